"""The arrays against plain integer sums and the reference kernels; their latency and throughput in ticks."""

import re

import ml_dtypes
import numpy as np
import pytest
from amaranth.back import rtlil
from amaranth.hdl import signed
from amaranth.sim import Simulator

from tests.lib.ticks import play
from tilewright.arch.formats import FP8_E4M3, FP16, FP32
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lut.array import LutArray, QuantisedLutArray, ScaleInteger
from tilewright.rtl.lut.baselines import AddArray, ConventionalLutArray, MacArray
from tilewright.rtl.lut.precompute import TablePrecompute, entry_format
from tilewright.workloads import lut_kernels as reference

INT8, INT16, INT32 = signed(8), signed(16), signed(32)
DTYPES = {
    INT8: np.int8,
    INT16: np.int16,
    INT32: np.int32,
    FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP16: np.float16,
    FP32: np.float32,
}
NAMES = {INT32: "int32", FP16: "fp16", FP32: "fp32"}

FP16_SPECIAL = np.array(
    # Zeros, smallest and largest subnormal, smallest normal, ones, largest, infinities, NaN.
    [
        0x0000,
        0x8000,
        0x0001,
        0x8001,
        0x03FF,
        0x83FF,
        0x0400,
        0x3C00,
        0xBC00,
        0x7BFF,
        0xFBFF,
        0x7C00,
        0xFC00,
        0x7E01,
    ],
    np.uint16,
).view(np.float16)


# ---- how an array is driven --------------------------------------------------------------------------------


def bits(values):
    """Encodings of an array as a flat list of integers."""
    values = np.ascontiguousarray(values)
    if values.dtype.kind != "i":
        values = values.view(f"u{values.dtype.itemsize}")
    return [int(v) for v in values.ravel()]


def pack(values, width):
    """Bit patterns, or integers that are to be cut to `width` bits, as one number, the first one lowest."""
    return sum((v & (1 << width) - 1) << i * width for i, v in enumerate(values))


def unpack(number, width, count):
    """The bit patterns in a port: the inverse of `pack`."""
    return [number >> i * width & (1 << width) - 1 for i in range(count)]


def run(array, tiles, gaps=None):
    """The results [tile][M*N] of tiles, each (psum, operands) with the operands of its ticks as dictionaries.

    The key "ahead" of operands holds what is to be driven some ticks before them, {ticks: inputs}. `gaps` [i]
    are the ticks to wait before the i-th operands (none). Where a port has no meaning it is driven with ones.
    The marks take and done are asserted to come when, and only when, the array's latency says.
    """
    schedule, take, done = {}, {}, []
    at = 3  # leaves time for what is ahead of the first operands
    waits = iter(gaps or [])
    for psum, operands in tiles:
        taken = False
        for i, inputs in enumerate(operands):
            at += next(waits, 0)
            inputs = dict(inputs)
            for ticks, early in inputs.pop("ahead", {}).items():
                schedule.setdefault(at - ticks, {}).update(early)
            marks = {"valid": 1, "first": i == 0, "last": i == len(operands) - 1}
            schedule.setdefault(at, {}).update(marks | inputs)
            # A quantised array begins its sum when the first block is complete.
            if not taken and inputs.get("close", 1):
                taken = True
                take[at + array.latency - 1] = {"psum": psum}
            at += 1
        done.append(at - 1 + array.latency)
    ports = {
        name: getattr(array, name)
        for name, member in array.signature.members.items()
        if member.flow.name == "In"
    }
    quiet = {name: (1 << len(port)) - 1 for name, port in ports.items()} | {"valid": 0}
    quiet |= {name: 0 for name in ("load", "swap") if name in ports}

    def drive(tick, before):
        return quiet | schedule.get(tick, {}) | take.get(tick, {})

    end = at + array.latency + 2
    seen = play(array, end, drive, ["take", "done", "result"])
    assert [t for t in range(end) if seen[t]["take"]] == sorted(take)
    assert [t for t in range(end) if seen[t]["done"]] == done
    return [seen[t]["result"] for t in done]


def plane_operands(words, k):
    """One dictionary for each group and plane of coded words [b, N, groups], groups outside."""
    planes, _, groups = words.shape
    return [
        {"plane": t, "words": pack(words[t, :, g].tolist(), k)} for g in range(groups) for t in range(planes)
    ]


