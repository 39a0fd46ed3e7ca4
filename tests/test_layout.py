"""The tree: links that resolve, a wheel that holds everything, imports that point one way, and a few bans."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tilewright import setup_check
from tilewright.arch import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tilewright"
ROOMS = ("arch", "mappers", "rtl", "sim", "workloads")
DATA = {".yaml", ".json", ".v", ".typed"}

tracked = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git which files belong to the tree")


def tree():
    """Paths of the files that git knows or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(n) for n in names if (ROOT / n).exists()]


# ---- links and rooms ----------------------------------------------------------------------------------


def test_the_rooms_are_relative_links():
    links = {p.name: p for p in PACKAGE.iterdir() if p.is_symlink()}
    assert set(links) == set(ROOMS)
    for name, link in links.items():
        assert link.readlink() == Path("../..") / name
        assert link.resolve() == ROOT / name and (link / "__init__.py").is_file()


def test_no_folder_at_the_root_shadows_the_package():
    assert not (ROOT / "tilewright").exists()


@pytest.mark.parametrize("slug", registry.targets())
def test_a_target_has_a_place_in_every_room(slug):
    for room in ROOMS:
        assert (ROOT / room / f"{slug}.py").is_file() or (ROOT / room / slug / "__init__.py").is_file(), room
    assert list((ROOT / "arch" / "presets" / slug).glob("*.yaml"))
    assert list((ROOT / "tests" / slug).glob("test_*.py"))
    assert (ROOT / "docs" / "targets" / f"{slug}.md").is_file()


