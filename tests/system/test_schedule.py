"""The system scheduler: hand-placed graphs, refusals, and laws over random graphs against the oracle."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.system import oracle
from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError
from tilewright.arch.system import Device, Link, System, Task, common_clock, resolve
from tilewright.sim.system import CAUSES, embed, in_order, schedule

NS = Clock.from_ns(Fraction(1))
# One tick of the drive is 1.5 ns; the link moves 32 B a tick and its latency of 1.2 ns covers two ticks.
DRIVE = Device("drive", Clock.from_ns(Fraction("1.5")))
PCIE = Link("pcie", Fraction(32 * 10**9), Fraction("1.2e-9"))
SYSTEM = System(NS, (Device("gpu"), DRIVE), (PCIE,))


def busy(use):
    return use["busy"], use["dependency"], use["not_before"], use["idle"]


# ---- by hand ------------------------------------------------------------------------------------------


def test_a_chain_is_the_sum():
    chain = schedule(
        SYSTEM,
        [
            Task(name="q", device="gpu", duration_ticks=10),
            Task(name="send", device="pcie", bytes=100, after=("q",)),
            Task(name="attend", device="drive", duration_ticks=5, after=("send",)),
        ],
    )
    # q 10; 100 B / 32 = 3.125 -> 4 ticks and 2 of latency; 5 * 1.5 = 7.5 -> 8. 10 + 4 + 2 + 8 = 24.
    assert chain.ticks == 24
    assert [t[2:] for t in chain.tasks] == [(0, 0, 10, 10), (10, 10, 14, 16), (16, 16, 24, 24)]
    # The drive waits 16 ticks for its only task; the link 10; after its last task each is idle.
    assert busy(chain.usage["gpu"]) == (10, 0, 0, 14)
    assert busy(chain.usage["pcie"]) == (4, 10, 0, 10)
    assert busy(chain.usage["drive"]) == (8, 16, 0, 0)


def test_a_link_sends_the_next_while_the_last_is_under_way():
    pair = [Task(name=n, device="pcie", bytes=64) for n in "ab"]
    # Two ticks each: [0, 2) and [2, 4); the latency of 2 is paid once at the end: 4 + 2.
    assert [t[2:] for t in schedule(SYSTEM, pair).tasks] == [(0, 0, 2, 4), (0, 2, 4, 6)]


def test_first_ready_first_served_then_priority_then_list():
    tasks = [
        Task(name="late", device="gpu", duration_ticks=1, not_before=1, priority=-9),
        Task(name="c", device="gpu", duration_ticks=2, priority=1),
        Task(name="a", device="gpu", duration_ticks=2),
        Task(name="b", device="gpu", duration_ticks=2),
    ]
    # a and b share the lower priority and go in list order, then c; `late` became ready after all three.
    starts = {t.name: t.start for t in schedule(SYSTEM, tasks).tasks}
    assert starts == {"a": 0, "b": 2, "c": 4, "late": 6}
    # In order of priority: `late` is first and holds the others up until tick 1.
    starts = {t.name: t.start for t in in_order(SYSTEM, tasks).tasks}
    assert starts == {"late": 1, "a": 2, "b": 4, "c": 6}


def test_stalls_before_arrival_of_work():
    timed = schedule(SYSTEM, [Task(name="x", device="gpu", duration_ticks=3, not_before=4)])
    assert busy(timed.usage["gpu"]) == (3, 0, 4, 0)
    assert busy(timed.usage["drive"]) == (0, 0, 0, 7)


def test_a_barrier_occupies_nothing():
    tasks = [
        Task(name="long", device="gpu", duration_ticks=9),
        Task(name="short", device="drive", duration_ticks=2),
        Task(name="barrier", device="gpu", duration_ticks=0, after=("short",)),
        Task(name="next", device="drive", duration_ticks=2, after=("barrier",)),
    ]
    for run in (schedule, in_order):
        done = run(SYSTEM, tasks)
        assert done.task("barrier")[2:] == (3, 3, 3, 3)  # 2 * 1.5 = 3, in the middle of `long`
        assert done.task("next").start == 3
        assert done.ticks == 9


def test_no_tasks_take_no_time():
    empty = schedule(SYSTEM, [])
    assert empty.ticks == 0
    assert busy(empty.usage["gpu"]) == (0, 0, 0, 0)


def test_embed_puts_a_device_timeline_inside_its_task():
    tasks = [
        Task(name="q", device="gpu", duration_ticks=10),
        Task(name="attend", device="drive", duration_ticks=7, after=("q",)),
    ]
    placed = schedule(SYSTEM, tasks).task("attend")
    # Tags [0, 3) and [3, 7) of 1.5 ns: 0..4.5 and 4.5..10.5 after tick 10; firsts down, ends up.
    assert embed(SYSTEM, placed, [0, 3], [3, 7]) == ([10, 14], [15, 21])
    assert placed.end == 21
    sent = schedule(SYSTEM, [Task(name="s", device="pcie", bytes=1)]).task("s")
    with pytest.raises(UserError, match="pcie is not a device"):
        embed(SYSTEM, sent, [0], [1])


def test_common_clock_rounds_nothing():
    clocks = [Clock.from_mhz(Fraction(1410)), Clock.from_mhz(Fraction(1000)), Clock.from_ns(Fraction("1.5"))]
    tick = common_clock(clocks)
    assert all((c.period_s / tick.period_s).denominator == 1 for c in clocks)
    # 1/1.41 = 100/141, 1 and 3/2 ns: the greatest common divisor is gcd(200, 282, 423)/282 = 1/282 ns.
    assert tick.period_s == Fraction(1, 282 * 10**9)


def test_timeline_tells_the_same():
    tasks = [
        Task(name="q", device="gpu", duration_ticks=10),
        Task(name="send", device="pcie", bytes=100, after=("q",)),
    ]
    done = schedule(SYSTEM, tasks)
    timeline = done.timeline()
    assert timeline.ticks == 16
    assert timeline.spans[["first", "end"]].tolist() == [(0, 10), (10, 16)]
    assert {u: timeline.unit(u) for u in timeline.units} == done.usage
    assert timeline.bound_by() == "gpu"


# ---- refusals -----------------------------------------------------------------------------------------


def task(name="t", device="gpu", **more):
    return Task(name=name, device=device, **({"duration_ticks": 1} | more))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: [task(device="gpv")], "task t: unknown device 'gpv': did you mean gpu?"),
        (lambda: [task("one"), task("two", after=("onr",))], "unknown task 'onr': did you mean one?"),
        (lambda: [task(), task()], "task t: the name is given twice"),
        (lambda: [task(device="pcie")], "pcie is a link and needs bytes"),
        (lambda: [task(duration_ticks=None, bytes=4)], "gpu is a device and needs duration_ticks"),
        (lambda: [task(bytes=4)], "task t: give either duration_ticks or bytes"),
        (lambda: [task(duration_ticks=None)], "task t: give either duration_ticks or bytes"),
        (lambda: [task(duration_ticks=-1)], "task t: duration_ticks must not be negative, not -1"),
        (lambda: [task(duration_ticks=1.5)], "task t: duration_ticks must be an integer, not 1.5"),
        (lambda: [task(not_before=-1)], "task t: not_before must not be negative, not -1"),
        (lambda: [task(priority="high")], "task t: priority must be an integer, not 'high'"),
        (lambda: [task(after="ab")], "task t: after must be a tuple of names, not 'ab'"),
        (lambda: [task(after=("t",))], "tasks wait for each other: t -> t"),
        (
            lambda: [
                task("a", after=("c",)),
                task("b", after=("a",)),
                task("c", after=("b",)),
                task("d", after=("c",)),
            ],
            "tasks wait for each other: a -> b -> c -> a",
        ),
        (
            lambda: [task(f"t{i}", after=(f"t{(i - 1) % 20}",)) for i in range(20)],
            r"t0 -> t1 -> t2 -> t3 -> \(13 more\) -> t17 -> t18 -> t19 -> t0$",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(UserError, match=message):
        schedule(SYSTEM, make())


def test_in_order_refuses_an_order_that_waits_for_itself():
    tasks = [task("first", after=("second",)), task("second")]
    assert schedule(SYSTEM, tasks).ticks == 2
    with pytest.raises(UserError, match="first -> second -> first"):
        in_order(SYSTEM, tasks)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: System(NS, (Device("x"),), (Link("x", Fraction(1)),)),
            "two devices or links are called 'x'",
        ),
        (lambda: Link("k", Fraction(0)), "link k: bytes_per_s must be positive, not 0"),
        (lambda: Link("k", "fast"), "link k: bytes_per_s: must be a finite number, not 'fast'"),
        (lambda: Link("k", 1, -1), "link k: latency_s must not be negative, not -1"),
        (lambda: common_clock([]), "at least one clock"),
        (lambda: schedule(SYSTEM, [task("send")]).task("sent"), "unknown task 'sent': did you mean send?"),
    ],
)
def test_bad_systems_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---- laws ---------------------------------------------------------------------------------------------


@st.composite
def graphs(draw, distinct=False):
    """Up to nine tasks whose predecessors come earlier in the list; barriers and late arrivals among them."""
    n = draw(st.integers(1, 9))
    priorities = (
        draw(st.permutations(range(n))) if distinct else draw(st.lists(st.integers(0, 2), min_size=n))
    )
    tasks = []
    for i in range(n):
        device = draw(st.sampled_from(SYSTEM.servers()))
        size = draw(st.integers(0, 5))
        work = {"bytes": 24 * size} if device == "pcie" else {"duration_ticks": size}
        tasks.append(
            Task(
                name=f"t{i}",
                device=device,
                after=tuple(f"t{j}" for j in range(i) if draw(st.integers(0, 3)) == 0),
                not_before=draw(st.sampled_from([0, 0, 0, 1, 4, 17])),
                priority=priorities[i],
                **work,
            )
        )
    return tasks


def starts(done):
    return {t.name: t.start for t in done.tasks}


@settings(deadline=None, max_examples=200)
@given(graphs().flatmap(st.permutations))
def test_equals_the_oracle(tasks):
    done = schedule(SYSTEM, tasks)
    times, usage, ticks = oracle.first_ready(SYSTEM, tasks)
    assert {t.name: (t.start, t.arrival) for t in done.tasks} == times
    assert done.ticks == ticks
    assert done.usage == usage


@settings(deadline=None, max_examples=100)
@given(graphs())
def test_in_order_equals_the_oracle(tasks):
    tasks = [replace(t, priority=0) for t in tasks]
    assert starts(in_order(SYSTEM, tasks)) == oracle.listed_order(SYSTEM, tasks)


@settings(deadline=None, max_examples=100)
@given(graphs())
def test_no_schedule_beats_the_critical_path_or_the_load(tasks):
    alone = oracle.longest_path(SYSTEM, tasks)
    for done in (schedule(SYSTEM, tasks), in_order(SYSTEM, [replace(t, priority=0) for t in tasks])):
        assert all(t.arrival >= alone[t.name] for t in done.tasks)
        for server, use in done.usage.items():
            load = sum(oracle.costs(SYSTEM, t)[0] for t in tasks if t.device == server)
            assert use["busy"] == load <= done.ticks
            assert load + sum(use[c] for c in CAUSES) == done.ticks
            assert min(use.values()) >= 0


@settings(deadline=None, max_examples=100)
@given(graphs(distinct=True), st.randoms(use_true_random=False))
def test_insertion_order_is_immaterial_when_priorities_differ(tasks, random):
    shuffled = random.sample(tasks, len(tasks))
    for run in (schedule, lambda s, g: in_order(s, [replace(t, priority=int(t.name[1:])) for t in g])):
        assert starts(run(SYSTEM, tasks)) == starts(run(SYSTEM, shuffled))


@settings(deadline=None, max_examples=100)
@given(graphs(), st.data())
def test_in_a_fixed_order_a_dependency_brings_nothing_forward(tasks, data):
    tasks = [replace(t, priority=0) for t in tasks]
    later = data.draw(st.integers(0, len(tasks) - 1))
    earlier = data.draw(st.integers(0, later))
    more = list(tasks)
    if earlier < later:
        more[later] = replace(more[later], after=(*more[later].after, f"t{earlier}"))
    before, after = starts(in_order(SYSTEM, tasks)), starts(in_order(SYSTEM, more))
    assert all(after[name] >= before[name] for name in before)


@settings(deadline=None, max_examples=100)
@given(graphs())
def test_replaying_the_order_that_was_chosen_gives_the_same_times(tasks):
    done = schedule(SYSTEM, tasks)
    begin = starts(done)
    replayed = [replace(t, priority=0) for t in sorted(tasks, key=lambda t: begin[t.name])]
    assert starts(in_order(SYSTEM, replayed)) == begin


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_chains_sum(durations):
    chain = [
        Task(
            name=f"t{i}", device=("gpu", "drive")[i % 2], duration_ticks=d, after=(f"t{i - 1}",) if i else ()
        )
        for i, d in enumerate(durations)
    ]
    assert schedule(SYSTEM, chain).ticks == sum(resolve(SYSTEM, chain).service)