def table_operands(tables, coded, width):
    """The same for a table array: tables [M, groups, entries] are loaded while others are in use."""
    operands = plane_operands(coded.words, coded.group)
    rows = (1 << tables.shape[0]) - 1
    for g in range(tables.shape[1]):
        packed = pack(bits(tables[:, g]), width)
        operands[g * coded.bits]["ahead"] = {2: {"load": rows, "tables": packed}, 1: {"swap": 1}}
    return operands


def activation_operands(a, coded):
    """The same for an array without tables: the activations [M, Ktot] of the group in each of its planes."""
    operands = plane_operands(coded.words, coded.group)
    width = a.dtype.itemsize * 8
    for i, inputs in enumerate(operands):
        first = i // coded.bits * coded.group
        inputs["activations"] = pack(bits(a[:, first : first + coded.group]), width)
    return operands


def results(array, accumulator, tiles, shape, gaps=None):
    """`run` with psum and results as arrays [M, N]."""
    width, dtype = accumulator.width, DTYPES[accumulator]
    packed = [(pack(bits(psum), width), operands) for psum, operands in tiles]
    values = []
    for number in run(array, packed, gaps):
        words = np.array(unpack(number, width, shape[0] * shape[1]), f"u{np.dtype(dtype).itemsize}")
        values.append(words.view(dtype).reshape(shape))
    return values


def same(got, expected):
    """Bit for bit, the signs of zeros and the one NaN included."""
    assert got.dtype == expected.dtype and bits(got) == bits(expected), (got, expected)


def codes(rng, n, channels, weight_bits):
    return rng.integers(1 << weight_bits, size=(n, channels), dtype=np.uint8)


def numbers(rng, shape, dtype):
    """Random numbers; of floats, with sums that cancel and round, and without overflow."""
    if np.dtype(dtype).kind == "i":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, size=shape).astype(dtype)
    return (rng.integers(-64, 65, size=shape) * 2.0 ** rng.integers(-9, 1, size=shape)).astype(dtype)


def random_gaps(rng, count):
    return rng.choice([0, 0, 1, 3], size=count).tolist()


# ---- precompute --------------------------------------------------------------------------------------------


