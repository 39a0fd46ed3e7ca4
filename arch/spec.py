"""What a person writes: YAML in, a frozen pydantic spec out, and the provenance of every number beside it.

A leaf is a plain value, or `{value: 12, unit: ns, source: "...", kind: published}`. `base: pim-gpt` makes a
file a set of deltas on a preset (or on another file, relative to itself).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic.fields import FieldInfo

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.quantity import KINDS, exact

# libyaml, where PyYAML was built with it: ten times faster than Python. Its messages are worse.
_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_BYTES = 1 << 20
MAX_DEPTH = 12
DATUM_KEYS = {"value", "unit", "source", "kind", "note"}


@dataclass(frozen=True)
class Provenance:
    """Where the value at a key path comes from."""

    unit: str
    source: str
    kind: str
    where: str


@dataclass(frozen=True)
class Leaf:
    """A scalar of a YAML file, as text-exact value with its place and provenance."""

    value: Any
    provenance: Provenance


Tree = dict[str, Any]  # nested dicts with Leaf (or a list of Leaf) at the ends


def _number(value: Any) -> Any:
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be a number, not {value!r}")
    try:
        return exact(value)
    except UserError:
        raise ValueError(f"must be a number, not {value!r}") from None


def _show(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


# An exact rational of the YAML text; strings such as "1/3" are welcome.
Exact = Annotated[Fraction, BeforeValidator(_number), PlainSerializer(_show, return_type=float)]
Positive = Annotated[Exact, Field(gt=0, le=10**15)]
NonNegative = Annotated[Exact, Field(ge=0, le=10**15)]


class Section(BaseModel):
    """A group of keys of a spec: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Spec(Section, ABC):
    """The root of a target's spec. Subclasses set `target_name` and define the sections."""

    target_name: ClassVar[str] = ""

    target: str
    name: str
    description: str = ""

    # Not part of the spec's content: filled in by the loader.
    _provenance: dict[str, Provenance] = {}

    @property
    def provenance(self) -> Mapping[str, Provenance]:
        """Key path -> where the value comes from; keys left to their default are absent."""
        return self._provenance

    @property
    @abstractmethod
    def tick(self) -> Clock:
        """The device's tick: its fastest clock."""

    @abstractmethod
    def params(self) -> Any:
        """What follows from the spec: the NamedTuple that kernels and RTL receive."""

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(key path, value) of everything the spec holds, in order of definition."""
        yield from _leaves(self, "")

    def assumed(self) -> list[str]:
        """Key paths whose value nobody has published, measured or derived."""
        return [path for path, p in self._provenance.items() if p.kind == "assumed"]


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- YAML to tree -------------------------------------------------------------------------------------


def parse_yaml(text: str, name: str) -> Tree:
    """The nested mapping of a YAML text, leaves with line numbers. Raises UserError naming the line.

    Anchors and aliases are refused (a few lines of them expand to gigabytes), as are repeated keys,
    non-string keys and nesting deeper than twelve levels.
    """
    try:
        check_yaml(text, name)
        root = yaml.compose(text, Loader=_FAST)
    except RecursionError:
        raise UserError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None
    if root is None:
        raise UserError(f"{name}: the file is empty; a spec needs at least `target` or `base`")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: a spec must be a mapping of keys to values")
    return _mapping(root, name, "")


def check_yaml(text: str, name: str, loader: Any = _FAST) -> None:
    """Raises UserError, naming the line, for YAML that is invalid, too long, aliased or nested too deeply."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{name}: at most {MAX_BYTES} characters are allowed, not {len(text)}")
    depth = documents = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            assert event.start_mark is not None
            where = f"{name}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"{where}: YAML anchors and aliases are not allowed")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise UserError(f"{where}: a second YAML document is not allowed")
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
                if depth > MAX_DEPTH:
                    raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
    except yaml.YAMLError as error:
        if loader is not yaml.SafeLoader:
            check_yaml(text, name, yaml.SafeLoader)
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{name}{line}: not valid YAML: {problem}") from None


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        if node.tag == "tag:yaml.org,2002:float":
            return node.value.replace("_", "")  # keep the text: it is read as an exact rational
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _mapping(node: yaml.MappingNode, name: str, path: str) -> Tree:
    tree: Tree = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key_node.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{name}:{line}: keys must be plain words, not {key_node.value!r}")
        if key in tree:
            raise UserError(f"{name}:{line}: key {path}{key} is given twice")
        tree[key] = _node(value_node, name, f"{path}{key}")
    return tree


def _node(node: yaml.Node, name: str, path: str) -> Any:
    where = f"{name}:{node.start_mark.line + 1}"
    try:
        if isinstance(node, yaml.ScalarNode):
            return Leaf(_scalar(node), Provenance("", f"set in {Path(name).name}", "assumed", where))
        if isinstance(node, yaml.SequenceNode):
            values = [_node(n, name, path) for n in node.value]
            if not all(isinstance(v, Leaf) for v in values):
                raise UserError(f"{where}: {path} must be a list of plain values")
            return Leaf(
                [v.value for v in values], Provenance("", f"set in {Path(name).name}", "assumed", where)
            )
        assert isinstance(node, yaml.MappingNode)
        tree = _mapping(node, name, f"{path}.")
    except ValueError as error:
        raise UserError(f"{where}: {path}: {error}") from None
    if "value" not in tree:
        return tree
    for key, leaf in tree.items():
        if key not in DATUM_KEYS:
            raise UserError(f"{where}: {path} has no {key!r}: {nearest(key, DATUM_KEYS)}")
        if not isinstance(leaf, Leaf):
            raise UserError(f"{where}: {path}.{key} must be a plain value")
    text = {k: str(tree[k].value) if k in tree else "" for k in ("unit", "source", "note")}
    kind = str(tree["kind"].value) if "kind" in tree else "assumed"
    if kind not in KINDS:
        raise UserError(f"{where}: {path}.kind must be one of {', '.join(KINDS)}, not {kind!r}")
    source = "; ".join(t for t in (text["source"], text["note"]) if t)
    return Leaf(tree["value"].value, Provenance(text["unit"], source, kind, where))


