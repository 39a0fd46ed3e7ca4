"""Independent runs, on as many processes as there are processors."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.arch.scenario import Progress, Scenario
from tilewright.devices import load_device
from tilewright.run import run
from tilewright.workloads.models import load_model


class Job(NamedTuple):
    """A model on a device; `mapping` overrides choices of a target's mapper."""

    spec: str
    model: str
    scenario: Scenario
    sets: tuple[str, ...] = ()
    mapping: Mapping[str, Any] | None = None


class Outcome(NamedTuple):
    """What a run came to, small enough to cross between processes. `operators` are ticks by operator kind."""

    job: Job
    ticks: int
    time_s: float
    energy_j: float
    counters: Mapping[str, int]
    units: Mapping[str, Mapping[str, Any]]
    operators: Mapping[str, int]
    lower_bound: bool


def run_job(job: Job) -> Outcome:
    """Run one. Raises UserError."""
    r = run(load_device(job.spec, job.sets), load_model(job.model), job.scenario, mapping=job.mapping)
    assert r.energy_j is not None
    operators = {o.name: o.cycles for o in r.operators}
    return Outcome(job, r.cycles, float(r.time_s), r.energy_j, r.counters, r.units, operators, r.lower_bound)


def run_jobs(jobs: Sequence[Job], progress: Progress | None = None) -> list[Outcome]:
    """The outcomes in the order of the jobs. Raises UserError.

    The first runs in this process, so that kernels which have to be compiled are compiled once.
    """
    done = {0: run_job(jobs[0])} if jobs else {}
    if progress is not None:
        progress(len(done), len(jobs))
    if len(jobs) <= 1:
        return list(done.values())
    # A fresh process each: a copy of this one would hold threads (of the progress bar) that do not run in it.
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs) - 1, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(run_job, job): i for i, job in enumerate(jobs) if i}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                if progress is not None:
                    progress(len(done), len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[i] for i in range(len(jobs))]


def _quiet() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and there is one progress bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
