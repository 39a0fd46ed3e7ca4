import json
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.workloads import lut_kernels
from tilewright.workloads.lut_weights import (
    SCHEMES,
    TensorFile,
    dequantise,
    encode_groups,
    quantise,
    quantise_rows,
)

# --- quantisation by hand ----------------------------------------------------------------------------------------


def test_asymmetric():
    # lo = -1, hi = 2: s = 3/3, z = 1; -0.5 is a tie -> 0, 0.5 -> 0, 1.5 -> 2.
    got = quantise(np.float32([[-1, -0.5, 0.5, 1.5, 2]]), "W2")
    assert (got.scale.tolist(), got.zero.tolist()) == ([[1.0]], [[1.0]])
    assert got.codes.tolist() == [[0, 1, 1, 3, 3]]
    # Only positive: lo is 0, so z = 0. s = 30/15.
    got = quantise(np.float32([[30, 3, 5, 4]]), "W4")
    assert (got.scale.tolist(), got.zero.tolist()) == ([[2.0]], [[0.0]])
    assert got.codes.tolist() == [[15, 2, 2, 2]]  # 3/2 and 5/2 are ties, both to 2
    # Only negative: hi is 0, z = 7. s = 7/7.
    got = quantise(np.float32([[-7, -1]]), "W3")
    assert (got.zero.tolist(), got.codes.tolist()) == ([[7.0]], [[0, 6]])


def test_codes_are_clipped():
    # s = 3/3, z = round(1.5) = 2 (even): 1.5 -> round(1.5) + 2 = 4, clipped to 3.
    got = quantise(np.float32([[-1.5, 1.5]]), "W2")
    assert (got.zero.tolist(), got.codes.tolist()) == ([[2.0]], [[0, 3]])


def test_sign():
    # mean |w| = 2: the values become +-2 = 4 (q - 1/2); zero counts as positive.
    got = quantise(np.float32([[-3, 3, 0, 2]]), "W1")
    assert (got.scale.tolist(), got.zero.tolist(), got.bits) == ([[4.0]], [[0.5]], 1)
    assert got.codes.tolist() == [[0, 1, 1, 1]]
    assert dequantise(got).tolist() == [[-2, 2, 2, 2]]


def test_ternary():
    # mean |w| = 2: w/s = 2.5, -0.5 (tie -> 0), 0.75, -0.25.
    got = quantise(np.float32([[5, -1, 1.5, -0.5]]), "ternary")
    assert (got.scale.tolist(), got.zero.tolist(), got.bits) == ([[2.0]], [[1.0]], 2)
    assert got.codes.tolist() == [[2, 1, 2, 1]]
    assert dequantise(got).tolist() == [[2, 0, 2, 0]]


def test_groups_have_their_own_scale_and_the_last_may_be_short():
    got = quantise(np.float32([[3, 0, 6, 0, 9], [0, 0, -3, 0, 1]]), "W2", 2)
    assert got.scale.tolist() == [[1, 2, 3], [0, 1, np.float32(1) / 3]]
    assert got.zero.tolist() == [[0, 0, 0], [0, 3, 0]]
    assert got.codes.tolist() == [[3, 0, 3, 0, 3], [0, 0, 0, 3, 3]]
    assert got.spans == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_rows():
    # Row 1: scale 254/127 = 2, so 3 -> 1.5 -> 2 and 5 -> 2.5 -> 2. Row 2: nothing to divide by.
    codes, scale = quantise_rows(np.float32([[-254, 3, 5], [0, 0, 0]]))
    assert scale.tolist() == [2.0, 0.0]
    assert codes.tolist() == [[-127, 2, 2], [0, 0, 0]]


def test_numbers_near_the_ends_of_the_range():
    # 2**-149 / 127 is 0 in FP32: the codes are 0, not infinite.
    codes, scale = quantise_rows(np.float32([[2.0**-149]]))
    assert (codes.tolist(), scale.tolist()) == ([[0]], [0.0])
    # 200 * 2**-149 / 127 rounds to 2 * 2**-149, and 200/2 = 100.
    codes, scale = quantise_rows(np.float32([[200 * 2.0**-149]]))
    assert (codes.tolist(), scale.tolist()) == ([[100]], [2 * 2.0**-149])
    huge = np.float32([[-3e38, 3e38]])
    assert dequantise(quantise(huge, "ternary")).tolist() == huge.tolist()
    for scheme in ("W1", "W4"):
        with pytest.raises(UserError, match=r"^weights span more than FP32 holds"):
            quantise(huge, scheme)