# ---- the wheel ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in the wheel that the tree builds; built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in tree():
        if path.parts[0] in (*ROOMS, "src") or len(path.parts) == 1:
            copy = source / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / path).is_symlink():
                copy.symlink_to((ROOT / path).readlink())
            else:
                copy.write_bytes((ROOT / path).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, timeout=120)
    (path,) = folder.glob("tilewright-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@tracked
def test_the_wheel_holds_the_tree(wheel):
    expected = set()
    for path in tree():
        if path.suffix not in DATA | {".py"}:
            continue
        if path.parts[0] in ROOMS:
            expected.add(f"tilewright/{path.as_posix()}")
        elif path.parts[:2] == ("src", "tilewright"):
            expected.add(path.relative_to("src").as_posix())
    got = {n for n in wheel if ".dist-info/" not in n}
    assert got == expected


@tracked
def test_the_wheel_holds_what_runs_need(wheel):
    assert wheel >= {
        "tilewright/py.typed",
        "tilewright/rtl/lib/tilewright_memory.v",
        "tilewright/arch/presets/pim/pim-gpt.yaml",
        "tilewright/workloads/configs/gpt2-xl.json",
    }
    assert any(n.endswith("licenses/LICENSE") for n in wheel)


# ---- imports ------------------------------------------------------------------------------------------


def test_imports_point_one_way():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def modules(*rooms):
    return [p for room in rooms for p in sorted((ROOT / room).rglob("*.py"))]


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", modules("rtl"), ids=relative)
def test_rtl_keeps_its_annotations(path):
    # Amaranth reads the ports of a component from its annotations; as strings they are lost.
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            assert "annotations" not in [a.name for a in node.names]


# ---- kernels ------------------------------------------------------------------------------------------


def kernels(module):
    """Functions of a module that Numba compiles."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            names = {n.id for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
            if names & {"njit", "jit", "vectorize", "guvectorize"}:
                yield node


LITERAL = (ast.Constant, ast.Tuple, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)


def constants(module):
    """Names bound at module level to integers that are spelled out there: literals, or `range(n)` unpacked."""
    for node in module.body:
        if isinstance(node, ast.Assign):
            parts = [n for n in ast.walk(node.value) if not isinstance(n, LITERAL)]
            parts += [
                n for n in ast.walk(node.value) if isinstance(n, ast.Constant) and type(n.value) is not int
            ]
            counted = isinstance(node.value, ast.Call) and ast.unparse(node.value).startswith("range(")
            if not parts or (counted and len(parts) == 2):  # the call, and the name `range`
                yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))


BUILTINS = {"abs", "bool", "divmod", "enumerate", "float", "int", "len", "max", "min", "range", "zip"}
BUILTINS |= {"AssertionError", "IndexError", "OverflowError", "RuntimeError", "ValueError", "np", "numba"}


def globals_read(source):
    """(kernel, name) for each global that a kernel reads and should be given as an argument."""
    module = ast.parse(source)
    # Kernels and state types of this file: Numba notices when they change.
    names = {k.name for k in kernels(module)} | {c.name for c in module.body if isinstance(c, ast.ClassDef)}
    imported = {
        (a.asname or a.name): node.module
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for a in node.names
    }
    # A kernel of another module of this room is a callee, not a value.
    callees = {n for n, m in imported.items() if m and m.startswith("tilewright.sim")}
    for kernel in kernels(module):
        inner = [n for n in ast.walk(kernel) if isinstance(n, ast.Name)]
        stored = {n.id for n in inner if isinstance(n.ctx, ast.Store)}
        arguments = {a.arg for a in ast.walk(kernel.args) if isinstance(a, ast.arg)}
        outside = {d for top in (*kernel.decorator_list, kernel.args) for d in ast.walk(top)}
        outside |= set(ast.walk(kernel.returns)) if kernel.returns else set()
        for node in inner:
            known = stored | arguments | names | callees | set(constants(module)) | BUILTINS
            if node not in outside and node.id not in known:
                yield kernel.name, node.id


@pytest.mark.parametrize("path", modules("sim"), ids=relative)
def test_kernels_read_no_globals(path):
    # A kernel in Numba's cache keeps the value that a global had when it was compiled.
    assert sorted(set(globals_read(path.read_text("utf-8")))) == []


def test_the_check_of_kernels_sees_a_global():
    source = """
import numpy as np
from numba import njit
from tilewright.arch.pim import CMD, PimParams
A, E = 3, -(2**40)
C, D = range(2)
B = np.zeros(2)
F = int(B[0])
G = 1.5
@njit
def ok(p: PimParams, n=A) -> int:
    return max(p.x, A, C, E) + np.int64(n)
@njit(cache=True)
def bad(p):
    x = CMD.ACT + F * G
    for i in range(len(B)):
        x += ok(p, i)
    return x
"""
    assert set(globals_read(source)) == {("bad", "CMD"), ("bad", "B"), ("bad", "F"), ("bad", "G")}


def test_kernels_are_compiled_without_fast_math():
    for path in modules("sim"):
        assert "fastmath=True" not in path.read_text("utf-8"), relative(path)


# ---- words --------------------------------------------------------------------------------------------

# Nothing in the tree may depend on the machine it was written on, or name where packages come from.
FORBIDDEN = re.compile(r"/wor[k]/|/roo[t]/|/hom[e]/\w|index-ur[l]|\bpypi\.or[g]|files\.pythonhoste[d]")


@tracked
def test_no_file_knows_this_machine():
    found = []
    for path in tree():
        if (ROOT / path).is_symlink():
            continue
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1):
            if FORBIDDEN.search(line):
                found.append(f"{path}:{number}: {line.strip()[:80]}")
    assert found == []


def test_everything_that_is_installed_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    locked = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)( ; .*)?", line).groups()[:2]
            locked.setdefault(name, set()).add(version)
    for requirement in wanted:
        name, _, pinned = re.match(r"([\w-]+)(==)?([\w.]*)", requirement).groups()
        versions = locked.get(name.lower().replace("_", "-"), set())
        assert versions, f"{name} is not in constraints.txt"
        assert not pinned or pinned in versions, f"{requirement}: constraints.txt has {versions}"


# ---- set-up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((3, 10, 13), "Python must be 3.11 to 3.13, not 3.10: apt-get install python3.11 (then: make PYTHON=python3.11)"),
        ((3, 14, 0), "Python must be 3.11 to 3.13, not 3.14: apt-get install python3.13 (then: make PYTHON=python3.13)"),
        ((3, 12, 1), ""),
    ],
)  # fmt: skip
def test_set_up_checks_the_version(version, expected):
    assert setup_check.version_problem(version) == expected


def test_set_up_is_content_here():
    assert setup_check.problems(rtl=True) == []


def test_set_up_names_the_package_of_what_is_missing(monkeypatch):
    dot = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(setup_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_check, "has_libpython", lambda: False)
    monkeypatch.setattr(setup_check.importlib.util, "find_spec", lambda name: None)
    venv = f"Python's venv module is missing: apt-get install python{dot}-venv"
    assert setup_check.problems(rtl=False) == [venv]
    assert setup_check.problems(rtl=True) == [
        venv,
        f"the shared library of Python {dot} is missing: apt-get install libpython{dot}",
        "c++ is not on PATH: apt-get install g++",
        "make is not on PATH: apt-get install make",
        "perl is not on PATH: apt-get install perl",
    ]


def test_set_up_sees_a_checkout_without_links(tmp_path):
    for room in ROOMS:
        (tmp_path / room).write_text("../../" + room)
    assert setup_check.links_problem(str(tmp_path)) == (
        f"{tmp_path}/arch is not a link to a folder: git config core.symlinks true, then check out again"
    )


def test_set_up_runs_as_a_plain_file_and_exits_with_2(tmp_path):
    script = tmp_path / "setup_check.py"  # no links beside it
    script.write_text((PACKAGE / "setup_check.py").read_text("utf-8"))
    done = subprocess.run([sys.executable, "-I", str(script)], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("set-up: ") and done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "-I", str(PACKAGE / "setup_check.py")], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def unseen(sources):
    """(module, name) of each function that only compiled code may call."""
    for name, module in sources.items():
        for kernel in kernels(module):
            options = {n.id for d in kernel.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
            if options & {"INNER", "CALLED"}:
                yield name, kernel.name


def crashes(sources):
    """(module, name) for each call of such a function by Python; `sources` are modules of sim/ by name."""
    hidden = set(unseen(sources))
    for name, module in sources.items():
        functions = {n.name: (name, n.name) for n in module.body if isinstance(n, ast.FunctionDef)}
        aliases = {}
        for node in (n for n in module.body if isinstance(n, ast.ImportFrom)):
            for a in node.names:
                if node.module == "tilewright.sim":
                    aliases[a.asname or a.name] = a.name
                elif (node.module or "").startswith("tilewright.sim."):
                    functions[a.asname or a.name] = (node.module.rpartition(".")[2], a.name)
        inside = {n for kernel in kernels(module) for n in ast.walk(kernel)}
        for call in (n for n in ast.walk(module) if isinstance(n, ast.Call) and n not in inside):
            what = call.func
            if isinstance(what, ast.Name) and functions.get(what.id) in hidden:
                yield functions[what.id]
            if isinstance(what, ast.Attribute) and isinstance(what.value, ast.Name):
                target = aliases.get(what.value.id), what.attr
                if target in hidden:
                    yield target


def test_python_calls_no_function_that_only_compiled_code_may_call():
    # There is no wrapper that would take its arguments: Python would crash.
    assert list(crashes({p.stem: ast.parse(p.read_text("utf-8")) for p in modules("sim")})) == []


def test_the_check_of_calls_sees_one():
    one = """
from numba import njit
from tilewright.sim.cache import CALLED, ENTRY, INNER
@njit(**INNER)
def inner(x): return x
@njit(**CALLED)
def part(x): return inner(x)
@njit(**ENTRY)
def entry(x): return part(x)
def python(x): return entry(x) + part(x)
"""
    other = "from tilewright.sim import one as o\nfrom tilewright.sim.one import inner as i\nx = o.part(1) + o.entry(1)\ny = [i(2)]"
    found = crashes({"one": ast.parse(one), "other": ast.parse(other)})
    assert sorted(found) == [("one", "inner"), ("one", "part"), ("one", "part")]
