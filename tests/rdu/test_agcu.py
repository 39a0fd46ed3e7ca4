# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

"""AGCUs and channels: bytes as the NumPy kernels have them, ticks as closed forms say."""

from random import Random

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import cause, packet, run, simulate, small
from tilewright.arch import rdu
from tilewright.arch.rdu import CONFIG_AGCU, LOAD_LATENCY
from tilewright.rtl.rdu.agcu import Agcu
from tilewright.rtl.rdu.channel import Channel
from tilewright.workloads import rdu_kernels as kernels

LANES = 4
LINE = 4 * LANES
LINES = 32
LATENCY = 7
ACTIVITY = "activity"


def params(works=(1, 1), in_flight=8, latency=LATENCY):
    """A machine whose HBM channel moves p lines in q ticks."""
    p = small(pcu__lanes=LANES, agcu__in_flight=in_flight)
    change = {name: np.array(getattr(p, name)) for name in ("rate_p", "rate_q", "latency", "tier_lines")}
    for name, value in zip(change, (*works, latency, LINES), strict=True):
        change[name][0] = value
    return p._replace(**change)


class Gate(wiring.Component):
    """An AGCU that has a channel of HBM to itself; the memory is outside."""

    def __init__(self, *, params):
        self._agcu, self._channel = Agcu(params=params), Channel(params=params, count=1)
        self._params = params
        agcu, channel = self._agcu.signature, self._channel.signature
        ours = ("start", "config", "base", "store", "load", "tokens", "signal", "done", "activity")
        memory = ("read_enable", "read_line", "read_data", "write_enable", "write_line", "write_data")
        super().__init__(
            {n: agcu.members[n] for n in ours} | {n: channel.members[n] for n in memory} | {"granted": Out(1)}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.agcu = agcu = self._agcu
        m.submodules.channel = channel = self._channel
        wiring.connect(m, wiring.flipped(self.store), agcu.store)
        wiring.connect(m, agcu.load, wiring.flipped(self.load))
        for name, member in self.signature.members.items():
            if name in ("store", "load", "granted"):
                continue
            parts = [part for part in (agcu, channel) if name in part.signature.members]
            for part in parts:
                here, there = getattr(self, name), getattr(part, name)
                m.d.comb += there.eq(here) if member.flow is In else here.eq(there)
        m.d.comb += [
            agcu.latency[0].eq(int(self._params.latency[0])),
            channel.p.eq(int(self._params.rate_p[0])),
            channel.q.eq(int(self._params.rate_q[0])),
            channel.requests.eq(agcu.request[0]),
            channel.lines[0].eq(agcu.line),
            channel.writes[0].eq(agcu.write),
            channel.data[0].eq(agcu.data),
            agcu.grant.eq(channel.grants),
            agcu.answer.eq(channel.answer),
            self.granted.eq(channel.grants),
        ]
        return m


class Memory:
    """Lines of bytes at the ports of a `Gate`: what it reads is there a tick later, in place of the old data."""

    def __init__(self, image):
        self.image = image
        self.grants = []
        self._read = 0

    def tick(self, ctx, component, tick):
        ctx.set(component.read_data, self._read)
        if ctx.get(component.granted):
            self.grants.append(tick)
        if ctx.get(component.read_enable):
            at = ctx.get(component.read_line) * LINE
            self._read = int.from_bytes(self.image[at : at + LINE].tobytes(), "little")
        if mask := ctx.get(component.write_enable):
            at = ctx.get(component.write_line) * LINE
            value = ctx.get(component.write_data).to_bytes(LINE, "little")
            for k in range(LINE):
                if mask >> k & 1:
                    self.image[at + k] = value[k]


_built = {}


def gate(**sets):
    """The component of these params, the same one each time."""
    key = tuple(sorted(sets.items()))
    if key not in _built:
        _built[key] = Gate(params=params(**sets))
    return _built[key]


def config(**fields):
    return kernels.configuration(CONFIG_AGCU, **{"direction": "load", "words": LANES, **fields})


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, LINES * LINE).astype(np.uint8)


