"""The host map: where regions lie, and how values become words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.hostmap import HostMap, Region

REGIONS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=6).map(
    lambda sizes: [Region(f"r{i}", n, bits) for i, (n, bits) in enumerate(sizes)]
)


def test_layout_by_hand():
    hostmap = HostMap([Region("a", 3), Region("b", 5, 72), Region("c", 1, 8)])
    # a: 3 words in a block of 4, at 0. b: 72 bits are 3 words, stride 4, 20 words in a block of 32: next
    # multiple of 32 after 4. c: one word, right behind.
    assert [hostmap.base(name) for name in "abc"] == [0, 32, 64]
    assert hostmap.base("b", 4) == 32 + 4 * 4
    assert hostmap.words() == 65


def test_pack_by_hand():
    hostmap = HostMap([Region("wide", 4, 40), Region("huge", 4, 72), Region("byte", 4, 8)])
    assert hostmap.pack("wide", [0x12_3456_789A, -1]).tolist() == [0x3456789A, 0x12, 0xFFFFFFFF, 0xFF]
    assert hostmap.pack("huge", [1 << 64 | 2 << 32 | 3]).tolist() == [3, 2, 1, 0]
    assert hostmap.pack("byte", np.array([-128, 127], np.int8)).tolist() == [0x80, 0x7F]
    assert hostmap.unpack("byte", [0xFF80]).tolist() == [0x80]  # padding is not data


@settings(deadline=None, max_examples=50)
@given(REGIONS)
def test_regions_are_aligned_and_disjoint(regions):
    hostmap = HostMap(regions)
    end = 0
    for region in hostmap:
        base = hostmap.base(region.name)
        assert base >= end
        assert base % region.span == 0 and region.span & (region.span - 1) == 0
        end = base + region.words
        assert hostmap.base(region.name, region.elements - 1) == end - region.stride
    assert end <= hostmap.words() <= 1 << 24


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 200), st.integers(0, 9))
def test_unpack_undoes_pack(data, bits, n):
    hostmap = HostMap([Region("r", 9, bits)])
    values = data.draw(st.lists(st.integers(-(1 << bits - 1), (1 << bits) - 1), min_size=n, max_size=n))
    words = hostmap.pack("r", values)
    assert words.dtype == np.uint32 and len(words) == n * hostmap["r"].stride
    assert [int(v) for v in hostmap.unpack("r", words)] == [v % (1 << bits) for v in values]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, (1 << 36) - 1), max_size=8))
def test_arrays_and_lists_pack_alike(values):
    hostmap = HostMap([Region("r", 8, 36)])
    assert (hostmap.pack("r", np.array(values, np.uint64)) == hostmap.pack("r", values)).all()


def test_the_address_space_is_full_at_24_bits():
    assert HostMap([Region("a", 1 << 23), Region("b", 1 << 23)]).words() == 1 << 24
    with pytest.raises(ValueError, match="24 address bits hold 16777216"):
        HostMap([Region("a", 1 << 23), Region("b", 1 << 23), Region("c", 1)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.base("r", 4), IndexError, "elements 0 to 3, not 4"),
        (lambda m: m.base("s"), KeyError, "no region 's'"),
        (lambda m: m.pack("r", [0] * 5), ValueError, "at most 4 values"),
        (lambda m: m.pack("r", [0, 256]), ValueError, "256 does not fit 8 bits"),
        (lambda m: m.pack("r", [-129]), ValueError, "-129 does not fit 8 bits"),
        (lambda m: m.pack("r", np.ones(2)), ValueError, "integers, not float64"),
        (lambda m: m.unpack("r", [0] * 5), ValueError, "4 elements of 1 words"),
        (lambda m: HostMap([*m, *m]), ValueError, "r is given twice"),
        (lambda m: Region("r", 0), ValueError, "at least 1, not 0"),
        (lambda m: Region("r", 1, 0), ValueError, "at least 1, not 0"),
        (lambda m: Region("a b", 1), ValueError, "identifier"),
    ],
)
def test_mistakes_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(HostMap([Region("r", 4, 8)]))
