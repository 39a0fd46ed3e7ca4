"""Any single mistake in a spec either leaves a spec that runs, or is refused in a line that names the key."""

import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError

PROGRAM = """\
WR_GB channels=1 cols=2 tag=load
GEMV channels=1 cols=2 outs=2 pitch=1 tag=multiply
RD_BK channels=1 cols=1 tag=read
WR_BK channels=1 cols=1 tag=write
ADD n=4 tag=add
"""
WRONG = (
    0, -1, 1, 2, 3, 7, 0.5, -0.25, 10**12, 10**30, 1e300, True, None, "", "words", "1/3", "1/0", "1e999", "nan",
    float("inf"), float("nan"), [], [1, 2], {}, {"a": 1}, {"value": {"a": 1}}, {"value": [1]}, {"value": 0},
    {"value": -3, "kind": "guessed"}, {"value": 1, "units": "ns"}, {"vaule": 1},
)  # fmt: skip


def tree(name):
    text = specs.presets("pim")[name].read_text()
    return yaml.safe_load(text)


PLAIN = tree("pim-gpt")


def paths(node, prefix=()):
    """Every key path of the file: sections, numbers, and what stands beside a number."""
    for key, value in node.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


PATHS = sorted(paths(PLAIN))


def parent(root, path):
    for key in path[:-1]:
        root = root[key]
    return root


@st.composite
def mutations(draw):
    """(file content, words of which the refusal must name one)."""
    path = draw(st.sampled_from(PATHS))
    root = copy.deepcopy(PLAIN)
    section, key = parent(root, path), path[-1]
    # What stands beside a number (unit, source, ...) is named by the number's key.
    names = {[k for k in path if k not in specs.DATUM_KEYS][-1]}
    if "tick_ns" in names:
        names.add("the tick of")
    kind = draw(st.sampled_from(("delete", "set", "set", "set", "rename")))
    if kind == "delete":
        del section[key]
    elif kind == "set":
        section[key] = draw(st.sampled_from(WRONG))
    else:
        new = draw(st.sampled_from((key[:-1], key + "s", key.upper(), "x_" + key, key.replace("_", "-"))))
        section[new] = section.pop(key)
        names.add(new)
    return root, names


@settings(deadline=None, max_examples=120)
@given(mutations())
def test_a_mistake_runs_or_is_named(tmp_path_factory, mutation):
    root, names = mutation
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(yaml.safe_dump(root, sort_keys=False))
    try:
        spec = registry.load_spec(str(path))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 500
        assert "mutated.yaml" in message
        assert any(name in message for name in names), (message, names)
        return
    run(spec)


def run(spec):
    program = registry.room("arch", "pim").ISA.assemble(PROGRAM)
    timeline = registry.room("sim", "pim").simulate(spec.params(), program)
    assert timeline.ticks > 0
    registry.room("arch", "pim").energy(spec)


@pytest.mark.parametrize("name", sorted(specs.presets("pim")))
def test_presets_run(name):
    run(registry.load_spec(name))