# --- quantisation, properties ------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_error_is_at_most_half_a_step(scheme, group, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((3, 9)).astype(np.float32)
    got = quantise(w, scheme, group)
    assert got.codes.max() < 1 << got.bits and got.scale.shape == got.zero.shape == (3, -(-9 // group))
    real = dequantise(got)
    columns = np.arange(9) // group
    step = got.scale[:, columns]
    error = np.abs(real.astype(np.float64) - w)
    if scheme in ("W2", "W3", "W4"):
        # The zero point is rounded too, so at the ends a code may be clipped: one step in all.
        assert (error <= step * 1.0001).all()
        inner = (got.codes > 0) & (got.codes < (1 << got.bits) - 1)
        assert (error[inner] <= step[inner] * 0.5001).all()
    elif scheme == "ternary":
        assert (error[np.abs(w) < step] <= step[np.abs(w) < step] * 0.5001).all()
        assert (np.sign(real) * np.sign(w) >= 0).all()
    else:
        assert (np.sign(real) == np.where(w >= 0, 1, -1)).all()
        for i, span in enumerate(got.spans):
            mean = sum(Fraction(float(abs(x))) for x in w[0, span]) / (span.stop - span.start)
            assert abs(float(got.scale[0, i]) / 2 - float(mean)) <= 1e-7 * float(mean)


@given(st.sampled_from(["W2", "W3", "W4"]), st.integers(0, 2**32 - 1))
def test_values_on_the_grid_come_back(scheme, seed):
    rng = np.random.default_rng(seed)
    top = (1 << SCHEMES[scheme][0]) - 1
    zero = int(rng.integers(0, top + 1))
    codes = rng.integers(0, top + 1, (2, 6))
    codes[:, 0], codes[:, 1] = 0, top
    w = np.float32(0.25) * (codes - zero)
    got = quantise(w, scheme)
    assert got.codes.tolist() == codes.tolist() and (got.zero == zero).all() and (got.scale == 0.25).all()


@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 11), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_a_lut_layer_computes_with_the_dequantised_weights(scheme, group, k, seed):
    rng = np.random.default_rng(seed)
    weights = quantise(rng.standard_normal((5, 11)), scheme, group)
    a, row_scale = quantise_rows(rng.standard_normal((3, 11)))
    got = lut_kernels.lut_linear(
        a, encode_groups(weights, k), weights.scale, weights.zero, row_scale=row_scale
    )
    exact = (a * row_scale[:, None].astype(np.float64)) @ dequantise(weights).astype(np.float64).T
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_other_float_types_are_widened():
    w = np.array([[-1, 0.5, 2]])
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        assert quantise(w.astype(dtype), "W2").codes.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: quantise(np.ones((1, 1)), "W5"),
            r"^weight scheme 'W5' is unknown; allowed: W1, W2, W3, W4, ternary$",
        ),
        (lambda: quantise(np.ones((1, 1)), "W4", 0), "^weight group must be at least 1 channel, not 0$"),
        (lambda: quantise(np.ones(3), "W4"), r"must be a matrix that is not empty, not of shape \[3\]$"),
        (lambda: quantise(np.ones((3, 0)), "W4"), r"not of shape \[3, 0\]$"),
        (lambda: quantise(np.ones((1, 1), int), "W4"), "^weights must be floats, not int64$"),
        (
            lambda: quantise(np.array([[0.0, 1.0], [np.nan, 0.0]]), "W4"),
            r"^weights must be finite FP32 numbers: \[1, 0\] is nan$",
        ),
        (lambda: quantise_rows(np.array([[1e40]])), r"^activations must be finite .*: \[0, 0\] is 1e\+40$"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


# --- files -------------------------------------------------------------------------------------------------------


def safetensors(tensors, data=b""):
    """The bytes of a file after the format's description: length, JSON header, data."""
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(kind, shape, begin, end):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_by_hand(tmp_path):
    path = tmp_path / "model.safetensors"
    # 1.0 and 2.0 in bfloat16 are 3F80 and 4000, in FP16 3C00 and 4000; little-endian.
    data = bytes.fromhex("803f0040") + bytes.fromhex("003c0040") + bytes([255, 1]) + bytes([255, 1])
    layout = {"b": ("BF16", 0, 4), "h": ("F16", 4, 8), "i": ("I8", 8, 10), "u": ("U8", 10, 12)}
    tensors = {name: entry(kind, [1, 2], a, b) for name, (kind, a, b) in layout.items()}
    path.write_bytes(safetensors({"__metadata__": {"format": "pt"}} | tensors, data))
    file = TensorFile(path)
    assert file.names == ["b", "h", "i", "u"]
    assert file.read("b").dtype == ml_dtypes.bfloat16 and file.read("b").tolist() == [[1, 2]]
    assert file.read("h").dtype == np.float16 and file.read("h").tolist() == [[1, 2]]
    assert (file.read("i").tolist(), file.read("u").tolist()) == ([[-1, 1]], [[255, 1]])


@pytest.mark.parametrize(
    "kind, dtype", [("F64", "<f8"), ("F32", "<f4"), ("I64", "<i8"), ("I32", "<i4"), ("BOOL", "?")]
)
def test_safetensors_types(tmp_path, kind, dtype):
    values = np.array([[0, 1, 1]], dtype)
    path = tmp_path / "one.safetensors"
    path.write_bytes(safetensors({"x": entry(kind, [1, 3], 0, values.nbytes)}, values.tobytes()))
    got = TensorFile(path).read()
    assert got.dtype == values.dtype and got.tolist() == values.tolist()


def test_npy(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))
    file = TensorFile(path)
    assert file.names == ["w"]
    assert isinstance(file.read(), np.memmap)
    assert file.read("any name").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("w.bin", b"", r"w\.bin: the file must end in \.npy or \.safetensors$"),
        ("w.npy", None, r"w\.npy: No such file or directory$"),
        ("w.npy", b"PK\3\4", r"w\.npy: not a \.npy file: it begins with b'PK\\x03\\x04'$"),
        ("w.npy", b"\x93NUMPY\1\0", r"w\.npy: .*"),
        ("w.safetensors", None, r"w\.safetensors: No such file or directory$"),
        ("w.safetensors", b"abc", r"w\.safetensors: .*header too small$"),
        ("w.safetensors", b"\xff" * 9, r"w\.safetensors: .*header too large$"),
        ("w.safetensors", safetensors({"x": entry("F32", [2], 0, 8)}, bytes(4)), r"w\.safetensors: .+"),
        ("w.safetensors", safetensors({"x": entry("F32", [3], 0, 8)}, bytes(8)), r"w\.safetensors: .+"),
        ("w.safetensors", safetensors({"x": entry("F33", [2], 0, 8)}, bytes(8)), r"w\.safetensors: .+"),
        ("w.safetensors", struct.pack("<Q", 3) + b"{,}", r"w\.safetensors: .+"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)


def test_an_npy_of_objects_or_text_is_refused(tmp_path):
    for name, array in (("o.npy", np.array([None])), ("s.npy", np.array(["x"]))):
        np.save(tmp_path / name, array)
        with pytest.raises(UserError, match=rf"{name}: .*(objects|numbers)"):
            TensorFile(tmp_path / name)


def test_unknown_tensors_and_types(tmp_path):
    path = tmp_path / "two.safetensors"
    tensors = {"weight": entry("F32", [1], 0, 4), "odd": entry("F8_E4M3", [4], 4, 8)}
    path.write_bytes(safetensors(tensors, bytes(8)))
    file = TensorFile(path)
    with pytest.raises(UserError, match=r"has no tensor 'wieght'; did you mean weight\?$"):
        file.read("wieght")
    with pytest.raises(UserError, match=r"has 2 tensors: name one, such as odd$"):
        file.read()
    with pytest.raises(UserError, match=r"tensor 'odd' is of type F8_E4M3; allowed: BF16, BOOL, .*U8$"):
        file.read("odd")
