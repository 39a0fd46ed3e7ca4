"""A spec by name: of a target that is modelled in cycles, or of a device known by its roofline."""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.system import SLUG, RooflineSpec, load_roofline


def load_device(name: str, sets: Sequence[str] = ()) -> specs.Spec:
    """The spec of a target, or of a device known by its roofline, from a preset's name or a YAML path.

    Raises UserError as `registry.load_spec` does.
    """
    slugs = [*registry.targets(), SLUG]
    known = [n for slug in slugs for n in specs.presets(slug)]
    if name not in known and not specs.is_path(name):
        raise UserError(f"unknown spec {name!r}: {nearest(name, known)} (or the path of a YAML file)")
    target = specs.apply_sets(specs.load_tree(name, slugs), sets).get("target")
    if isinstance(target, specs.Leaf) and target.value == SLUG:
        return load_roofline(name, sets)
    return registry.load_spec(name, sets)


def spec_hash(spec: specs.Spec) -> str:
    """SHA-256 of the resolved values, names and descriptions aside: equal machines have equal hashes."""
    values = {path: _exact(v) for path, v in spec.leaves() if path not in ("name", "description")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _exact(value: Any) -> Any:
    return str(value) if isinstance(value, Fraction) else value


def is_roofline(spec: specs.Spec) -> bool:
    """Whether the device is known by its roofline only."""
    return isinstance(spec, RooflineSpec)
