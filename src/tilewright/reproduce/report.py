"""A reproduction as tables and as JSON."""

from dataclasses import asdict
from fractions import Fraction
from typing import Any

from tilewright import __version__
from tilewright.devices import spec_hash
from tilewright.reproduce import NEGLIGIBLE, Reproduction, Row, Sensitivity
from tilewright.tables import engineering, grid

# ---- JSON ---------------------------------------------------------------------------------------------


def document(found: Reproduction) -> dict[str, Any]:
    """The JSON of `reproduce`: plain numbers, errors as fractions, None where something is not known."""
    return {
        "tilewright": __version__,
        "target": found.published.target,
        "source": found.published.source,
        "spec": found.spec.name,
        "spec_hash": spec_hash(found.spec),
        "generate": found.generate,
        "rows": [_row_document(row) for row in found.rows],
        "models": list(found.models),
        "remarks": list(found.remarks),
        "assumed": found.spec.assumed(),
        "sensitivity": None if found.sensitivity is None else _sensitivity_document(found.sensitivity),
    }


def _row_document(row: Row) -> dict[str, Any]:
    p, o = row.published, row.ours
    low, high = (None if v is None else float(v) for v in (p.low, p.high))
    theirs = {"low": low, "high": high, "words": p.words or None, "kind": p.kind, "source": p.source}
    ours = {"low": o.low, "high": o.high, "bound": o.bound or None, "by_model": dict(o.by_model)}
    error = None if row.errors is None else list(row.errors)
    return {
        "key": row.key, "title": p.title, "unit": p.unit, "published": theirs, "ours": ours, "error": error,
        "verdict": row.verdict,
    }  # fmt: skip


def _sensitivity_document(found: Sensitivity) -> dict[str, Any]:
    effects = [
        {"key": e.key, "value": float(e.value), "tried": [float(v) for v in e.tried], "time": list(e.time),
         "energy": list(e.energy)}
        for e in found.effects
    ]  # fmt: skip
    job = {"spec": found.job.spec, "model": found.job.model, "scenario": asdict(found.job.scenario)}
    return {**job, "effects": effects, "not_numbers": list(found.words)}


# ---- tables -------------------------------------------------------------------------------------------


def tables(found: Reproduction) -> list[Any]:
    """What `reproduce` prints."""
    items: list[Any] = [found.published.source]
    items.append(f"{found.spec.name}: generate {found.generate}")
    if found.generate != found.published.generate:
        items.append(f"not what is published: that is for {found.published.generate} tokens")
    table = grid("", "figure", ">published", "kind", ">ours", ">error %", "range")
    for row in found.rows:
        p, o = row.published, row.ours
        unit = "" if p.unit == "x" else f", {p.unit}"
        shown = p.words if p.low is None or p.high is None else _range(_figure(p.low), _figure(p.high))
        ours = o.bound + _range(_figure(o.low), _figure(o.high))
        error = "-" if row.errors is None else _range(*(_percents(e) for e in row.errors))
        table.add_row(p.title + unit, shown, p.kind, ours, error, row.verdict)
    table.columns[-1].no_wrap = True
    items += ["", table, ""]
    items += [
        "error: our least and most against theirs; of bounds, bounds (>= <=, ~ neither)",
        "range: of the published one; open where a bound, or words, can't tell",
        "",
    ]
    items += [_model_table(found), "", *found.remarks]
    return items


def _figure(value: float | Fraction) -> str:
    """Three digits, or all those before the point.

    >>> _figure(3.14159), _figure(1074), _figure(0.512)
    ('3.14', '1,074', '0.51')
    """
    v = float(value)
    digits = 0 if v.is_integer() or abs(v) >= 99.95 else 1 if abs(v) >= 9.995 else 2
    return f"{v:,.{digits}f}"


def _percents(value: float) -> str:
    return f"{100 * value:+.{0 if abs(value) >= 0.0995 else 1}f}"


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low}..{high}"


def _model_table(found: Reproduction) -> Any:
    table = grid("", "model", *(f">{heading}" for heading in found.headings.values()))
    for row in found.models:
        cells = [str(row["model"])]
        for key in found.headings:
            unit = {"_s": "s", "_j": "J"}.get(key[-2:])
            cells.append(engineering(float(row[key]), unit) if unit else _figure(float(row[key])))
        table.add_row(*cells)
    table.columns[-1].no_wrap = True
    return table


def sensitivity_tables(found: Sensitivity) -> list[Any]:
    """The constants by size of their effect; what hardly matters, or can't be moved, in a line each."""
    s = found.job.scenario
    shown = [e for e in found.effects if e.size >= NEGLIGIBLE]
    none = [e.key for e in found.effects if not e.value]
    small = [
        e.key + (" (one way only)" if None in e.time else "")
        for e in found.effects
        if e.value and e.size < NEGLIGIBLE and not e.refused
    ]
    refused = [e.key for e in found.effects if e.refused]
    prompt = f"prompt {s.prompt}, " if s.prompt else ""
    title = f"assumed numbers less and more 10 %: {found.job.model}, {prompt}{s.generate} tokens"
    table = grid(title, "key", ">value", ">less", ">more", ">time %", ">energy %")
    table.columns[-1].no_wrap = True
    for e in shown:
        values = (f"{float(v):.6g}" for v in (e.value, *e.tried))
        table.add_row(e.key, *values, _pair(e.time), _pair(e.energy))
    note = (
        "whole numbers move by whole numbers, at least one; timings round up to ticks; what is derived stays"
    )
    items: list[Any] = [table, "", note]
    for words, keys in (
        (f"less than {100 * NEGLIGIBLE:g} %", small),
        ("zero, of which 10 % is nothing", none),
        ("refused by the spec's checks or the mapper, both ways", refused),
        ("not numbers", found.words),
    ):
        if keys:
            items.append(f"{words}: {', '.join(keys)}")
    if any(None in e.time for e in shown):
        items.append("-: the spec's checks, or the mapper, refuse that value")
    return items


def _pair(values: tuple[float | None, float | None]) -> str:
    return " ".join(f"{'-' if v is None else f'{100 * v:+.1f}':>5}" for v in values)
