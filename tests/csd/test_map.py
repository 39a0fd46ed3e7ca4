"""Transformers mapped onto a GPU with drives: commands by hand, pages by their tables, hazards, and what is refused."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import csd
from tilewright.arch.csd import CACHED, FORMS, OP, PATHS, CsdSpec
from tilewright.arch.csd_pages import PageTables
from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.mappers.csd import map_model
from tilewright.mappers.csd.layout import pieces
from tilewright.workloads.csd import Machine, blank_image
from tilewright.workloads.csd_kernels import Engine, add_values, dense, sparf
from tilewright.workloads.graph import OpKind, decode_step, prefill
from tilewright.workloads.models import load_model


def machine(*sets, name="instinfer-a6000"):
    return build(CsdSpec, apply_sets(load_tree(name, ["csd"]), sets), "test")


FULL, SPARSE = machine(), machine("attention.kind=sparf")
OPT = load_model("opt-13b")
# Pages of 16 tokens of 16 channels, spans of 32 tokens (8 channels of a page); 2 channels of 2 chips of 2 planes.
SMALL = [
    "engine.lanes=4", "engine.batches=2", "engine.buffer_lines=256", "engine.max_tokens=256",
    "engine.max_channels=16", "attention.page_channels=8", "dram.table_bits=6", "dram.slots=256",
    "dram.vector_lines=2048", "flash.geometry.channels=2", "flash.geometry.chips_per_channel=2",
    "flash.geometry.dies_per_chip=1", "flash.geometry.planes_per_die=2", "flash.geometry.blocks_per_plane=16", "flash.geometry.pages_per_block=8",
    "flash.geometry.page_bytes=512",
]  # fmt: skip
TINY = dataclasses.replace(
    OPT, name="tiny", layers=2, d_model=64, heads=4, kv_heads=4, head_dim=16, d_ff=128, vocab=100, d_embed=64
)


def small(*sets):
    return machine(*SMALL, *sets)


def code_of(mapped, label=None):
    return np.concatenate(
        [s.regions["code"] for s in mapped.program.segments if label is None or s.label == label]
    )


def of(code, op, **fields):
    """The commands of an operation whose fields have these values."""
    mine = code["op"] == OP[op]
    for name, value in fields.items():
        mine &= code[name] == value
    return code[mine]


# ---- by hand ------------------------------------------------------------------------------------------


def test_bytes_of_a_decode_step_by_hand():
    mapped = map_model(FULL, OPT, Scenario(context=1024, generate=1, batch=64))
    code = code_of(mapped, "token 0")
    links = of(code, "LINK")
    assert len(links) == 2 * 40 and set(links["path"]) == {PATHS.index("drive")}
    # q, k, v in: 64 sequences x 3 x 5120 x 2 B; a third of it, attention, out.
    assert links["bytes"][:2].tolist() == [64 * 3 * 5120 * 2, 64 * 5120 * 2]
    assert links["bytes"][:2].sum() == 2621440  # 64 * (6 + 2) * 5120
    # 2560 heads of a layer in 20 chunks of 128; 1023 heads would be too many for a command, 640 divide them.
    attends = of(code, "ATTEND")
    assert len(attends) == 40 * 20 and set(attends["heads"]) == {128} and set(attends["tokens"]) == {1025}
    assert attends["slot"].tolist() == list(range(0, 40 * 2560, 128))
    assert set(attends["after"]) == {4}
    assert set(of(code, "WRITE")["heads"]) == {640} and set(of(code, "WRITE")["first"]) == {1024}
    # Queries at 0, 2560 heads x 128 / 32 lines; keys, values and results follow.
    write = of(code, "WRITE")[1]
    assert (write["line"], write["line2"]) == (10240 + 640 * 4, 20480 + 640 * 4)
    assert attends["line2"][:2].tolist() == [30720, 30720 + 512]


def test_a_prompt_by_hand():
    scenario = Scenario(prompt=1024, generate=0, batch=64)
    for spec, copies, spans in ((FULL, 2, 0), (SPARSE, 3, 4)):
        code = code_of(map_model(spec, OPT, scenario))
        # K and V of a layer are 64 x 1024 x 20480 B = 1.342e9, as Table III has them; keys twice make it 1.5 times.
        assert of(code, "LINK")["bytes"].sum() == 40 * 64 * 1024 * 5120 * 2 * copies
        tokens, channels = (of(code, "WRITE", form=i) for i in range(len(FORMS)))
        assert (tokens["heads"] * tokens["tokens"]).sum() == 40 * 64 * 40 * 1024
        assert channels["heads"].sum() == 40 * 64 * 40 * spans


def test_what_the_gpu_does_is_the_graph_without_decodes_attention():
    scenario = Scenario(prompt=32, generate=3, batch=5)
    model = load_model("llama-3-8b")
    mapped = map_model(FULL, model, scenario)
    code = code_of(mapped)
    prompt = prefill(model, prompt=32, batch=5)
    steps = [decode_step(model, context=32 + i, batch=5) for i in range(3)]
    attention = (OpKind.SCORES, OpKind.SOFTMAX, OpKind.VALUES)
    expected = prompt.flops + sum(op.flops for g in steps for op in g.operators if op.kind not in attention)
    assert of(code, "GPU")["operations"].sum() == expected
    # And with keys and values elsewhere, decode's attention as well, and what it reads.
    # What the prompt attends to and what decode does are told apart: only one of them is in the drives.
    prompts = [i for i, tag in enumerate(mapped.tags) if tag.op == "prompt_attention"]
    assert set(code["op"][np.isin(code["tag"], prompts)]) == {OP["GPU"]}
    code = code_of(map_model(FULL, model, scenario, {"kv": "host"}))
    assert of(code, "GPU")["operations"].sum() == prompt.flops + sum(g.flops for g in steps)
    attends = np.array([i for i, tag in enumerate(mapped.tags) if tag.op == "attention"])
    assert len(attends) == 32
    for label, graph in (("token 0", steps[0]), ("token 2", steps[2])):
        mine = [s.regions["code"] for s in map_model(FULL, model, scenario, {"kv": "ssd"}).program.segments
                if s.label == label]  # fmt: skip
        (code,) = mine
        layer = [op for op in graph.operators if op.layer == 7 and op.kind in attention]
        moved = (
            layer[0].input_bytes(16) + layer[2].output_bytes(16) + sum(op.kv_read_bytes(16) for op in layer)
        )
        assert moved in of(code, "GPU", operations=sum(op.flops for op in layer))["bytes"]


@pytest.mark.parametrize(("kv", "paths"), [("host", ("host", "host")), ("ssd", ("ssd_read", "ssd_write"))])
def test_elsewhere_all_keys_and_values_cross_the_link_in_every_step(kv, paths):
    scenario = Scenario(prompt=100, generate=3, batch=4)
    code = code_of(map_model(FULL, OPT, scenario, {"kv": kv}))
    layer = 4 * 5120 * 2 * 2  # of a token of the batch
    links = of(code, "LINK")
    read, written = PATHS.index(paths[0]), PATHS.index(paths[1])
    assert set(code["op"]) == {OP["GPU"], OP["LINK"]} and set(links["path"]) == {read, written}
    if kv == "ssd":
        assert links["bytes"][links["path"] == read].sum() == 40 * layer * (100 + 101 + 102)
        assert links["bytes"][links["path"] == written].sum() == 40 * layer * 103
    assert links["bytes"].sum() == 40 * layer * (100 + 101 + 102 + 103)
    # Twenty drives: of paths that they share each has a twentieth of the bytes.
    shared = of(code_of(map_model(machine("drives=20"), OPT, scenario, {"kv": kv})), "LINK")
    assert (shared["bytes"] * 20 == links["bytes"]).all()


def test_heads_are_dealt_out_to_drives():
    scenario = Scenario(context=64, generate=1, batch=4)
    for drives, heads in ((20, 2), (3, 14), (40, 1)):
        mapped = map_model(machine(f"drives={drives}"), OPT, scenario)
        code = code_of(mapped, "token 0")
        assert of(code, "ATTEND")["heads"].sum() == 40 * 4 * heads
        assert of(code, "LINK")["bytes"][0] == 4 * heads * 3 * 128 * 2
        assert any("40 K/V heads on 3 drives" in n for n in mapped.notes) == (drives == 3)


def test_heads_of_a_group_share_their_keys():
    spec = machine("host.gpus=4")
    code = code_of(map_model(spec, load_model("llama-2-70b"), Scenario(context=32, batch=2)), "token 0")
    config = of(code, "CONFIG")
    assert config["group"] == 8 and not config["mean"]
    assert set(of(code, "ATTEND")["heads"]) == {16}
    # 8 K/V heads of 128 channels, 64 queries: (64 + 16) x 128 x 2 B x 2 sequences in.
    assert of(code, "LINK")["bytes"][:2].tolist() == [80 * 128 * 2 * 2, 64 * 128 * 2 * 2]


def test_selections_follow_the_step_and_spans_are_transposed():
    mapped = map_model(SPARSE, OPT, Scenario(context=510, generate=4, batch=2))
    steps = {s.label: s.regions["code"] for s in mapped.program.segments if s.label.startswith("token")}
    # A page of 2048 elements holds 8 channels of 256 tokens: token 511 completes the second span.
    for i, (tokens, spans) in enumerate([(511, 1), (512, 1), (513, 2), (514, 2)]):
        code = steps[f"token {i}"]
        attend = of(code, "ATTEND")
        assert set(attend["tokens"]) == {tokens} and set(attend["spans"]) == {spans}
        assert of(code, "CONFIG")["k"] == tokens // 16 and of(code, "CONFIG")["r"] == 16
        assert np.uint32(attend["share"][0]).view(np.float32) == np.float32(1 / tokens)
        assert set(of(code, "TRANSPOSE")["first"]) == ({1} if tokens == 512 else set())
        assert of(code, "TRANSPOSE")["heads"].sum() == (40 * 2 * 40 if tokens == 512 else 0)
    assert np.uint32(of(code, "CONFIG")["scale"][0]).view(np.float32) == np.float32(1 / np.sqrt(128))


def test_a_prompt_that_the_gpu_does_not_hold_goes_in_parts():
    mapped = map_model(FULL, OPT, Scenario(prompt=1024, generate=1, batch=256))
    assert mapped.document["prompt_batch"] == 128 and any(
        "128 sequences at a time" in n for n in mapped.notes
    )
    labels = [s.label for s in mapped.program.segments]
    assert labels == ["prompt 0-127", "prompt 128-255", "token 0"]
    assert mapped.steps == 3 and list(mapped.step_of) == [0, 0, 1]
    slots = of(code_of(mapped), "WRITE")["slot"]
    assert slots.max() < 40 * 256 * 40
    # The second half of the first layer begins behind its first 128 sequences.
    second = next(s for s in mapped.program.segments if s.label == labels[1])
    assert of(second.regions["code"], "WRITE")["slot"][0] == 128 * 40


def test_pieces_are_equal_where_possible():
    for total, limit, unit in ((2560, 128, 8), (40, 128, 8), (96, 40, 8)):
        size = pieces(total, limit, unit)
        assert total % size == 0 and size <= limit and (size == total or size % unit == 0)
    assert pieces(127 * 2, 100, 8) == 96  # a prime's double would leave single heads


# ---- pages --------------------------------------------------------------------------------------------


def play(spec, mapped):
    """Every command against the drive's tables, which refuse pages that are not there. Returns them."""
    p = spec.params()
    tables, config = PageTables(p), None
    for segment in mapped.program.segments:
        code = segment.regions["code"]
        for record in code:
            if record["op"] == OP["CONFIG"]:
                config = record
            tables.command(config, record)
        csd.check(p, code, segment.label)
    return tables