def load(cfg, base=0, seed=0, **more):
    """Run the RTL, compare its packets with the kernel's, and its requests in number; the run and the grants."""
    sets = {k: more.pop(k) for k in ("works", "in_flight", "latency") if k in more}
    memory = Memory(image(seed))
    done = run(
        gate(**sets),
        {"config": cfg, "base": base},
        {},
        ["load"],
        activities=[ACTIVITY],
        every=memory.tick,
        **more,
    )
    want = kernels.agcu_load(cfg, {cfg["argument"]: base}, memory.image, LANES)
    rows = zip(want.data, want.sequence, want.last, strict=True)
    assert [p for _, p in done.packets["load"]] == [packet(d, s, l, cfg["flow"]) for d, s, l in rows]
    assert len(memory.grants) == len(kernels.agcu_requests(cfg, {cfg["argument"]: base}, LANES))
    return done, memory.grants


def store(cfg, rows, base=0, seed=0, **more):
    """Likewise, comparing the memory."""
    sets = {k: more.pop(k) for k in ("works", "in_flight", "latency") if k in more}
    memory, want = Memory(image(seed)), image(seed)
    feeds = {"store": [packet(row) for row in rows]}
    done = run(
        gate(**sets),
        {"config": cfg, "base": base},
        feeds,
        [],
        activities=[ACTIVITY],
        every=memory.tick,
        **more,
    )
    zeros = np.zeros(len(rows), int)
    kernels.agcu_store(
        cfg, {cfg["argument"]: base}, want, kernels.Packets(np.array(rows, np.uint32), zeros, zeros)
    )
    assert memory.image.tolist() == want.tolist()
    assert len(memory.grants) == len(kernels.agcu_requests(cfg, {cfg["argument"]: base}, LANES))
    return done, memory.grants


def steps(done):
    return [t for t, a in enumerate(done.activity[ACTIVITY]) if a == 0]


# ---- loads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [1, LATENCY])
def test_lines_come_a_latency_later_and_one_a_tick(latency):
    # n = 6 lines: granted at 0..5, packets at latency + 2 + i; busy for n ticks, done when the last has left.
    done, grants = load(config(count0=6, stride0=LINE), base=3 * LINE, latency=latency)
    assert grants == steps(done) == list(range(6))
    assert LOAD_LATENCY == 2
    assert done.at("load") == [latency + 2 + i for i in range(6)]
    assert done.ticks == 6 + latency + 2
    assert done.activity[ACTIVITY][6:] == [cause("pipeline")] * (latency + 2)


