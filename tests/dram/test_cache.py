"""The cache of compiled kernels never runs code that is no longer there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tilewright.sim
from tilewright.sim.cache import cache_key, cache_root, configure_cache

CALLEE = "from numba import njit\n@njit(cache=True)\ndef f(x):\n    return x + {}\n"
CALLER = """from numba import njit
from tilewright.sim.callee import f
@njit(cache=True)
def g(x):
    return 10 * f(x)
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of sim/ with a kernel and its callee in two files, and a function that runs the kernel."""
    sim = tmp_path / "src" / "tilewright" / "sim"
    sim.mkdir(parents=True)
    for name in ("__init__.py", "cache.py"):
        shutil.copy(Path(tilewright.sim.__file__).parent / name, sim / name)
    (sim.parent / "__init__.py").write_text("")
    (sim / "callee.py").write_text(CALLEE.format(1))
    (sim / "caller.py").write_text(CALLER)

    def run(**env):
        script = (
            "from tilewright.sim.caller import g; print(g(1)); import numba; print(numba.config.CACHE_DIR)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
            | {"PYTHONPATH": str(tmp_path / "src"), "TILEWRIGHT_CACHE": str(tmp_path / "cache")}
            # Bytecode is told from its source by size and whole seconds: an edit in the same second would be missed.
            | {"PYTHONDONTWRITEBYTECODE": "1"}
            | env,
            capture_output=True,
            text=True,
            check=True,
        )
        value, folder = done.stdout.split()
        return int(value), Path(folder)

    return sim, run


def test_an_edited_callee_is_compiled_anew(tree, tmp_path):
    sim, run = tree
    value, folder = run()
    assert value == 20 and folder.parent == tmp_path / "cache" / "numba"
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.nb?")}
    assert kept
    assert run() == (20, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.nb?")} == kept  # loaded, not compiled
    (sim / "callee.py").write_text(CALLEE.format(2))
    value, other = run()
    assert value == 30 and other != folder


def test_the_users_folder_is_kept_and_an_unwritable_one_is_not(tree, tmp_path):
    _, run = tree
    value, folder = run(NUMBA_CACHE_DIR=str(tmp_path / "mine"))
    assert value == 20 and folder.parent == tmp_path / "mine"
    (tmp_path / "file").write_text("")  # a file where the folder should be: unwritable even for root
    value, folder = run(TILEWRIGHT_CACHE=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    assert value == 20 and folder.parent.parent == tmp_path


def test_key_covers_names_contents_and_bounds_checking(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x")
    keys = {cache_key(tmp_path)}
    (tmp_path / "a" / "b.py").write_text("y")
    keys.add(cache_key(tmp_path))
    (tmp_path / "a" / "b.py").rename(tmp_path / "a" / "c.py")
    keys.add(cache_key(tmp_path))
    monkeypatch.setattr("numba.config.BOUNDSCHECK", 1)
    keys.add(cache_key(tmp_path))
    assert len(keys) == 4
    (tmp_path / "a" / "note.txt").write_text("not code")
    assert cache_key(tmp_path) in keys


def test_unused_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("numba.config.CACHE_DIR", "")  # restored afterwards
    assert cache_root() == tmp_path
    old, recent, other = (tmp_path / "numba" / n for n in ("0123456789abcdef", "fedcba9876543210", "mine"))
    for folder in (old, recent, other):
        folder.mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    assert configure_cache().parent == tmp_path / "numba"
    assert not old.exists() and recent.exists() and other.exists()
