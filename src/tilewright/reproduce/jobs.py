"""Independent runs, on as many processes as there are processors."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Progress, Scenario
from tilewright.devices import load_device
from tilewright.run import run
from tilewright.workloads.models import load_model


class Job(NamedTuple):
    """A model on a device; `mapping` overrides choices of a target's mapper. Where an `optional` one can't run, its outcome is
    left out."""

    spec: str
    model: str
    scenario: Scenario
    sets: tuple[str, ...] = ()
    mapping: Mapping[str, Any] | None = None
    optional: bool = False


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


def _run(job: Job) -> Outcome | None:
    """As `run_job`, but nothing for an optional job that can't run."""
    try:
        return run_job(job)
    except UserError:
        if job.optional:
            return None
        raise


def run_jobs(jobs: Sequence[Job], progress: Progress | None = None) -> list[Outcome]:
    """The outcomes in the order of the jobs, without those of optional ones that can't run. Raises UserError.

    The first runs in this process, so that kernels which have to be compiled are compiled once.
    """
    done = {0: _run(jobs[0])} if jobs else {}
    if progress is not None:
        progress(len(done), len(jobs))
    if len(jobs) <= 1:
        return [outcome for outcome in done.values() if outcome]
    # A fresh process each: a copy of this one would hold threads (of the progress bar) that do not run in it.
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs) - 1, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(_run, job): i for i, job in enumerate(jobs) if i}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                if progress is not None:
                    progress(len(done), len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [outcome for i in range(len(jobs)) if (outcome := done[i])]


def _quiet() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and there is one progress bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
