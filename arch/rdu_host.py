"""The host port of a dataflow machine's RTL: its registers, memories and counters, and the names of its units."""

from collections.abc import Mapping

import numpy as np

from tilewright.arch.hostmap import HostMap, Region
from tilewright.arch.rdu import (
    ARGS,
    CAUSES,
    CODE,
    CONFIGS,
    COUNTERS,
    DRAM,
    DRAM_TIMINGS,
    TIERS,
    RduParams,
    is_pcu,
)

# ---- units --------------------------------------------------------------------------------------------


def positions(p: RduParams) -> list[tuple[int, int]]:
    """All positions, row by row."""
    return [(x, y) for y in range(p.rows) for x in range(p.columns)]


def pmu_positions(p: RduParams) -> list[tuple[int, int]]:
    """Positions of the PMUs, in the order of the image's scratchpads."""
    return [(x, y) for x, y in positions(p) if not is_pcu(x, y)]


def agcu_position(p: RduParams, agcu: int) -> tuple[int, int]:
    """Where the switch is that an AGCU hangs on: the west side first, each side from the north."""
    return (0 if agcu < p.agcus_per_side else p.columns - 1), agcu % p.agcus_per_side


def loggers(p: RduParams) -> list[str]:
    """What keeps a log of its own: `pcu@x,y` and `pmu@x,y` row by row, then `agcu@i`."""
    units = [f"{'pcu' if is_pcu(x, y) else 'pmu'}@{x},{y}" for x, y in positions(p)]
    return units + [f"agcu@{i}" for i in range(2 * p.agcus_per_side)]


def unit_names(p: RduParams) -> list[str]:
    """What counts its ticks, a PMU's write side before its read side; and the sequencer and the DMA, last."""
    names: list[str] = []
    for unit in loggers(p):
        kind, _, place = unit.partition("@")
        names += [unit] if kind != "pmu" else [f"pmu.{side}@{place}" for side in ("write", "read")]
    return [*names, "sequencer", "dma"]


# ---- registers and counters ---------------------------------------------------------------------------

REGISTERS = (
    *("length", "program_load", "argument_load", "hardware_launch", "host_launch"),
    *(f"{what}_{tier}" for tier in TIERS for what in ("p", "q", "latency")),
    *("copy_p", "copy_q"),
    *(f"{what}_{tier}" for tier in TIERS for what in ("timed", *DRAM_TIMINGS)),
)
DERIVED = ("lane_ops", "macs")  # from iterations and the configuration
COUNTED = tuple(name for name in COUNTERS if name not in DERIVED)  # by the RTL


def register_values(p: RduParams, length: int) -> list[int]:
    """What the RTL's registers hold for a program of `length` operations."""
    tiers = [(int(p.rate_p[k]), int(p.rate_q[k]), int(p.latency[k])) for k in range(len(TIERS))]
    return [
        *(length, p.program_load, p.argument_load, p.hardware_launch, p.host_launch),
        *(value for tier in tiers for value in tier),
        *(p.copy_p, p.copy_q),
        *(int(row[DRAM.index(what)]) for row in p.dram for what in ("timed", *DRAM_TIMINGS)),
    ]


def status_names() -> list[str]:
    """Names of the RTL's read-only words."""
    return ["ticks", *COUNTED]


# ---- memories -----------------------------------------------------------------------------------------

ACTIVITIES = 1 << (len(CAUSES)).bit_length()  # words of a unit in `activity`: busy, then CAUSES, then nothing
KIND_BITS = 3
RECORD_BITS = max(record.bits for record in CONFIGS)
CONFIG_BITS = RECORD_BITS + KIND_BITS  # a configuration record, and above it its index in CONFIGS


def hostmap(p: RduParams, depth: int) -> HostMap:
    """Regions of the host port for a code of `depth` operations.

    `activity` has ACTIVITIES words for each of `unit_names`, `spans` the first tick and the end of each of `loggers` in
    each operation, `log` those of the operations. Configuration, scratchpads and off-chip memories are not among
    them. Raises ValueError where `depth` is not a power of two.
    """
    if depth < 1 or depth & (depth - 1):
        raise ValueError(f"depth must be a power of two, not {depth}")
    index = depth.bit_length()
    return HostMap(
        [
            Region("registers", len(REGISTERS)),
            Region("status", len(status_names())),
            Region("code", depth, CODE.bits),
            Region("sections", depth, 4 * index),
            Region("args", depth, ARGS.bits),
            Region("log", depth, 64),
            Region("activity", ACTIVITIES * len(unit_names(p))),
            Region("spans", depth * len(loggers(p)), 64),
        ]
    )


def config_words(regions: Mapping[str, np.ndarray]) -> list[int]:
    """The configuration records of a segment in the order of the configuration bus, each with its kind above it."""
    words = []
    for kind, record in enumerate(CONFIGS):
        if record.region in regions:
            rows = record.encode(regions[record.region]).astype("<u4")
            words += [int.from_bytes(row.tobytes(), "little") | kind << RECORD_BITS for row in rows]
    return words


def directory(configs: list[int], args: list[int], depth: int) -> list[int]:
    """An entry for each section, given how many records of either kind it has; `depth` as in `hostmap`."""
    bits = depth.bit_length()
    entries, config, argument = [], 0, 0
    for c, a in zip(configs, args, strict=True):
        entries.append(config | c << bits | argument << 2 * bits | a << 3 * bits)
        config, argument = config + c, argument + a
    return entries
