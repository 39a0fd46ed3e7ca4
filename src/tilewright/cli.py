"""The command line: each command reads its arguments and calls one function. Rooms load when a command needs them."""

from typing import Annotated, Literal

import typer
from typer import Argument, Option

app = typer.Typer(
    name="tilewright",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Model AI accelerators at cycle level, with RTL that proves the model tells the truth.",
)

_FILE = "FILE"

Spec = Annotated[str, Argument(metavar="SPEC", help="Preset name or YAML file.")]
Specs = Annotated[
    list[str], Argument(metavar="SPEC...", help="Preset names or YAML files; ratios are to the first.")
]
Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Change a value of the spec: channels=4. May be repeated."),
]
Model = Annotated[str, Option(metavar="MODEL", help="Built-in model, or a Hugging Face config.json.")]
Context = Annotated[int, Option(help="Tokens that are cached already.")]
Prompt = Annotated[int, Option(help="Tokens to prefill.")]
Generate = Annotated[int | None, Option(help="Tokens to generate; 1 unless given, 0 with --train.")]
Train = Annotated[int, Option(help="Tokens of a sequence for a step of training; on rdu only.")]
Batch = Annotated[int, Option(help="Sequences.")]
Json = Annotated[str | None, Option(metavar=_FILE, help="Write JSON; - is stdout, and nothing else is.")]
Csv = Annotated[str | None, Option(metavar=_FILE, help="Write the spans as CSV; - is stdout.")]
Mapping = Annotated[str | None, Option(metavar=_FILE, help="Take choices of the mapping from here.")]
MappingOut = Annotated[str | None, Option(metavar=_FILE, help="Write the mapping.")]
Spans = Annotated[Literal["operator", "step"], Option(help="Spans summed over steps, or one for each.")]
Fold = Annotated[bool, Option("--fold/--no-fold", help="Repeated work in one step: equal integers, sooner.")]
LmHead = Annotated[bool, Option("--lm-head/--no-lm-head", help="Run the LM head.")]
Embedding = Annotated[bool, Option("--embedding/--no-embedding", help="Run the embedding.")]
Seed = Annotated[int, Option(help="Seed of what is drawn at random.")]
Program = Annotated[str, Argument(metavar="PROGRAM.asm", help="Assembler text.")]
Engine = Annotated[Literal["sim", "rtl"], Option(help="Cycle model, or RTL under Verilator.")]
Image = Annotated[str | None, Option(metavar="FILE.npz", help="Memory to start from; the rest is zero.")]
Dump = Annotated[str | None, Option(metavar="FILE.npz", help="Write the memory that the program leaves.")]
Values = Annotated[bool, Option("--values", help="Compute values too; with the RTL, compare everything.")]
Trace = Annotated[str | None, Option(metavar=_FILE, help="Write a trace for Perfetto; - is stdout.")]
TraceLimit = Annotated[int, Option(metavar="N", help="Commands of each channel in the trace.")]
Waves = Annotated[str | None, Option(metavar="FILE.vcd", help="Write the RTL's waveforms.")]
Subject = Annotated[str, Argument(metavar="TARGET|SPEC|REPLAY.json", help="Also a mismatch that was kept.")]
Structures = Annotated[int | None, Option("--specs", metavar="N", help="Random specs.")]
Programs = Annotated[int | None, Option(metavar="N", help="Random programs for each spec.")]
Target = Annotated[str, Argument(metavar="TARGET", help="A target with published rows: lut, pim, rdu, csd.")]
AsPublished = Annotated[
    int | None, Option("--generate", help="Tokens to generate, as published unless given.")
]
Sensitive = Annotated[
    bool, Option("--sensitivity/--no-sensitivity", help="Move each assumed number by 10 % either way.")
]
Flash = Annotated[str, Argument(metavar="PRESET", help="Flash preset or YAML file.")]
PageTrace = Annotated[str, Option("--trace", metavar="FILE.csv", help="Page operations: docs/flash.md.")]
Svg = Annotated[
    str | None, Option(metavar="FILE", help="Draw the mapping, where it has a place and routes; - is stdout.")
]
Out = Annotated[str, Option("--out", "-o", metavar="FILE.v", help="Verilog; - is stdout.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Schema = Annotated[bool, Option("--schema", help="Print the JSON Schema of spec files, for editors.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from tilewright import __version__

        print(f"tilewright {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback()
def _main(version: Version = False) -> None:
    pass


@app.command("list")
def list_() -> None:
    """Targets and presets, roofline devices, models, DRAM devices."""
    from tilewright import catalog, output

    output.show(catalog.listing())


@app.command()
def show(spec: Spec, sets: Sets = None, json: AsJson = False, schema: Schema = False) -> None:
    """A spec with units and sources, what follows from it, and what is assumed."""
    from tilewright import catalog, devices

    if json and schema:
        raise typer.BadParameter("--json and --schema exclude each other")
    form = "json" if json else "schema" if schema else "table"
    catalog.print_spec(devices.load_device(spec, sets or ()), form)


@app.command()
def run(
    spec: Specs,
    model: Model,
    context: Context = 0,
    prompt: Prompt = 0,
    generate: Generate = None,
    batch: Batch = 1,
    train: Train = 0,
    sets: Sets = None,
    json: Json = None,
    csv: Csv = None,
    mapping: Mapping = None,
    mapping_out: MappingOut = None,
    trace: Trace = None,
    trace_limit: TraceLimit = 100_000,
    svg: Svg = None,
    spans: Spans = "operator",
    fold: Fold = True,
    lm_head: LmHead = True,
    embedding: Embedding = True,
    seed: Seed = 0,
) -> None:
    """Run a model: a table for each operator, and several specs side by side."""
    from tilewright import commands
    from tilewright.arch.scenario import Scenario

    steps = (0 if train else 1) if generate is None else generate
    counts = {"context": context, "prompt": prompt, "generate": steps, "batch": batch, "seed": seed}
    counts["train"] = train
    scenario = Scenario(**counts, lm_head=lm_head, embedding=embedding)
    files = {"json": json, "csv": csv, "mapping": mapping, "mapping_out": mapping_out, "trace": trace}
    files["svg"] = svg
    by_step = spans == "step"
    commands.run(
        spec, sets or (), model, scenario, trace_limit=trace_limit, by_step=by_step, fold=fold, **files
    )


@app.command("exec")
def exec_(
    spec: Spec,
    program: Program,
    sets: Sets = None,
    engine: Engine = "sim",
    image: Image = None,
    dump: Dump = None,
    values: Values = False,
    waves: Waves = None,
    trace: Trace = None,
    trace_limit: TraceLimit = 100_000,
    json: Json = None,
) -> int:
    """Run an assembler program; exit code 1 if RTL and model differ."""
    from tilewright import commands

    files = {"image": image, "dump": dump, "waves": waves, "trace": trace, "json": json}
    return commands.execute(
        spec, sets or (), program, engine=engine, values=values, trace_limit=trace_limit, **files
    )


@app.command()
def verify(
    subject: Subject,
    sets: Sets = None,
    specs: Structures = None,
    programs: Programs = None,
    seed: Seed = 0,
    waves: Waves = None,
    json: Json = None,
) -> int:
    """RTL against interpreter (bits) and cycle model (ticks); exit code 1 and a replay file on a mismatch."""
    from tilewright import commands

    counts = {"specs": specs, "programs": programs}
    return commands.verify(subject, sets or (), **counts, seed=seed, waves=waves, json=json)


@app.command()
def rtl(spec: Spec, out: Out, sets: Sets = None) -> None:
    """Write a spec's Verilog: of a machine of equal channels, one channel."""
    from tilewright import commands

    commands.rtl(spec, sets or (), out)


@app.command()
def reproduce(
    target: Target, generate: AsPublished = None, sensitivity: Sensitive = True, json: Json = None
) -> None:
    """Published rows beside ours, with the error, and how much each assumed number matters."""
    from tilewright import commands

    commands.reproduce(target, generate=generate, sensitivity=sensitivity, json=json)


@app.command()
def flash(preset: Flash, trace: PageTrace, sets: Sets = None, json: Json = None) -> None:
    """Run a page trace on a NAND flash device: throughput, latency, what channels and dies did."""
    from tilewright import commands

    commands.flash(preset, sets or (), trace, json=json)
