"""The meaning of programs: what a section leaves in memory, and which programs have none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.isa import Program
from tilewright.arch.rdu import dynamic_flow
from tilewright.mappers.rdu.section import Section, segment
from tilewright.workloads import rdu as meaning
from tilewright.workloads import rdu_kernels as kernels
from tilewright.workloads.rdu import blank_image, interpret

LANES = 4
LINE = 4 * LANES


def spec_of(*sets):
    """Plasticine on a grid of 3 x 3 with two AGCUs a side: 5 PCUs, 4 PMUs of 4 banks and 256 words, lines of 16 bytes."""
    sizes = [
        "grid.columns=3",
        "grid.rows=3",
        "agcu.per_side=2",
        "pcu.lanes=4",
        "pmu.bytes=1024",
        "pmu.banks=4",
    ]
    sizes += ["memory.ddr.channels=16", "memory.ddr.bytes=4096", "memory.hbm.bytes=4096", "pcu.registers=8"]
    sizes += ["pcu.stages=2", "pcu.systolic=true", "pcu.exp_terms=2", *sets]
    return specs.build(rdu.RduSpec, specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), sizes), "small")


SPEC = spec_of()
P = SPEC.params()
FLOATS = np.arange(64, dtype=np.float32)


def image_of(ddr=FLOATS):
    image = blank_image(P)
    words = np.ascontiguousarray(ddr).reshape(-1).view(np.uint8)
    image["ddr"][: len(words)] = words
    return image


def run(section, args, image=None, at=None):
    built = section.build(at=at, moves=500)
    program = Program(rdu.ISA, [segment(built, args=args)], built.tags)
    out, decisions = interpret(SPEC, program, image or image_of(), {"kept": 1})
    assert decisions == {"kept": 1}
    return out


def memory(image, first, count, tier="ddr", dtype="<f4"):
    size = np.dtype(dtype).itemsize
    return image[tier][first : first + count * size].view(dtype)


def load(s, name="load", lines=4, **fields):
    return s.agcu(
        name,
        **{"direction": "load", "tier": "ddr", "words": LANES, "count0": lines, "stride0": LINE, **fields},
    )


def store(s, name="store", lines=4, **fields):
    fields = {"direction": "store", "tier": "ddr", "argument": 1, "count0": lines, "stride0": LINE, **fields}
    return s.agcu(name, **{"words": LANES, **fields})


# ---- by hand ------------------------------------------------------------------------------------------


def test_elements_pass_a_pipeline():
    """x -> 2 x + 1, from words to bfloat16 (exact below 256) in the HBM, behind what was there."""
    s = Section(P)
    load(s)
    doubled = {"operation": "multiply", "b_from": "constant", "constant": 0x40000000}
    plus = {"operation": "add", "b_from": "constant", "constant": 0x3F800000}
    s.pcu("f", mode="simd", count0=4, vectors=1, stages=[doubled, plus])
    store(s, tier="hbm", format="bf16", stride0=8)
    s.stream("load", "f")
    s.stream("f", "store")
    image = image_of()
    image["hbm"][:] = 255
    before = {name: array.copy() for name, array in image.items()}
    out = run(s, {0: 32, 1: 64}, image)
    # Lines from byte 32 on hold 8 .. 23; 16 results of 2 bytes follow byte 64.
    results = memory(out, 64, 16, "hbm", "<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(results.view(np.float32), 2 * np.arange(8, 24) + 1)
    assert (out["hbm"][:64] == 255).all() and (out["hbm"][96:] == 255).all()
    np.testing.assert_array_equal(out["ddr"], image["ddr"])
    for name, array in before.items():
        np.testing.assert_array_equal(image[name], array)


def test_a_tile_is_transposed_in_a_scratchpad():
    """Rows of a 4 x 4 tile are written, its columns read; of two tiles the second is written into the other half."""
    s = Section(P)
    load(s, lines=8)
    chain = {
        f"{side}_{k}": v
        for side in ("write", "read")
        for k, v in (("count0", 4), ("count1", 2), ("stride1", 128))
    }
    s.pmu(
        "t", enable=3, **chain, write_stride0=4, read_stride0=1, read_lane_stride=4, skew_bits=2, skew_shift=2
    )
    s.double_buffer("t", write_level=1, read_level=1)
    store(s, lines=8)
    s.stream("load", "t")
    s.stream("t", "store")
    out = run(s, {0: 0, 1: 1024}, at={"t": (1, 0)})
    tiles = FLOATS[:32].reshape(2, 4, 4)
    np.testing.assert_array_equal(memory(out, 1024, 32), tiles.transpose(0, 2, 1).reshape(-1))
    # Of the first tile word (row, column) is in bank row + column modulo 4, at index row.
    scratch = out["scratch"][0].view(np.float32)
    assert [scratch[(2 + c) % 4, 2] for c in range(4)] == [8, 9, 10, 11]
    assert scratch[(1 + 3) % 4, 32 + 1] == 16 + 7


def test_a_product_of_matrices():
    """A (4 x 2) times B (2 x 2): columns of A and rows of B come in, columns of the product leave."""
    a, b = np.array([[1, 2], [3, 4], [5, 6], [7, 8]]), np.array([[1, -1], [0.5, 2]])
    rows = np.zeros((2, LANES))
    rows[:, :2] = b
    s = Section(P)
    load(s, "a", 2)
    load(s, "b", 2, argument=2)
    s.pcu("gemm", mode="systolic", count0=2, vectors=3, fold_level=1)
    store(s, lines=2)
    s.stream("a", ("gemm", 0))
    s.stream("b", ("gemm", 1))
    s.stream("gemm", "store")
    image = image_of(np.concatenate([a.T, rows]).astype(np.float32))
    out = run(s, {0: 0, 1: 256, 2: 2 * LINE}, image)
    np.testing.assert_array_equal(memory(out, 256, 8).reshape(2, 4), (a @ b).T)


def test_scalars_go_beside_vectors():
    """Sums of lines, each taken from all lanes of its line; the sum waits at its input, the line at its own."""
    s = Section(P)
    load(s)
    s.pcu("sum", mode="simd", count0=4, vectors=1, tree="add", fold_type="fp32")
    less = {"operation": "subtract", "a": 0, "b": 4}
    s.pcu("rest", mode="simd", count0=4, vectors=1, scalars=1, stages=[less])
    store(s)
    s.stream("load", "sum", "rest")
    s.stream("sum", "rest", network="scalar")
    s.stream("rest", "store")
    out = run(s, {0: 0, 1: 512})
    lines = FLOATS[:16].reshape(4, 4)
    np.testing.assert_array_equal(
        memory(out, 512, 16), (lines - lines.sum(axis=1, keepdims=True)).reshape(-1)
    )


def test_sequence_ids_order_what_comes_from_many():
    """Two loads write one scratchpad: packet n goes to 4 n, whichever comes first; then all is read."""
    s = Section(P)
    load(s, "even", 2, stride0=2 * LINE, sequence=0, sequence_step=2)
    load(s, "odd", 2, stride0=2 * LINE, sequence=1, sequence_step=2, argument=2)
    s.pmu("all", enable=3, write_count0=4, sequence_scale=4, read_count0=4, read_stride0=4)
    s.double_buffer("all", write_level=1, read_level=1, buffers=1)
    store(s)
    s.stream("even", "all")
    s.stream("odd", "all")
    s.stream("all", "store")
    out = run(s, {0: 0, 2: LINE, 1: 640})
    np.testing.assert_array_equal(memory(out, 640, 16), FLOATS[:16])


def test_addresses_out_of_range_are_dropped():
    """Words 4 .. 11 are held: of four lines the middle ones leave, and half of none."""
    s = Section(P)
    load(s)
    s.pmu("part", enable=3, low=4, words=8, write_count0=4, write_stride0=4, read_count0=4, read_stride0=4)
    s.double_buffer("part", write_level=1, read_level=1, buffers=1)
    store(s, lines=2)
    s.stream("load", "part")
    s.stream("part", "store")
    out = run(s, {0: 0, 1: 640}, at={"part": (0, 1)})
    np.testing.assert_array_equal(memory(out, 640, 8), FLOATS[4:12])
    # PMU (0, 1) is the second one, row by row; word 4 is the first that it holds.
    assert out["scratch"][1].view(np.float32)[:, 0].tolist() == [4, 5, 6, 7] and not out["scratch"][0].any()


def test_a_folded_and_gated_tail():
    """Maximum of 4 lines, of which an exponential is not taken: exp(0) = 1 gates nothing; 1 * 3 = 3."""
    s = Section(P)
    load(s)
    s.pcu("top", mode="simd", count0=4, vectors=1, fold="maximum", fold_level=1, fold_type="fp32")
    s.pcu(
        "one",
        mode="simd",
        vectors=1,
        function="exp",
        gated=1,
        gate=0,
        result=1,
    )
    store(s, lines=1)
    s.stream("load", "top")
    s.stream("top", "one")
    s.stream("one", "store")
    out = run(s, {0: 0, 1: 640})
    # Register 1 holds 0, as nothing fills it: exp(0) = 1, times the maxima.
    np.testing.assert_array_equal(memory(out, 640, 4), [12, 13, 14, 15])


def test_packets_that_find_their_own_way():
    s = Section(P)
    load(s)
    s.pmu("end", enable=1, write_count0=4, write_stride0=4)
    s.stream("load", "end")
    built = s.build(at={"end": (1, 2)}, moves=500)
    built.records["config.agcu"]["flow"] = dynamic_flow(1, 2)
    del built.records["config.switch"]
    out, _ = interpret(SPEC, Program(rdu.ISA, [segment(built)], built.tags), image_of())
    assert (out["scratch"][3].view(np.float32).T.reshape(-1)[:16] == FLOATS[:16]).all()


def test_copies_arguments_and_repetitions():
    """A kernel that copies the line before to the next one, three times; then lines go to the HBM and back."""
    s = Section(P)
    load(s, lines=1)
    store(s, lines=1)
    s.stream("load", "store")
    built = s.build(moves=500)
    first = segment(built, args={0: 0, 1: LINE})
    again = segment(built, args={0: LINE, 1: 3 * LINE}, index=1, load=False, repeat=2)
    copies = [
        rdu.CODE.make("COPY", source=1, target=0, **{"from": 0}, to=7, lines=2),
        rdu.CODE.make("WAIT"),
        rdu.CODE.make("COPY", source=0, target=1, **{"from": 8}, to=0, lines=1),
    ]
    last = type(first)({"code": np.concatenate(copies)})
    out, _ = interpret(SPEC, Program(rdu.ISA, [first, again, last], built.tags), image_of(FLOATS[:4]))
    assert memory(out, 0, 20).tolist() == [*[0, 1, 2, 3] * 2, *[0] * 4, 0, 1, 2, 3, *[0] * 4]
    assert memory(out, 7 * LINE, 8, "hbm").tolist() == [0, 1, 2, 3] * 2


# ---- programs without a meaning -----------------------------------------------------------------------


def buffered(**fields):
    """A load, a scratchpad without tokens, a store."""
    s = Section(P)
    load(s)
    s.pmu("b", enable=3, write_count0=4, write_stride0=4, read_count0=4, read_stride0=4, **fields)
    store(s)
    s.stream("load", "b")
    s.stream("b", "store")
    return s


def refused(section, message, args=None, change=None, **options):
    built = section.build(moves=500, **options)
    if change:
        change(built.records)
    program = Program(rdu.ISA, [segment(built, args=args or {0: 0, 1: 512})], built.tags)
    with pytest.raises(ValueError, match=message):
        interpret(SPEC, program, image_of())


def test_a_race_in_a_scratchpad_is_refused():
    """What is read depends on whether it was written before: the store shows it."""
    refused(buffered(), r"segment 0: ddr: byte 51\d depends on which unit is first: a token is missing")


def test_a_race_that_only_a_scratchpad_shows_is_refused():
    s = Section(P)
    for k, name in enumerate(("a", "b")):
        load(s, name, 2, argument=k, sequence=k)
    s.pmu("end", enable=1, write_count0=4)  # all packets go to the same words
    for name in ("a", "b"):
        s.stream(name, "end")
    refused(
        s,
        r"pmu@1,0: word 0 of bank 0 depends on which unit is first",
        {0: 0, 1: LINE * 2},
        at={"end": (1, 0)},
    )


def test_a_race_for_memory_is_refused():
    s = Section(P)
    for k, name in enumerate(("a", "b")):
        load(s, f"load {name}", argument=2 + k)
        store(s, f"store {name}")
        s.stream(f"load {name}", f"store {name}")
    refused(s, "ddr: byte 51. depends on which unit is first", {1: 512, 2: 0, 3: 64})


def test_units_that_wait_for_one_another_are_named():
    s = buffered(
        write_wait=1, write_wait_level=7, read_wait=1, read_wait_level=7, write_signal=1, read_signal=1
    )
    s.token("b.write", 0, "b.read", 0)
    s.token("b.read", 0, "b.write", 0)
    refused(
        s,
        "deadlock: pmu.write@1,0 waits for a token at control input 0; pmu.read@1,0 waits for a token at control "
        "input 4; agcu@. waits for packet 0 of vector input 0",
        at={"b": (1, 0)},
    )


def test_packets_nobody_takes_are_refused():
    s = Section(P)
    load(s, lines=5)
    store(s, lines=4)
    s.stream("load", "store")
    refused(s, "agcu@.: 1 packets are left at vector input 0")


@pytest.mark.parametrize(
    ("fields", "args", "message"),
    [
        ({"lines": 5}, {0: 4096 - 4 * LINE}, "agcu@.: byte 4096 lies outside its memory of 4096 bytes"),
        ({"lines": 5, "stride0": -LINE}, {0: LINE}, "agcu@.: byte -16 lies outside its memory"),
        ({"lines": 5}, {0: 4}, "agcu@.: 4 elements of 4 bytes at byte 4 are not within a line of 16"),
        ({"lines": 5, "words": 1}, {0: 2}, "agcu@.: 1 elements of 4 bytes at byte 2 are not within a line"),
        ({"lines": 5, "words": 1, "format": "bf16"}, {0: 1}, "agcu@.: 1 elements of 2 bytes at byte 1"),
    ],
)
def test_addresses_that_are_not_there(fields, args, message):
    s = Section(P)
    load(s, **fields)
    s.pmu("end", enable=1, write_count0=5)
    s.stream("load", "end")
    refused(s, message, args)


def test_flows_that_lead_nowhere():
    def change(name, value):
        def apply(records):
            records[name[0]][name[1]] = value

        return apply

    at = {"b": (1, 0), "load": (0, 0), "store": (2, 0)}
    s = buffered()
    s.double_buffer("b", write_level=1, read_level=1)
    refused(
        s,
        "agcu@0: switch 0,0 knows no flow 9 at vector port 3",
        at=at,
        change=change(("config.agcu", "flow"), 9),
    )
    flow = dynamic_flow(0, 0)
    nobody = "agcu@0: nobody takes its packets at vector input 0 of unit 0,0"
    refused(s, nobody, at=at, change=change(("config.agcu", "flow"), flow))
    refused(
        s,
        "pmu.read@1,0: its vector packets leave the mesh at 1,0",
        at=at,
        change=change(("config.switch", "out"), 1),
    )

    def circle(records):
        records["config.agcu"]["flow"] = 0
        ways = ((0, 0, 3, 1 << 1), (1, 0, 3, 1 << 3), (0, 0, 1, 1 << 1))  # east, west, east
        rows = [rdu.CONFIG_SWITCH.make(x=x, y=y, port=port, out=out) for x, y, port, out in ways]
        records["config.switch"] = np.concatenate(rows)

    s = Section(P)
    load(s)
    s.pcu("end", mode="simd", count0=4, vectors=1)
    s.stream("load", "end")
    refused(s, "agcu@0: its vector packets go in circles at switch 1,0", at={"load": (0, 0)}, change=circle)


def test_copies_that_meet_a_kernel_or_themselves():
    s = Section(P)
    load(s)
    store(s)
    s.stream("load", "store")
    built = s.build(moves=500)
    launch = segment(built, args={0: 0, 1: 512})

    def program(wait=False, **copy):
        fields = {"source": 1, "target": 1, "lines": 2, "from": 100, "to": 120, **copy}
        code = [
            rdu.CODE.make("COPY", **fields),
            *([rdu.CODE.make("WAIT")] if wait else []),
            launch.regions["code"],
        ]
        return Program(rdu.ISA, [type(launch)({**launch.regions, "code": np.concatenate(code)})], built.tags)

    interpret(SPEC, program(), image_of())
    for copy, byte in (({"to": 3}, 48), ({"to": 35}, 560), ({"from": 31}, 512)):
        with pytest.raises(ValueError, match=f"byte {byte} is in use by a COPY that no WAIT has ended"):
            interpret(SPEC, program(**copy), image_of())
        interpret(SPEC, program(wait=True, **copy), image_of())
    interpret(SPEC, program(**{"from": 3}), image_of())  # both read
    with pytest.raises(ValueError, match="COPY of 32 bytes from 1600 to 1616: they overlap"):
        interpret(SPEC, program(to=101), image_of())
    with pytest.raises(ValueError, match="COPY writes 32 bytes from 4080 on; the memory has 4096"):
        interpret(SPEC, program(to=255), image_of())


def test_sections_that_are_not_there():
    for op in ("PROGRAM_LOAD", "ARGUMENT_LOAD"):
        program = rdu.ISA.assemble(f"{op} section=1")
        with pytest.raises(ValueError, match=f"segment 0: {op}: there is no segment 1"):
            interpret(SPEC, program, blank_image(P))
    with pytest.raises(ValueError, match="scratch has shape"):
        interpret(spec_of("pmu.banks=8"), rdu.ISA.assemble("WAIT"), blank_image(P))


# ---- against the kernels of single units --------------------------------------------------------------

registers = st.integers(0, 7)
stage = st.fixed_dictionaries(
    {
        "operation": st.sampled_from(rdu.STAGE_OPS),
        "type": st.sampled_from(rdu.TYPES),
        "a_from": st.sampled_from(rdu.OPERANDS),
        "b_from": st.sampled_from(rdu.OPERANDS),
        "a": st.integers(0, 5),
        "b": st.integers(0, 5),
        "c": registers,
        "constant": st.integers(0, (1 << 32) - 1),
        "to": st.integers(0, 3),
    }
)
folding = st.one_of(
    st.fixed_dictionaries({"gated": st.integers(0, 1), "gate": registers}),
    st.fixed_dictionaries(
        {
            **{name: st.sampled_from(rdu.FOLDS) for name in ("fold", "tree")},
            "fold_type": st.sampled_from(rdu.TYPES),
            "fold_level": st.integers(0, 4),
        }
    ),
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(stage, max_size=2),
    folding,
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from(rdu.FUNCTIONS),
    st.integers(0, 1),
    st.integers(0, 3),
    st.integers(0, 1 << 30),
)
def test_a_pcu_computes_what_its_kernel_says(stages, fields, counts, function, rounds, level, seed):
    """Whatever it is told, and however many iterations are taken at once."""
    rng = np.random.default_rng(seed)
    config = kernels.configuration(
        rdu.CONFIG_PCU,
        **{f"count{n}": c for n, c in enumerate(counts)},
        mode="simd",
        vectors=3,
        vector1_level=level,
        result=0,
        round=rounds,
        function=function,
        **fields,
    )
    total = int(np.prod(counts))
    words = [
        rng.integers(0, 1 << 32, (n, LANES)).astype(np.uint32)
        for n in (total, total // int(np.prod(counts[:level])))
    ]
    made = [kernels.configuration(rdu.CONFIG_STAGE, **s) for s in stages]
    expected = kernels.pcu(config, made, words, lanes=LANES, registers=P.registers, counts=P)
    results = []
    for few in (False, True):
        unit = meaning.Pcu("pcu", ("unit", 0, 0), config, meaning.Chain(config), params=P, stages=made)
        for i, packets in enumerate(words):
            queue = meaning.Queue(LANES)
            queue.push(packets, np.arange(len(packets)))
            unit.inputs["vector", i] = queue, level * i
        unit.sinks["vector"] = [meaning.Queue(LANES)]
        while unit.step(few):
            pass
        results.append(unit.sinks["vector"][0])
    for queue in results:
        np.testing.assert_array_equal(queue.data, expected.data)
        np.testing.assert_array_equal(queue.sequence, expected.sequence)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 3)] * 3),
    st.lists(st.integers(0, 40), min_size=6, max_size=6),
    st.sampled_from([(0, 256), (7, 30), (0, 100)]),
    st.integers(0, 5),
    st.integers(0, 1 << 30),
)
def test_a_scratchpad_holds_what_its_kernels_say(counts, strides, held, scale, seed):
    rng = np.random.default_rng(seed)
    total = int(np.prod(counts))
    config = kernels.configuration(
        rdu.CONFIG_PMU,
        enable=3,
        low=held[0],
        words=held[1],
        sequence_scale=scale,
        sequence_step=5,
        **{f"{side}_count{n}": c for side in ("write", "read") for n, c in enumerate(counts)},
        **{
            f"{side}_stride{n}": strides[3 * k + n]
            for k, side in enumerate(("write", "read"))
            for n in range(3)
        },
    )
    packets = rng.integers(0, 1 << 32, (total, LANES)).astype(np.uint32)
    sequence = rng.integers(0, 9, total)
    scratch = rng.integers(0, 1 << 32, (P.banks, P.bank_words)).astype(np.uint32)
    expected = scratch.copy()
    kernels.pmu_write(config, expected, kernels.Packets(packets, sequence, np.zeros(total, bool)))
    given = kernels.pmu_read(config, expected, LANES)
    at = ("unit", 1, 0)
    writer = meaning.Writer("write", at, config, meaning.Chain(config, "write_"), memory=scratch, lanes=LANES)
    reader = meaning.Reader("read", at, config, meaning.Chain(config, "read_"), memory=scratch, lanes=LANES)
    writer.inputs["vector", 0] = meaning.Queue(LANES), 0
    writer.inputs["vector", 0][0].push(packets, sequence)
    reader.sinks["vector"] = [meaning.Queue(LANES)]
    for process in (writer, reader):
        while process.step(True):
            pass
    np.testing.assert_array_equal(scratch, expected)
    queue = reader.sinks["vector"][0]
    np.testing.assert_array_equal(queue.data, given.data)
    np.testing.assert_array_equal(queue.sequence, given.sequence)
