"""Results for people (tables that fit the terminal) and for scripts (JSON and CSV)."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from rich.table import Table

from tilewright import __version__
from tilewright.devices import is_roofline, spec_hash
from tilewright.execute import Executed, Image, values_document
from tilewright.output import replacing
from tilewright.summary import Operator, Result, group, row_hit_rate
from tilewright.tables import engineering, grid, percent, width

CSV_COLUMNS = ("spec", "name", "op", "layer", "step", "start", "end", "cycles", "energy_j", "bound_by")

# ---- JSON and CSV -------------------------------------------------------------------------------------


def head(result: Result) -> dict[str, Any]:
    """The JSON of a run without its spans; None where something is not known."""
    period = result.tick.period_s
    return {
        "tilewright": __version__,
        "spec": result.name,
        "spec_hash": spec_hash(result.spec),
        "model": result.model,
        "scenario": asdict(result.scenario) if result.scenario else None,
        "cycles": result.cycles,
        "tick_s": f"{period.numerator}/{period.denominator}",
        "time_s": float(result.time_s),
        "tokens_per_s": result.tokens_per_s,
        "energy_j": result.energy_j,
        "area_mm2": None,
        "counters": dict(result.counters),
        "units": dict(result.units),
        "assumed": [*result.assumed, *result.choices],
        "seed": result.scenario.seed if result.scenario else None,
    }


def write_json(path: str, results: Sequence[Result], extra: Mapping[str, Any] | None = None) -> None:
    """One object, or a list of them for several results; spans are written one by one, a line each."""
    with replacing(path) as file:
        file.write("[\n" if len(results) > 1 else "")
        for i, result in enumerate(results):
            file.write(",\n" if i else "")
            _write_result(file, result, extra or {})
        file.write("\n]\n" if len(results) > 1 else "\n")


def _write_result(file: IO[str], result: Result, extra: Mapping[str, Any]) -> None:
    text = json.dumps(head(result) | dict(extra), indent=1)
    file.write(text.removesuffix("\n}") + ',\n "spans": [')
    for i, row in enumerate(result.spans.rows()):
        file.write((",\n  " if i else "\n  ") + json.dumps(row))
    file.write("\n ]\n}")


def write_csv(path: str, results: Sequence[Result]) -> None:
    """The spans of all results, with a column for the spec; what is not known stays empty."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for result in results:
            for row in result.spans.rows():
                writer.writerow({"spec": result.name} | row)


def write_document(path: str, document: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(document, indent=1) + "\n")


# ---- numbers ------------------------------------------------------------------------------------------


def ratio(value: float, first: Result, other: Result) -> str:
    """How many times as long: a bound where one of the two times is one."""
    sign = {(False, True): ">=", (True, False): "<="}.get((first.lower_bound, other.lower_bound), "")
    digits = f"{value:.2g}" if value < 0.995 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return f"{sign}{digits}x"


# ---- tables -------------------------------------------------------------------------------------------


def run_tables(results: Sequence[Result]) -> list[Any]:
    """What `run` prints: each device by operator and by unit, then all of them side by side."""
    items: list[Any] = [_title(results[0])]
    for result in results:
        if not is_roofline(result.spec) or len(results) == 1:
            items += ["", *device_tables(result)]
    results = [each for result in results for each in (result, *result.beside)]
    if len(results) > 1:
        items += ["", *compared(results)]
    return items


def _title(result: Result) -> str:
    s = result.scenario
    assert s is not None
    if s.train:
        batch = f", batch {s.batch}" if s.batch > 1 else ""
        return f"{result.model}: train {s.train}{batch}, seed {s.seed}"
    words = [f"{k} {v}" for k, v in (("context", s.context), ("prompt", s.prompt)) if v]
    words += [f"generate {s.generate}", f"batch {s.batch}", f"LM head {'yes' if s.lm_head else 'no'}"]
    words += [] if s.embedding else ["embedding no"]
    return f"{result.model}: {', '.join(words)}, seed {s.seed}"


