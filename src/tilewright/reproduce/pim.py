"""PIM-GPT: the paper's eight models on our machine, and its baselines as rooflines.

As in the paper: nothing cached, 1024 tokens generated, batch 1, and no LM head, since the parameters that it counts
are those of the blocks.
"""

from collections.abc import Mapping, Sequence

from tilewright.arch.scenario import Scenario
from tilewright.arch.system import RooflineSpec
from tilewright.devices import load_device
from tilewright.reproduce import Ours, Row
from tilewright.reproduce.jobs import Job, Outcome
from tilewright.summary import row_hit_rate
from tilewright.workloads.models import load_model

SPEC = "pim-gpt"
BASELINES = {"gpu": "t4", "cpu": "xeon-6154"}
MODELS = tuple(
    f"{family}-{size}" for family in ("gpt2", "gpt3") for size in ("small", "medium", "large", "xl")
)
PROBE_TOKENS = 32  # of the run by which the effect of a constant is measured
HEADINGS = {
    "time_s": "time", "energy_j": "energy", "speedup_gpu": "x T4", "speedup_cpu": "x Xeon", "energy_gpu": "E T4",
    "energy_cpu": "E Xeon", "row_hits": "hits %", "vmm_share": "VMM %", "asic_share": "ASIC %",
}  # fmt: skip
VMM = ("qkv", "scores", "values", "attention_out", "up", "down")  # matrix times vector, attention's included


def jobs(generate: int) -> list[Job]:
    """The longest first: two processes then end together."""
    scenario = Scenario(generate=generate, lm_head=False)
    size = {m: load_model(m).parameters["total"] for m in MODELS}
    models = sorted(MODELS, key=lambda m: -size[m])
    return [Job(spec, model, scenario) for model in models for spec in (SPEC, *BASELINES.values())]


def probe(generate: int) -> Job:
    return Job(SPEC, "gpt2-xl", Scenario(generate=min(generate, PROBE_TOKENS), lm_head=False))


def _sorted(outcomes: Sequence[Outcome]) -> Mapping[tuple[str, str], Outcome]:
    return {(o.job.model, o.job.spec): o for o in outcomes}


def hit_rate(outcome: Outcome) -> float:
    rate = row_hit_rate(outcome.counters, load_device(outcome.job.spec).params().n_banks)
    assert rate is not None
    return rate


def asic_share(outcome: Outcome) -> float:
    """Share of the time in which the ASIC computes; the channels wait meanwhile, for instructions are serial."""
    return 1 - outcome.units["asic"]["stalls"]["idle"] / outcome.ticks


def vmm_share(outcome: Outcome) -> float:
    return sum(outcome.operators.get(op, 0) for op in VMM) / outcome.ticks


def block_weights(name: str) -> int:
    """Matrix elements of the transformer blocks: 12 L d^2 where heads are d wide in all and the MLP 4 d."""
    m = load_model(name)
    return m.layers * m.d_model * (2 * m.q_dim + 2 * m.kv_dim + 2 * m.d_ff)


def rows(outcomes: Sequence[Outcome]) -> Mapping[str, Ours]:
    at = _sorted(outcomes)
    own = {m: at[m, SPEC] for m in MODELS}
    ours = {
        "row_hits": Ours({m: 100 * hit_rate(o) for m, o in own.items()}),
        "asic_share": Ours({"gpt3-xl": 100 * asic_share(own["gpt3-xl"])}),
        "vmm_share": Ours({m: 100 * vmm_share(o) for m, o in own.items()}),
        "weights_gpt2_xl": Ours({"gpt2-xl": block_weights("gpt2-xl") / 2**20}),
        "weights_gpt3_xl": Ours({"gpt3-xl": block_weights("gpt3-xl") / 2**20}),
    }
    for key, device in BASELINES.items():
        other = {m: at[m, device] for m in MODELS}
        time = {m: other[m].time_s / own[m].time_s for m in MODELS}
        energy = {m: other[m].energy_j / own[m].energy_j for m in MODELS}
        bound = all(o.lower_bound for o in other.values())
        ours[f"speedup_{key}"] = Ours(time, ">=" if bound else "")
        # Rated power (at most) over a time (at least): their product bounds nothing.
        ours[f"energy_{key}"] = Ours(energy, "~" if bound else "<=")
        ours[f"power_{key}"] = Ours({m: energy[m] / time[m] for m in MODELS}, "<=")
    return ours


def models(outcomes: Sequence[Outcome]) -> list[dict[str, str | float]]:
    at, ours = _sorted(outcomes), rows(outcomes)
    table = []
    for m in MODELS:
        own = at[m, SPEC]
        row: dict[str, str | float] = {"model": m, "time_s": own.time_s, "energy_j": own.energy_j}
        row |= {
            key: ours[key].by_model[m] for key in ("speedup_gpu", "speedup_cpu", "energy_gpu", "energy_cpu")
        }
        row |= {"row_hits": ours["row_hits"].by_model[m], "vmm_share": ours["vmm_share"].by_model[m]}
        table.append(row | {"asic_share": 100 * asic_share(own)})
    return table


def remarks(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        (
            "as the paper: nothing cached, batch 1, no LM head. It gives ranges over the eight models, so our least and "
            "most stand beside its; gpt3-small and -medium have the shapes of gpt2's"
        )
    ]
    for key, device in BASELINES.items():
        speed, power = rows[f"speedup_{key}"], rows[f"power_{key}"]
        assert speed.published.low is not None and speed.published.high is not None
        ends = (speed.ours.low / float(speed.published.low), speed.ours.high / float(speed.published.high))
        if speed.verdict == "open":
            lines.append(
                f"{device}: a roofline of efficiency 1, for want of a source, so its times and our speed-ups over it are "
                f"lower bounds. They fall short of the published range; that the machine does can't be concluded. The "
                f"range would take a baseline that reaches {100 * min(ends):.1f} to {100 * max(ends):.1f} % of its roofline"
            )
        baseline = load_device(device)
        assert isinstance(baseline, RooflineSpec) and power.published.low is not None
        rated = float(baseline.power.peak_w)
        drawn = [rated * float(power.published.low) / power.ours.high]
        drawn.append(rated * float(power.published.high or 0) / power.ours.low)
        lines.append(
            f"{device}: energy is rated power, at most, over that time, at least: it bounds nothing. The power ratio "
            f"does not depend on that time: the published one has {device} draw {drawn[0]:.2g} to {drawn[1]:.2g} W "
            f"of its rated {rated:g} W at our machine's power"
        )
    lines.append(
        "ASIC: softmax, GELU, norms and sums, while channels wait; matrix x vector: attention included"
    )
    lines.append(
        "weights of the blocks: gpt3-xl has 24 heads of 128 (Brown et al., Table 2.1), 3072 wide in a model of 2048; "
        "12 L d^2 takes them to be 2048 wide"
    )
    return lines
