"""Fourier convolutions by Monarch decomposition: against NumPy's transform, and sections against the reference."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.mappers.rdu import monarch as mapper
from tilewright.sim.rdu import execute
from tilewright.workloads import monarch
from tilewright.workloads.rdu import blank_image, interpret

# 8 lanes: signals of 512 points; 8 columns, of which a lane's single point leaves 7 idle.
SMALL = (
    *("pcu.lanes=8", "pcu.stages=8", "grid.columns=24", "grid.rows=24", "grid.dies=1", "agcu.per_side=20"),
    *("pmu.bytes=16384", "pmu.banks=16", "memory.hbm.channels=64", "memory.ddr.channels=16"),
    *("node.p2p_channels=16", "node.copy_lines=8"),
)


@cache
def machine(*sets):
    tree = specs.apply_sets(specs.load_tree("sn40l", ["rdu"]), list(sets))
    return specs.build(rdu.RduSpec, tree, "sn40l")


def signals(points, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(points) / np.sqrt(points)
    return rng.standard_normal(points) + 1j * rng.standard_normal(points), kernel


def far(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# ---- reference ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([(2, 5), (4, 3), (8, 3), (16, 2)]), st.integers(0, 99))
def test_convolution_is_numpys_to_the_rounding_of_bfloat16(size, seed):
    radix, order = size
    x, h = signals(radix**order, seed)
    y = monarch.convolve(x, monarch.spectrum(h, radix)).complex()
    wanted = np.fft.ifft(np.fft.fft(x) * np.fft.fft(h))
    # Each of 2 * order roundings, and as many matrices, is off by 2**-9 at most: of random sign, they add as squares.
    assert far(y, wanted) < 2**-9 * np.sqrt(4 * order)


def test_a_unit_pulse_comes_back_and_a_shifted_one_shifts():
    x, _ = signals(64, 1)
    for shift in (0, 1, 13):
        h = np.zeros(64)
        h[shift] = 1
        assert far(monarch.convolve(x, monarch.spectrum(h, 4)).complex(), np.roll(x, shift)) < 0.01


def test_forward_stages_alone_are_a_transform():
    x, _ = signals(64, 2)
    z = monarch.Pair.of(x.reshape(4, 4, 4))
    for stage in (1, 2, 3):
        z = monarch.transform(z, stage - 1, monarch.matrix(4))
        if stage < 3:
            z = monarch.multiply(z, monarch.twiddles(4, 3, stage))
    # Axis s holds k_s, the lowest digit of frequency first.
    assert far(z.complex().transpose(2, 1, 0).reshape(-1), np.fft.fft(x)) < 0.01


def test_matrix_and_twiddles_by_hand():
    f = monarch.matrix(4)
    # exp(-2 pi i k n / 4): powers of -i.
    assert np.allclose(f.complex(), [[(-1j) ** (k * n) for n in range(4)] for k in range(4)], atol=1e-7)
    assert np.allclose(monarch.matrix(4, inverse=True).complex() @ f.complex(), np.eye(4), atol=1e-7)
    # Stage 1 of 4 x 4 points: exp(-2 pi i k i2 / 16), at k = 2, i2 = 2 a quarter turn.
    assert monarch.twiddles(4, 2, 1).complex()[2, 2] == pytest.approx(-1j, abs=1e-7)


def test_sizes_are_checked():
    assert monarch.order_of(4096, 16) == 3
    for points in (0, 24, 1):
        with pytest.raises(ValueError, match=f"power of radix 4, not {points}"):
            monarch.order_of(points, 4)
    with pytest.raises(ValueError, match=r"stage must be in 1\.\.2"):
        monarch.twiddles(4, 3, 3)


# ---- sections -----------------------------------------------------------------------------------------


@cache
def mapped(make, order):
    p = machine(*SMALL).params()
    x, h = signals(p.lanes**order, 0)
    spectrum = monarch.spectrum(h, p.lanes)
    found = make(p, spectrum)
    return found, tuple(k.build() for k in found.kernels), x, h, spectrum


def interpreted(make, order):
    spec = machine(*SMALL)
    found, built, x, _, _ = mapped(make, order)
    image = blank_image(spec.params())
    memory = found.memory(x)
    image["hbm"][: len(memory)] = memory
    image["scratch"] = mapper.scratch(spec.params(), built, found.kernels)
    image, _ = interpret(spec, found.program(built), image)
    return found.result(image["hbm"])


def test_one_kernel_computes_the_reference_bit_for_bit():
    _, _, x, _, spectrum = mapped(mapper.fft_convolution, 3)
    y, wanted = interpreted(mapper.fft_convolution, 3), monarch.convolve(x, spectrum)
    assert np.array_equal(y.re, wanted.re) and np.array_equal(y.im, wanted.im)


def test_a_kernel_for_each_operator_computes_a_convolution():
    found, _, x, h, _ = mapped(mapper.unfused_convolution, 3)
    # Six transforms, and five products between and behind them.
    assert len(found.kernels) == 11
    y = interpreted(mapper.unfused_convolution, 3).complex()
    assert far(y, np.fft.ifft(np.fft.fft(x) * np.fft.fft(h))) < 2**-9 * np.sqrt(2 * 12)


def test_both_run_and_fusion_saves_what_goes_through_memory():
    p = machine(*SMALL).params()
    ticks = {}
    for make in (mapper.fft_convolution, mapper.unfused_convolution):
        found, built, *_ = mapped(make, 3)
        runs = [execute(p, b.records, k.arguments) for b, k in zip(built, found.kernels, strict=True)]
        ticks[make] = sum(r.ticks for r in runs)
        lines = sum(int(r.counters[:, rdu.COUNTERS.index("hbm_lines")].sum()) for r in runs)
        # Every kernel reads and writes a line for each point and packet, 512 / 8 of each; here there are 3 transfers
        # in and out at least, there one for each kernel.
        assert lines >= 2 * 64 * (3 if make is mapper.fft_convolution else 11)
    assert ticks[mapper.fft_convolution] < ticks[mapper.unfused_convolution]


def test_what_does_not_fit_is_named():
    small = machine(*SMALL).params()
    _, h = signals(8**5, 0)
    with pytest.raises(UserError, match="a lane's signal has 8192 words; a PMU holds 4096"):
        mapper.fft_convolution(small, monarch.spectrum(h, 8))
    with pytest.raises(UserError, match=r"order must be in 3\.\.6, not 2"):
        mapper.fft_convolution(small, monarch.spectrum(h[:64], 8))
    with pytest.raises(UserError, match=r"needs pcu\.systolic"):
        mapper.fft_convolution(small._replace(systolic=0), monarch.spectrum(h[:512], 8))
    with pytest.raises(UserError, match="a complex product takes 8"):
        mapper.fft_convolution(small._replace(stages=4), monarch.spectrum(h[:512], 8))
    with pytest.raises(UserError, match="8 lanes need 27 AGCUs; there are 4"):
        mapper.fft_convolution(small._replace(agcus_per_side=2), monarch.spectrum(h[:512], 8))
