"""What there is to choose from, and what a spec holds: `tilewright list` and `tilewright show`."""

import json
from fractions import Fraction
from typing import Any

from tilewright import __version__, output
from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.quantity import KINDS
from tilewright.arch.system import load_roofline, roofline_presets
from tilewright.devices import spec_hash
from tilewright.tables import count, grid


def plain(value: Any) -> Any:
    """The value as JSON holds it: whole numbers stay whole, other rationals become floats."""
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else float(value)
    return value


# ---- list ---------------------------------------------------------------------------------------------


def listing() -> list[Any]:
    """Tables of targets and presets, roofline devices, models, DRAM and flash devices."""
    from tilewright.arch.dram import dram_presets, load_dram_preset
    from tilewright.arch.flash import flash_presets, load_flash
    from tilewright.workloads.models import builtin_models, load_model

    presets = grid("Specs", "name", "target", "description")
    for name, slug in registry.preset_names().items():
        presets.add_row(name, slug, registry.load_spec(name).description)
    rooflines = grid("Roofline devices (baselines in `run`)", "name", "description")
    for name in roofline_presets():
        rooflines.add_row(name, load_roofline(name).description)
    models = grid("Models (or a Hugging Face config.json)", "name", "family", ">layers", ">parameters")
    for name in builtin_models():
        model = load_model(name)
        models.add_row(name, model.family, str(model.layers), count(model.parameters["total"]))
    drams = grid("DRAM devices", "name", "standard", "description")
    for name in dram_presets():
        preset = load_dram_preset(name)
        drams.add_row(name, preset.standard.name, preset.title)
    flashes = grid("Flash devices", "name", "description")
    for name in flash_presets():
        flashes.add_row(name, load_flash(name).description)
    return [presets, "", rooflines, "", models, "", drams, "", flashes]


# ---- show ---------------------------------------------------------------------------------------------


def show_spec(spec: specs.Spec) -> list[Any]:
    """Tables of a spec by section with units, kinds and sources, what follows in ticks, and what is assumed."""

    items: list[Any] = [f"{spec.name} ({spec.target_name}): {spec.description}", f"hash {spec_hash(spec)}"]
    table, section = None, None
    for path, value in spec.leaves():
        if path in ("target", "name", "description") or value is None:
            continue
        where, _, key = path.rpartition(".")
        if table is None or where != section:
            table, section = grid(where or "machine", "key", ">value", "unit", "kind", "source"), where
            items += ["", table]
        p = spec.provenance.get(path)
        table.add_row(key, _text(value), *((p.unit, p.kind, p.source) if p else ("", "default", "")))
    if timing := getattr(spec, "timing", {}):
        derived = grid("derived, in ticks", "key", ">ticks")
        for key, ticks in timing.items():
            derived.add_row(key, str(ticks))
        items += ["", derived]
    assumed = spec.assumed()
    share = f"{len(assumed)} of {len(spec.provenance)} values"
    return [*items, "", f"assumed ({share}): {', '.join(assumed) or 'none'}"]


def _text(value: Any) -> str:
    if not isinstance(value, Fraction):
        return str(value)
    decimal = f"{float(value):.12g}"
    return decimal if Fraction(decimal) == value else f"{float(value):.6g}"


def spec_document(spec: specs.Spec) -> dict[str, Any]:
    """The spec as JSON: every value with unit, source, kind and place, what is derived, what is assumed."""
    values = {}
    for path, value in spec.leaves():
        p = spec.provenance.get(path)
        datum = {"unit": p.unit, "kind": p.kind, "source": p.source, "where": p.where} if p else {}
        values[path] = {"value": plain(value), **datum}
    return {
        "tilewright": __version__,
        "spec": spec.name,
        "spec_hash": spec_hash(spec),
        "values": values,
        "derived": dict(getattr(spec, "timing", {})),
        "assumed": spec.assumed(),
    }


def spec_schema(spec: specs.Spec) -> dict[str, Any]:
    """JSON Schema of the spec's YAML files, for editors: a value may stand alone or with its provenance.

    Nothing is required, since a file may be a set of deltas on its `base`.
    """
    schema = type(spec).model_json_schema(mode="validation")
    sections = [schema, *schema.get("$defs", {}).values()]
    for section in sections:
        section.pop("required", None)
        section["properties"] = {k: _datum(v) for k, v in section.get("properties", {}).items()}
    base = {"type": "string", "description": "preset or YAML file that this file changes"}
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _datum(value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in value:
        return value
    text = {"type": "string"}
    fields = {"value": value, "unit": text, "source": text, "note": text, "kind": {"enum": list(KINDS)}}
    datum = {"type": "object", "properties": fields, "required": ["value"], "additionalProperties": False}
    return {"anyOf": [value, datum]}


def print_spec(spec: specs.Spec, form: str) -> None:
    """`tilewright show`: as tables, or in JSON the spec ("json") or the schema of its files ("schema")."""
    if form == "table":
        output.show(show_spec(spec))
    else:
        print(json.dumps(spec_document(spec) if form == "json" else spec_schema(spec), indent=1))