scenarios = st.builds(
    Scenario,
    context=st.integers(0, 70),
    prompt=st.integers(0, 70),
    generate=st.integers(1, 40),
    batch=st.integers(1, 3),
)


@settings(deadline=None, max_examples=30)
@given(
    scenarios, st.sampled_from(["dense", "sparf"]), st.sampled_from([1, 3, 4]), st.sampled_from([0, 1, 5]),
    st.sampled_from([2048, 300]), st.booleans(),
)  # fmt: skip
def test_programs_read_only_what_they_wrote(scenario, kind, drives, chunk, lines, groups):
    spec = small(f"attention.kind={kind}", f"drives={drives}", "flash.geometry.blocks_per_plane=64")
    model = dataclasses.replace(TINY, heads=8) if groups else TINY
    try:
        mapped = map_model(small(
            f"attention.kind={kind}", f"drives={drives}", f"dram.vector_lines={lines}",
            "flash.geometry.blocks_per_plane=64",
        ), model, scenario, {"chunk": chunk})  # fmt: skip
    except UserError as error:  # a head of a long prompt takes more than a small half
        assert lines == 300 and "dram.vector_lines" in str(error)
        return
    tables = play(spec, mapped)
    total = scenario.context + scenario.prompt + scenario.generate
    heads = 2 * scenario.batch * -(-4 // drives)
    # Two pages for 16 tokens, two more (of 8 channels of 16) for a span of 32.
    assert tables.taken.sum() == heads * (total // 16 * 2 + (total // 32 * 2 if kind == "sparf" else 0))


def test_cached_tokens_are_there_and_take_no_commands_of_a_step():
    # 8 heads of 70 + 70 tokens, and two spans of 32 in the other form: 6528 lines of 4 elements.
    spec = small("attention.kind=sparf", "dram.vector_lines=13056")
    mapped = map_model(spec, TINY, Scenario(context=70, generate=2, batch=2))
    segments = list(mapped.program.segments)
    assert [s.label for s in segments] == [CACHED, CACHED, "token 0", "token 1"]
    for segment in segments[:2]:
        code = segment.regions["code"]
        assert set(code["op"]) == {OP["CONFIG"], OP["WRITE"]}
        assert of(code, "WRITE", form=0)["tokens"].tolist() == [70]
        assert of(code, "WRITE", form=1)["first"].tolist() == [0, 1]  # spans of 32


def test_a_prompt_behind_cached_tokens_brings_them_back():
    spec = small("dram.vector_lines=8192")
    mapped = map_model(spec, TINY, Scenario(context=40, prompt=8, generate=0, batch=2))
    code = code_of(mapped, "prompt")
    # 2 full groups of 16 tokens, K and V; all 40 tokens of 8 heads cross the link.
    assert of(code, "READ")["count"].tolist() == [4, 4] and of(code, "READ")["slot"].tolist() == [0, 8]
    assert of(code, "LINK")["bytes"].tolist() == 2 * [8 * 2 * 40 * 16 * 2, 8 * 2 * 8 * 16 * 2]
    play(spec, mapped)


def test_blocks_are_erased_when_few_are_free():
    # 96 slots of 15 groups, K and V: 1440 pages of each log, in stripes of 32 (2 chips x 2 planes x 8 pages): 45 blocks.
    scenario = Scenario(context=240, generate=1, batch=12)
    with pytest.raises(UserError, match="of a drive's flash, more than its"):
        map_model(small("dram.vector_lines=8192", "flash.geometry.blocks_per_plane=44"), TINY, scenario)
    wide = small("dram.vector_lines=8192", "flash.geometry.blocks_per_plane=48")
    mapped = map_model(wide, TINY, scenario)
    code = code_of(mapped, "reclaim")
    assert code["op"].tolist() == [OP["RECLAIM"]] and code["count"] == [1440 // 32]
    assert map_model(wide, TINY, scenario, {"reclaim": 0}).steps == mapped.steps - 1
    tables = play(wide, mapped)
    assert tables.erased.tolist() == [45, 45]


@pytest.mark.parametrize("kind", ["dense", "sparf"])
@pytest.mark.parametrize("group", [1, 2])
def test_values_are_those_of_each_heads_own_keys(kind, group):
    """A prompt in parts, a step that fills a page and completes a span, on values: a wrong slot, line or span shows."""
    spec = small(
        "dram.vector_lines=1700", "dram.slots=16", f"attention.kind={kind}", "attention.k=7", "attention.r=5",
        "flash.geometry.blocks_per_plane=4",
    )  # fmt: skip
    model = dataclasses.replace(TINY, heads=4 * group)
    mapped = map_model(spec, model, Scenario(context=21, prompt=10, generate=3, batch=2))
    rng = np.random.default_rng(1)

    def half(*shape):
        return rng.normal(size=shape).astype(np.float16).view(np.uint16)

    keys, values, d = half(16, 34, 16), half(16, 34, 16), 16
    drive, engine, attended = Machine(spec, blank_image(spec.params())), Engine(4, 6, 3, 3), 0
    for record in code_of(mapped):
        fields = dict(zip(record.dtype.names, record.tolist(), strict=True))
        op, mine = csd.OPS[fields["op"]].name, slice(fields["slot"], fields["slot"] + fields["heads"])
        first, n = fields["first"], fields["tokens"]
        bring = {}  # what the link leaves in the vectors
        if op == "WRITE" and fields["form"] == 0:
            bring = {"line": keys[mine, first : first + n], "line2": values[mine, first : first + n]}
        elif op == "WRITE":
            bring = {"line": keys[mine, 32 * first : 32 * (first + 1)].swapaxes(1, 2)}
        elif op == "ATTEND":
            queries = half(fields["heads"], group, d)
            bring = {"line": queries}
        for line, what in bring.items():
            drive.vectors[4 * fields[line] :][: what.size] = what.reshape(-1)
        getattr(drive, op)(fields)
        if op != "ATTEND":
            continue
        attended += fields["heads"]
        found = drive.vectors[4 * fields["line2"] :][: queries.size].reshape(queries.shape)
        k, v, scale = keys[mine, :n], values[mine, :n], np.float32(0.25)
        expected = dense(queries, k, v, scale, engine)
        if kind == "sparf":
            sums = add_values(np.zeros((fields["heads"], d), np.uint32), v)
            expected = sparf(
                queries,
                k,
                v,
                scale,
                engine,
                r=5,
                k=7,
                share=np.float32(1 / n),
                value_sum=sums if group == 1 else None,
            )
        assert np.array_equal(found, expected.out)
    assert attended == 3 * 16


# ---- hazards ------------------------------------------------------------------------------------------


def waits(code):
    """For each command those before it of each unit that need not be done when it begins: {unit: [places]}."""
    unit = {OP["GPU"]: "gpu", OP["LINK"]: "link"}
    open_ = {"gpu": [], "link": [], "drive": []}
    for i, record in enumerate(code):
        for bit, name in ((1, "gpu"), (2, "link"), (4, "drive")):
            if record["after"] & bit:
                open_[name] = []
        yield i, record, {name: list(places) for name, places in open_.items()}
        if record["op"] != OP["CONFIG"]:
            open_[unit.get(int(record["op"]), "drive")].append(i)


@pytest.mark.parametrize(("context", "lines"), [(0, 1600), (0, 3400), (70, 1640), (70, 4000)])
def test_halves_of_the_vectors_take_turns(context, lines):
    spec = small(f"dram.vector_lines={lines}", "attention.kind=sparf")
    mapped = map_model(spec, TINY, Scenario(context=context, prompt=64, generate=0, batch=3))
    code = np.concatenate([s.regions["code"] for s in mapped.program.segments if s.label != CACHED])
    rows = list(waits(code))
    half = lines // 2
    sends = [i for i, r, _ in rows if mapped.tags[r["tag"]].op == "kv_send"]
    stores = [i for i, r, _ in rows if r["op"] == OP["WRITE"] and r["form"] == 0]
    assert len(sends) == len(stores) > 2
    for send, store in zip(sends, stores, strict=True):
        _, record, pending = rows[store]
        assert send < store and send not in pending["link"]  # it is there
        mine = int(record["line"]) // half
        _, _, pending = rows[send]
        for before in pending["drive"]:  # nothing that still reads or writes this half
            assert int(code["line"][before]) // half != mine
        if context:  # nothing that is still on its way to the GPU from there
            fetches = [i for i in pending["link"] if mapped.tags[code["tag"][i]].op == "kv_fetch"]
            assert not fetches
    for send, store, end in zip(sends, stores, [*stores[1:], len(code)], strict=True):
        # What a part brings lies side by side: keys, values, and keys once more for each span.
        part = [code[store], *(r for r in code[store:end] if r["op"] == OP["WRITE"] and r["form"] == 1)]
        each = [int(r["heads"]) * 4 * (32 if r["form"] else int(r["tokens"])) for r in part]
        begins = [int(part[0]["line"]), int(part[0]["line2"]), *(int(r["line"]) for r in part[1:])]
        sizes = [each[0], *each]
        assert begins == [begins[0] + sum(sizes[:i]) for i in range(len(sizes))]
        assert sum(sizes) * 4 * 2 == code[send]["bytes"] and sum(sizes) <= half
    for _, record, pending in rows:
        if mapped.tags[record["tag"]].op == "kv_fetch":
            assert not [j for j in pending["drive"] if code["op"][j] == OP["READ"]]
        if record["op"] == OP["READ"]:
            assert not [j for j in pending["drive"] if code["op"][j] == OP["WRITE"]]


def test_a_step_waits_for_what_it_needs():
    spec = small("attention.kind=sparf")
    mapped = map_model(spec, TINY, Scenario(prompt=31, generate=2, batch=3))
    code = np.concatenate([s.regions["code"] for s in mapped.program.segments])
    for i, record, pending in waits(code):
        op = mapped.tags[record["tag"]].op
        if op == "send":
            assert not pending["gpu"]  # queries, keys and values are computed
            assert not [j for j in pending["drive"] if code["op"][j] in (OP["WRITE"], OP["ATTEND"])]
        if op in ("kv_append", "attention") and record["op"] in (OP["WRITE"], OP["ATTEND"]):
            assert not pending["link"]  # they have arrived
        if op == "receive":
            assert not pending["drive"]
        if op == "attention_out":
            before = [mapped.tags[code["tag"][j]].op for j in pending["link"]]
            assert "receive" not in before
        if op == "transpose":  # overlaps what follows: the GPU does not wait for it
            assert code["op"][i + 1] == OP["TRANSPOSE"] or code["after"][i + 1] == 2


# ---- documents and refusals ---------------------------------------------------------------------------


def test_a_document_comes_back_as_it_went():
    scenario = Scenario(prompt=64, generate=2, batch=4)
    for parts in ({}, {"kv": "ssd"}, {"attention": "sparf", "chunk": 40, "page_channels": 4, "reclaim": 0.5}):
        mapped = map_model(FULL, OPT, scenario, parts)
        document = json.loads(json.dumps(mapped.document))
        assert parts.items() <= document.items()
        again = map_model(FULL, OPT, scenario, document)
        assert again.document == mapped.document
        assert np.array_equal(code_of(again), code_of(mapped))
    assert sorted(map_model(FULL, OPT, scenario).beside) == ["kv=host", "kv=ssd"]
    assert not map_model(FULL, OPT, scenario, {"kv": "host"}).beside


def test_what_a_baseline_can_not_hold_is_left_out():
    # 2048 tokens x 819200 B x 64 = 107.4 GB: more than the host's 96 GB, less than the SSD's 2000.
    mapped = map_model(FULL, OPT, Scenario(context=1024, prompt=0, generate=1024, batch=64))
    assert list(mapped.beside) == ["kv=ssd"]
    (note,) = [n for n in mapped.notes if "left out" in n]
    assert note.startswith("kv=host is left out: 2048 tokens x batch 64 are 107.4 GB") and "96.0 GB" in note


@pytest.mark.parametrize(
    ("sets", "model", "scenario", "mapping", "message"),
    [
        ((), "bert-base", Scenario(prompt=8, generate=0), {}, "bert-base is an encoder"),
        ((), "bloom-176b", Scenario(), {}, "bloom-176b: target csd has no ALiBi"),
        ((), "sparse-gpt-13b", Scenario(), {}, "target csd does not support sparse weights"),
        ((), "opt-30b", Scenario(), {}, "opt-30b does not fit 1 x a6000: weights 59.9 GB and activations"),
        (("engine.max_tokens=8192",), "mistral-7b", Scenario(context=4096), {}, "sliding window of 4096"),
        ((), "opt-13b", Scenario(context=2048), {}, "opt-13b has 2048 positions"),
        ((), "llama-2-13b", Scenario(context=5000), {}, "5001 tokens are more than engine.max_tokens 4096"),
        ((), "llama-2-13b", Scenario(context=64, batch=512), {}, "819200 slots, more than dram.slots 524288"),
        (("engine.max_channels=64",), "opt-13b", Scenario(), {}, "heads of 128 channels; engine.lanes 32"),
        (("engine.max_group=4", "host.gpus=4"), "llama-2-70b", Scenario(), {}, "8 query heads share a K/V head"),
        (("drives=41",), "opt-13b", Scenario(), {}, "drives 41 are more than the 40 K/V heads"),
        (("dram.table_bits=6",), "opt-13b", Scenario(context=1000), {}, "1001 tokens need 126 table entries"),
        (("dram.vector_lines=1000",), "opt-13b", Scenario(batch=9), {}, "360 heads take 5760 lines"),
        (("dram.vector_lines=8000",), "opt-13b", Scenario(prompt=512), {}, "one head take 4096 lines"),
        (("flash.geometry.blocks_per_plane=2",), "opt-13b", Scenario(context=2000, batch=9), {}, "drive's flash, more than"),
        ((), "opt-13b", Scenario(), {"kv": "disk"}, "mapping.kv must be drive or host or ssd, not 'disk'"),
        ((), "opt-13b", Scenario(), {"chunks": 4}, "mapping has no 'chunks': did you mean chunk?"),
        ((), "opt-13b", Scenario(), {"chunk": 1024}, "mapping.chunk must be a whole number in 0..1023"),
        ((), "opt-13b", Scenario(), {"reclaim": 2}, "mapping.reclaim must be a share"),
        ((), "opt-13b", Scenario(), {"model": "opt-30b"}, "mapping.model must be 'opt-13b' here"),
        ((), "opt-13b", Scenario(), {"kv": "host", "attention": "sparf"}, "mapping.attention must be dense where kv is host"),
        ((), "opt-13b", Scenario(context=2000, batch=64), {"kv": "host"}, "more than the 96.0 GB of host memory"),
        ((), "opt-13b", Scenario(prompt=1024, batch=256), {"prompt_batch": 200}, "does not fit 1 x a6000"),
    ],
)  # fmt: skip
def test_refusals_take_one_line_with_the_numbers(sets, model, scenario, mapping, message):
    with pytest.raises(UserError) as error:
        map_model(machine(*sets), load_model(model), scenario, mapping)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_energy_counts_every_drive_and_the_gpus():
    one, twenty = ({r.name: r for r in csd.energy(machine(*sets))} for sets in ((), ("drives=20",)))
    assert twenty["GeMV"].pj == 20 * one["GeMV"].pj
    # 300 W in ticks of 1/285 us.
    assert (
        one["GPUs"].pj == twenty["GPUs"].pj == Fraction(300 * 10**6, 285) and one["GPUs"].basis == "busy:gpu"
    )
