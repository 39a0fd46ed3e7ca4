"""SN40L and Plasticine: what their papers, talks and logs print, beside our machines.

Plasticine: the regression applications of its own simulator's logs, on our array with a routed network. SN40L: what
fusion and launches by the AGCUs are worth on a node of eight sockets, a Fourier convolution of 1 M points on one, and
how long an expert takes to be switched. The baseline without fusion is ours: every operator a kernel, launched by the
host, on all units that it can use. Of Table III all models are decoded, and both are trained that are there; which of
sparseGPT's weights are zero is assumed.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, cast

import numpy as np

from tilewright.arch.published import published
from tilewright.arch.rdu import RduSpec
from tilewright.arch.registry import load_spec, room
from tilewright.arch.scenario import Scenario
from tilewright.arch.system import RooflineSpec
from tilewright.devices import load_device
from tilewright.mappers.rdu.apps import LOGGED
from tilewright.mappers.rdu.monarch import Convolution, fft_convolution, unfused_convolution
from tilewright.mappers.rdu.section import Built
from tilewright.reproduce import Ours, Row
from tilewright.reproduce.jobs import Job, Outcome
from tilewright.workloads import monarch
from tilewright.workloads.models import load_model

SPEC = "sn40l-node"
SOCKET = "sn40l"
PLASTICINE = "plasticine-20x20"
MODELS = ("llama-2-7b", "mistral-7b")
CONTEXT = 4096
DECODED = (  # with the tokens of their sequences
    (MODELS[0], CONTEXT), ("llava-1.5-7b", 4096), ("mistral-7b", 2048), ("mistral-7b", 4096), ("falcon-40b", 2048),
    ("llama-2-70b", 4096), ("bloom-176b", 8192),
)  # fmt: skip
PROMPT = 1024  # published: 4096, which takes four times as long to simulate
TRAINED = (MODELS[0], "sparse-gpt-13b")
TRAIN = 512  # published: 4096 and 2048, which take more than eight and four times as long to simulate
RATES = {"8b": "llama-3.1-8b", "70b": "llama-3.1-70b", "405b": "llama-3.1-405b"}
RATE_SETS = ("node.sockets=16",)
RATE_CONTEXT = 8192
GPU = "a100"
GPUS = 8  # of a DGX
EXPERTS = 150
BATCH = 8
TOKENS = (20, 200)
ORDER = 5  # of the convolution: 16 ** 5 points
SHAPE = (2, 2048, 16, 4096, 256)  # of the fusion example, see `intensities`
BYTES = 2  # of a bfloat16

# What the text calls them -> choices of our mapper.
MAPPINGS = {
    "unfused": {"fusion": "unfused", "orchestration": "host"},
    "SO": {"fusion": "fused", "orchestration": "host"},
    "HO": {"fusion": "fused", "orchestration": "hardware"},
}
ROUTED = {"routed_dot_simple_0": "dot_simple_0", "routed_gemm_0": "gemm_0", "routed_outer_1": "outer_1"}
HEADINGS = {
    "ideal": "ideal", "logged": "logged", "ours": "ours", "error": "error %", "over": "over ideal",
    "over_logged": "logged over", "network": "network",
}  # fmt: skip


def prefill(generate: int) -> Scenario:
    return Scenario(prompt=PROMPT, generate=0)


def decode(generate: int, tokens: int = CONTEXT) -> Scenario:
    return Scenario(context=tokens - generate, generate=generate)


def training(generate: int) -> Scenario:
    return Scenario(train=TRAIN, generate=0)


def rate(generate: int) -> Scenario:
    return Scenario(context=RATE_CONTEXT - generate, generate=generate)


def jobs(generate: int) -> list[Job]:
    out = [Job(SPEC, model, prefill(generate), mapping=way) for model in MODELS for way in MAPPINGS.values()]
    out += [
        Job(SPEC, model, training(generate), mapping=way) for model in TRAINED for way in MAPPINGS.values()
    ]
    # A large model may find no routes, or come to a deadlock.
    out += [
        Job(SPEC, model, decode(generate, tokens), mapping=way, optional=model not in MODELS)
        for model, tokens in DECODED
        for way in MAPPINGS.values()
    ]
    out += [Job(SPEC, model, rate(generate), RATE_SETS, MAPPINGS["HO"], True) for model in RATES.values()]
    return [*out, Job(GPU, MODELS[0], decode(generate))]


def probe(generate: int) -> Job:
    return Job(SPEC, MODELS[0], decode(generate), mapping=MAPPINGS["HO"])


# ---- Plasticine ---------------------------------------------------------------------------------------


class App(NamedTuple):
    """Ticks of one application: of its loops alone, as logged, ours, and ours more with links twice as slow."""

    ideal: int
    logged: int
    ours: int
    network: int


@cache
def app(key: str) -> App:
    """The application of a published row. All by one preset: nothing is chosen by row."""
    params = load_spec(PLASTICINE).params()
    make, sizes = LOGGED[key]
    made = make(params, **sizes)
    built = made.section.build()
    execute = room("sim", "rdu").execute
    ticks, slower = (
        execute(p, built.records, made.arguments).ticks for p in (params, params._replace(hop=2 * params.hop))
    )
    logged = published("rdu").rows[key].low
    assert logged is not None
    return App(made.ideal, int(logged), ticks, slower - ticks)


# ---- SN40L --------------------------------------------------------------------------------------------


def peak_tflops(name: str) -> float:
    """Multiplications and additions of a socket, 1e12 a second."""
    return float(cast(RduSpec, load_spec(name)).peak_flops) / 1e12


def intensities(b: int, m: int, k: int, n: int, q: int) -> dict[str, float]:
    """Operations a byte of Gemm0 -> Mul -> Transpose -> Gemm1, each operand counted once, by what is fused.

    b times (m x k) (k x n), times a matrix of m x n, transposed, times (m x q).
    """
    operations = b * (2 * m * k * n + m * n + 2 * n * m * q)
    between = BYTES * b * m * n
    outside = BYTES * (b * m * k + k * n + m * n + m * q + b * n * q)
    return {
        "unfused": operations / (outside + 6 * between),
        "partial": operations / (outside + 2 * between),
        "fused": operations / outside,
    }


class Transform(NamedTuple):
    """Seconds of a Fourier convolution, and kernel launches, by way of mapping."""

    seconds: Mapping[str, float]
    calls: Mapping[str, int]


@cache
def convolution(order: int) -> Transform:
    """A convolution of radix ** order points on one socket: fused, and every operator a kernel."""
    spec = cast(RduSpec, load_spec(SOCKET))
    params = spec.params()
    kernel = np.zeros(params.lanes**order)
    kernel[0] = 1  # no time depends on data
    spectrum = monarch.spectrum(kernel, params.lanes)
    simulate = room("sim", "rdu").simulate
    seconds, calls = {}, {}
    ways: dict[str, tuple[Convolution, list[Built]]] = {}
    for name, make in (("fused", fft_convolution), ("unfused", unfused_convolution)):
        mapped = make(params, spectrum)
        ways[name] = mapped, [k.build() for k in mapped.kernels]
    for name, way, host in (("unfused", "unfused", True), ("SO", "fused", True), ("HO", "fused", False)):
        mapped, built = ways[way]
        line = simulate(params, mapped.program(built, host=host))
        seconds[name] = float(line.ticks * spec.tick.period_s)
        calls[name] = line.counter("launches")
    return Transform(seconds, calls)


def switch_seconds(weights: float, gb_per_s: float) -> float:
    """Time to move weights, in bytes."""
    return weights / (gb_per_s * 1e9)


def node_copy(sets: Sequence[str] = ()) -> float:
    """GB a second from DDR to HBM of all sockets of a node."""
    node = cast(RduSpec, load_spec(SPEC, sets)).node
    return float(node.sockets * node.ddr_to_hbm_gb_per_s)


def _host_link(name: str) -> float:
    link = cast(RooflineSpec, load_device(name)).host_link
    assert link is not None
    return float(link.gb_per_s)


def distinct(experts: int, prompts: int) -> float:
    """Different experts that uniformly drawn prompts ask for, on average."""
    return experts * (1 - (1 - 1 / experts) ** prompts)


def _decode(tokens: int) -> str:
    return f"decode {tokens // 1024}K"


def _sorted(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], Outcome]:
    """By model, way of mapping, and phase."""
    ways = {tuple(sorted(v.items())): k for k, v in MAPPINGS.items()}
    out = {}
    for o in outcomes:
        way = ways[tuple(sorted(o.job.mapping.items()))] if o.job.mapping else o.job.spec
        scenario = o.job.scenario
        if o.job.sets == RATE_SETS:
            phase = "rate"
        elif scenario.train:
            phase = "training"
        elif scenario.prompt:
            phase = "prefill"
        else:
            phase = _decode(scenario.context + scenario.generate)
        out[o.job.model, way, phase] = o
    return out


def seconds(outcome: Outcome) -> float:
    """Of the prompt, or of one decode step."""
    return outcome.time_s / (outcome.job.scenario.generate or 1)


def hbm_share(outcome: Outcome) -> float:
    """Bytes that pass between HBM and socket, of what its published bandwidth would move in the same time."""
    spec = cast(RduSpec, load_spec(outcome.job.spec, outcome.job.sets))
    moved = outcome.counters["hbm_lines"] * spec.line_bytes
    return moved / (outcome.time_s * float(spec.memory.hbm.gb_per_s) * 1e9)


def _compositions(at: Mapping[tuple[str, str, str], Outcome]) -> dict[str, dict[str, float]]:
    """Speed-ups of the composition of experts over a DGX by tokens: with copies at batch 8 and 1, and without."""
    model = MODELS[0]
    weights = BYTES * load_model(model).parameters["total"]
    ours, theirs = (seconds(at[model, way, _decode(CONTEXT)]) for way in ("HO", GPU))
    steps = (ours, theirs / GPUS)
    switch = (switch_seconds(weights, node_copy()), switch_seconds(weights, _host_link(GPU)))

    def ratio(tokens: int, prompts: int, copies: float) -> float:
        gpu, rdu = (
            t + copies * c + prompts * tokens * t for t, c in zip(steps[::-1], switch[::-1], strict=True)
        )
        return gpu / rdu

    return {
        "coe_overall_8": {f"{n} tokens": ratio(n, BATCH, distinct(EXPERTS, BATCH)) for n in TOKENS},
        "coe_overall_1": {f"{n} tokens": ratio(n, 1, 1) for n in TOKENS},
        "coe_expert_1": {f"{n} tokens": steps[1] / steps[0] for n in TOKENS},
    }


def rows(outcomes: Sequence[Outcome]) -> Mapping[str, Ours]:
    at = _sorted(outcomes)
    ours = {key: Ours({PLASTICINE: app(key).ours}) for key in LOGGED}
    ours |= {key: Ours({PLASTICINE: app(of).network}) for key, of in ROUTED.items()}
    bandwidth = float(cast(RduSpec, load_spec(SOCKET)).memory.hbm.gb_per_s) / 1e3
    ours["peak_plasticine"] = Ours({"plasticine": peak_tflops("plasticine")})
    ours["peak_sn40l"] = Ours({SOCKET: peak_tflops(SOCKET)})
    ours["ridge_sn40l"] = Ours({f"{bandwidth:g} TB/s": peak_tflops(SOCKET) / bandwidth})
    shape = " x ".join(map(str, SHAPE))
    ours |= {f"intensity_{way}": Ours({shape: v}) for way, v in intensities(*SHAPE).items()}

    fft = convolution(ORDER)
    points = f"16^{ORDER}"
    ours["flashfft"] = Ours({points: fft.seconds["unfused"] / fft.seconds["SO"]})
    ours["flashfft_calls"] = Ours({points: fft.calls["SO"]})
    ours["flashfft_hardware"] = Ours({points: fft.seconds["SO"] / fft.seconds["HO"]})

    runs = {
        "prefill": [(m, "prefill") for m in MODELS],
        "training": [(m, "training") for m in TRAINED],
        "decode": [(m, _decode(tokens)) for m, tokens in DECODED],
    }

    def ratios(over: str, under: str, *phases: str) -> Ours:
        return Ours(
            {
                f"{m} {phase}": seconds(at[m, over, phase]) / seconds(at[m, under, phase])
                for name in phases
                for m, phase in runs[name]
                if (m, over, phase) in at and (m, under, phase) in at
            }
        )

    for phase in runs:
        ours[f"fusion_{phase}"] = ratios("unfused", "SO", phase)
        ours[f"hardware_{phase}"] = ratios("SO", "HO", phase)
    ours["overall"] = ratios("unfused", "HO", *runs)
    calls = [at[MODELS[0], way, "prefill"].counters["launches"] for way in ("unfused", "SO")]
    ours["calls_prefill"] = Ours({MODELS[0]: calls[0] / calls[1]})
    ours["share_of_peak"] = Ours(
        {f"{m} {p}": 100 * hbm_share(at[m, "HO", p]) for m, p in runs["decode"] if (m, "HO", p) in at}
    )
    for key, model in RATES.items():
        if (model, "HO", "rate") in at:
            ours[f"rate_{key}"] = Ours({model: 1 / seconds(at[model, "HO", "rate"])})

    weights = {m: BYTES * load_model(m).parameters["total"] for m in (MODELS[0], RATES["8b"])}
    copy = switch_seconds(weights[MODELS[0]], node_copy())
    for gpu in (GPU, "h100"):
        theirs = switch_seconds(weights[MODELS[0]], _host_link(gpu))
        ours[f"switch_{gpu}"] = Ours({MODELS[0]: theirs / copy})
    spec = cast(RduSpec, load_spec(SPEC))
    peak = float(spec.node.sockets * spec.memory.ddr.gb_per_s)
    ours["switch_8b"] = Ours({RATES["8b"]: switch_seconds(weights[RATES["8b"]], peak)})
    bound = ">=" if at[MODELS[0], GPU, _decode(CONTEXT)].lower_bound else ""
    return ours | {key: Ours(values, bound) for key, values in _compositions(at).items()}


def models(outcomes: Sequence[Outcome]) -> list[dict[str, str | float]]:
    """Plasticine's applications."""
    table: list[dict[str, str | float]] = []
    for key in LOGGED:
        a = app(key)
        row: dict[str, str | float] = {"model": published("rdu").rows[key].title}
        row |= {"ideal": a.ideal, "logged": a.logged, "ours": a.ours, "error": 100 * (a.ours / a.logged - 1)}
        table.append(
            row | {"over": a.ours - a.ideal, "over_logged": a.logged - a.ideal, "network": a.network}
        )
    return table


