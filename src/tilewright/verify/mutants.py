"""Named faults: a verification that lets one pass is not worth much.

A mutant changes one thing in RTL, model or interpreter for as long as its context is entered: a function's
source, or a value that it is given. Nothing on disk changes.
"""

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Mutant:
    """A fault, and how many cases of which structure of the target's plan are run to catch it."""

    name: str
    apply: Callable[[], AbstractContextManager[None]]
    structure: int = 0
    programs: int = 10


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def told(sim: ModuleType, change: Callable[[Any], Any]) -> AbstractContextManager[None]:
    """The model of module `sim` is given other params than the RTL."""
    true = sim.simulate

    def simulate(params: Any, *args: Any, **options: Any) -> Any:
        return true(change(params), *args, **options)

    return replaced(sim, "simulate", simulate)


def constant(array: np.ndarray) -> np.ndarray:
    """Read-only like the array of params that it replaces: a writable one would have the kernels compiled anew."""
    array.flags.writeable = False
    return array


@contextlib.contextmanager
def edited(module: ModuleType, name: str, old: str, new: str) -> Iterator[None]:
    """Function `name` ("f" or "Class.method") of a module runs with `old` in its source replaced by `new`.

    A compiled kernel then runs uncompiled, and with it every kernel of the module, as a compiled caller would
    go on calling the compiled one. Raises ValueError unless `old` occurs exactly once.
    """
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    compiled = hasattr(getattr(owner, last), "py_func")
    function = getattr(owner, last).py_func if compiled else getattr(owner, last)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{module.__name__}.{name} holds {old!r} {source.count(old)} times, not once")
    source = source[source.index("def ") :].replace(old, new)
    scope: dict[str, Any] = {}
    # The module's own namespace, so that the function sees what the others of the module see.
    exec(compile(source, f"<mutant of {name}>", "exec"), vars(module), scope)  # noqa: S102 (our own source)
    with ExitStack() as stack:
        for key, value in list(vars(module).items()) if compiled else ():
            if hasattr(value, "py_func"):
                stack.enter_context(replaced(module, key, value.py_func))
        stack.enter_context(replaced(owner, last, scope[last]))
        yield
