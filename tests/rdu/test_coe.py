"""Compositions of experts: who is in HBM when, where everything lies, and the closed forms of switching."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Mapped, Scenario, TagInfo
from tilewright.arch.system import load_roofline
from tilewright.mappers.rdu.coe import Copy, Regions, Run, Wait, copy_ticks, map_composition, schedule
from tilewright.run import run
from tilewright.workloads.models import Composition, load_model

SAMBA = load_model("samba-coe")
LINE = 64


def node(*sets):
    tree = specs.apply_sets(specs.load_tree("sn40l-node", ["rdu"]), sets)
    return specs.build(rdu.RduSpec, tree, "node")


# ---- a mapper of one model, as small as can be ---------------------------------------------------------

WEIGHTS, CACHE, SPILL = 5, 2, 3  # lines of an expert; a prompt more makes the cache a line longer
AGCU, ARGS = rdu.CONFIG_AGCU, rdu.ARGS


def map_one(spec, model, scenario, mapping):
    """A prompt's kernel and one for each token, which needs no configuration of its own.

    Argument register 2 is the first line of the weights, 3 the last; 4 the first of the cache, 6 of what is spilt to
    DDR; 7 is an address of another socket.
    """
    cache = CACHE + scenario.batch - 1
    tiers = {2: "hbm", 3: "hbm", 4: "hbm", 6: "ddr", 7: "remote"}
    values = {2: 0, 3: (WEIGHTS - 1) * LINE, 4: WEIGHTS * LINE, 6: LINE, 7: 1 * LINE}
    units = [
        AGCU.make(agcu=i, tier=rdu.TIERS.index(tier), argument=register, tag=0)
        for i, (register, tier) in enumerate(tiers.items())
    ]
    args = np.concatenate([ARGS.make(index=i, value=v) for i, v in values.items()])
    segments = []
    for i in range((scenario.prompt > 0) + scenario.generate):
        ops = [rdu.CODE.make("PROGRAM_LOAD", section=0)] if i == 0 else []
        ops += [rdu.CODE.make("ARGUMENT_LOAD", section=i), rdu.CODE.make("KERNEL_EXECUTE", tag=1)]
        regions = {"config.agcu": np.concatenate(units)} if i == 0 else {}
        segments.append(Segment({**regions, "args": args, "code": np.concatenate(ops)}, label=f"pass {i}"))
    return Mapped(
        program=Program(rdu.ISA, segments, ["load", "layer"]),
        tags=[TagInfo("load", "load", -1), TagInfo("layer 0", "layer", 0)],
        steps=len(segments),
        document={
            "memory": {
                "hbm": {"weights": WEIGHTS * LINE, "cache": cache * LINE - 1},
                "ddr": {"spilt": SPILL * LINE},
            },
            "seen": dict(mapping or {}),
        },
        notes=[f"batch {scenario.batch}"],
        assumed=["one thing"],
    )


def composition(experts):
    return replace(SAMBA, composition=Composition(SAMBA.composition.router, experts))


def compose(requests, *, experts=10, regions=None, generate=1, sets=(), **mapping):
    scenario = Scenario(prompt=4, generate=generate, batch=len(requests))
    mapping["requests"] = requests
    if regions is not None:
        mapping["regions"] = regions
    return map_composition(node(*sets), composition(experts), scenario, mapping, map_one)


# ---- closed forms -------------------------------------------------------------------------------------


def test_switching_an_expert_takes_its_bytes_at_the_nodes_rate():
    # 6738415616 parameters of 2 B over 8 sockets are 26321936 lines of 64 B, 13160968 beats of two. At 125 GB/s and
    # 1600 MHz a tick has 125 / (1.6 * 128) = 625 / 1024 beats; the latency of 200 ns is 320 ticks.
    spec = node()
    total = load_model("llama-2-7b").parameters["total"] * 2
    lines = total // 8 // LINE
    assert lines == 26_321_936
    ticks = copy_ticks(spec, lines)
    assert ticks == 1 + ceil(13_160_967 * 1024 / 625) + 320 + 2 == 21_563_252
    seconds = float(ticks * spec.tick.period_s)
    assert seconds == pytest.approx(13.476831e9 / 1e12, rel=1e-4)  # 13.5 ms at 1.0 TB/s
    # From a host over 32 and 64 GB/s (DGX A100, H100): printed are 31 x and 15 x.
    assert 30 < total / 32e9 / seconds < 32
    assert 15 < total / 64e9 / seconds < 16


def test_switching_at_the_peak_of_ddr():
    # Llama 3.1 8B, 16.06 GB, at 8 x 200 GB/s: "0.01 s".
    spec = node("node.ddr_to_hbm_gb_per_s=200")
    lines = ceil(load_model("llama-3.1-8b").parameters["total"] * 2 / 8 / LINE)
    assert float(copy_ticks(spec, lines) * spec.tick.period_s) == pytest.approx(0.01004, rel=1e-3)


@pytest.mark.parametrize(("lines", "beats"), [(1, 1), (2, 1), (3, 2), (4, 2), (1000, 500), (1001, 501)])
def test_ticks_of_a_copy_by_walking_its_beats(lines, beats):
    spec = node()
    p, q = spec.copy_rate.numerator, spec.copy_rate.denominator
    t = left = -1
    left = beats
    while left:
        t += 1
        left -= t * p % q < p
    assert copy_ticks(spec, lines) == 1 + t + spec.latencies[1] + 2


def test_distinct_experts_of_a_batch():
    # E (1 - (1 - 1/E)^BS) for 150 experts and 8 prompts: 150 * (8/150 - 28/150^2 + 56/150^3 - ...) = 7.8158.
    expected = 150 * (1 - (149 / 150) ** 8)
    assert expected == pytest.approx(7.8158, abs=1e-4)
    draws = np.random.default_rng(0).integers(150, size=(4000, 8))
    copied = [sum(isinstance(e, Copy) for e in schedule([row], 8)) for row in draws.tolist()]
    assert np.mean(copied) == pytest.approx(expected, abs=0.025)  # 0.42 / sqrt(4000) is 0.007


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize(("held", "experts"), [(5, 20), (15, 20), (38, 150)])
def test_hit_rate_of_uniform_traffic_is_the_share_that_is_held(held, experts, overlapped):
    requests = np.random.default_rng(1).integers(experts, size=20_000).tolist()
    events = schedule([[e] for e in requests], held, range(held), overlapped)
    missed = sum(isinstance(e, Copy) for e in events) / len(requests)
    assert 1 - missed == pytest.approx(held / experts, abs=0.012)  # 0.5 / sqrt(20000) is 0.0035


# ---- the schedule -------------------------------------------------------------------------------------


def test_the_least_recently_used_gives_way():
    held = Regions(2, [7])
    assert 7 in held and 8 not in held
    assert held.use(8) == (1, True)
    assert held.use(7) == (0, False)
    assert held.use(9) == (1, True)  # 8 was used before 7
    assert held.use(8, keep=[7]) == (1, True)  # now 7 is the oldest, but kept
    assert Regions(2, [1, 2, 3]).use(3) == (1, False)  # of too many the last ones are there


def test_exposed_copies_what_a_round_needs_at_once():
    assert schedule([[3, 5, 3]], regions=2) == [
        Run(None), Copy(3, 0), Copy(5, 1), Wait(), Run(0), Run(1), Run(0),
    ]  # fmt: skip
    # With one region: as many as there is room for, and 3 a second time.
    assert schedule([[3, 5, 3]], regions=1) == [
        Run(None), Copy(3, 0), Wait(), Run(0), Copy(5, 0), Wait(), Run(0), Copy(3, 0), Wait(), Run(0),
    ]  # fmt: skip
    # 3 ran last, so 5 goes.
    assert schedule([[3, 5, 3], [6]], regions=2)[-3:] == [Copy(6, 1), Wait(), Run(1)]
    # What the round needs is not given up for it: 4 goes, although 3 was used before it.
    assert schedule([[6, 3]], regions=2, resident=[3, 4]) == [
        Run(None), Copy(6, 1), Wait(), Run(1), Run(0),
    ]  # fmt: skip


def test_overlapped_copies_the_next_while_one_runs():
    assert schedule([[3, 5, 5, 6], [6, 3]], regions=2, overlapped=True) == [
        Run(None), Copy(3, 0), Wait(), Copy(5, 1), Run(0), Wait(), Run(1), Copy(6, 0), Run(1), Wait(), Run(0),
        Run(None), Copy(3, 1), Run(0), Wait(), Run(1),
    ]  # fmt: skip


# ---- the program, walked over memories that know what they hold ---------------------------------------


def walk(mapped, spec, experts, requests, at_once):
    """Copy tags of lines as the program copies lines, and look at what each kernel's addresses find."""
    segments = list(mapped.program.segments)
    hbm, ddr = {}, {}
    spill = 2 * SPILL
    for e in range(experts):
        for i in range(WEIGHTS):
            ddr[spill + e * WEIGHTS + i] = (e, i)
    router = WEIGHTS + CACHE + at_once - 1
    moving = []
    arguments, runs = {}, []
    loaded = None
    for segment in segments:
        for op in segment.regions["code"]:
            name = rdu.OPS[op["op"]].name
            if name == "COPY":
                assert (op["source"], op["target"]) == (1, 0)
                new = {int(op["to"]) + i: ddr[int(op["from"]) + i] for i in range(op["lines"])}
                assert op["lines"] == WEIGHTS and min(new) >= router + CACHE
                assert max(new) < spec.memory.hbm.bytes // LINE
                moving.append(new)
                for line in new:
                    hbm.pop(line, None)
            elif name == "WAIT":
                for new in moving:
                    hbm |= new
                moving = []
            elif name == "PROGRAM_LOAD":
                loaded = segments[op["section"]].regions["config.agcu"]
                arguments = {}
            elif name == "ARGUMENT_LOAD":
                records = segments[op["section"]].regions["args"]
                arguments |= dict(zip(records["index"].tolist(), records["value"].tolist(), strict=True))
            else:
                assert (loaded["tag"] == op["tag"] - 1).all()
                part = mapped.tags[op["tag"]].op.split()[0]
                line = {register: value // LINE for register, value in arguments.items()}
                assert line[7] == 1
                if part == "router":
                    assert (line[2], line[3], line[4], line[6]) == (0, WEIGHTS - 1, WEIGHTS, 1)
                    runs.append(None)
                else:
                    assert (line[4], line[6]) == (router, SPILL + 1)
                    (e, first), (f, last) = hbm[line[2]], hbm[line[3]]
                    assert (e, first, last) == (f, 0, WEIGHTS - 1)
                    runs.append(e)
    return runs


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_every_prompt_meets_its_expert(data):
    experts = data.draw(st.integers(1, 6))
    at_once = data.draw(st.integers(1, 4))
    rounds = data.draw(st.integers(1, 3))
    size = at_once * rounds
    requests = data.draw(st.lists(st.integers(0, experts - 1), min_size=size, max_size=size))
    switching = data.draw(st.sampled_from(["exposed", "overlapped"]))
    low = min(experts, 2) if switching == "overlapped" else 1
    regions = data.draw(st.integers(low, experts))
    generate = data.draw(st.integers(0, 2))
    lines = WEIGHTS + CACHE + at_once - 1 + CACHE + regions * WEIGHTS
    sets = [f"memory.hbm.bytes={lines * LINE}", f"memory.ddr.bytes={(2 * SPILL + experts * WEIGHTS) * LINE}"]
    mapped = compose(
        requests, experts=experts, switching=switching, round=at_once, generate=generate, sets=sets
    )
    assert mapped.document["regions"] == regions  # what there is room for
    expected = []
    for i in range(rounds):
        expected.append(None)
        for e in requests[i * at_once : (i + 1) * at_once]:
            expected += [e] * (1 + generate)
    assert walk(mapped, node(*sets), experts, requests, at_once) == expected
    steps = list(mapped.step_of)
    assert len(steps) == mapped.steps == len(list(mapped.program.segments))
    assert steps == sorted(steps) and set(steps) == set(range(rounds + size * (1 + generate)))


def test_runs_of_a_region_are_the_same_segments():
    mapped = compose([4, 5, 4], regions=2)
    segments = list(mapped.program.segments)
    runs = [s for s in segments if "args" in s.regions]
    router, first, second, third = runs[0], runs[1:3], runs[3:5], runs[5:7]
    assert all(a is b for a, b in zip(first, third, strict=True))
    assert first[0] is not second[0] and first[0].regions["args"] is not second[0].regions["args"]
    assert first[0].regions["config.agcu"] is second[0].regions["config.agcu"]
    assert first[0].regions["config.agcu"]["tag"].tolist() == [2] * 5
    assert router.regions["config.agcu"]["tag"].tolist() == [0] * 5
    assert [t.op for t in mapped.tags] == [
        "router load", "router layer", "expert load", "expert layer", "copy expert", "wait for expert",
    ]  # fmt: skip


def test_what_a_person_reads():
    mapped = compose([4, 5, 4, 9], regions=3, effort=1, expert={"effort": 2})
    assert mapped.document["router"]["seen"] == {"effort": 1}
    assert mapped.document["expert"]["seen"] == {"effort": 2}
    notes = " | ".join(mapped.notes)
    assert "4 requests, 3 experts copied" in notes and "1 of 4 found theirs in HBM (25 %)" in notes
    assert "router: batch 4 | expert: batch 1" in notes
    assert mapped.assumed == ["no expert is in HBM at the start", "one thing"]
    again = compose([4, 5, 4, 9], **{k: v for k, v in mapped.document.items() if k != "requests"})
    assert [s.regions["code"].tolist() for s in again.program.segments] == [
        s.regions["code"].tolist() for s in mapped.program.segments
    ]
    warm = compose([4, 5, 4, 9], resident=[9, 4])
    assert "2 of 4" not in " ".join(warm.notes) and "3 of 4 found theirs" in " ".join(warm.notes)


def test_requests_are_drawn_from_the_seed():
    def drawn(seed):
        scenario = Scenario(prompt=4, generate=0, batch=64, seed=seed)
        mapped = map_composition(node(), composition(10), scenario, None, map_one)
        assert f"the expert of each prompt: drawn uniformly, seed {seed}" in mapped.assumed
        return mapped.document["requests"]

    assert drawn(3) == drawn(3) != drawn(4)
    assert set(drawn(3)) == set(range(10))  # one of ten is missed with a chance of about 1 %


# ---- sizes --------------------------------------------------------------------------------------------


def full(model, tokens):
    """A mapper whose program is of no interest, of sizes that are."""

    def mapped(spec, one, scenario, mapping):
        small = map_one(spec, one, scenario, mapping)
        parts = {
            "weights": one.parameters["total"] * 2 // spec.node.sockets,
            "cache": tokens * scenario.batch * one.kv_elements_per_token * 2 // spec.node.sockets,
        }
        return replace(small, document={"memory": {"hbm": parts}})

    return mapped


def test_experts_that_a_node_holds():
    # A socket: 64 GiB = 68.719 GB of HBM, 1.6846 GB of an expert, as much of the router, 276 tokens of 0.5 MiB / 8
    # each of cache: 145 MB for the router's 8 prompts and 18 MB for an expert's.
    # (68.719 - 1.685 - 0.145 - 0.018) / 1.6846 = 39.7; DDR: 1649.27 / 1.6846 = 979.03.
    scenario = Scenario(prompt=256, generate=20, batch=8)
    mapped = map_composition(node(), SAMBA, scenario, None, full(SAMBA, 276))
    assert mapped.document["regions"] == 39
    assert "weights of an expert 13.48 GB" in mapped.notes[0] and "HBM has room for 39" in mapped.notes[0]
    assert mapped.notes[1] == "DDR has room for 979 experts and holds 150"
    assert "copied in 13.48 ms each, exposed" in mapped.notes[2]


def test_too_little_memory():
    own = WEIGHTS + CACHE + CACHE + 1  # router for two prompts, and the experts' cache
    fits = [f"memory.hbm.bytes={(own + 2 * WEIGHTS) * LINE}"]
    compose([1, 2], sets=fits)
    with pytest.raises(
        UserError, match=r"8 sockets each need 1\.6e-06 GB of HBM \(router .* 3 x .*1\.28e-06 GB"
    ):
        compose([1, 2], regions=3, sets=fits)
    less = [f"memory.hbm.bytes={(own + 2 * WEIGHTS - 1) * LINE}"]
    compose([1, 2], sets=less)  # one after the other
    with pytest.raises(UserError, match="2 x"):
        compose([1, 2], sets=less, switching="overlapped")
    compose([1, 1], sets=less, switching="overlapped")
    with pytest.raises(UserError, match="1 x"):
        compose([1, 2], sets=[f"memory.hbm.bytes={(own + WEIGHTS - 1) * LINE}"])
    ddr = 2 * SPILL + 10 * WEIGHTS
    compose([1], sets=[f"memory.ddr.bytes={ddr * LINE}"])
    with pytest.raises(UserError, match=r"need 3\.584e-06 GB of DDR \(10 x 3\.2e-07 GB of experts' weights"):
        compose([1], sets=[f"memory.ddr.bytes={(ddr - 1) * LINE}"])


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"switching": "exposd"}, r"switching: 'exposd' is unknown; did you mean exposed\?"),
        ({"round": 3}, "round must be a divisor of the 2 prompts of the batch, not 3"),
        ({"round": True}, "round must be a divisor .* not True"),
        ({"regions": 11}, r"regions must be in 1\.\.10, not 11"),
        ({"regions": 1, "switching": "overlapped"}, "regions must be at least 2 for overlapped switching"),
        ({"resident": [1, 1]}, r"resident must name each expert once, not \[1, 1\]"),
        ({"resident": "all"}, "resident must be a list of experts, not 'all'"),
        ({"requests": [1]}, "requests must name an expert for each of the 2 prompts of the batch, not 1"),
        ({"requests": [1, 10]}, r"requests must list experts in 0\.\.9, not 10"),
        ({"requests": [1, 0.5]}, r"requests must list experts in 0\.\.9, not 0\.5"),
        ({"router": 3}, "router must be a mapping of keys to values, not 3"),
    ],
)
def test_values_that_are_not_allowed(mapping, message):
    with pytest.raises(UserError, match=message):
        map_composition(node(), composition(10), Scenario(prompt=4, batch=2), mapping, map_one)


@pytest.mark.parametrize(("context", "prompt"), [(1, 1), (0, 0)])
def test_a_composition_is_run_from_the_prompt(context, prompt):
    with pytest.raises(UserError, match=f"--context 0, not {prompt} and {context}"):
        scenario = Scenario(context=context, prompt=prompt)
        map_composition(node(), composition(10), scenario, None, map_one)


def test_more_segments_than_can_be_named():
    with pytest.raises(UserError, match="more than 65536 segments"):
        compose([1, 2], generate=33_000)


def test_other_machines_refuse():
    scenario = Scenario(prompt=4)
    for name, slug in (("pim-gpt", "pim"), ("lut-a100-4x", "lut")):
        with pytest.raises(UserError, match=f"samba-coe: target {slug} does not support compositions"):
            run(load_spec(name), SAMBA, scenario)
    with pytest.raises(UserError, match="samba-coe: roofline a100 does not support compositions"):
        run(load_roofline("a100"), SAMBA, scenario)