def remarks(rows: Mapping[str, Row]) -> list[str]:
    long = {key: app(key) for key in LOGGED if app(key).ideal >= 30_000 and key != "sram_split_3"}
    worst = max(long, key=lambda key: abs(long[key].ours / long[key].logged - 1))
    lines = [
        (
            "Plasticine: one preset and one mapping for all rows, nothing fitted. The logs have an ideal network, ours has "
            "hops: network is what twice as slow links would add, so what these cost. Loading configuration is left "
            "out, as there"
        ),
        (
            f"rows of 30,000 cycles and more: within {100 * abs(long[worst].ours / long[worst].logged - 1):.2g} % of the "
            f"logs ({published('rdu').rows[worst].title}); ours is never below the ideal: "
            f"{'so' if all(app(key).ours >= app(key).ideal for key in LOGGED) else 'NOT SO'}"
        ),
    ]
    split = app("sram_split_3")
    if split.ours < 0.97 * split.logged:
        lines.append(
            "SRAMSplit_3: the log's banks conflict, since one memory takes three tiles at once; ours keeps each third of "
            "the tiles in PMUs of its own"
        )
    early, late = (rows["intensity_unfused"], rows["intensity_fused"])
    spec = cast(RduSpec, load_spec(SOCKET))
    peak, bandwidth = float(spec.peak_flops), float(spec.memory.hbm.gb_per_s) * 1e9
    found = intensities(*SHAPE)
    gain = min(peak, found["fused"] * bandwidth) / min(peak, found["unfused"] * bandwidth)
    lines.append(
        f"intensities: the shapes of the example are not printed; these are of a shape whose ratios fit, and differ by "
        f"{100 * abs(early.ours.low / float(early.published.low or 1) - 1):.1f} and "
        f"{100 * abs(late.ours.low / float(late.published.low or 1) - 1):.2g} %. By the roofline of one socket full fusion "
        f"is worth {gain:.1f}x"
    )
    fft = convolution(ORDER)
    lines.append(
        f"FlashFFTConv: one signal of 16^{ORDER} points in bfloat16 pairs, {1e6 * fft.seconds['SO']:.0f} us in one kernel, "
        f"{1e6 * fft.seconds['unfused']:.0f} us in {fft.calls['unfused']}, without any for transpositions; how many signals "
        "the paper has at once is not printed. Launch and load times are assumed, and decide both"
    )
    for key, what in (("fusion_decode", "fusion"), ("hardware_decode", "launches by hardware")):
        values = ", ".join(f"{m} {v:.2g}x" for m, v in rows[key].ours.by_model.items())
        lines.append(f"decoding, {what}: {values}. A model of Table III that is missing could not be run")
    lines.append(
        "without fusion our kernels use the whole socket, with operands in its memory; the paper's baseline is as "
        "unspecified as its launch costs. Rates of 70B and 405B are of speculative decoding, ours of a token a pass"
    )
    lines.append(
        "CoE: router and experts by our decode step of 4 K, a DGX as eight rooflines of efficiency 1 without communication, "
        "so that ours are lower bounds; prompts, whose length is not printed, are left out"
    )
    return lines
