"""InstAttention: OPT-13B with 1024 tokens in and 1024 out, on our machine and on what keeps K and V elsewhere.

A run of the paper is a prompt and 1024 decode steps. A step takes as much longer as it has more tokens, so that the one
in the middle, with 1024 + 512 tokens, stands for all: throughput is that of the prompt and 1024 of these.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from tilewright.arch.csd import ISA, OP, CsdSpec, exp_latency, gemv_latency
from tilewright.arch.formats import FP16
from tilewright.arch.isa import Program, Segment
from tilewright.arch.registry import load_spec, room
from tilewright.arch.scenario import Scenario
from tilewright.mappers.csd import map_model
from tilewright.reproduce import Ours, Row
from tilewright.reproduce.jobs import Job, Outcome
from tilewright.workloads.models import load_model

SPEC = "instinfer-a6000"
MODEL = "opt-13b"
PROMPT = 1024
MANY, MOST = 64, 256  # batches of which rows speak
LINKS = ("send", "receive", "kv_send", "kv_fetch", "kv_store")

# What the paper calls them -> attention, where keys and values are, batches.
SYSTEMS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "InstA": ("dense", "drive", (4, 16, MANY, MOST)),
    "SparF": ("sparf", "drive", (4, 16, MANY, MOST)),
    "FlexGen": ("dense", "ssd", (4, 16, MANY)),
    "DeepSpeed": ("dense", "host", (16,)),
}
HEADINGS = {
    "prompt_s": "prompt", "step_s": "a step", "rate": "tokens/s", "share": "K/V share %", "step_j": "energy a step",
}  # fmt: skip

Runs = Mapping[tuple[str, int], tuple[Outcome, Outcome]]


def prompt(batch: int) -> Scenario:
    return Scenario(prompt=PROMPT, generate=0, batch=batch)


def middle(batch: int, generate: int) -> Scenario:
    """The decode step in the middle of so many."""
    return Scenario(context=PROMPT + generate // 2, generate=1, batch=batch)


def jobs(generate: int) -> list[Job]:
    return [
        Job(SPEC, MODEL, scenario, mapping={"attention": attention, "kv": kv})
        for attention, kv, batches in SYSTEMS.values()
        for batch in batches
        for scenario in (prompt(batch), middle(batch, generate))
    ]


def probe(generate: int) -> Job:
    return Job(SPEC, MODEL, middle(4, generate), mapping={"attention": "sparf"})


def _sorted(outcomes: Sequence[Outcome]) -> Runs:
    """Prompt and step by system and batch."""
    names = {(attention, kv): name for name, (attention, kv, _) in SYSTEMS.items()}
    found: dict[tuple[str, int], list[Outcome]] = {}
    for o in outcomes:
        mapping = o.job.mapping or {}
        found.setdefault((names[mapping["attention"], mapping["kv"]], o.job.scenario.batch), []).append(o)
    return {key: (pair[0], pair[1]) for key, pair in found.items()}


def _generated(outcomes: Sequence[Outcome]) -> int:
    """How many tokens are generated: twice as many as come before the step in the middle."""
    return max(1, 2 * (max(o.job.scenario.context for o in outcomes) - PROMPT))


def rate(pair: tuple[Outcome, Outcome], generate: int) -> float:
    """Tokens a second of a prompt and of so many steps."""
    first, step = pair
    return step.job.scenario.batch * generate / (first.time_s + generate * step.time_s)


def share(step: Outcome) -> float:
    """Percent of a step in which all waits for keys and values, or for attention to them where they are."""
    waits = (
        LINKS
        if step.job.mapping and step.job.mapping["kv"] != "drive"
        else (*LINKS, "attention", "kv_append")
    )
    return 100 * sum(step.operators.get(op, 0) for op in waits) / step.ticks


# ---- units --------------------------------------------------------------------------------------------


def gemv_s(spec: CsdSpec, tokens: int, d: int) -> float:
    """Seconds from a GeMV unit's first operands to its last score."""
    lanes = spec.engine.lanes
    return float((tokens * d // lanes + gemv_latency(lanes)) * spec.tick.period_s)


def softmax_s(spec: CsdSpec, tokens: int) -> float:
    """Seconds from the first score to the last weight."""
    return float((tokens + exp_latency(spec.engine.exp_terms)) * spec.tick.period_s)


def peak_gflops(spec: CsdSpec) -> float:
    return float(2 * spec.engine.kernels * spec.engine.lanes / spec.tick.period_s) / 1e9


def write_rate(spec: CsdSpec, batch: int) -> float:
    """Bytes a second, 1e9, at which a drive stores a layer of a prompt that is there: writes alone, to the last program."""
    model = load_model(MODEL)
    code = next(iter(map_model(spec, model, prompt(batch)).program.segments)).regions["code"]
    mine = (code["op"] == OP["WRITE"]) & (code["slot"] < batch * model.kv_heads) | (
        code["op"] == OP["CONFIG"]
    )
    code = code[mine]
    code["after"], code["tag"] = 0, 0
    timeline = room("sim", "csd").simulate(spec.params(), Program(ISA, [Segment({"code": code})], ["write"]))
    stored = timeline.counter("programs") * spec.flash.geometry.page_bytes
    return float(stored / (timeline.ticks * spec.tick.period_s)) / 1e9


# ---- rows ---------------------------------------------------------------------------------------------


def rows(outcomes: Sequence[Outcome]) -> Mapping[str, Ours]:
    at, n = _sorted(outcomes), _generated(outcomes)
    spec = cast(CsdSpec, load_spec(SPEC))
    page, second = spec.flash.geometry.page_bytes, float(spec.tick.period_s)
    rates = {key: rate(pair, n) for key, pair in at.items()}
    best = {system: max(v for (s, _), v in rates.items() if s == system) for system in SYSTEMS}

    def kv(model: str, batch: int, tokens: int) -> float:
        return load_model(model).kv_elements_per_token * 2 * batch * tokens / 2**30

    dense, sparse = at["InstA", MANY], at["SparF", MANY]
    elsewhere = at["FlexGen", MANY][1]
    written = [pair[0].counters["programs"] * page for pair in (dense, sparse)]
    tokens = PROMPT * MANY
    d = load_model(MODEL).head_dim
    link = dense[1].counters["link_bytes"]
    crossed = elsewhere.counters["ssd_read_bytes"] + elsewhere.counters["ssd_write_bytes"]
    estimate = sparse[1].counters
    values: dict[str, float] = {
        "gemv_us": 1e6 * gemv_s(spec, 16, d),
        "gemv_gflops": 2e-9 * 16 * d / gemv_s(spec, 16, d),
        "softmax_us": 1e6 * softmax_s(spec, 16),
        "filter_gb": spec.engine.lanes * FP16.width / 8 / second / 1e9,
        "peak_gflops": peak_gflops(spec),
        "flash_gb": dense[1].counters["token_pages"] * page / (dense[1].operators["attention"] * second) / 1e9,
        "kv_token": written[0] / tokens / 2**20,
        "kv_32": kv(MODEL, 32, 4096),
        "kv_128": kv(MODEL, 128, 2048),
        "weights_175": load_model("opt-175b").parameters["total"] * 2 / 2**30,
        "footprint": written[1] / written[0],
        "traffic": crossed / link / (elsewhere.job.scenario.context + 1),
        "write_gb": written[0] / load_model(MODEL).layers / 1e9,
        "write_rate": write_rate(spec, MANY),
        "sparsity": 100 * estimate["channel_pages_skipped"]
        / (estimate["channel_pages"] + estimate["channel_pages_skipped"]),
        "flexgen_64": rates["InstA", MANY] / rates["FlexGen", MANY],
        "deepspeed_best": best["InstA"] / best["DeepSpeed"],
        "sparf_256": rates["SparF", MOST] / rates["InstA", MOST],
        "sparf_flexgen": best["SparF"] / best["FlexGen"],
        "share_flexgen": share(elsewhere),
        "share_dense": share(dense[1]),
        "share_sparf": share(sparse[1]),
    }  # fmt: skip
    return {key: Ours({MODEL: value}) for key, value in values.items()}


def models(outcomes: Sequence[Outcome]) -> list[dict[str, str | float]]:
    n = _generated(outcomes)
    return [
        {
            "model": f"{system}, batch {batch}",
            "prompt_s": pair[0].time_s,
            "step_s": pair[1].time_s,
            "rate": rate(pair, n),
            "share": share(pair[1]),
            "step_j": pair[1].energy_j,
        }
        for (system, batch), pair in _sorted(outcomes).items()
    ]


def remarks(rows: Mapping[str, Row]) -> list[str]:
    spec = cast(CsdSpec, load_spec(SPEC))
    ssd, host = (float(spec.path_rates[path]) / 1e9 for path in ("ssd_read", "host"))
    f = spec.flash
    flash = float(f.geometry.channels * f.interface.mb_per_s) / 1000
    lines = [
        (
            "a prompt of 1024, and the decode step in the middle of those asked for, which stands for all of them: "
            "throughput is of both; best is over the batches below"
        ),
        (
            f"FlexGen, DeepSpeed: K and V on a plain SSD, in host memory, fetched a layer ahead at the full rate of "
            f"{ssd:g} and {host:g} GB/s while the GPU works: bounds of what such systems reach, without their software"
        ),
        "not here: FlexGen with SparQ and vLLM's recomputation (not mapped); swapping, read retries (not modelled)",
    ]
    low = rows["flexgen_64"].published.low
    if rows["flexgen_64"].verdict == "outside" and low is not None:
        lines.append(
            f"InstA/FlexGen is at most about {flash / ssd:.1f} where all of flash gives {flash:g} GB/s and the SSD {ssd:g}; "
            f"{float(low):.2f} takes an SSD of which the GPU sees {flash / float(low):.1f} GB/s"
        )
    return lines
