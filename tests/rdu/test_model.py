"""The cycle model: equal to the RTL tick for tick, on random sections; and what it says where nothing can go on."""

from random import Random

import numpy as np
import pytest

from tests.rdu import test_top
from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import ISA, dynamic_flow, is_pcu
from tilewright.rtl.rdu.run import Case, build_rtl, run_cases
from tilewright.sim.rdu import execute, simulate

LOCAL = len(rdu.MESH)
NORTH, EAST, SOUTH, WEST = range(LOCAL)
# The structure of `test_top.py`: one build of the RTL serves both.
SETS = (
    *("grid.columns=2", "grid.rows=2", "agcu.per_side=1", "agcu.in_flight=8"),
    *("pcu.lanes=4", "pcu.stages=2", "pcu.registers=8", "pcu.vector_inputs=2", "pcu.scalar_inputs=1"),
    *("pcu.systolic=true", "pcu.exp_terms=2", "pcu.reciprocal_iterations=1", "pcu.rsqrt_iterations=1"),
    *("pmu.banks=8", "pmu.bytes=2048", "network.flows=8", "network.fifo_depth=4"),
    *("memory.hbm.bytes=2048", "memory.hbm.gb_per_s=16", "memory.hbm.latency_ns=5"),
    *("memory.ddr.bytes=2048", "memory.ddr.channels=4", "memory.ddr.latency_ns=9"),
    *("node.copy_lines=2", "node.ddr_to_hbm_gb_per_s=32/3"),
    *("launch.program_load_us=0.010", "launch.argument_load_us=0.003"),
    *("launch.host_launch_us=0.007", "launch.hardware_launch_us=0.002"),
)
MEMORY = 2048  # bytes of HBM and DDR


def spec_of(*sets):
    """Plasticine with keys changed."""
    return specs.build(
        rdu.RduSpec, specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), list(sets)), "small"
    )


def records(region, rows):
    """Records with names in place of numbers where a field has any."""
    record = ISA.record(region)

    def number(name, value):
        return record.by_name[name].names.index(value) if isinstance(value, str) else value

    made = [record.make(**{k: number(k, v) for k, v in row.items()}) for row in rows]
    return np.concatenate(made) if made else np.zeros(0, record.dtype)


class Sketch:
    """A section written unit by unit; packets go in dimension order, several sinks in one tree of static flows."""

    def __init__(self, p):
        self.p = p
        self.rows = {record.region: [] for record in rdu.CONFIGS}
        self.flows = {}

    def unit(self, kind, x, y, **fields):
        self.rows[f"config.{kind}"].append({"x": x, "y": y, **fields})

    def pcu(self, x, y, **fields):
        self.unit("pcu", x, y, **{"mode": "simd", **fields})

    def pmu(self, x, y, **fields):
        words = self.p.banks * self.p.bank_words
        self.unit("pmu", x, y, **{"words": words, **fields})

    def agcu(self, i, **fields):
        self.rows["config.agcu"].append({"agcu": i, **fields})

    def place(self, i):
        """Switch and port of an AGCU."""
        side, y = divmod(i, self.p.agcus_per_side)
        return (self.p.columns - 1 if side else 0), y, (EAST if side else WEST)

    def token(self, source, output, sink, into):
        """`source` and `sink` are (x, y), a PMU's read side's numbers from 4 on; ints are AGCUs."""
        row = {"output": output, "input": into}
        for end, prefix in ((source, ""), (sink, "to_")):
            agcu = isinstance(end, int)
            row[f"{prefix}x"], row[f"{prefix}y"] = self.place(end)[:2] if agcu else end
            row["from_agcu" if not prefix else "to_agcu"] = int(agcu)
        self.rows["config.token"].append(row)

    def static(self, source, sinks, network="vector"):
        """The flow that leads from (x, y, port) to all of the sinks, (x, y, output port of the switch) each."""
        x, y, port = source
        flow = self.flows.setdefault(network, 0)
        self.flows[network] += 1
        table = {}
        for tx, ty, out in sinks:
            at, came = (x, y), port
            while True:
                cx, cy = at
                if cx != tx:
                    step = EAST if tx > cx else WEST
                elif cy != ty:
                    step = SOUTH if ty > cy else NORTH
                else:
                    step = out
                key = (cx, cy, came)
                table[key] = table.get(key, 0) | 1 << step
                if at == (tx, ty):
                    break
                at = (cx + (step == EAST) - (step == WEST), cy + (step == SOUTH) - (step == NORTH))
                came = rdu.OPPOSITE[step]
        for (cx, cy, came), out in table.items():
            row = {
                "x": cx,
                "y": cy,
                "network": network,
                "port": came,
                "flow": flow,
                "out": out,
                "next_flow": flow,
            }
            self.rows["config.switch"].append(row)
        return flow

    def records(self):
        return {region: records(region, rows) for region, rows in self.rows.items() if rows}


