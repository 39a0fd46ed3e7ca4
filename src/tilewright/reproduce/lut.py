"""LUT Tensor Core: Table 1 of the paper on our machines, the same machine without lookup arrays, and a roofline.

What Table 1 times is not said. Were it a single layer, its FP16 row would be at 1.5 % of the peak; so we take it
for the whole model: BS1 SEQ2048 as a prompt of 2048 tokens, BS1024 SEQ1 as one token for each of 1024 sequences with
nothing cached (2048 tokens of cache for each would be 698 GB).
"""

from collections.abc import Mapping, Sequence
from typing import cast

from tilewright.arch.lut import LutSpec
from tilewright.arch.registry import load_spec, room
from tilewright.arch.scenario import Scenario
from tilewright.mappers.lut import gemm_program
from tilewright.reproduce import Ours, Row
from tilewright.reproduce.jobs import Job, Outcome

SPEC = "lut-a100-4x"
MODEL = "bitnet-b1.58-3b"
OTHERS = ("llama-2-7b", "llama-2-13b")  # in FP16, which fits
KERNEL = (2048, 27648, 5120)
W1A16 = ("lut.weight_bits=1", "lut.arrays=2", "lut.activation=fp16", "lut.accumulator=fp16")

# What Table 1 calls them -> the spec, and what computes its linear layers.
MACHINES = {
    "FP16 TC": ("lut-a100-4x", "tensor_fp16"),
    "INT8 TC": ("lut-a100-4x", "tensor_int8"),
    "4X": ("lut-a100-4x", "lut"),
    "8X": ("lut-a100-8x", "lut"),
    "a100": ("a100", ""),
}
PHASES = ("prefill", "decode")
KEYS = {"FP16 TC": "fp16", "INT8 TC": "int8", "4X": "4x", "8X": "8x"}
HEADINGS = {
    "prefill_s": "prefill", "prefill_j": "energy", "decode_s": "decode", "decode_j": "energy", "busy": "arrays busy %",
}  # fmt: skip


def prefill(generate: int) -> Scenario:
    return Scenario(prompt=2048, generate=0)


def decode(generate: int) -> Scenario:
    return Scenario(generate=generate, batch=1024)


def jobs(generate: int) -> list[Job]:
    out = []
    for spec, linear in MACHINES.values():
        mapping = {"linear": linear} if linear else None
        out += [Job(spec, MODEL, s(generate), mapping=mapping) for s in (prefill, decode)]
    for model in OTHERS:
        for spec, linear in (MACHINES["FP16 TC"], MACHINES["8X"]):
            out += [Job(spec, model, s(generate), mapping={"linear": linear}) for s in (prefill, decode)]
    return out


def probe(generate: int) -> Job:
    return Job(SPEC, MODEL, Scenario(prompt=2048, generate=1))


def _sorted(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], Outcome]:
    """By model, machine and phase."""
    names = {v: k for k, v in MACHINES.items()}
    out = {}
    for o in outcomes:
        machine = names[o.job.spec, (o.job.mapping or {}).get("linear", "")]
        out[o.job.model, machine, "prefill" if o.job.scenario.prompt else "decode"] = o
    return out


def seconds(outcome: Outcome) -> float:
    """Of the prompt, or of one decode step."""
    return outcome.time_s / (outcome.job.scenario.generate or 1)


def peak_tops(spec: LutSpec) -> float:
    """Operations of all arrays at the weights' width, 1e12 a second; a multiply-accumulate is two."""
    p = spec.params()
    lanes = spec.cores * p.rows * p.n * p.k
    return float(2 * lanes / spec.lut.weight_bits / spec.tick.period_s) / 1e12


def array_efficiency(spec: LutSpec) -> float:
    """Operations by the energy of the arrays alone, 1e12 a joule."""
    planes = 512 * 2 / spec.lut.weight_bits
    return float(planes / spec.energy.lut_pj_per_512_lanes)


def kernel_tops(sets: Sequence[str] = ()) -> float:
    """What the kernel study's GEMM reaches, 1e12 operations a second."""
    spec = cast(LutSpec, load_spec(SPEC, sets))
    m, n, k = KERNEL
    ticks = room("sim", "lut").simulate(spec.params(), gemm_program(spec, m, n, k)).ticks
    return float(2 * m * n * k / (ticks * spec.tick.period_s)) / 1e12


