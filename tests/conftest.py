"""Set-up that every test shares; it runs before anything imports Numba."""

import os
from pathlib import Path

from hypothesis import settings

# Compiled kernels, simulators and objects of C++ are kept inside this checkout: a fresh clone is really cold,
# a second run is warm.
_CACHE = Path(__file__).resolve().parent.parent / ".build" / "cache"
os.environ.setdefault("TILEWRIGHT_CACHE", str(_CACHE))
os.environ.setdefault("CCACHE_DIR", str(_CACHE / "ccache"))

# The first example of a kernel includes its compilation, and two workers share two cores.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