def split(random, n, levels=3):
    """Loop counts, innermost first, with product n."""
    out = []
    for _ in range(levels - 1):
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        out.append(random.choice(divisors))
        n //= out[-1]
    return [*out, n]


def counts(values, prefix=""):
    return {f"{prefix}count{n}": v for n, v in enumerate(values)}


def random_sketch(p, seed, most=24):
    """Sources, units between, sinks; what each gives fits what the next one takes. It may deadlock, all the same."""
    random = Random(seed)
    s = Sketch(p)
    grid = [(x, y) for y in range(p.rows) for x in range(p.columns)]
    pcus, pmus = [a for a in grid if is_pcu(*a)], [a for a in grid if not is_pcu(*a)]
    agcus = list(range(2 * p.agcus_per_side))
    for units in (pcus, pmus, agcus):
        random.shuffle(units)
    ends = []  # what gives packets: (how many, put the flow into its row, place of its output)
    n = random.choice([k for k in range(1, most + 1)])

    def throttle(prefix=""):
        return {f"{prefix}interval": random.choice([1, 1, 1, 2, 5])}

    def bank_bits():
        bits = p.banks.bit_length() - 1
        total = bits + p.bank_words.bit_length() - 1
        chosen = sorted(random.sample(range(total), bits)) if random.random() < 0.4 else range(bits)
        out = {f"bank_bit{i}": b for i, b in enumerate(chosen)}
        if random.random() < 0.3:
            skew = random.randint(1, bits)
            out |= {"skew_bits": skew, "skew_shift": random.randint(list(chosen)[skew - 1] + 1, total)}
        return out

    def reads(total):
        values = split(random, total)
        room = p.banks * p.bank_words // 8
        strides = {f"read_stride{k}": random.randint(0, room // v) for k, v in enumerate(values)}
        lane = random.choice([0, 1, 1, 1, 2, 3, 4, 8])
        return {**counts(values, "read_"), **strides, "read_lane_stride": lane, **throttle("read_")}

    def writes(values):
        strides = {f"write_stride{k}": random.randint(0, 64) for k in range(3)}
        more = {"sequence_scale": random.choice([1, 3, 4])} if random.random() < 0.3 else {}
        if random.random() < 0.3:
            more |= {"write_base": random.choice([0, 50, 250, (1 << 24) - 2])}
        lane = {"write_lane_stride": random.choice([0, 1, 1, 1, 2, 4, 8])}
        return {**counts(values, "write_"), **strides, **more, **lane, **throttle("write_")}

    def element():
        size = random.choice(["word", "bf16"])
        words = random.choice([w for w in (1, 2, 3, 4) if w <= p.lanes])
        return {"format": size, "words": words}, (4 if size == "word" else 2)

    def gate(i, direction, total):
        fields, size = element()
        values = split(random, total)
        used = 1 << (fields["words"] * size - 1).bit_length()
        strides = {f"stride{k}": random.choice([0, used, 2 * used, 16, 32]) for k in range(len(values))}
        return {
            "agcu": i,
            "direction": direction,
            "tier": random.choice(["hbm", "ddr"]),
            **fields,
            **strides,
            **counts(values),
            **throttle(),
            "argument": i,
        }

    def source():
        if pmus and (not agcus or random.random() < 0.5):
            x, y = pmus.pop()
            row = {"enable": 2, **bank_bits(), **reads(n)}
            s.pmu(x, y, **row)
            return n, s.rows["config.pmu"][-1], (x, y, LOCAL)
        if agcus:
            i = agcus.pop()
            s.agcu(**{"i": i} | {k: v for k, v in gate(i, "load", n).items() if k != "agcu"})
            return n, s.rows["config.agcu"][-1], s.place(i)
        return None

    def connect(end, sinks, network="vector", field="flow"):
        """Sinks are (x, y, port of the switch)."""
        _, row, place = end
        if len(sinks) == 1 and sinks[0][2] >= LOCAL and random.random() < 0.5:
            x, y, port = sinks[0]
            row[field] = dynamic_flow(x, y, port - LOCAL)
        else:
            row[field] = s.static(place, sinks, network)
        row["sequence"], row["sequence_step"] = random.choice([(0, 1), (5, 1), (0, 3)])

    def compute(inputs):
        """A PCU takes what `inputs` give; gives an end."""
        x, y = pcus.pop()
        total = inputs[0][0]
        values = split(random, total)
        row = {**counts(values), "vectors": (1 << len(inputs)) - 1, "send_vector": 1, **throttle()}
        gives = total
        if len(inputs) == 2 and p.systolic and random.random() < 0.6:
            level = random.randint(1, 3)
            row |= {"mode": "systolic", "fold": "add", "fold_level": level}
            gives = p.stages * int(np.prod(values[level:]))
        elif random.random() < 0.4:
            level = random.randint(1, 3)
            row |= {"fold": "add", "fold_level": level}
            gives = int(np.prod(values[level:]))
        elif random.random() < 0.4:
            row |= {"gated": 1, "gate": 1}
        row["function"] = random.choice(["none", "none", *rdu.FUNCTIONS])
        if row.get("mode") != "systolic" and not row.get("gated"):
            row["tree"] = random.choice(["none", "none", "add"])
        s.pcu(x, y, **row)
        row = s.rows["config.pcu"][-1]
        for k, end in enumerate(inputs):
            connect(end, [(x, y, LOCAL + k)])
        return gives, row, (x, y, LOCAL)

    def buffer(end):
        """A PMU between: it reads as often as was written, behind all of it or tile by tile."""
        x, y = pmus.pop()
        total = end[0]
        tiles = random.choice([d for d in range(1, total + 1) if total % d == 0])
        row = {"enable": 3, **bank_bits(), **writes([total // tiles, tiles]), **reads(total)}
        row |= counts([total // tiles, tiles, 1], "read_")
        levels = {"wait_level": 1, "signal_level": 1, "wait": 1, "signal": 1}
        row |= {f"{side}_{k}": v for side in ("write", "read") for k, v in levels.items()}
        row |= {"write_hold0": random.randint(1, 3)}
        row |= {f"read_stride{k}": random.randint(0, 8) for k in range(3)}
        s.pmu(x, y, **row)
        s.token((x, y), 0, (x, y), 4)
        s.token((x, y), 4, (x, y), 0)
        connect(end, [(x, y, LOCAL)])
        return total, s.rows["config.pmu"][-1], (x, y, LOCAL)

    while len(ends) < 3 and (end := source()):
        ends.append(end)
    for _ in range(random.randint(1, 6)):
        random.shuffle(ends)
        if pcus and len(ends) > 1 and ends[0][0] == ends[1][0] and random.random() < 0.6:
            ends = [compute(ends[:2]), *ends[2:]]
        elif pcus and ends and random.random() < 0.7:
            ends = [compute(ends[:1]), *ends[1:]]
        elif pmus and ends:
            ends = [buffer(ends[0]), *ends[1:]]
    for end in ends:
        sinks = []
        for _ in range(random.choice([1, 1, 2])):
            if agcus and random.random() < 0.5:
                i = agcus.pop()
                s.agcu(**{"i": i} | {k: v for k, v in gate(i, "store", end[0]).items() if k != "agcu"})
                sinks.append(s.place(i))
            elif pmus:
                x, y = pmus.pop()
                s.pmu(x, y, enable=1, **bank_bits(), **writes(split(random, end[0])))
                sinks.append((x, y, LOCAL))
            elif pcus:
                x, y = pcus.pop()
                s.pcu(x, y, vectors=1, **counts(split(random, end[0])), **throttle())
                sinks.append((x, y, LOCAL))
        if sinks:
            connect(end, sinks)
        else:  # nobody is left: the unit gives nothing
            row = end[1]
            if "mode" in row:
                row["send_vector"] = 0
            else:
                row["flow"] = s.static(end[2], [(*end[2][:2], LOCAL)])
                row |= {"enable": 0} if "enable" in row else {"direction": "off"}
    return s.records()


def launch(section, args=()):
    """A program that runs a section once."""
    code = ISA.record("code")
    ops = [code.make(op) for op in ("PROGRAM_LOAD", "ARGUMENT_LOAD", "KERNEL_EXECUTE")]
    regions = {**section, "code": np.concatenate(ops)}
    if args:
        regions["args"] = records("args", [{"index": i, "value": v} for i, v in args])
    return Program(ISA, [Segment(regions)], ())


def span_of(timeline):
    """First tick and end of each tag over all segments."""
    out = {}
    for span in timeline.spans:
        first, end = out.get(int(span["tag"]), (timeline.ticks, 0))
        out[int(span["tag"])] = min(first, int(span["first"])), max(end, int(span["end"]))
    return out


def same(model, rtl):
    """The model's timeline against the RTL's: ticks, spans, counters, and every unit's stalls by cause."""
    assert model.ticks == rtl.ticks
    assert model.units == rtl.units
    assert {u: model.unit(u) for u in model.units} == {u: rtl.unit(u) for u in rtl.units}
    assert span_of(model) == span_of(rtl)
    assert {name: model.counter(name) for name in rtl.counter_names} == rtl.totals()


def cases(p, seeds):
    """Random sections that end, and their programs; each unit has a tag of its own."""
    out = []
    for seed in seeds:
        section = random_sketch(p, seed)
        tag = 0
        for region in ("config.pcu", "config.pmu", "config.agcu"):
            if region in section:
                section[region]["tag"] = 1 + tag + np.arange(len(section[region]))
                tag += len(section[region])
        try:
            program = launch(section, tuple((i, 256 * i) for i in range(2 * p.agcus_per_side)))
            timeline = simulate(p, program, fold=False)
        except UserError as error:
            assert "deadlock" in str(error)
            continue
        out.append((seed, program, timeline))
    return out


# ---- against the RTL ----------------------------------------------------------------------------------


@pytest.mark.cosim
def test_random_sections_take_what_they_take_in_rtl():
    spec = spec_of(*SETS)
    p = spec.params()
    image = {
        **{tier: np.zeros(MEMORY, np.uint8) for tier in rdu.TIERS},
        "scratch": np.zeros((p.pmus, p.banks, p.bank_words), np.uint32),
    }
    found = cases(p, range(60))
    assert len(found) > 30
    done = run_cases(build_rtl(spec), [Case(p, program, image) for _, program, _ in found])
    for (seed, program, unfolded), outcome in zip(found, done, strict=True):
        assert outcome.error is None, f"seed {seed}"
        same(unfolded, outcome.timeline)
        same(simulate(p, program), outcome.timeline)


@pytest.mark.cosim
def test_written_sections_take_what_they_take_in_rtl():
    spec = spec_of(*SETS)
    p = spec.params()
    made = [Case(p, make(), image(p)) for make, image in test_top.CASES.values()]
    for case, outcome in zip(made, run_cases(build_rtl(spec), made), strict=True):
        for fold in (False, True):
            same(simulate(p, case.program, fold=fold), outcome.timeline)


# ---- derived by hand ----------------------------------------------------------------------------------


def small(*sets):
    return spec_of(*SETS, *sets).params()


def test_a_stream_through_a_double_buffer():
    # `test_top.KERNEL` is derived there: 38 ticks, the units busy as here.
    did = execute(small(), test_top.stream_section(), {3: 64, 200: 1024})
    assert did.ticks == 38
    assert dict(zip(did.units, did.busy.tolist(), strict=True)) == {
        "pcu@0,0": [22, 30],
        "pmu.write@1,0": [10, 18],
        "pmu.read@1,0": [16, 24],
        "agcu@0": [0, 8],
        "agcu@1": [29, 37],
    }


def test_a_special_function_takes_its_latency():
    p = small()

    def ticks(**fields):
        s = Sketch(p)
        s.pmu(1, 0, enable=2, read_stride0=4, read_count0=5, flow=dynamic_flow(0, 0))
        s.pmu(0, 1, enable=1, write_stride0=4, write_count0=5)
        s.pcu(0, 0, count0=5, vectors=1, send_vector=1, flow=dynamic_flow(0, 1), **fields)
        return execute(p, s.records()).ticks

    for number, name in enumerate(rdu.FUNCTIONS):
        assert ticks(function=name) - ticks() == rdu.tail_latency(p, number)
    # A level of the tree of 4 lanes, 2 of them, and the gate's multiplication take one operation each.
    assert ticks(tree="add") - ticks() == 2
    assert ticks(gated=1, gate=1) - ticks() == 1


def test_work_follows_from_iterations():
    # 8 iterations of 4 lanes, both stages at work; 6 of an array of 4 x 2.
    p = small()
    totals = [
        execute(p, section()).counters.sum(axis=0)
        for section in (test_top.stream_section, test_top.gemm_section)
    ]
    lane_ops, macs = (rdu.COUNTERS.index(name) for name in ("lane_ops", "macs"))
    assert [(t[lane_ops], t[macs]) for t in totals] == [(8 * 4 * 2, 0), (0, test_top.K * 4 * 2)]


def test_a_copy_ends_as_its_rule_says():
    # Beats of 2 lines, one in 3 ticks, ddr answers after 9: 5 lines are 3 beats, at 0, 3 and 6; idle after 6 + 9 + 2.
    p = small()
    assert (p.copy_p, p.copy_q, p.copy_lines, int(p.latency[1])) == (1, 3, 2, 9)
    op = ISA.record("code").make("COPY", source=1, target=0, lines=5)
    t = simulate(p, Program(ISA, [Segment({"code": op})], ()))
    # Tick 0 issues it, the DMA's tick 0 is 1, 18 finds it idle and is the last.
    assert t.ticks == 1 + 17 + 1
    assert {k: v for k, v in t.unit("dma").items() if v} == {
        "busy": 3,
        "memory": 4,
        "pipeline": 10,
        "idle": 2,
    }
    assert t.counter("copied_lines") == 5


def test_repetitions_and_tags():
    p = small()
    segment = launch(test_top.stream_section()).segments[0]
    code = segment.regions["code"][2:]
    once, thrice = (
        simulate(p, Program(ISA, [segment, Segment({"code": code}, repeat=n)], test_top.TAGS)) for n in (1, 3)
    )
    # A launch by hardware: issue, 2 ticks, the kernel's 38 and the one that finds it quiet.
    assert thrice.ticks - once.ticks == 2 * (1 + 2 + 39)
    assert thrice.counter("iterations") == 2 * once.counter("iterations")
    # The sequencer, which comes first, and the DMA do none of the tag's work.
    assert set(np.flatnonzero(once.activity[:, 2:, 0].sum(axis=1))) == {1, 2, 3, 4}


# ---- what cannot be -----------------------------------------------------------------------------------


def two(p, **fields):
    """PMU (1, 0) reads 4 vectors for PCU (0, 0)."""
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_stride0=4, read_count0=4, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, **{"count0": 4, "vectors": 1, **fields})
    return s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The PMU reads in 0 .. 3, its packets leave 3 ticks later, are taken 3 links on, and done with after 4 more.
        ({"count0": 5}, r"deadlock after tick 13: pcu@0,0 waits for packets of pmu\.read@1,0$"),
        ({"count0": 3}, r"packets of pmu\.read@1,0 are left for pcu@0,0$"),
        ({"wait": 2}, r"pcu@0,0 waits for a token of nobody$"),
        ({"vectors": 3}, r"pcu@0,0 waits for packets of nobody$"),
        ({"send_vector": 1, "flow": 3}, r"flow 0x3 leads nowhere from port 4 of the vector switch 0,0"),
        (
            {"send_vector": 1, "flow": dynamic_flow(0, 1, 2)},
            r"input 2 of pmu@0,1, whose vector inputs number 1",
        ),
        ({"gated": 1, "fold": "add"}, r"pcu@0,0: a gate goes with SIMD mode without fold and tree"),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_errors_name_the_units(change, message, fold):
    with pytest.raises(UserError, match=message):
        execute(small(), two(small(), **change).records(), fold=fold)


def test_units_that_wait_for_one_another():
    p = small()
    s = Sketch(p)
    s.pcu(0, 0, vectors=1, count0=2, send_vector=1, flow=dynamic_flow(1, 1))
    s.pcu(1, 1, vectors=1, count0=2, send_vector=1, flow=dynamic_flow(0, 0))
    message = "pcu@0,0 waits for packets of pcu@1,1; pcu@1,1 waits for packets of pcu@0,0"
    with pytest.raises(UserError, match=message):
        execute(p, s.records())


def test_tokens_that_nobody_takes():
    p = small()
    s = two(p, count0=4)
    s.rows["config.pmu"][0] |= {"read_count0": 17, "read_signal": 1}
    s.rows["config.pcu"][0] |= {"count0": 17}
    s.token((1, 0), 4, (0, 0), 2)
    with pytest.raises(UserError, match=r"pcu@0,0: more than 15 control tokens from pmu\.read@1,0"):
        execute(p, s.records())
    s.rows["config.pmu"][0] |= {"read_count0": 15}
    s.rows["config.pcu"][0] |= {"count0": 15}
    execute(p, s.records())


def test_an_access_across_lines():
    p = small()
    s = Sketch(p)
    s.agcu(0, direction="load", words=4, count0=2, stride0=8, flow=dynamic_flow(1, 0))
    s.pmu(1, 0, enable=1, write_count0=2)
    with pytest.raises(UserError, match="agcu@0: an iteration's elements must lie in one line of 16 bytes"):
        execute(p, s.records())


def test_errors_of_a_program_name_the_operation():
    p = small()
    op = ISA.record("code").make("PROGRAM_LOAD", section=1)
    with pytest.raises(
        UserError, match=r"segment 0, operation 0 \(PROGRAM_LOAD\): section must be in 0\.\.0, not 1"
    ):
        simulate(p, Program(ISA, [Segment({"code": op})], ()))
    op = ISA.record("code").make("COPY", source=2, target=0, lines=1)
    with pytest.raises(UserError, match="source must be hbm or ddr, not remote"):
        simulate(p, Program(ISA, [Segment({"code": op})], ()))
    with pytest.raises(UserError, match=r"segment 0, operation 2 \(KERNEL_EXECUTE\): deadlock"):
        simulate(p, launch(two(p, count0=5).records()))
