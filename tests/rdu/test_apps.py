"""Plasticine's regression applications: what they compute, what they take, and what the logs say."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.published import published
from tilewright.mappers.rdu import apps
from tilewright.sim.rdu import execute
from tilewright.workloads.rdu import blank_image, interpret


@cache
def machine(*sets):
    tree = specs.apply_sets(specs.load_tree("plasticine-20x20", ["rdu"]), list(sets))
    return specs.build(rdu.RduSpec, tree, "plasticine-20x20")


def outcome(app, spec):
    """What the interpreter leaves where the result belongs."""
    image = blank_image(spec.params())
    memory = app.memory(app.bytes)
    image["ddr"][: len(memory)] = memory
    image, _ = interpret(spec, app.program(app.section.build()), image)
    raw = image["ddr"][app.output : app.output + app.result.nbytes]
    return raw.view(np.int32).reshape(app.result.shape)


def ticks(app, spec, **changed):
    p = spec.params()._replace(**changed)
    return execute(p, app.section.build().records, app.arguments).ticks


# Small enough for every loop, large enough for every parallel factor and its last, shorter turn.
SMALL = {
    apps.simple_dot_product: [{"n": 128}, {"n": 128, "outer": 2}],
    apps.dot_product: [{"n": 128}, {"n": 192, "outer": 3}, {"n": 128, "inner": 16, "outer": 2}],
    apps.outer_product: [
        {"n": 64, "rows": 32, "words": 1},
        {"n": 64, "rows": 16, "columns": 16, "outer_rows": 2, "outer_columns": 2},
    ],
    apps.mem_reduce: [
        {"size": 64, "n": 7},
        {"size": 32, "n": 8, "outer": 2},
        {"size": 32, "n": 7, "outer": 3},
    ],
    apps.sram_split: [{"n": 1280}, {"n": 1280, "write": 16, "outer": 3}, {"n": 640, "write": 16, "read": 16}],
    apps.gemm: [
        {"dim": 32, "tile": 16},
        {"dim": 32, "tile": 16, "inner": 8, "j": 2},
        {"dim": 32, "tile": 16, "i": 3},
        {"dim": 32, "tile": 16, "ii": 2, "kk": 3},
        {"dim": 24, "tile": 8, "jj": 3, "inner": 4, "j": 2},
    ],
}


@pytest.mark.parametrize(("make", "sizes"), [(f, a) for f, cases in SMALL.items() for a in cases])
def test_results_are_those_of_numpy(make, sizes):
    spec = machine()
    app = make(spec.params(), **sizes)
    assert np.array_equal(outcome(app, spec), app.result)
    assert app.result.any()
    assert app.ideal <= ticks(app, spec)


def test_words_beyond_one_pmu_lie_in_the_next():
    spec = machine("pmu.bytes=2048")  # 512 words of 1280
    app = apps.sram_split(spec.params(), n=1280)
    assert sum(name.startswith("words") for name in app.section.netlist().index) == 3
    # The sum of 0 .. 1279 is 1279 * 640.
    assert outcome(app, spec).tolist() == [1279 * 640]


def test_expected_values_by_hand():
    p = machine().params()
    # 0 + 1 + 4 + .. + 31^2 = 31 * 32 * 63 / 6; tiles 0..6 add to 21.
    assert apps.simple_dot_product(p, n=32).result.tolist() == [31 * 32 * 63 // 6]
    assert set(apps.mem_reduce(p, size=16, n=7).result.tolist()) == {21}
    a, b = (v.astype(np.int64).reshape(32, 32) for v in apps.gemm(p, dim=32, tile=16).inputs.values())
    c = apps.gemm(p, dim=32, tile=16).result
    assert int(c[3, 5]) == sum(int(a[3, k]) * int(b[k, 5]) for k in range(32))


def test_ideals_are_products_of_loops():
    p = machine().params()
    ideals = {key: make(p, **sizes).ideal for key, (make, sizes) in apps.LOGGED.items()}
    # 128^3 / 16 products a tick; 8 tiles of 64 x ceil(64 / 3) rows of 64 x 4; 100 and ceil(100 / 3) tiles of 1024;
    # 262144 words in and out; 8192 tiles by three, 4 ticks to write one, 64 to read it.
    assert ideals["gemm_0"] == 131072 and ideals["gemm_19"] == 8 * 22 * 64 * 4 == 45056
    assert ideals["gemm_22"] == 131072 // 4 and ideals["gemm_8"] == 32**3 // 8 // 2
    assert ideals["mem_reduce_0"] == 102400 and ideals["mem_reduce_2"] == 34 * 1024
    assert ideals["sram_split_0"] == 524288 and ideals["sram_split_3"] == 2731 * 68
    assert set(ideals) < set(published("rdu").rows)


@pytest.mark.parametrize("key", list(apps.LOGGED))
def test_logged_rows(key):
    spec = machine()
    make, sizes = apps.LOGGED[key]
    app = make(spec.params(), **sizes)
    ours, logged = ticks(app, spec), int(published("rdu").rows[key].low)
    assert app.ideal <= ours
    if key == "sram_split_3":  # ours has a memory for each third of the tiles, and no conflicts
        assert app.ideal < ours < 0.9 * logged
    elif app.ideal >= 30_000:
        assert ours == pytest.approx(logged, rel=0.03)
    else:
        assert ours == pytest.approx(logged, rel=0.15)
    if key.startswith(("dot_simple", "sram_split")) and key != "sram_split_3":
        assert abs(ours - logged) <= 30


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 6), st.integers(1, 2))
def test_time_grows_by_tiles_and_falls_by_copies(more, outer):
    spec = machine()
    p = spec.params()
    times = [ticks(apps.simple_dot_product(p, n=256 * n, outer=outer), spec) for n in (1, 1 + more)]
    # Another 256 elements take 256 / outer ticks, at whatever fill: four buffers leave no gap between tiles.
    assert times[1] - times[0] == pytest.approx(256 * more // outer, abs=16)


def test_a_streaming_application_pays_for_hops_once():
    spec = machine()
    cost = [
        ticks(app, spec, hop=3) - ticks(app, spec)
        for app in (apps.outer_product(spec.params(), n=n, words=1) for n in (64, 128))
    ]
    assert 0 < cost[0] and abs(cost[1] - cost[0]) < 40


def test_errors_name_the_size():
    p = machine().params()
    for message, make, sizes in (
        ("tile 48 must divide 128", apps.gemm, {"tile": 48}),
        ("kk 3 must divide 4 tiles", apps.gemm, {"tile": 32, "kk": 3}),
        ("inner 16 must divide 8", apps.gemm, {"tile": 16, "j": 2}),
        ("outer must be in 1..3, not 4", apps.mem_reduce, {"outer": 4}),
        ("write must be 1 or 16, not 4", apps.sram_split, {"write": 4}),
        ("outer * tile 96 must divide 1024", apps.dot_product, {"outer": 3}),
        ("buffers of 65536 words for 2 tiles", apps.mem_reduce, {"size": 65536, "n": 2}),
    ):
        with pytest.raises(UserError, match=message.replace("*", r"\*")):
            make(p, **sizes)
