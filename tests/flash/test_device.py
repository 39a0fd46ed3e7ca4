"""Presets, specs, page mapping and traces."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flash.strategies import device
from tilewright.arch.errors import UserError
from tilewright.arch.flash import (
    ADDRESS,
    ERASE,
    POLICIES,
    PROGRAM,
    READ,
    PageMap,
    check_operations,
    flash_presets,
    load_flash,
    operations,
    read_trace,
)
from tilewright.sim.flash import simulate

# ---- presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", flash_presets())
def test_every_preset_has_provenance(name):
    spec = load_flash(name)
    given_ = {path for path, value in spec.leaves() if value is not None} - {"target", "name", "description"}
    assert set(spec.provenance) == given_
    assert spec.name == name
    for path, p in spec.provenance.items():
        assert p.source, path
        unit = {"us": "us", "ns": "ns", "bytes": "B", "s": "MB/s"}.get(path.rpartition("_")[2])
        assert (
            p.unit == unit or unit is None or path == "interface.mb_per_s" or not path.endswith(f"_{unit}")
        ), path
    t = spec.timing
    assert t["read_lsb"] <= t["program_lsb"] <= t["erase"]
    assert t["read_lsb"] <= t.get("read_msb", t["read_lsb"])


def test_what_nobody_states_is_assumed():
    assumed = load_flash("instattention").assumed()
    assert {"cells.read_lsb_us", "cells.program_lsb_us", "geometry.planes_per_die"} <= set(assumed)
    assert "interface.mb_per_s" not in assumed and "geometry.page_bytes" not in assumed
    mqsim = load_flash("mqsim").assumed()
    assert not {p for p in mqsim if p.startswith(("geometry.", "cells.read", "cells.program", "interface."))}


def test_the_sets_of_other_simulators():
    # MQSim @7ec40e3: 8 x 4 x 2 x 2, 75 / 750 us and 3.8 ms, 8192 B at 333 MB/s.
    spec = load_flash("mqsim")
    assert spec.geometry.limits == (8, 4, 2, 2, 2048, 256)
    t = spec.timing
    assert (t["read_lsb"], t["program_msb"], t["erase"]) == (75_000, 750_000, 3_800_000)
    assert t["page_transfer"] == -(-8192 * 1000 // 333) == 24_601
    # FEMU states 52.433 us for a page: exact through the ratio.
    assert load_flash("femu-tlc").timing["page_transfer"] == 52_433
    # InstAttention: 8 channels x 1.4 GB/s, 4096 B: 2925.7 ns.
    spec = load_flash("instattention")
    assert spec.geometry.channels * spec.interface.mb_per_s == 11_200
    assert spec.timing["page_transfer"] == 2926
    # L1: W D P >= (tR + tc + P tx) / tx keeps the channel busy.
    g, t = spec.geometry, spec.timing
    ways = g.chips_per_channel * g.dies_per_chip * g.planes_per_die
    assert (
        ways * t["page_transfer"] >= t["read_lsb"] + t["read_command"] + g.planes_per_die * t["page_transfer"]
    )


def test_ticks_round_up_from_exact_numbers():
    spec = load_flash("mqsim", ["tick_ns=3", "cells.read_lsb_us=0.1", "interface.mb_per_s=1000/3"])
    assert spec.timing["read_lsb"] == 34  # 33.3
    assert spec.ticks_per_byte == Fraction(1) and spec.transfer_ticks(7) == 7
    assert spec.timing["read_command"] == 97  # 290 / 3


def test_policies_are_data():
    for name, policy in POLICIES.items():
        p = load_flash("mqsim", [f"scheduler.policy={name}"]).params()
        assert sorted(k for k in p.stages.ravel() if k >= 0) == [READ, PROGRAM, ERASE, 3]
        assert p.units * p.unit_dies == 8 and (p.unit_dies == 1) == (policy.unit == "die")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("geometry.channel=4", "unknown key geometry.channel: did you mean channels?"),
        ("geometry.channels=0", "geometry.channels must be greater than or equal to 1, not 0"),
        ("cells.page_types=tlc", "read_csb_us is missing: page_types tlc needs it"),
        (
            "scheduler.policy=fifo",
            "scheduler.policy must be 'chip-busy', 'data-out-first' or 'pipelined', not 'fifo'",
        ),
        ("placement.order=CWDD", "order must have each of C, W, D and P once, not 'CWDD'"),
        (
            "placement.spare_blocks=2048",
            "placement.spare_blocks 2048 must be below geometry.blocks_per_plane 2048",
        ),
        (
            "geometry.dies_per_chip=64 geometry.blocks_per_plane=1048576",
            "must have at most 2.28 blocks, not 4294967296",
        ),
        ("tick_ns=1e-6", "is 75000000000 ticks|must be below 2.40: choose a longer tick_ns"),
        ("interface.mb_per_s=1234567/9876543211234567", "ticks a byte|must be below"),
    ],
)
def test_a_spec_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        load_flash("mqsim", change.split())


def test_names_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"unknown flash preset 'mqsin': did you mean mqsim\?"):
        load_flash("mqsin")
    path = tmp_path / "other.yaml"
    path.write_text("target: pim\n")
    with pytest.raises(UserError, match="target must be flash, not 'pim'"):
        load_flash(str(path))
    path.write_text("base: mqsim\ngeometry: {channels: 2}\n")
    assert load_flash(str(path)).geometry.channels == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel": [0, 8]}, "operation 1: channel must be 0 to 7, not 8"),
        ({"page": -1}, "operation 0: page must be 0 to 255, not -1"),
        ({"bytes": [1, 8193]}, "operation 1: a read must move 1 to 8192 bytes, not 8193"),
        ({"kind": PROGRAM, "bytes": 8}, "a program moves 8192 bytes, not 8"),
        ({"kind": ERASE, "page": 3}, "an erase has no page, not 3"),
        ({"kind": ERASE, "bytes": 3}, "an erase moves no bytes, not 3"),
        ({"kind": 3}, "kind must be 0 .* to 2 .*, not 3"),
        ({"arrival": [4, 3]}, "operation 1: arrives at tick 3, before the operation above it"),
        ({"arrival": 1 << 50}, "arrival must be 0 to"),
        ({"arrival": []}, "no operations"),
    ],
)
def test_operations_outside_the_device(fields, message):
    spec = load_flash("mqsim")
    with pytest.raises(UserError, match=message):
        check_operations(spec, operations(spec, **fields))


# ---- page mapping -------------------------------------------------------------------------------------


def test_cwdp_counts_channels_first():
    # 2 channels x 3 chips x 1 die x 2 planes: page 7 = 1 + 2 * (0 + 3 * (0 + 1 * 1)).
    spec = device((2, 3, 1, 2, 4, 8))
    home = PageMap(spec).home(np.array([0, 1, 2, 6, 7, 12, 12 * 8]))
    assert home["channel"].tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert home["chip"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert home["plane"].tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert home["page"].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert home["block"].tolist() == [0, 0, 0, 0, 0, 0, 1]


@settings(max_examples=30)
@given(st.permutations("CWDP"), st.tuples(*[st.integers(1, 3)] * 4))
def test_every_order_is_one_to_one(order, sizes):
    spec = device((*sizes, 3, 4), placement__order="".join(order))
    pages = PageMap(spec)
    home = pages.home(np.arange(pages.logical_pages))
    places = set(zip(*(home[name].tolist() for name in ADDRESS), strict=True))
    assert places == set(product(*[range(n) for n in (*sizes, 2, 4)]))
    # The first letter of the order changes from each page to the next.
    name = {"C": "channel", "W": "chip", "D": "die", "P": "plane"}[order[0]]
    size = sizes["CWDP".index(order[0])]
    assert home[name].tolist() == [i % size for i in range(pages.logical_pages)]


def test_programs_go_to_the_open_block_of_their_plane():
    # One plane of 4 blocks x 2 pages, the last block spare: pages 0..5 at home in blocks 0..2.
    spec = device((1, 1, 1, 1, 4, 2))
    pages = PageMap(spec)
    ops, source = pages.translate(0, [PROGRAM, READ, PROGRAM, READ, READ], [0, 0, 1, 1, 2])
    assert source.tolist() == [0, 1, 2, 3, 4]
    assert list(zip(ops["block"].tolist(), ops["page"].tolist(), strict=True)) == [
        (3, 0),
        (3, 0),
        (3, 1),
        (3, 1),
        (1, 0),
    ]
    # Block 3 is full, block 0 dead: it is erased, and takes page 2; its place in the map stays for later.
    ops, source = pages.translate(5, [PROGRAM, READ], [2, 2])
    assert ops["kind"].tolist() == [ERASE, PROGRAM, READ] and source.tolist() == [0, 0, 1]
    assert ops["block"].tolist() == [0, 0, 0] and ops["arrival"].tolist() == [5, 5, 5]
    pages.translate(6, PROGRAM, 4)
    # Block 0 holds 2 and 4; block 1 page 3, block 2 page 5: nothing is dead.
    with pytest.raises(
        UserError, match="operation 0: plane 0 has no erased block and none without live pages"
    ):
        pages.translate(7, PROGRAM, 0)


def test_pages_die_in_the_block_that_is_open():
    # 3 blocks x 2 pages, block 2 spare. Page 0 twice fills block 2; once more kills it, so it is erased and takes
    # page 0, then page 1. Block 0 is dead by now: erased for page 1, which fills it. Page 0 kills block 2 again.
    spec = device((1, 1, 1, 1, 3, 2))
    ops, _ = PageMap(spec).translate(0, PROGRAM, [0, 0, 0, 1, 1, 1, 0])
    assert ops["kind"].tolist() == [PROGRAM] * 2 + [ERASE] + [PROGRAM] * 2 + [ERASE] + [PROGRAM] * 2 + [
        ERASE,
        PROGRAM,
    ]
    assert ops["block"].tolist() == [2, 2, 2, 2, 2, 0, 0, 0, 2, 2]
    assert ops["page"].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    check_operations(spec, ops)
    simulate(spec.params(), ops)


@settings(max_examples=60)
@given(st.data())
def test_what_the_map_gives_is_legal(data):
    spec = device((2, 1, 1, 2, 5, 3), placement__spare_blocks=3, placement__order="PCWD")
    pages = PageMap(spec)
    kinds = data.draw(st.lists(st.sampled_from([READ, PROGRAM]), min_size=1, max_size=80))
    logical = [data.draw(st.integers(0, pages.logical_pages - 1)) for _ in kinds]
    try:
        ops, source = pages.translate(0, kinds, logical)
    except UserError as error:
        assert "without live pages" in str(error)
        return
    check_operations(spec, ops)
    simulate(spec.params(), ops)  # raises where a block does not allow an operation
    # A read finds what was programmed last, or the page's home.
    at = {}
    home = PageMap(spec).home(np.arange(pages.logical_pages))
    for op, i in zip(ops, source.tolist(), strict=True):
        place = tuple(int(op[n]) for n in ADDRESS)
        if op["kind"] == PROGRAM:
            assert place not in at.values()
            at[logical[i]] = place
        elif op["kind"] == READ:
            assert place == at.get(logical[i], tuple(int(home[n][logical[i]]) for n in ADDRESS))
        else:
            assert not [p for p in at.values() if p[:5] == place[:5]]


def test_logical_pages_beyond_the_device():
    spec = device((1, 1, 1, 1, 4, 2))
    with pytest.raises(UserError, match="logical page must be 0 to 5, not 6"):
        PageMap(spec).home([0, 6])
    with pytest.raises(UserError, match="operation 1: logical pages are read or programmed, the map erases"):
        PageMap(spec).translate(0, [PROGRAM, ERASE], [0, 0])


# ---- traces -------------------------------------------------------------------------------------------

PHYSICAL = "arrival_ns,op,channel,chip,die,plane,block,page"


def read(text, spec=None):
    return read_trace(text.splitlines(), "t.csv", spec or load_flash("mqsim", ["tick_ns=2"]))


def test_a_physical_trace():
    text = f"# pages\n\n{PHYSICAL},bytes\n0,read,1,2,1,0,7,9,100\n# more\n2.5, erase ,0,0,0,0,3,,\n3,program,0,0,0,0,3,0,\n"
    trace = read(text)
    assert trace.operations.tolist() == [
        (0, READ, 1, 2, 1, 0, 7, 9, 100),
        (2, ERASE, 0, 0, 0, 0, 3, 0, 0),  # 1.25 ticks of 2 ns
        (2, PROGRAM, 0, 0, 0, 0, 3, 0, 8192),
    ]
    assert list(trace.places) == ["t.csv:4", "t.csv:6", "t.csv:7"]


def test_a_logical_trace():
    spec = device((2, 1, 1, 1, 3, 1), placement__spare_blocks=1)
    trace = read("arrival_ns,op,logical_page\n0,read,1\n4,program,1\n5,program,1\n", spec)
    assert trace.operations["kind"].tolist() == [READ, PROGRAM, ERASE, PROGRAM]
    assert trace.operations["channel"].tolist() == [1, 1, 1, 1]
    assert list(trace.places) == ["t.csv:2", "t.csv:3", "t.csv:4", "t.csv:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv:1: the first line must be arrival_ns,op,channel"),
        ("arrival,op,logical_page\n", "t.csv:1: the first line must be .* not 'arrival,op,logical_page'"),
        (f"{PHYSICAL}\n", "t.csv: no operations below the first line"),
        (f"{PHYSICAL}\n0,read,0,0,0,0,0\n", "t.csv:2: 8 columns must be there, not 7"),
        (
            f"{PHYSICAL}\n0,raed,0,0,0,0,0,0\n",
            r"t.csv:2: op must be read, program or erase, not 'raed'; did you mean read\?",
        ),
        (f"{PHYSICAL}\n#\nx,read,0,0,0,0,0,0\n", "t.csv:3: arrival_ns: must be a finite number, not 'x'"),
        (f"{PHYSICAL}\n0,read,0,a,0,0,0,0\n", "t.csv:2: chip must be a whole number, not 'a'"),
        (f"{PHYSICAL}\n0,read,0,0,0,0,0,\n", "t.csv:2: page must be a whole number, not ''"),
        (f"{PHYSICAL}\n0,read,0,0,2,0,0,0\n", "t.csv:2: die must be 0 to 1, not 2"),
        (f"{PHYSICAL}\n9,read,0,0,0,0,0,0\n1,read,0,0,0,0,0,0\n", "t.csv:3: arrives at tick 1, before"),
        (f"{PHYSICAL}\n-1,read,0,0,0,0,0,0\n", "t.csv:2: arrival_ns must be 0 or more, not -1"),
        (f"{PHYSICAL}\n1e300,read,0,0,0,0,0,0\n", "t.csv:2: numbers must be below"),
        (f"{PHYSICAL},bytes\n0,read,0,0,0,0,0,0,0\n", "t.csv:2: a read must move 1 to 8192 bytes, not 0"),
        (
            "arrival_ns,op,logical_page\n0,read,99999999999\n",
            "t.csv:2: logical_page must be 0 to 62423039, not 99999999999",
        ),
        (
            "arrival_ns,op,logical_page\n0,read,0\n0,erase,0\n",
            "t.csv:3: logical pages are read or programmed",
        ),
    ],
)
def test_traces_that_are_none(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)
