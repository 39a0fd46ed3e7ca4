"""Inner functions of kernels, called from Python."""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit


@cache
def called(function: Any) -> Callable[..., Any]:
    """A function of `sim/` that only compiled code may call (see `sim/cache.py`), for tests."""

    @njit
    def call(*args):
        return function(*args)

    return call