def tables_of(k, activation, groups):
    """What the unit makes of groups [G, K], one a tick with a pause after each third, as [G, entries]."""
    unit = TablePrecompute(k=k, activation=activation)
    dtype = {FP16: np.float16}.get(unit.entry, np.int32)
    feed = {}
    for i in range(len(groups)):
        feed[i + i // 3] = {"valid": 1, "a": pack(bits(groups[i]), activation.width)}
    end = max(feed) + unit.latency + 2
    seen = play(unit, end, lambda t, _: feed.get(t, {"valid": 0}), ["table_valid", "table"])
    assert [t for t in range(end) if seen[t]["table_valid"]] == [t + unit.latency for t in feed]
    entries = 1 << k - 1
    tables = []
    for t in feed:
        words = unpack(seen[t + unit.latency]["table"], unit.entry.width, entries)
        if dtype is np.int32:
            half = 1 << unit.entry.width - 1
            tables.append(np.array([(w ^ half) - half for w in words], np.int32))
        else:
            tables.append(np.array(words, np.uint16).view(np.float16))
    return np.stack(tables)


def test_table_by_hand():
    # -1-2-3-4, +1-2-3-4, -1+2-3-4, +1+2-3-4, -1-2+3-4, +1-2+3-4, -1+2+3-4, +1+2+3-4
    assert tables_of(4, INT8, np.array([[1, 2, 3, 4]], np.int8)).tolist() == [[-10, -8, -6, -4, -4, -2, 0, 2]]
    # All signs equal: +512 needs eleven bits.
    assert tables_of(4, INT8, np.full((1, 4), -128, np.int8))[0, 0] == 512
    assert entry_format(INT8, 4) == signed(11)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("activation", [INT8, INT16], ids=["int8", "int16"])
def test_integer_tables(k, activation):
    rng = np.random.default_rng(k)
    groups = numbers(rng, (20, k), DTYPES[activation])
    info = np.iinfo(groups.dtype)
    groups[:2] = [[info.min], [info.max]]
    same(tables_of(k, activation, groups), reference.symmetric_tables(groups, k)[:, 0])


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("activation", [FP16, FP8_E4M3], ids=["fp16", "fp8"])
def test_float_tables(k, activation):
    rng = np.random.default_rng(k)
    groups = numbers(rng, (20, k), np.float32)
    groups[10:] = np.abs(groups[10:, :1]) * rng.choice(
        [-1, 1], size=(10, k)
    )  # zeros of both signs, in the middle too
    groups = groups.astype(DTYPES[activation])
    if activation is FP16:
        groups = np.concatenate([groups, rng.choice(FP16_SPECIAL, size=(60, k))])
    else:
        any_bits = rng.integers(256, size=(20, k), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        groups = np.concatenate([groups, any_bits])
    same(tables_of(k, activation, groups), reference.symmetric_tables(groups, k)[:, 0])


def test_sums_are_shared():
    text = rtlil.convert(TablePrecompute(k=4, activation=INT8), emit_src=False)
    assert len(re.findall(r"cell \$(?:add|sub)\b", text)) == 12
    # 2 + 4 + 8: without the sharing of opposite sums it would be 4 + 8 + 8.
    verilog = to_verilog(TablePrecompute(k=4, activation=FP16))
    assert len(re.findall(r"^  FpAdd_\d+ ", verilog, re.MULTILINE)) == 14


# ---- the table array ---------------------------------------------------------------------------------------


def lut_tiles(a, q, psum, weight_bits, k, accumulator, width):
    """A tile's psum and operands, and its result by the reference kernel."""
    coded = reference.encode(q, weight_bits, k)
    tables = reference.symmetric_tables(a, k)
    expected = reference.lut_gemm(a, coded, psum, accumulator=NAMES[accumulator])
    return (psum, table_operands(tables, coded, width)), expected


def test_result_by_hand():
    # q = 0, 3, 2, 1 of two bits are q' = -3, 3, 1, -1: 100 - 3*1 + 3*2 + 1*3 - 1*4 = 102
    a, q = np.array([[1, 2, 3, 4]], np.int8), np.array([[0, 3, 2, 1]], np.uint8)
    psum = np.array([[100]], np.int32)
    tile, _ = lut_tiles(a, q, psum, 2, 4, INT32, 11)
    array = LutArray(m=1, n=1, k=4, weight_bits=2, entry=signed(11), accumulator=INT32)
    assert array.latency == 2
    assert results(array, INT32, [tile], (1, 1))[0].tolist() == [[102]]


@pytest.mark.parametrize("gapped", [False, True], ids=["back_to_back", "gaps"])
@pytest.mark.parametrize(
    "m, n, k, weight_bits", [(1, 1, 2, 1), (2, 3, 4, 1), (2, 4, 4, 2), (1, 2, 3, 3), (2, 2, 4, 4)]
)
def test_integers_are_exact(m, n, k, weight_bits, gapped):
    rng = np.random.default_rng(weight_bits)
    entry = entry_format(INT8, k)
    array = LutArray(m=m, n=n, k=k, weight_bits=weight_bits, entry=entry, accumulator=INT32)
    tiles, expected = [], []
    for groups in (1, 3, 1, 1, 2):
        a = numbers(rng, (m, groups * k), np.int8)
        q = codes(rng, n, groups * k, weight_bits)
        if groups == 2:  # the largest sums: all signs equal, once positive and once negative
            a[:] = -128
            q[:] = 0
            q[-1] = (1 << weight_bits) - 1
        psum = numbers(rng, (m, n), np.int32)  # also wraps
        tile, by_kernel = lut_tiles(a, q, psum, weight_bits, k, INT32, entry.width)
        tiles.append(tile)
        whole = (
            psum.astype(np.int64) + a.astype(np.int64) @ (2 * q.astype(np.int64) - (1 << weight_bits) + 1).T
        )
        expected.append(whole.astype(np.int32))
        same(by_kernel, expected[-1])
    gaps = random_gaps(rng, sum(len(t[1]) for t in tiles)) if gapped else None
    for got, right in zip(results(array, INT32, tiles, (m, n), gaps), expected, strict=True):
        same(got, right)


def test_fewer_planes_than_the_array_has():
    rng = np.random.default_rng(0)
    array = LutArray(m=1, n=2, k=4, weight_bits=4, entry=signed(11), accumulator=INT32)
    tiles, expected = [], []
    for weight_bits in (1, 4, 2):
        a, q = numbers(rng, (1, 4), np.int8), codes(rng, 2, 4, weight_bits)
        tile, right = lut_tiles(a, q, np.zeros((1, 2), np.int32), weight_bits, 4, INT32, 11)
        tiles.append(tile)
        expected.append(right)
    for got, right in zip(results(array, INT32, tiles, (1, 2)), expected, strict=True):
        same(got, right)


def test_rows_are_loaded_apart():
    array = LutArray(m=2, n=1, k=2, weight_bits=1, entry=signed(10), accumulator=INT32)
    load = {
        3: {"load": 0b10, "tables": pack([-1, -2, 30, 40], 10)},
        2: {"load": 0b01, "tables": pack([10, 20, -3, -4], 10)},
        1: {"swap": 1, "tables": pack([-5, -6, -7, -8], 10)},
    }
    operands = [{"plane": 0, "words": 1, "ahead": load}]
    got = results(array, INT32, [(np.zeros((2, 1), np.int32), operands)], (2, 1))
    assert got[0].tolist() == [[20], [40]]


@pytest.mark.parametrize("accumulator", [FP16, FP32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("m, n, k, weight_bits", [(1, 1, 2, 1), (2, 2, 4, 2), (1, 2, 3, 4)])
def test_floats_round_once_a_plane(m, n, k, weight_bits, accumulator):
    rng = np.random.default_rng(weight_bits)
    array = LutArray(m=m, n=n, k=k, weight_bits=weight_bits, entry=FP16, accumulator=accumulator)
    tiles, expected = [], []
    for groups in (1, 4, 2):
        a, q = numbers(rng, (m, groups * k), np.float16), codes(rng, n, groups * k, weight_bits)
        psum = numbers(rng, (m, n), DTYPES[accumulator])
        tile, right = lut_tiles(a, q, psum, weight_bits, k, accumulator, 16)
        tiles.append(tile)
        expected.append(right)
    gaps = random_gaps(rng, sum(len(t[1]) for t in tiles)) if k == 3 else None
    for got, right in zip(results(array, accumulator, tiles, (m, n), gaps), expected, strict=True):
        same(got, right)


def one_entry(accumulator, entries, planes, psum=0.0):
    """psum + entry * 2**plane for one column, as encodings: each entry in each plane, a tile apiece."""
    array = LutArray(m=1, n=1, k=2, weight_bits=4, entry=FP16, accumulator=accumulator)
    start = np.array([[psum]], DTYPES[accumulator])
    tiles = []
    for entry in entries:
        for plane in planes:
            load = {2: {"load": 1, "tables": pack([entry, entry], 16)}, 1: {"swap": 1}}
            tiles.append((start, [{"plane": plane, "words": 0, "ahead": load}]))
    got = results(array, accumulator, tiles, (1, 1))
    return np.array([bits(g)[0] for g in got]).reshape(len(entries), len(planes))


def test_weight_of_a_plane_by_hand():
    planes = (0, 1, 2, 3)
    # -0 as the partial sum shows the sign of a zero. Zero stays zero; the least subnormal is doubled exactly;
    # 0x3ff * 2**-24 becomes a normal number; 0x7bff = 65504 overflows; infinity stays.
    got = one_entry(FP16, [0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xF000, 0xFC00, 0x7D01], planes, -0.0)
    assert got.tolist() == [
        [0x0000] * 4,
        [0x8000] * 4,
        [0x0001, 0x0002, 0x0004, 0x0008],
        [0x03FF, 0x07FE, 0x0BFE, 0x0FFE],
        [0x7BFF, 0x7C00, 0x7C00, 0x7C00],
        [0xF000, 0xF400, 0xF800, 0xFC00],  # -8192 * 8 = -65536
        [0xFC00] * 4,
        [0x7E00] * 4,  # the canonical NaN
    ]
    # FP32 holds them all: 65504 * 8 = 0x7ff * 2**8.
    got = one_entry(FP32, [0x0000, 0x0001, 0x7BFF, 0x7D01], (0, 3), -0.0)
    assert got.tolist() == [[0, 0], [0x33800000, 0x35000000], [0x477FE000, 0x48FFE000], [0x7FC00000] * 2]


@pytest.mark.parametrize("accumulator", [FP16, FP32], ids=["fp16", "fp32"])
def test_every_entry_and_plane_against_numpy(accumulator):
    entries = np.concatenate([bits(FP16_SPECIAL), np.random.default_rng(1).integers(1 << 16, size=60)])
    got = one_entry(accumulator, entries.tolist(), range(4))
    dtype = DTYPES[accumulator]
    with np.errstate(all="ignore"):
        values = entries.astype(np.uint16).view(np.float16).astype(dtype)[:, None] * dtype(2) ** np.arange(
            4, dtype=dtype
        )
        expected = np.where(np.isnan(values), dtype(np.nan), values + dtype(0))
    assert got.ravel().tolist() == bits(expected)


def test_infinities_and_nans_propagate():
    a = np.array([[np.inf, 1, 1, 1], [np.nan, 1, 1, 1]], np.float16)
    q = np.array([[0, 3, 2, 1], [3, 0, 0, 0], [1, 0, 0, 0]], np.uint8)
    psum = np.array([[1, -np.inf, 0], [0, 0, 0]], np.float16)
    tile, expected = lut_tiles(a, q, psum, 2, 4, FP16, 16)
    # Row 0: q' = -3 gives -inf; +inf meets -inf; the planes of q' = -1 are +1 and -2.
    assert [hex(x) for x in bits(expected)] == ["0xfc00"] + ["0x7e00"] * 5
    array = LutArray(m=2, n=3, k=4, weight_bits=2, entry=FP16, accumulator=FP16)
    same(results(array, FP16, [tile], (2, 3))[0], expected)


def test_misuse_is_caught():
    array = LutArray(m=1, n=1, k=2, weight_bits=2, entry=signed(10), accumulator=INT32)
    for wrong, message in [
        ({"valid": 1, "first": 0}, "first must mark"),
        ({"valid": 1, "first": 1, "plane": 2}, "no such plane"),
    ]:
        with pytest.raises(AssertionError, match=message):
            play(array, 3, lambda t, _, wrong=wrong: wrong, ["done"])
    array = QuantisedLutArray(m=1, n=1, k=2, weight_bits=2, block=1)
    with pytest.raises(AssertionError, match="end with a block"):
        play(array, 3, lambda t, _: {"valid": 1, "first": 1, "last": 1, "close": 0}, ["done"])


# ---- quantised tables --------------------------------------------------------------------------------------


def quantised_tile(a, q, psum, weight_bits, k, block):
    coded = reference.encode(q, weight_bits, k)
    tables, scales = reference.quantise_tables(reference.symmetric_tables(a, k), block)
    operands = table_operands(tables, coded, 8)
    for i, inputs in enumerate(operands):
        group, plane = divmod(i, weight_bits)
        inputs["close"] = int(
            plane == weight_bits - 1 and (group % block == block - 1 or i == len(operands) - 1)
        )
        if inputs["close"]:
            inputs["scales"] = pack(bits(scales[:, group // block]), 32)
    return (psum, operands), reference.lookup_quantised(tables, scales, coded, psum, block)


def test_quantised_by_hand():
    # T = -3, +1 with scale 0.5 and q = 0 (W = 0,0 in both planes: T[0] * 3): 1 + (-3 * 3) * 0.5 = -3.5
    load = {2: {"load": 1, "tables": pack([-3, 1], 8)}, 1: {"swap": 1}}
    operands = [
        {"plane": 0, "words": 0, "close": 0, "ahead": load},
        {"plane": 1, "words": 0, "close": 1, "scales": 0x3F000000},
    ]
    array = QuantisedLutArray(m=1, n=1, k=2, weight_bits=2, block=1)
    assert array.latency == 5
    got = results(array, FP32, [(np.ones((1, 1), np.float32), operands)], (1, 1))
    assert got[0].tolist() == [[-3.5]]


@pytest.mark.parametrize("gapped", [False, True], ids=["back_to_back", "gaps"])
@pytest.mark.parametrize("m, n, k, weight_bits, block", [(2, 2, 4, 1, 1), (1, 2, 4, 2, 1), (2, 1, 3, 3, 2)])
def test_quantised_tables(m, n, k, weight_bits, block, gapped):
    rng = np.random.default_rng(block)
    array = QuantisedLutArray(m=m, n=n, k=k, weight_bits=weight_bits, block=block)
    tiles, expected = [], []
    for groups in (3, 1, 1, 4):
        a = rng.normal(size=(m, groups * k)).astype(np.float16)
        q = codes(rng, n, groups * k, weight_bits)
        if groups == 4:
            a[0, :k] = 0  # in a block of its own it has the scale 0
        tile, right = quantised_tile(a, q, numbers(rng, (m, n), np.float32), weight_bits, k, block)
        tiles.append(tile)
        expected.append(right)
    gaps = random_gaps(rng, sum(len(t[1]) for t in tiles)) if gapped else None
    for got, right in zip(results(array, FP32, tiles, (m, n), gaps), expected, strict=True):
        same(got, right)


def test_quantised_extremes():
    # The largest sum of a block: 3 * 127 in 3 groups; then infinite and NaN scales, of entries that are 0.
    rng = np.random.default_rng(0)
    array = QuantisedLutArray(m=1, n=2, k=2, weight_bits=2, block=3)
    q = np.array([[0] * 6, [3] * 6], np.uint8)
    tiles, expected = [], []
    for a in ([1, 0, 1, 0, 1, 0], [np.inf, 1, 1, 1, 1, 1], [np.nan, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]):
        psum = numbers(rng, (1, 2), np.float32)
        tile, right = quantised_tile(np.array([a], np.float16), q, psum, 2, 2, 3)
        tiles.append(tile)
        expected.append(right)
    for got, right in zip(results(array, FP32, tiles, (1, 2)), expected, strict=True):
        same(got, right)


def test_scaled_integers():
    rng = np.random.default_rng(0)
    scales = [
        0,
        0x80000000,
        1,
        0x007FFFFF,
        0x00800000,
        0x3F800001,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7FA00000,
    ]
    scales = np.array(scales + rng.integers(1 << 32, size=40).tolist(), np.uint32).view(np.float32)
    integers = np.concatenate([[0, 1, -1, 3, 8191, -8191], rng.integers(-8191, 8192, size=6)])
    unit = ScaleInteger(width=13, format=FP32)
    seen = []

    async def bench(ctx):
        for a in integers.tolist():
            for scale in bits(scales):
                ctx.set(unit.sign, a < 0)
                ctx.set(unit.magnitude, abs(a))
                ctx.set(unit.scale, scale)
                await ctx.delay(1e-6)
                seen.append(ctx.get(unit.o))

    simulator = Simulator(unit)
    simulator.add_testbench(bench)
    simulator.run()
    with np.errstate(all="ignore"):
        product = integers[:, None].astype(np.float32) * scales
    assert seen == bits(np.where(np.isnan(product), np.float32(np.nan), product))


# ---- baselines ---------------------------------------------------------------------------------------------


def mac_tile(a, w, psum, k, accumulator):
    width = a.dtype.itemsize * 8
    operands = [
        {"activations": pack(bits(a[:, i : i + k]), width), "weights": pack(bits(w[:, i : i + k]), width)}
        for i in range(0, a.shape[1], k)
    ]
    return (psum, operands), reference.mac_gemm(a, w, psum, accumulator=NAMES[accumulator], lanes=k)


@pytest.mark.parametrize("gapped", [False, True], ids=["back_to_back", "gaps"])
@pytest.mark.parametrize(
    "m, n, k, operand, accumulator",
    [(2, 2, 4, INT8, INT32), (1, 2, 4, FP16, FP16), (2, 1, 2, FP16, FP32), (1, 1, 4, FP8_E4M3, FP32)],
    ids=["int8", "fp16", "fp16_fp32", "fp8_fp32"],
)
def test_mac_array(m, n, k, operand, accumulator, gapped):
    rng = np.random.default_rng(k)
    array = MacArray(m=m, n=n, k=k, activation=operand, weight=operand, accumulator=accumulator)
    assert array.latency == (2 if operand is INT8 else 2 + {2: 1, 4: 2}[k])
    tiles, expected = [], []
    for groups in (1, 4, 1):
        a, w = numbers(rng, (m, groups * k), np.float32), numbers(rng, (n, groups * k), np.float32)
        if operand is INT8:
            a, w = numbers(rng, a.shape, np.int8), numbers(rng, w.shape, np.int8)
            a[0, 0] = w[0, 0] = -128
        a, w = a.astype(DTYPES[operand]), w.astype(DTYPES[operand])
        tile, right = mac_tile(a, w, numbers(rng, (m, n), DTYPES[accumulator]), k, accumulator)
        tiles.append(tile)
        expected.append(right)
    gaps = random_gaps(rng, sum(len(t[1]) for t in tiles)) if gapped else None
    for got, right in zip(results(array, accumulator, tiles, (m, n), gaps), expected, strict=True):
        same(got, right)


BIT_SERIAL = [(AddArray, reference.add_gemm), (ConventionalLutArray, reference.conventional_gemm)]


@pytest.mark.parametrize("kind, kernel", BIT_SERIAL, ids=["add", "conventional"])
@pytest.mark.parametrize("gapped", [False, True], ids=["back_to_back", "gaps"])
@pytest.mark.parametrize(
    "m, n, k, weight_bits, activation, accumulator",
    [
        (2, 2, 4, 2, INT8, INT32),
        (1, 1, 3, 1, INT8, INT32),
        (1, 2, 4, 2, FP16, FP16),
        (2, 1, 3, 3, FP16, FP32),
        (1, 1, 2, 1, FP8_E4M3, FP32),
    ],
    ids=["int8", "int8_b1", "fp16", "fp16_fp32", "fp8_fp32"],
)
def test_bit_serial_arrays(kind, kernel, m, n, k, weight_bits, activation, accumulator, gapped):
    rng = np.random.default_rng(k)
    array = kind(m=m, n=n, k=k, weight_bits=weight_bits, activation=activation, accumulator=accumulator)
    integer = 2 if kind is AddArray else 3
    assert array.latency == (integer if activation is INT8 else k + 1)
    tiles, expected = [], []
    for groups in (1, 3, 1):
        a = numbers(rng, (m, groups * k), np.int8 if activation is INT8 else np.float32).astype(
            DTYPES[activation]
        )
        if activation is FP16 and groups == 3:
            a[:, -k:] = rng.choice(FP16_SPECIAL[:9], size=(m, k))  # zeros of both signs, subnormals
        a[0, 0] = -128
        q = codes(rng, n, groups * k, weight_bits)
        psum = numbers(rng, (m, n), DTYPES[accumulator])
        coded = reference.group_words(q, weight_bits, k)
        tiles.append((psum, activation_operands(a, coded)))
        expected.append(kernel(a, coded, psum, accumulator=NAMES[accumulator]))
        if activation is INT8:
            whole = psum.astype(np.int64) + a.astype(np.int64) @ q.T.astype(np.int64)
            same(expected[-1], whole.astype(np.int32))
    gaps = random_gaps(rng, sum(len(t[1]) for t in tiles)) if gapped else None
    for got, right in zip(results(array, accumulator, tiles, (m, n), gaps), expected, strict=True):
        same(got, right)


@pytest.mark.parametrize("kind, kernel", BIT_SERIAL, ids=["add", "conventional"])
def test_what_is_not_selected_adds_plus_zero(kind, kernel):
    # Only the sum of all elements, each -0, is -0, and leaves a partial sum of -0 as it is.
    array = kind(m=1, n=4, k=2, weight_bits=1, activation=FP16, accumulator=FP16)
    a, psum = np.full((1, 2), -0.0, np.float16), np.full((1, 4), -0.0, np.float16)
    coded = reference.group_words(np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.uint8), 1, 2)
    got = results(array, FP16, [(psum, activation_operands(a, coded))], (1, 4))[0]
    assert [hex(x) for x in bits(got)] == ["0x0", "0x0", "0x0", "0x8000"]
    same(got, kernel(a, coded, psum, accumulator="fp16"))


# ---- Verilog -----------------------------------------------------------------------------------------------


def test_units_share_their_modules():
    verilog = to_verilog(LutArray(m=2, n=64, k=4, weight_bits=2, entry=signed(11), accumulator=INT32))
    modules = re.findall(r"^module (\w+)", verilog, re.MULTILINE)
    assert sorted(re.sub(r"_\d+$", "", name) for name in modules) == [
        "Accumulate",
        "LutUnit",
        "PlaneWeight",
        "top",
    ]
    assert len(re.findall(r"^  LutUnit_\d+ ", verilog, re.MULTILINE)) == 128
