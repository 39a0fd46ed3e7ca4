"""How time is taken: the shortest of a few runs, since other work only ever adds to it."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

REPEATS = 3
T = TypeVar("T")


def best(run: Callable[[], T]) -> tuple[float, T]:
    """The shortest CPU time of this process, in seconds, and the last result."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return min(times), result


class Command(NamedTuple):
    """What a whole command took: the shortest wall clock and the mean CPU time, the most memory of all so far."""

    wall_s: float
    cpu_s: float
    memory_mib: float

    def __str__(self) -> str:
        return f"{self.wall_s:6.2f} s wall {self.cpu_s:6.2f} s CPU {self.memory_mib:5.0f} MiB"


def command(arguments: Sequence[str]) -> Command:
    """`tilewright` with `arguments`, warm. Raises CalledProcessError if it fails."""
    argv = [sys.executable, "-m", "tilewright", *arguments]
    subprocess.run(argv, check=True, capture_output=True)
    walls, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True)
        walls.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / REPEATS
    return Command(min(walls), cpu, after.ru_maxrss / 1024)
