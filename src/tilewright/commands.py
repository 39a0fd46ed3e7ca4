"""What the commands do, in order: check every argument, work, then write."""

from collections.abc import Sequence

from tilewright import output, report
from tilewright.arch.scenario import Scenario
from tilewright.catalog import load_device
from tilewright.run import check_mapping
from tilewright.run import run as run_device
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
    by_step: bool,
    fold: bool,
) -> None:
    """`tilewright run`."""
    output.check_outputs(json, csv, mapping_out)
    devices = [load_device(name, sets) for name in names]
    check_mapping(devices, mapping, mapping_out)
    model = load_model(model_name)
    results = []
    for device in devices:
        results.append(
            run_device(device, model, scenario, mapping=mapping, mapping_out=mapping_out, by_step=by_step,
                       fold=fold)
        )  # fmt: skip
    if json is not None:
        report.write_json(json, results)
    if csv is not None:
        report.write_csv(csv, results)
    if output.STDOUT not in (json, csv, mapping_out):
        output.show(report.run_tables(results))
