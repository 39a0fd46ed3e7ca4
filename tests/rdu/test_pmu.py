"""Memory units: what is stored and read back, and how banks, diagonals and tokens govern the ticks."""

from math import gcd
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import cause, packet, run, small, unit
from tilewright.arch import rdu
from tilewright.arch.rdu import CONFIG_PMU, check_pmu
from tilewright.rtl.rdu.pmu import Pmu
from tilewright.workloads import rdu_kernels as kernels

LANES, BANKS, DEPTH = 4, 4, 16
WORDS = BANKS * DEPTH
SETS = {
    "pcu__lanes": LANES,
    "pcu__stages": 2,
    "pcu__registers": 8,
    "pmu__banks": BANKS,
    "pmu__bytes": 4 * WORDS,
    "pmu__counters": 3,
}
WIDE = SETS | {"pmu__banks": 8}  # banks for two sides
WRITE, READ = 1, 2


def config(**fields):
    return kernels.configuration(CONFIG_PMU, **{"words": WORDS, **fields})


def rows(count, lanes=LANES, first=1):
    return [[first + i * lanes + k for k in range(lanes)] for i in range(count)]


def through(sets, write, read, data, sequence=None, **more):
    """Write packets, then read: the read side waits for the write side's last token. Gives the run.

    The run's packets must be the kernel's.
    """
    params = small(**sets)
    cfg = config(
        enable=WRITE | READ,
        write_signal=1,
        write_signal_level=7,
        read_wait=1,
        read_wait_level=7,
        **write,
        **read,
    )
    check_pmu(params, cfg)
    ids = np.arange(len(data)) if sequence is None else np.array(sequence)
    memory = np.zeros((params.banks, params.bank_words), np.uint32)
    kernels.pmu_write(cfg, memory, kernels.Packets(np.array(data, np.uint32), ids, ids < 0))
    want = kernels.pmu_read(cfg, memory, params.lanes)
    done = run(
        unit(Pmu, **sets),
        {"config": cfg},
        {"write": [packet(row, s) for row, s in zip(data, ids, strict=True)]},
        ["read"],
        activities=["write_activity", "read_activity"],
        loop={"write_signal": "read_tokens"},
        **more,
    )
    expected = [
        packet(row, s, l, cfg["flow"]) for row, s, l in zip(want.data, want.sequence, want.last, strict=True)
    ]
    assert [p for _, p in done.packets["read"]] == expected
    return done


