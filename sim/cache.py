"""Where compiled kernels are kept on disk.

Numba notices an edit in the file of a cached kernel but not in the files of what that kernel calls, and would
go on running the old callee. So the cache folder is named after the contents of every file under `sim/`:
any edit opens a new, empty folder.
"""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numba

_CONFIG: Any = numba.config  # its attributes are set at run time, unseen by type checkers

# Options of njit for functions that take NamedTuples of arrays. Without `_nrt` every call would count a reference up
# and down for each array of the tuple, which takes ten times longer than the work. Such a function must not allocate,
# nor return an array.
ENTRY: dict[str, Any] = {"cache": True, "_nrt": False}
# For compiled code alone: to take a NamedTuple of arrays from Python is more code than most functions have, and half of
# the time that all take to compile. Python that called one of these would crash; tests look for that.
CALLED: dict[str, Any] = {**ENTRY, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Small functions in an inner loop are inlined; to inline larger ones everywhere would take minutes to compile.
INNER: dict[str, Any] = {**CALLED, "forceinline": True}


def cache_key(sources: Path) -> str:
    """The hash of every .py file under `sources`, of the Numba version and of its bounds checking."""
    h = hashlib.sha256(f"numba {numba.__version__} boundscheck {_CONFIG.BOUNDSCHECK}".encode())
    for path in sorted(sources.rglob("*.py")):
        content = path.read_bytes()
        h.update(f"\n{path.relative_to(sources).as_posix()} {len(content)}\n".encode())
        h.update(content)
    return h.hexdigest()[:16]


def cache_root() -> Path:
    """TILEWRIGHT_CACHE, else ~/.cache/tilewright."""
    chosen = os.environ.get("TILEWRIGHT_CACHE")
    return Path(chosen) if chosen else Path("~/.cache/tilewright").expanduser()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _forget_unused(root: Path, days: int = 30) -> None:
    """Remove the folders of former contents of `sim/` that no run has used for so long."""
    for folder in root.iterdir():
        named_by_hash = len(folder.name) == 16 and set(folder.name) <= set("0123456789abcdef")
        if named_by_hash and folder.stat().st_mtime < time.time() - 86400 * days:
            shutil.rmtree(folder, ignore_errors=True)


def configure_cache() -> Path:
    """Point Numba's disk cache at a folder that belongs to the present contents of `sim/`; returns it.

    The folder lies under NUMBA_CACHE_DIR if the user set it, else under `cache_root()`/numba; where that
    cannot be written, under the system's folder for temporary files. Must run before a kernel is decorated.
    """
    key = cache_key(Path(__file__).parent)
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = (Path(chosen) if chosen else cache_root() / "numba") / key
    if not _writable(folder):
        # One folder per user: a shared one would belong to whoever came first.
        folder = Path(tempfile.gettempdir()) / f"tilewright-numba-{os.getuid()}" / key
        if not _writable(folder):
            folder = Path(tempfile.mkdtemp(prefix="tilewright-numba-"))
    os.utime(folder)
    _forget_unused(folder.parent)
    _CONFIG.CACHE_DIR = str(folder)
    return folder
