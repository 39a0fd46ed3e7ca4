"""Which targets exist: found by file name in this folder, without importing any of them.

A target is a file `arch/<slug>.py` with presets in `arch/presets/<slug>/` whose specs say `target: <slug>`.
Its other rooms hold modules of the same slug. Adding a target is adding files.
"""

from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType

from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError, nearest

ROOMS = ("arch", "workloads", "mappers", "sim", "rtl")


def targets() -> list[str]:
    """Slugs of the targets: those with a module in `arch/`, in `sim/` and a folder of presets."""
    arch = Path(str(resources.files("tilewright.arch")))
    sim = arch.parent / "sim"  # by path: the package would load numba
    folders = sorted(p.name for p in (arch / "presets").iterdir() if p.is_dir())
    mappers = arch.parent / "mappers"
    return [s for s in folders if _has(arch, s) and _has(sim, s) and _has(mappers, s)]


def _has(room: Path, slug: str) -> bool:
    return (room / f"{slug}.py").is_file() or (room / slug / "__init__.py").is_file()


def room(name: str, slug: str) -> ModuleType:
    """The module of target `slug` in room `name` (arch, workloads, mappers, sim, rtl)."""
    return import_module(f"tilewright.{name}.{slug}")


def preset_names() -> dict[str, str]:
    """Preset name -> slug of its target."""
    return {name: slug for slug in targets() for name in specs.presets(slug)}


def load_spec(name: str, sets: Sequence[str] = ()) -> specs.Spec:
    """The spec of a preset name or a YAML path, with `a.b=value` overrides. Raises UserError.

    Everything is checked here, derived parameters included, before any work begins.
    """
    slugs = targets()
    tree = specs.apply_sets(specs.load_tree(name, slugs), sets)
    leaf = tree.get("target")
    if not isinstance(leaf, specs.Leaf):
        raise UserError(f"{name}: key target is missing (one of {', '.join(slugs)}), or a base")
    if leaf.value not in slugs:
        raise UserError(
            f"{leaf.provenance.where}: unknown target {leaf.value!r}: {nearest(str(leaf.value), slugs)}"
        )
    spec = specs.build(room("arch", leaf.value).SPEC, tree, name)
    try:
        spec.params()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return spec