def device_tables(result: Result) -> list[Any]:
    items: list[Any] = [_operator_table(result)]
    if result.units:
        items += ["", _unit_table(result)]
    return items + ["", *_figures(result)]


def _operator_table(result: Result) -> Table:
    narrow = width() < 80
    counts = () if narrow else (">calls", ">cycles")
    table = grid(result.name, "operator", *counts, ">time", ">%", ">energy", "bound by")

    def add(name: str, o: Operator, **style: Any) -> None:
        time = engineering(o.cycles * float(result.tick.period_s), "s")
        numbers = [] if narrow else [f"{o.calls:,}" if o.calls else "", f"{o.cycles:,}"]
        share, energy = percent(o.cycles, result.cycles), engineering(o.energy_j, "J")
        table.add_row(name, *numbers, time, share, energy, o.bound_by, **style)

    shown = [o for o in result.operators if o.name or _matters(o, result)]
    for i, o in enumerate(shown):
        add("  " * o.inside + (o.name or "(none)"), o, end_section=i == len(shown) - 1)
    calls = sum(o.calls for o in result.operators if not o.inside)
    add("total", Operator("", calls, result.cycles, result.energy_j, ""), style="bold")
    return table


def _matters(o: Operator, result: Result) -> bool:
    """Whether what belongs to no operator shows in the table's digits."""
    energy = o.energy_j is not None and result.energy_j is not None and o.energy_j > 5e-4 * result.energy_j
    return 2000 * o.cycles >= result.cycles or energy