def rows(outcomes: Sequence[Outcome]) -> Mapping[str, Ours]:
    at = _sorted(outcomes)
    time = {(machine, phase): seconds(at[MODEL, machine, phase]) for machine in MACHINES for phase in PHASES}
    ours = {
        f"{phase}_{key}": Ours({MODEL: 1e3 * time[machine, phase]})
        for machine, key in KEYS.items()
        for phase in PHASES
    }
    for phase in PHASES:
        for machine, key in (("4X", "4x"), ("8X", "8x")):
            ours[f"speedup_{phase}_{key}"] = Ours({MODEL: time["FP16 TC", phase] / time[machine, phase]})
        ours[f"speedup_int8_{phase}_4x"] = Ours({MODEL: time["INT8 TC", phase] / time["4X", phase]})
        roofline = at[MODEL, "a100", phase]
        ratio = {MODEL: time["a100", phase] / time["4X", phase]}
        ours[f"roofline_{phase}_4x"] = Ours(ratio, ">=" if roofline.lower_bound else "")
    ours["llama"] = Ours(
        {
            f"{model} {phase}": seconds(at[model, "FP16 TC", phase]) / seconds(at[model, "8X", phase])
            for model in OTHERS
            for phase in PHASES
        }
    )
    ours["kernel_w1a16"] = Ours({"2048 x 27648 x 5120": kernel_tops(W1A16)})
    for machine, key in (("4X", "4x"), ("8X", "8x")):
        spec = cast(LutSpec, load_spec(MACHINES[machine][0]))
        ours[f"peak_{key}"] = Ours({machine: peak_tops(spec)})
        ours[f"efficiency_{key}"] = Ours({machine: array_efficiency(spec)})
    return ours


def models(outcomes: Sequence[Outcome]) -> list[dict[str, str | float]]:
    at = _sorted(outcomes)
    table: list[dict[str, str | float]] = []
    for machine in MACHINES:
        row: dict[str, str | float] = {"model": machine}
        for phase in PHASES:
            o = at[MODEL, machine, phase]
            row |= {f"{phase}_s": seconds(o), f"{phase}_j": o.energy_j / (o.job.scenario.generate or 1)}
        o = at[MODEL, machine, "prefill"]
        row["busy"] = 100 * o.units["compute"]["busy"] / o.ticks if "compute" in o.units else 0.0
        table.append(row)
    return table


def remarks(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        (
            "Table 1 does not say what it times: a single layer would have its FP16 row at 1.5 % of the peak, so we take "
            "the whole model; BS1 SEQ2048 as a prompt of 2048, BS1024 SEQ1 as a token for each of 1024 sequences, "
            "nothing cached"
        ),
        (
            "FP16 TC, INT8 TC: our machine with its linear layers on the plain tensor cores, all else alike; the "
            "paper's FP16 row is of LLAMA 3B, ours has BitNet's shapes and sub-norms. a100: our roofline of efficiency "
            "1 in FP16, so that its times are lower bounds"
        ),
    ]
    for phase in PHASES:
        shares = [_share(rows[f"{phase}_{key}"]) for key in KEYS.values()]
        line = f"{phase} takes {min(shares):.2f} to {max(shares):.2f} of the published times"
        if max(shares) < 0.9:
            line += ": what is missing is not in the arrays, since the tensor cores' rows miss it, too"
        lines.append(line)
    if _share(rows["decode_8x"]) > 1.1:
        lines[-1] += (
            ". 8X is slower than published because a core's share of the L2 bandwidth does not feed twice the arrays: "
            "the cores of an SM share no operands here"
        )
    return [
        *lines,
        (
            "arrays: operations by the energy of the arrays alone, 16.22 pJ a tick (Table 2, at the synthesis clock). "
            "The energy of a run counts buffers, caches, DRAM and idle power, too"
        ),
        "kernel: two arrays a core, 1-bit weights, FP16 activations, tables and accumulators",
    ]


def _share(row: Row) -> float:
    """Our time of the published one."""
    assert row.published.low is not None
    return row.ours.low / float(row.published.low)
