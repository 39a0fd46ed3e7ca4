"""The command line: each command reads its arguments and calls one function. Rooms load when a command needs them."""

from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="tilewright",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Model AI accelerators at cycle level, with RTL that proves the model tells the truth.",
)

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="Preset name or YAML file.")]
Specs = Annotated[list[str], typer.Argument(metavar="SPEC...", help="Preset names or YAML files; the first is the reference.")]  # fmt: skip
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the spec, as in dram.timing.t_rp_ns=14; may be repeated.")]  # fmt: skip
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout, and nothing else is.")]  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from tilewright import __version__

        print(f"tilewright {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,  # fmt: skip
) -> None:
    pass


@app.command("list")
def list_() -> None:
    """Targets and presets, roofline devices, models, DRAM devices."""
    from tilewright import catalog, output

    output.show(catalog.listing())


@app.command()
def show(
    spec: Spec,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of the spec's files, for editors.")] = False,  # fmt: skip
) -> None:
    """A spec with units and sources, what follows from it, and what is assumed."""
    from tilewright import catalog

    if as_json and schema:
        raise typer.BadParameter("--json and --schema exclude each other")
    form = "json" if as_json else "schema" if schema else "table"
    catalog.print_spec(catalog.load_device(spec, sets or ()), form)


@app.command()
def run(
    spec: Specs,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Built-in model, or a Hugging Face config.json.")],
    context: Annotated[int, typer.Option(help="Tokens that are cached already.")] = 0,
    prompt: Annotated[int, typer.Option(help="Tokens to prefill.")] = 0,
    generate: Annotated[int, typer.Option(help="Tokens to generate.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    sets: Sets = None,
    json: Json = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Write the spans as CSV; - is stdout.")] = None,
    mapping: Annotated[str | None, typer.Option(metavar="FILE", help="Take choices of the mapping from here.")] = None,  # fmt: skip
    mapping_out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the mapping.")] = None,
    spans: Annotated[Literal["operator", "step"], typer.Option(help="Spans summed over steps, or one for each step.")] = "operator",  # fmt: skip
    fold: Annotated[bool, typer.Option("--fold/--no-fold", help="Take repeated work in one step; the integers are the same without.")] = True,  # fmt: skip
    lm_head: Annotated[bool, typer.Option("--lm-head/--no-lm-head", help="Run the LM head.")] = True,
    embedding: Annotated[bool, typer.Option("--embedding/--no-embedding", help="Run the embedding.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn at random (token ids).")] = 0,
) -> None:
    """Run a model: a table for each operator, and several specs side by side."""
    from tilewright import commands
    from tilewright.arch.scenario import Scenario

    scenario = Scenario(context=context, prompt=prompt, generate=generate, batch=batch, lm_head=lm_head,
                        embedding=embedding, seed=seed)  # fmt: skip
    commands.run(spec, sets or (), model, scenario, json=json, csv=csv, mapping=mapping,
                 mapping_out=mapping_out, by_step=spans == "step", fold=fold)  # fmt: skip


@app.command("exec")
def exec_(
    spec: Spec,
    program: Annotated[str, typer.Argument(metavar="PROGRAM.asm", help="Assembler text.")],
    sets: Sets = None,
    engine: Annotated[Literal["sim", "rtl"], typer.Option(help="Cycle model, or RTL under Verilator.")] = "sim",
    image: Annotated[str | None, typer.Option(metavar="FILE.npz", help="Memory to start from; what it leaves out is zero.")] = None,  # fmt: skip
    dump: Annotated[str | None, typer.Option(metavar="FILE.npz", help="Write the memory that the program leaves.")] = None,  # fmt: skip
    values: Annotated[bool, typer.Option("--values", help="Compute values too; with --engine rtl, compare values and ticks.")] = False,  # fmt: skip
    waves: Annotated[str | None, typer.Option(metavar="FILE.vcd", help="Write the RTL's waveforms.")] = None,
    json: Json = None,
) -> int:
    """Run an assembler program; exit code 1 if RTL and model differ."""
    from tilewright import commands

    return commands.execute(spec, sets or (), program, engine=engine, image=image, dump=dump, values=values,
                            waves=waves, json=json)  # fmt: skip


@app.command()
def rtl(
    spec: Spec,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE.v", help="Verilog; - is stdout.")],
    sets: Sets = None,
) -> None:
    """Write a spec's Verilog."""
    from tilewright import commands

    commands.rtl(spec, sets or (), out)


@app.command()
def verify(
    subject: Annotated[str, typer.Argument(metavar="TARGET|SPEC|REPLAY.json", help="A target's name, a spec, or a mismatch kept in a replay file.")],  # fmt: skip
    sets: Sets = None,
    specs: Annotated[int | None, typer.Option(metavar="N", help="Random specs (structures).")] = None,
    programs: Annotated[int | None, typer.Option(metavar="N", help="Random programs for each.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of specs, programs and values.")] = 0,
    waves: Annotated[str | None, typer.Option(metavar="FILE.vcd", help="Write waveforms of the first case that disagrees.")] = None,  # fmt: skip
    json: Json = None,
) -> int:
    """RTL against interpreter (bits) and cycle model (ticks); exit code 1 and a replay file on a mismatch."""
    from tilewright import commands

    return commands.verify(subject, sets or (), specs=specs, programs=programs, seed=seed, waves=waves,
                           json=json)  # fmt: skip