def _unit_table(result: Result) -> Table:
    """Units that stand in a row of equals share a line: the mean of them."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, unit in result.units.items():
        kinds.setdefault(group(name), []).append(unit)
    table = grid("", "unit", ">busy %", "stalled for (% of the run)")
    for name, units in kinds.items():
        whole = result.cycles * len(units)
        stalls = {c: sum(u["stalls"][c] for u in units) for c in units[0]["stalls"]}
        largest = sorted((c for c in stalls if 1000 * stalls[c] >= whole), key=lambda c: -stalls[c])
        own = next(n for n in result.units if group(n) == name)
        label = f"{name} ({len(units)})" if len(units) > 1 else own
        causes = ", ".join(f"{c} {percent(stalls[c], whole)}" for c in largest)
        table.add_row(label, percent(sum(u["busy"] for u in units), whole), causes)
    return table


def _figures(result: Result) -> list[str]:
    per_token = result.energy_j / result.tokens if result.tokens and result.energy_j is not None else None
    words = [f"{engineering(float(result.time_s), 's')}"]
    if result.tokens_per_s:
        words += [f"{result.tokens_per_s:.4g} tokens/s", f"{engineering(per_token, 'J')} per token"]
    if result.energy_j is not None and result.cycles:
        words.append(f"{engineering(result.energy_j / float(result.time_s), 'W')}")
    hits = row_hit_rate(result.counters, getattr(result.params, "n_banks", 0))
    if hits is not None:
        words.append(f"row hits {100 * hits:.2f} %")
    lines = ["; ".join(words), *result.notes]
    lines += [f"assumed: {choice}" for choice in result.choices]
    if n := len(result.assumed):
        lines.append(f"assumed: {n} values of the spec; `tilewright show {result.spec.name}` lists them")
    return lines


def compared(results: Sequence[Result]) -> list[Any]:
    """All devices side by side; ratios are to the first."""
    first = results[0]
    table = grid("compared with the first", "spec", ">time", ">ratio", ">tokens/s", ">energy", ">ratio")
    for r in results:
        speed = f"{r.tokens_per_s:.4g}" if r.tokens_per_s else "-"
        energy = "-"
        if r.energy_j is not None and first.energy_j:
            energy = ratio(r.energy_j / first.energy_j, r, r)
        times = ratio(float(r.time_s / first.time_s), first, r)
        table.add_row(r.name, engineering(float(r.time_s), "s"), times, speed,
                      engineering(r.energy_j, "J"), energy)  # fmt: skip
    items: list[Any] = [table]
    for part in _parts(results):
        items += ["", _side_by_side(part)]
    items += [""]
    for r in results:
        if is_roofline(r.spec):
            items += [f"{r.spec.name}: {note}" for note in (*r.notes, *r.choices)]
    if any(r.lower_bound != first.lower_bound for r in results):
        items.append(">= at least, <= at most: the ratio to a device whose times are lower bounds")
    return items


def _parts(results: Sequence[Result]) -> Iterator[Sequence[Result]]:
    """As many devices at once as fit the terminal, the first among them each time."""
    fit = max(1, (width() - 28) // 18)
    for i in range(1, len(results), fit):
        yield [results[0], *results[i : i + fit]]


def _side_by_side(results: Sequence[Result]) -> Table:
    first = results[0]
    columns = ["operator", f">{first.name}"]
    for r in results[1:]:
        columns += [f">{r.name}", ">ratio"]
    table = grid("", *columns)
    table.columns[-1].no_wrap = True
    times = [{o.name: o.cycles * float(r.tick.period_s) for o in r.operators if o.name} for r in results]
    for name in dict.fromkeys(n for t in times for n in t):
        reference = times[0].get(name)
        cells = [engineering(reference, "s")]
        for r, t in zip(results[1:], times[1:], strict=True):
            quotient = ratio(t[name] / reference, first, r) if reference and name in t else "-"
            cells += [engineering(t.get(name), "s"), quotient]
        table.add_row(name, *cells)
    return table


# ---- exec ---------------------------------------------------------------------------------------------


def executed_document(
    done: Executed, program: str, engine: str, differences: Sequence[str] | None
) -> dict[str, Any]:
    """What the JSON of `exec` holds beside that of a run."""
    values = None
    if done.before is not None and done.after is not None:
        values = values_document(done.before, done.after)
    equal = None if differences is None else not differences
    return {
        "program": program, "engine": engine, "values": values, "equal": equal,
        "differences": None if differences is None else list(differences),
    }  # fmt: skip


def executed_tables(
    done: Executed, program: str, engine: str, differences: Sequence[str] | None
) -> list[Any]:
    """What `exec` prints."""
    r = done.result
    title = f"{program} on {r.spec.name} ({'RTL' if engine == 'rtl' else 'cycle model'})"
    energy = f", {engineering(r.energy_j, 'J')}" if r.energy_j is not None else ""
    items: list[Any] = [title, f"{r.cycles:,} ticks, {engineering(float(r.time_s), 's')}{energy}", ""]
    spans = grid("", "tag", ">first", ">end", ">ticks", ">energy", "bound by")
    for row in r.spans.rows():
        energy = engineering(row["energy_j"], "J")
        ticks = (f"{row[k]:,}" for k in ("start", "end", "cycles"))
        spans.add_row(row["name"], *ticks, energy, row["bound_by"] or "-")
    counters = grid("", "counter", ">count")
    for name, n in r.counters.items():
        if n:
            counters.add_row(name, f"{n:,}")
    items += [spans, "", _unit_table(r), "", counters]
    if done.before is not None and done.after is not None:
        items += ["", _values_table(done.before, done.after)]
    if differences is not None:
        verdict = "RTL equals interpreter (bits) and cycle model (ticks, tags, counters, stalls)"
        items += ["", *(differences[:20] or [verdict])]
        items += [f"{len(differences) - 20} more differences"] if len(differences) > 20 else []
    return items


def _values_table(before: Image, after: Image) -> Table:
    table = grid("", "array", ">elements", ">changed", "sha256", "first elements")
    for name, d in values_document(before, after).items():
        array = after[name].reshape(-1)
        digits = 2 * array.dtype.itemsize if array.dtype.kind == "u" else 0
        first = " ".join(f"{int(v):0{digits}x}" if digits else str(int(v)) for v in array[:4])
        table.add_row(name, f"{array.size:,}", f"{d['changed']:,}", d["sha256"], first)
    return table
