"""Small flash devices and legal traces drawn at random."""

from collections import defaultdict

import numpy as np
from hypothesis import strategies as st

from tilewright.arch.flash import ERASE, OPERATION, POLICIES, PROGRAM, READ, FlashSpec, load_flash

KEYS = (
    "channels",
    "chips_per_channel",
    "dies_per_chip",
    "planes_per_die",
    "blocks_per_plane",
    "pages_per_block",
)


def device(geometry=(1, 1, 1, 1, 4, 8), **changes: object) -> FlashSpec:
    """A device whose times are round numbers of ticks: a page moves in 10, is read in 100, programmed in 300,
    a block erased in 1000; commands take 2, and 1 for each further plane. `changes` are `a__b=value`."""
    values = {f"geometry.{k}": v for k, v in zip(KEYS, geometry, strict=True)} | {
        "geometry.page_bytes": 1000, "tick_ns": 1, "cells.page_types": "uniform",
        "cells.read_lsb_us": 0.1, "cells.program_lsb_us": 0.3, "cells.erase_us": 1, "cells.endurance": 1000,
        "interface.mb_per_s": 100_000,
        "interface.read_command_ns": 2, "interface.read_command_plane_ns": 1,
        "interface.program_command_ns": 2, "interface.program_command_plane_ns": 1,
        "interface.erase_command_ns": 2, "interface.erase_command_plane_ns": 1,
        "suspension.of": "none", "suspension.command_ns": 3, "suspension.erase_us": 0.02,
        "suspension.program_us": 0.02, "suspension.limit": 1,
        "scheduler.policy": "pipelined", "scheduler.multi_plane": "false", "scheduler.same_page": "true",
        "scheduler.cache_read": "false", "scheduler.window": 8, "scheduler.queue_depth": 0,
        "placement.spare_blocks": 1,
    }  # fmt: skip
    values |= {k.replace("__", "."): str(v).lower() if isinstance(v, bool) else v for k, v in changes.items()}
    return load_flash("mqsim", [f"{k}={v}" for k, v in values.items()])


@st.composite
def devices(draw, **fixed: object) -> FlashSpec:
    """Any structure and rule, with times that often coincide and commands that may take none."""
    short = st.sampled_from([0, 1, 2, 3, 5])
    changes: dict[str, object] = {
        "geometry__page_bytes": draw(st.sampled_from([1, 7, 16])),
        "interface__mb_per_s": draw(st.sampled_from([1000, 3000, 7000])),
        "cells__page_types": draw(st.sampled_from(["uniform", "mlc", "tlc"])),
        "cells__endurance": 1000,
    }
    for kind in ("lsb", "csb", "msb"):
        changes[f"cells__read_{kind}_us"] = draw(st.integers(1, 30)) / 1000
        changes[f"cells__program_{kind}_us"] = draw(st.integers(1, 60)) / 1000
    changes["cells__erase_us"] = draw(st.integers(1, 90)) / 1000
    changes["cells__cache_busy_us"] = draw(short) / 1000
    for kind in ("read", "program", "erase"):
        changes[f"interface__{kind}_command_ns"] = draw(short)
        changes[f"interface__{kind}_command_plane_ns"] = draw(short)
    changes["suspension__of"] = draw(st.sampled_from(["none", "erase", "program", "both"]))
    changes["suspension__command_ns"] = draw(short)
    changes["suspension__erase_us"] = draw(st.integers(0, 12)) / 1000
    changes["suspension__program_us"] = draw(st.integers(0, 12)) / 1000
    changes["suspension__limit"] = draw(st.integers(1, 3))
    changes["scheduler__policy"] = draw(st.sampled_from(sorted(POLICIES)))
    for flag in ("multi_plane", "same_page", "cache_read"):
        changes[f"scheduler__{flag}"] = draw(st.booleans())
    changes["scheduler__window"] = draw(st.sampled_from([1, 2, 3, 8]))
    changes["scheduler__queue_depth"] = draw(st.sampled_from([0, 0, 1, 2, 5]))
    geometry = tuple(draw(st.integers(1, most)) for most in (2, 2, 2, 4)) + (3, 10)
    return device(geometry, **changes | fixed)


@st.composite
def traces(
    draw, spec: FlashSpec, most: int = 30, kinds=(READ, READ, PROGRAM, ERASE), gaps=(0, 3, 40)
) -> np.ndarray:
    """Operations that every block allows, arriving at once or over time."""
    g = spec.geometry
    next_page: dict[tuple[int, ...], int] = {}  # of blocks whose pages are known
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    arrival, rows = 0, []
    gap = draw(st.sampled_from(gaps))
    for _ in range(draw(st.integers(1, most))):
        arrival += draw(st.integers(0, gap)) if gap else 0
        place = tuple(draw(st.integers(0, n - 1)) for n in g.limits[:4]) + (draw(st.integers(0, 1)),)
        kind = draw(st.sampled_from(kinds))
        full = next_page.get(place, seen[place]) >= g.pages_per_block
        if kind == READ and next_page.get(place) == 0:
            kind = PROGRAM if PROGRAM in kinds else ERASE
        if kind == PROGRAM and full:
            kind = ERASE if ERASE in kinds else READ
        page, size = 0, 0
        if kind == READ:
            page = draw(st.integers(0, next_page.get(place, g.pages_per_block) - 1))
            size = draw(st.sampled_from([g.page_bytes, 1]))
            seen[place] = max(seen[place], page + 1)
        elif kind == PROGRAM:
            page = (
                next_page[place]
                if place in next_page
                else draw(st.integers(seen[place], g.pages_per_block - 1))
            )
            next_page[place], size = page + 1, g.page_bytes
        else:
            next_page[place] = 0
        rows.append((arrival, kind, *place, page, size))
    return np.array(rows, OPERATION)
