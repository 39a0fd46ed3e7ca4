"""Places and routes that were found before, kept on disk: to find them takes most of a mapper's time.

They are named by a hash of what they follow from, the sources of placement and routing included, so that what is found
here is what would be found anew. So a run with other timings or memories, whose sections are the same, does not place
and route again.
"""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["remembered"]

T = TypeVar("T")
SOURCES = ("fabric.py", "gates.py", "kernels.py", "netlist.py", "place.py", "route.py")
MOST = 200  # results kept, those used last


def remembered(what: str, find: Callable[[], T]) -> T:
    """What `find` gave for `what`, which says in words everything that it follows from."""
    here = Path(__file__).parent
    key = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES) + what.encode()).hexdigest()
    root = os.environ.get("TILEWRIGHT_CACHE")
    folder = (Path(root) if root else Path("~/.cache/tilewright").expanduser()) / "places"
    path = folder / key[:32]
    try:
        with path.open("rb") as file:
            found: T = pickle.load(file)
        os.utime(path)
        return found
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError):
        pass
    found = find()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:
            pickle.dump(found, new)
        Path(new.name).replace(path)
        for old in sorted(folder.iterdir(), key=lambda p: -p.stat().st_mtime)[MOST:]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # a cache that can't be written only costs time
    return found
