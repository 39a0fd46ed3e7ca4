"""What the commands do, in order: check every argument, work, then write."""

from collections.abc import Sequence
from dataclasses import replace

from tilewright import output, report
from tilewright.arch import registry
from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario
from tilewright.devices import load_device
from tilewright.run import check_mapping, check_one_mapped
from tilewright.run import run as run_device
from tilewright.trace import check_limit
from tilewright.workloads.models import load_model


def run(
    names: Sequence[str],
    sets: Sequence[str],
    model_name: str,
    scenario: Scenario,
    *,
    json: str | None,
    csv: str | None,
    mapping: str | None,
    mapping_out: str | None,
    trace: str | None,
    trace_limit: int,
    svg: str | None,
    by_step: bool,
    fold: bool,
) -> None:
    """`tilewright run`."""
    output.check_outputs(json, csv, mapping_out, trace, svg)
    check_limit(trace_limit)
    devices = [load_device(name, sets) for name in names]
    check_mapping(devices, mapping, mapping_out)
    check_one_mapped(devices, "--trace needs", trace)
    check_one_mapped(devices, "--svg needs", svg)
    model = load_model(model_name)
    results = []
    for device in devices:
        results.append(
            run_device(device, model, scenario, mapping=mapping, mapping_out=mapping_out, trace=trace,
                       trace_limit=trace_limit, svg=svg, by_step=by_step, fold=fold)
        )  # fmt: skip
    tables = report.run_tables(results)
    results = [each for result in results for each in (result, *result.beside)]
    if json is not None:
        report.write_json(json, results)
    if csv is not None:
        report.write_csv(csv, results)
    if output.STDOUT not in (json, csv, mapping_out, trace, svg):
        output.show(tables)


def execute(
    name: str,
    sets: Sequence[str],
    program: str,
    *,
    engine: str,
    image: str | None,
    dump: str | None,
    values: bool,
    waves: str | None,
    trace: str | None,
    trace_limit: int,
    json: str | None,
) -> int:
    """`tilewright exec`. Returns 1 if the RTL was compared and differs, else 0."""
    from tilewright import execute as executing

    if waves is not None and engine != "rtl":
        raise UserError("--waves needs --engine rtl: the cycle model has no signals")
    if trace is not None and engine != "sim":
        raise UserError("--trace needs --engine sim: it draws the cycle model; of the RTL there is --waves")
    output.check_outputs(json, dump, waves, trace)
    check_limit(trace_limit)
    spec = registry.load_spec(name, sets)
    compare = values and engine == "rtl"
    done = executing.execute(
        spec, program, engine=engine, image=image, values=values or dump is not None, waves=waves,
        trace=trace, trace_limit=trace_limit,
    )  # fmt: skip
    differences = done.differences if compare else None
    if dump is not None and done.after is not None:
        executing.save_image(dump, done.after)
    if json is not None:
        report.write_json(json, [done.result], report.executed_document(done, program, engine, differences))
    if output.STDOUT not in (json, dump, trace):
        output.show(report.executed_tables(done, program, engine, differences))
    return 1 if differences else 0


def rtl(name: str, sets: Sequence[str], out: str) -> None:
    """`tilewright rtl`."""
    from tilewright.verilog import verilog

    output.check_outputs(out)
    text = verilog(name, sets)
    with output.replacing(out) as file:
        file.write(text)


def verify(
    subject: str,
    sets: Sequence[str],
    *,
    specs: int | None,
    programs: int | None,
    seed: int,
    waves: str | None,
    json: str | None,
) -> int:
    """`tilewright verify`. Returns 1 for a mismatch, or for something that was not covered."""
    from tilewright.verify import engine

    output.check_outputs(waves, json)
    if waves == output.STDOUT:
        raise UserError("--waves needs the name of a file")
    what: str | engine.Structure = subject
    notes: list[str] = []
    if sets:
        spec = registry.load_spec(subject, sets)
        what, notes = engine.plan_of(spec.target_name).scaled(spec)
    with output.progress_bar("structures") as progress:
        found = engine.run(what, specs=specs, programs=programs, seed=seed, waves=waves, progress=progress)
    if json is not None:
        report.write_document(json, {**found.document(), "notes": [*notes, *found.notes]})
    if json != output.STDOUT:
        output.show([*notes, found.text()])
    return 0 if found.passed else 1


def reproduce(slug: str, *, generate: int | None, sensitivity: bool, json: str | None) -> None:
    """`tilewright reproduce`."""
    from tilewright import reproduce as reproducing
    from tilewright.reproduce import report as reports

    output.check_outputs(json)
    with output.progress_bar("models") as progress:
        found = reproducing.reproduce(slug, generate, progress)
    # Each as soon as it is there: moving every assumed number may take longer than the rows.
    if json != output.STDOUT:
        output.show(reports.tables(found))
        if json is not None and sensitivity:
            report.write_document(json, reports.document(found))
    if sensitivity:
        with output.progress_bar("assumed numbers") as progress:
            effects = reproducing.sensitivity(slug, generate, progress)
        found = replace(found, sensitivity=effects)
        if json != output.STDOUT:
            output.show(["", *reports.sensitivity_tables(effects)])
    if json is not None:
        report.write_document(json, reports.document(found))


def flash(name: str, sets: Sequence[str], trace: str, *, json: str | None) -> None:
    """`tilewright flash`."""
    from tilewright import flash as flashing

    output.check_outputs(json)
    done = flashing.replay(name, sets, trace)
    if json is not None:
        report.write_document(json, flashing.document(done))
    if json != output.STDOUT:
        output.show(flashing.tables(done))
