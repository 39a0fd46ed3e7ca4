"""Targets are found by file name; finding them imports none."""

import json
import subprocess
import sys

import pytest

from tilewright.arch import registry
from tilewright.arch.errors import UserError


def python(code):
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_discovery_imports_no_target():
    code = """
import json, sys
from tilewright.arch import registry
slugs = registry.targets()
names = registry.preset_names()
rooms = [m for m in sys.modules if any(m.endswith("." + s) for s in slugs)]
print(json.dumps([slugs, sorted(names.values()), rooms, "numba" in sys.modules]))
"""
    slugs, of_presets, imported, numba = python(code)
    assert "pim" in slugs and set(of_presets) == set(slugs)
    assert imported == [] and not numba


def test_every_target_has_every_room():
    for slug in registry.targets():
        for room in registry.ROOMS:
            module = registry.room(room, slug)
            assert module.__name__ == f"tilewright.{room}.{slug}" and module.__doc__


def test_furniture_is_no_target():
    # arch/dram.py and sim/dram.py with presets are technology that targets share.
    assert not {"dram", "system"} & set(registry.targets())


def test_presets_know_their_target():
    for name, slug in registry.preset_names().items():
        spec = registry.load_spec(name)
        assert (spec.name, spec.target, type(spec).target_name) == (name, slug, slug)


def test_a_spec_without_a_known_target_is_refused(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("name: odd\n")
    with pytest.raises(UserError, match=r"odd.yaml: key target is missing \(one of .*pim.*\), or a base"):
        registry.load_spec(str(path))
    path.write_text("name: odd\ntarget: pmi\n")
    with pytest.raises(UserError, match=r"odd.yaml:2: unknown target 'pmi': did you mean pim\?"):
        registry.load_spec(str(path))