# ---- loading ------------------------------------------------------------------------------------------


def presets(slug: str) -> dict[str, Path]:
    """Name -> file of the presets under `arch/presets/<slug>/`."""
    folder = Path(str(resources.files("tilewright.arch"))) / "presets" / slug
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))} if folder.is_dir() else {}


def is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml")) or Path(name).is_file()


def load_tree(name: str, slugs: Sequence[str], beside: Path | None = None, depth: int = 0) -> Tree:
    """The tree of a preset or a file, its `base` merged beneath. Raises UserError."""
    if depth > 8:
        raise UserError(f"base: {name} is based on itself, or on a chain of more than 8 files")
    known = {n: p for slug in slugs for n, p in presets(slug).items()}
    if name in known:
        path = known[name]
        label = f"{name}.yaml"
    elif is_path(name):
        path = Path(name) if beside is None else beside / name
        label = str(path)
    else:
        raise UserError(f"unknown spec {name!r}: {nearest(name, known)} (or the path of a YAML file)")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {label}: {reason}") from None
    tree = parse_yaml(text, label)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, Leaf) or not isinstance(base.value, str):
        raise UserError(f"{label}: base must be the name of a preset or a YAML path")
    below = load_tree(base.value, slugs, path.parent, depth + 1)
    if "name" not in tree:
        below["name"] = Leaf(path.stem, Provenance("", "file name", "derived", label))
    return merge(below, tree)


def merge(below: Tree, above: Tree) -> Tree:
    """`above` laid over `below`; a value set without a unit keeps the unit it replaces."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            out[key] = merge(old, value)
        elif isinstance(old, Leaf) and isinstance(value, Leaf) and not value.provenance.unit:
            p = value.provenance
            out[key] = Leaf(value.value, Provenance(old.provenance.unit, p.source, p.kind, p.where))
        else:
            out[key] = value
    return out


def apply_sets(tree: Tree, sets: Sequence[str]) -> Tree:
    """The tree with each `a.b=value` of the command line laid over it. Raises UserError."""
    for text in sets:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise UserError(f"--set {text}: expected KEY.PATH=VALUE")
        parsed = parse_yaml(f"value: {value}", f"--set {path}")
        leaf = parsed.get("value")
        if not isinstance(leaf, Leaf) or len(parsed) != 1:
            raise UserError(f"--set {path}: must be a plain value, not {value!r}")
        leaf = Leaf(leaf.value, Provenance("", "set on the command line", "assumed", f"--set {text}"))
        overlay: Any = leaf
        for key in reversed(path.split(".")):
            overlay = {key: overlay}
        tree = merge(tree, overlay)
    return tree


def build(cls: type[Spec], tree: Tree, label: str) -> Spec:
    """The validated spec of class `cls`. Raises UserError naming file, line, key, value and what is allowed."""
    provenance: dict[str, Provenance] = {}

    def plain(node: Any, prefix: str) -> Any:
        if isinstance(node, Leaf):
            provenance[prefix] = node.provenance
            return node.value
        return {k: plain(v, f"{prefix}.{k}" if prefix else k) for k, v in node.items()}

    values = plain(tree, "")
    try:
        spec = cls.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(cls, error, provenance, label)) from None
    for path in ("target", "name", "description"):
        provenance.pop(path, None)
    object.__setattr__(spec, "_provenance", provenance)
    return spec


def _explain(
    cls: type[BaseModel], error: ValidationError, provenance: Mapping[str, Provenance], label: str
) -> str:
    found = error.errors(include_url=False)
    # A misspelled key is both unknown and missing; the first says more.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    keys = [str(k) for k in first["loc"]]
    path = ".".join(keys)
    place = next(
        (p.where for known, p in provenance.items() if known == path or known.startswith(path + ".")), label
    )
    place = label if not keys else place
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key {path}: {nearest(keys[-1], _fields(cls, keys[:-1]))}"
    if first["type"] == "missing":
        return f"{place}: key {path} is missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "model_type":
        message = "a section of keys"
    shown = first["input"]
    if first["type"] == "value_error":
        return f"{place}: {path + ': ' if path else ''}{message}"
    if isinstance(shown, Fraction):
        shown = _show(shown)
    return (
        f"{place}: {path} must be {message}, not {shown!r}"
        if not isinstance(shown, dict)
        else (f"{place}: {path} must be {message}, not a section")
    )


def _fields(cls: type[BaseModel], keys: Sequence[str]) -> list[str]:
    fields: Mapping[str, FieldInfo] = cls.model_fields
    for key in keys:
        annotation = fields[key].annotation if key in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        fields = annotation.model_fields
    return list(fields)