@pytest.mark.parametrize("works", [(1, 3), (3, 5), (2, 7)])
def test_a_channel_works_p_in_q_ticks(works):
    # Tick t works where t p mod q < p: line i is granted at ceil(i q / p).
    p, q = works
    done, grants = load(config(count0=10, stride0=LINE), works=works)
    assert grants == [-(-i * q // p) for i in range(10)]
    waits = [a for t, a in enumerate(done.activity[ACTIVITY][: grants[-1]]) if t not in grants]
    assert set(waits) == {cause("memory")}


@pytest.mark.parametrize(
    "words, form, iterations, requests", [(1, "word", 8, 2), (2, "bf16", 8, 2), (4, "word", 8, 8)]
)
def test_iterations_in_one_line_share_its_request(words, form, iterations, requests):
    # 8 * 1 * 4 = 8 * 2 * 2 = 32 bytes are 2 lines of 16, 8 * 4 * 4 = 128 are 8.
    cfg = config(words=words, format=form, count0=iterations, stride0=words * (4 if form == "word" else 2))
    done, grants = load(cfg)
    assert len(grants) == requests
    assert steps(done) == list(range(8))
    # A packet a tick behind the first one, which the second line does not hold up.
    assert done.at("load") == [LATENCY + 2 + i for i in range(8)]


def test_bfloat16_is_the_upper_half_of_a_word():
    memory = image()
    done, _ = load(config(words=3, format="bf16", sequence=9, last_level=0), base=LINE + 6)
    halves = memory[LINE + 6 : LINE + 12].view("<u2")
    assert done.words("load") == [[int(h) << 16 for h in halves] + [0]]


def test_no_more_than_in_flight_packets_are_under_way():
    # 2 at a time, each from its grant at t until it leaves at t + 9: the next is taken at t + 10.
    done, grants = load(config(count0=6, stride0=LINE), in_flight=2)
    assert grants == [0, 1, 10, 11, 20, 21]
    assert set(done.activity[ACTIVITY][2:9]) == {cause("memory")}


def test_a_stopped_output_is_charged_when_nothing_can_be_taken():
    # Ready from tick 20; in flight are 8 of 10, all taken by tick 7.
    done, grants = load(config(count0=10, stride0=LINE), accept=lambda name, t: t >= 20)
    assert grants == [*range(8), 21, 22]
    kinds = done.activity[ACTIVITY]
    assert kinds[8 : LATENCY + 2] == [cause("memory")] * (LATENCY - 6)
    assert kinds[LATENCY + 2 : 20] == [cause("output")] * (18 - LATENCY)
    assert done.at("load")[:8] == list(range(20, 28))


def test_a_stopped_output_is_not_charged_for_a_token_that_is_missing():
    # The packet of tick 0 stands at the output from 9 on; there is room for more, but no token until tick 15.
    cfg = config(count0=2, stride0=LINE, wait=1, hold0=1)
    done, grants = load(cfg, accept=lambda name, t: t >= 20, tokens={"tokens": {15: 1}})
    assert grants == [0, 16]
    assert done.activity[ACTIVITY][1:16] == [cause("token")] * 15
    assert done.activity[ACTIVITY][17:20] == [cause("output")] * 3


def test_a_load_that_takes_tokens_reads_again():
    # One line, four times; a token for every second one, for which it is read again.
    cfg = config(count0=2, count1=2, wait=1, wait_level=1, hold0=1, signal=2, signal_level=1)
    done, grants = load(cfg, tokens={"tokens": {9: 1}})
    assert grants == [0, 10] and steps(done) == [0, 1, 10, 11]
    assert done.tokens["signal"] == [(1, 2), (11, 2)]
    assert set(done.activity[ACTIVITY][2:9]) == {cause("token")}


def test_strides_may_be_negative():
    load(config(count0=3, count1=3, stride0=-LINE, stride1=2 * LINE), base=4 * LINE)


def test_a_second_run_begins_anew():
    memory = Memory(image())
    cfg = config(count0=2, stride0=4, words=1, sequence=5)  # ends in the line in which it begins
    first, second = run(
        gate(works=(1, 3)),
        {"config": cfg, "base": 8},
        {},
        ["load"],
        activities=[ACTIVITY],
        every=memory.tick,
        runs=2,
    )
    assert first.packets == second.packets and first.activity == second.activity
    assert memory.grants == [0, 0]


# ---- stores -------------------------------------------------------------------------------------------


def rows(n, seed=1):
    return np.random.default_rng(seed).integers(0, 1 << 32, (n, LANES)).tolist()


def test_lines_are_stored_one_a_tick():
    # Iteration i at tick i; its line is written when the next one is of another line, or there is none: at i + 1.
    done, grants = store(config(direction="store", count0=5, stride0=LINE), rows(5))
    assert steps(done) == list(range(5))
    assert grants == [1, 2, 3, 4, 5]
    assert done.ticks == 6
    assert done.activity[ACTIVITY][5] == cause("pipeline")


@pytest.mark.parametrize("words, form", [(1, "word"), (2, "bf16"), (3, "bf16")])
def test_bytes_of_one_line_are_merged(words, form):
    # Two iterations a line: lines are written at 2, 4, 6.
    size = words * (4 if form == "word" else 2)
    cfg = config(direction="store", words=words, format=form, count0=2, stride0=size, count1=3, stride1=LINE)
    done, grants = store(cfg, rows(6))
    assert steps(done) == list(range(6))
    assert grants == [2, 4, 6]


def test_a_store_waits_for_its_channel():
    # The channel works at 0, 3, 6, ...: line i is written at 3 (i + 1), and the next iteration taken then.
    done, grants = store(config(direction="store", count0=4, stride0=LINE), rows(4), works=(1, 3))
    assert grants == [3, 6, 9, 12]
    assert steps(done) == [0, 3, 6, 9]
    assert set(done.activity[ACTIVITY][1:3]) == {cause("memory")}


def test_tokens_of_a_store_go_out_when_its_bytes_are_written():
    # Three pairs of words in one line; a token after each pair, which writes it: at 3, 6, 9.
    cfg = config(direction="store", words=1, count0=2, count1=3, stride0=4, signal=4, signal_level=1)
    done, grants = store(cfg, rows(6), works=(1, 3))
    assert steps(done) == [0, 1, 3, 4, 6, 7]
    assert grants == [3, 6, 9]
    assert done.tokens["signal"] == [(3, 4), (6, 4), (9, 4)]


def test_an_empty_input_is_charged():
    cfg = config(direction="store", count0=2, stride0=LINE)
    done, grants = store(cfg, rows(2), offer=lambda name, t: t >= 4)
    assert done.activity[ACTIVITY][:4] == [cause("operand")] * 4
    assert grants == [5, 6]


def test_the_buffer_is_written_before_the_next_packet_is_there():
    # The second iteration, of another line, has no packet until tick 9.
    cfg = config(direction="store", count0=2, stride0=LINE)
    done, grants = store(cfg, rows(2), offer=lambda name, t: t in (0, 9))
    assert grants == [1, 10] and steps(done) == [0, 9]


@pytest.mark.parametrize(
    "base, fields",
    [(2, {"words": 1}), (8, {"words": 3}), (1, {"words": 1, "format": "bf16"}), (0, {"words": 0})],
)
def test_elements_that_are_not_in_a_line_are_refused(base, fields):
    cfg = config(**fields)
    with pytest.raises(ValueError, match=r"multiples of their size|words must be in 1\.\.4"):
        kernels.agcu_load(cfg, [base], image(), LANES)
    with pytest.raises(AssertionError, match="not in one line"):
        run(gate(), {"config": cfg, "base": base}, {}, ["load"], every=Memory(image()).tick)


# ---- random -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_random_patterns_match_the_kernel(seed):
    random = Random(seed)
    form = random.choice(rdu.FORMATS)
    size = 4 if form == "word" else 2
    words = random.choice((1, 2, 4))
    grid = words * size  # a power of two: never across lines
    counts = [random.randint(1, 4) for _ in range(3)]
    strides = [grid * random.randrange(-3, 4) for _ in range(3)]
    base = 8 * LINE + grid * random.randrange(8)
    cfg = config(
        direction=random.choice(("load", "store")), words=words, format=form, sequence=65534, flow=3,
        last_level=random.randrange(4), interval=random.choice((1, 1, 3)), argument=2,
        signal=random.randrange(4), signal_level=random.randrange(4),
        **{f"count{n}": c for n, c in enumerate(counts)}, **{f"stride{n}": s for n, s in enumerate(strides)},
    )  # fmt: skip
    willing = random.choice((0.3, 0.8, 1))
    will = {t: random.random() < willing for t in range(400)}
    works = random.choice(((1, 1), (3, 5)))
    in_flight = random.choice((2, 8))
    if cfg["direction"] == 1:
        load(cfg, base, seed % 7, works=works, in_flight=in_flight, accept=lambda name, t: will.get(t, True))
    else:
        n = int(np.prod(counts))
        store(cfg, rows(n, seed), base, seed % 7, works=works, in_flight=in_flight,
              offer=lambda name, t: will.get(t, True))  # fmt: skip


# ---- channels -----------------------------------------------------------------------------------------


def granted(masks, works=(1, 1), count=3):
    """Grants at each tick behind `start`."""
    component = Channel(params=params(), count=count)
    seen = []

    async def bench(ctx):
        for k in range(count):
            ctx.set(component.lines[k], k + 5)
        ctx.set(component.p, works[0])
        ctx.set(component.q, works[1])
        ctx.set(component.requests, (1 << count) - 1)
        ctx.set(component.start, 1)
        await ctx.tick()
        ctx.set(component.start, 0)
        for mask in masks:
            ctx.set(component.requests, mask)
            seen.append(ctx.get(component.grants))
            assert ctx.get(component.read_enable) == (seen[-1] != 0)
            if seen[-1]:
                assert ctx.get(component.read_line) == seen[-1].bit_length() - 1 + 5
            await ctx.tick()

    simulate(component, bench)
    return seen


def test_a_channel_serves_its_agcus_in_turn():
    assert granted([7, 7, 7, 7, 5, 5, 6, 0, 7]) == [1, 2, 4, 1, 4, 1, 2, 0, 4]


def test_the_turn_moves_only_when_the_channel_works():
    assert granted([7] * 7, works=(2, 5)) == [1, 0, 0, 2, 0, 4, 0]


def test_channels_that_are_refused():
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        Channel(params=params(), count=0)


def test_the_tier_is_named_in_the_request():
    component = Agcu(params=params())
    seen = []

    async def bench(ctx):
        for tier in range(3):
            ctx.set(component.config, config(tier=tier))
            ctx.set(component.start, tier == 0)
            await ctx.tick()
            seen.append(ctx.get(component.request))

    simulate(component, bench)
    assert seen == [1, 2, 4]