def test_what_is_written_is_read_back():
    data = rows(4)
    done = through(SETS, {"write_count0": 4, "write_stride0": 4}, {"read_count0": 4, "read_stride0": 4}, data)
    assert done.words("read") == data
    # Iterations 0..3, accesses at the banks 1..4, token at 4; read iterations 5..8, packets 3 ticks later.
    assert done.tokens["write_signal"] == [(4, 1)]
    assert done.at("read") == [5 + rdu.READ_LATENCY + i for i in range(4)]
    assert done.conflicts == 0


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 5, 6, 8])
def test_strides_cost_their_conflict_factor(stride):
    # L lanes at a stride of s words over B word-interleaved banks: ceil(L / (B / gcd(s, B))) ticks a vector.
    factor = -(-LANES // (BANKS // gcd(stride, BANKS)))
    count = 4
    done = through(
        SETS,
        {"write_count0": WORDS // LANES, "write_stride0": LANES},
        {"read_count0": count, "read_stride0": 1, "read_lane_stride": stride},
        rows(WORDS // LANES),
    )
    first, *later = done.at("read")
    assert later == [first + factor * (i + 1) for i in range(count - 1)]
    assert done.conflicts == (factor - 1) * count
    assert done.activity["read_activity"].count(cause("bank")) == (factor - 1) * count


def test_a_column_of_an_aligned_tile_meets_one_bank_and_a_diagonal_none():
    # Element (i, j) of a 4 x 4 tile at 4 i + j. Plain: column j lies in bank j, 4 ticks. Diagonal: in bank
    # (i + j) mod 4, one tick, and rows too.
    tile = rows(4)
    write = {"write_count0": 4, "write_stride0": 4}
    columns = {"read_count0": 4, "read_stride0": 1, "read_lane_stride": 4}
    diagonal = {"skew_bits": 2, "skew_shift": 2}
    transposed = [list(column) for column in zip(*tile, strict=True)]
    for skew, ticks in (({}, 4), (diagonal, 1)):
        done = through(SETS, write | skew, columns, tile)
        assert done.words("read") == transposed
        at = done.at("read")
        assert np.diff(at).tolist() == [ticks] * 3
    done = through(SETS, write | diagonal, {"read_count0": 4, "read_stride0": 4}, tile)
    assert done.words("read") == tile
    assert np.diff(done.at("read")).tolist() == [1] * 3


def both_sides(half):
    """Read 8 vectors while 8 are written, the halves of the scratchpad apart by the bank's top bit, or not."""
    cfg = config(
        enable=WRITE | READ, bank_bit0=0, bank_bit1=1, bank_bit2=half,
        write_count0=8, write_stride0=4, write_base=32,
        read_count0=8, read_stride0=4,
    )  # fmt: skip
    check_pmu(small(**WIDE), cfg)
    return run(
        unit(Pmu, **WIDE), {"config": cfg}, {"write": [packet(r) for r in rows(8)]}, ["read"],
        activities=["write_activity", "read_activity"],
    )  # fmt: skip


def test_double_buffers_in_banks_of_their_own_never_meet():
    # Bank bit 2 is address bit 5: the buffer at 32 has banks 4..7 to itself.
    done = both_sides(5)
    assert done.conflicts == 0
    assert done.at("read") == [rdu.READ_LATENCY + i for i in range(8)]
    assert done.activity["write_activity"][:9] == [0] * 8 + [cause("pipeline")]


def test_sides_that_share_banks_take_turns():
    # Bank bit 2 is address bit 2: both sides go through banks 0..3, 4..7, 0..3 in step, so each vector of one side
    # meets one of the other. Reading goes first, the writing one tick behind, and never again in its way.
    done = both_sides(2)
    assert done.conflicts == 1
    assert done.at("read") == [rdu.READ_LATENCY + i for i in range(8)]
    assert done.activity["write_activity"][:3] == [0, cause("bank"), 0]


@pytest.mark.parametrize("buffers, period", [(2, 5), (1, 10)])
def test_a_second_buffer_lets_reading_and_writing_overlap(buffers, period):
    # A tile of 4 vectors takes either side t = 5 ticks from its token to the token it gives: 4 iterations, and one
    # at the banks behind the last. With one buffer a tile takes t + t; with two, two tiles do.
    tiles = 6
    data = rows(4 * tiles)
    sides = {
        f"{side}_{name}": value
        for side in ("write", "read")
        for name, value in {
            "count0": 4, "stride0": 4, "count1": buffers, "stride1": 32, "count2": tiles // buffers,
            "wait": 1, "wait_level": 1, "signal": 1, "signal_level": 1,
        }.items()
    }  # fmt: skip
    cfg = config(enable=WRITE | READ, bank_bit0=0, bank_bit1=1, bank_bit2=5, **sides)
    free = {tick: 1 for tick in range(buffers)}  # the tokens of buffers that are free at first
    done = run(
        unit(Pmu, **WIDE), {"config": cfg}, {"write": [packet(r) for r in data]}, ["read"],
        tokens={"write_tokens": free}, loop={"write_signal": "read_tokens", "read_signal": "write_tokens"},
    )  # fmt: skip
    assert done.words("read") == data
    starts = np.array(done.at("read")[::4])
    assert (starts[2:] - starts[:-2]).tolist() == [2 * period] * (tiles - 2)
    assert done.conflicts == 0


def test_sides_at_one_bank_alternate():
    # A column each of bank 0, word by word from tick 1: read, write, read, write, ... The reads are done at 7, so
    # their packet is there at 9; the writes at 8.
    cfg = config(enable=WRITE | READ, write_lane_stride=4, read_lane_stride=4, write_signal=1, read_signal=2)
    done = run(unit(Pmu, **SETS), {"config": cfg}, {"write": [packet(rows(1)[0])]}, ["read"])
    assert done.tokens == {"write_signal": [(8, 1)], "read_signal": [(7, 2)]}
    assert done.at("read") == [9]
    assert done.words("read") == [[0, 0, 0, 0]]


def test_addresses_out_of_range_are_dropped():
    # The unit holds words 6..13 of a tensor of 16. Vectors 0 and 3 are dropped whole when read (0..3: none held;
    # 12..15: 12 and 13 are), so three packets are left: 4..7 with two zeros, 8..11, 12..15 with two zeros.
    data = rows(4, first=0)
    held = {"low": 6, "words": 8}
    done = through(
        SETS, {"write_count0": 4, "write_stride0": 4} | held, {"read_count0": 4, "read_stride0": 4}, data
    )
    assert done.words("read") == [[0, 0, 6, 7], [8, 9, 10, 11], [12, 13, 0, 0]]
    assert [p["sequence"] for _, p in done.packets["read"]] == [0, 1, 2]


def test_sequence_ids_put_packets_in_order():
    data = rows(4)
    order = [2, 0, 3, 1]
    done = through(
        SETS,
        {"write_count0": 4, "sequence_scale": 4},
        {"read_count0": 4, "read_stride0": 4},
        [data[i] for i in order],
        order,
    )
    assert done.words("read") == data


def test_a_full_output_stops_reading():
    # Packets are ready from tick 8 on; the output is ready from 20.
    done = through(
        SETS,
        {"write_count0": 4, "write_stride0": 4},
        {"read_count0": 4, "read_stride0": 4},
        rows(4),
        accept=lambda name, tick: tick >= 20,
    )
    assert done.at("read") == [20, 21, 22, 23]
    assert done.activity["read_activity"].count(cause("output")) == 12
    assert done.activity["read_activity"][:5] == [cause("token")] * 5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bank_bit0": 1, "bank_bit1": 1}, "bank_bit0..1 must be ascending and below 6, not [1, 1]"),
        ({"bank_bit1": 6}, "bank_bit0..1 must be ascending and below 6, not [0, 6]"),
        ({"skew_bits": 3}, "skew_bits must be at most 2, not 3"),
        ({"skew_bits": 2, "skew_shift": 1}, "skew_shift 1 must lie above bank_bit1 1"),
        ({"words": WORDS + 1}, "words must be at most 64, not 65"),
    ],
)
def test_records_that_lose_words_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        check_pmu(small(**SETS), config(**fields))
    assert str(error.value) == message


def random_map(random, banks):
    """A bank map that `check_pmu` admits."""
    bits = banks.bit_length() - 1
    total = WORDS.bit_length() - 1
    positions = sorted(random.sample(range(total), bits))
    skew = random.randrange(bits + 1)
    lowest = positions[skew - 1] + 1 if skew else 0
    return {f"bank_bit{i}": b for i, b in enumerate(positions)} | {
        "skew_bits": skew,
        "skew_shift": random.randrange(lowest, total + 1),
    }


@given(st.randoms(use_true_random=False), st.sampled_from([2, 4, 8]))
def test_every_word_has_a_place_of_its_own(random, banks):
    cfg = config(**random_map(random, banks))
    valid, bank, index = kernels.place(cfg, np.arange(WORDS), banks)
    assert valid.all()
    assert len(set(zip(bank.tolist(), index.tolist(), strict=True))) == WORDS
    assert bank.max() < banks and index.max() < WORDS // banks


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_random_patterns_match_the_kernel(seed):
    random = Random(seed)
    sets = random.choice((SETS, WIDE))
    big = 1 << rdu.ADDRESS_BITS
    fields = random_map(random, sets["pmu__banks"])
    low = random.choice((0, random.randrange(40)))
    fields |= {"low": low, "words": random.randrange(1, WORDS + 1), "flow": random.getrandbits(16)}

    def pattern(side):
        counts = [random.randint(1, 3) for _ in range(3)]
        strides = [random.choice((0, 1, 4, 7, 16, big - 4)) for _ in range(3)]
        out = {f"{side}_count{n}": c for n, c in enumerate(counts)}
        out |= {f"{side}_stride{n}": s for n, s in enumerate(strides)}
        out |= {
            f"{side}_base": random.randrange(WORDS),
            f"{side}_lane_stride": random.choice((0, 1, 4, 5, big - 1)),
        }
        return out, int(np.prod(counts))

    write, packets = pattern("write")
    read, _ = pattern("read")
    fields |= {"sequence_scale": random.choice((0, 1, 4)), "last_level": random.randrange(8)}
    data = [[random.getrandbits(32) for _ in range(LANES)] for _ in range(packets)]
    sequence = [random.randrange(20) for _ in range(packets)]
    willing = random.choice((0.3, 1))
    holds = [random.random() < willing for _ in range(400)]
    through(sets, write | fields, read, data, sequence, accept=lambda name, t: t >= 400 or holds[t])
