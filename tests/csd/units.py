"""What the tests of the engine's units share: FP16 and FP32 as bits, words of lanes, numbers that hurt."""

import numpy as np
from hypothesis import strategies as st

from tilewright.arch import csd
from tilewright.arch import spec as specs
from tilewright.arch.formats import FP16, FP32
from tilewright.workloads.formats import from_bits, to_bits

# Zeros, smallest and largest subnormal, smallest normal, ones, largest, infinity, NaN; signs are drawn.
HALF_SPECIAL = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, FP16.nan)

halves = st.one_of(
    st.integers(0, 0xFFFF).filter(lambda b: b & 0x7FFF <= FP16.overflow),
    st.sampled_from([0x3C00, 0xBC00, 0x4000, 0x3800]),
    st.sampled_from([b | s for b in HALF_SPECIAL[:-1] for s in (0, 0x8000)] + [FP16.nan]),
)
finite_halves = st.integers(0, 0xFFFF).filter(lambda b: b & 0x7FFF < FP16.overflow)


def half(values):
    """FP16 bits of real numbers."""
    return to_bits(np.asarray(values, np.float64), FP16)


def single(value):
    """FP32 bits of a number, as an int; every NaN is the canonical one."""
    return int(to_bits(np.asarray(value, np.float32), FP32))


def floats(bits):
    """float32 of FP16 bits."""
    return from_bits(np.asarray(bits, np.uint16), FP16)


def pack(values, width=16):
    """Values side by side, the first one lowest."""
    return sum(int(v) << width * i for i, v in enumerate(values))


def unpack(word, count, width=16):
    return [word >> width * i & (1 << width) - 1 for i in range(count)]


# A drive that a simulator takes in its stride: lines of 4, pages of 64 elements, two channels, short times.
SMALL = {
    "engine.lanes": 4, "engine.batches": 2, "engine.buffer_lines": 64, "engine.max_tokens": 64,
    "engine.max_channels": 16, "engine.max_group": 2, "engine.exp_terms": 4, "engine.clock_mhz": 1000,
    "engine.reciprocal_iterations": 2, "engine.rsqrt_iterations": 2, "engine.command_queue": 2,
    "attention.page_channels": 2,
    "dram.table_bits": 5, "dram.slots": 4, "dram.vector_lines": 256,
    "flash.queue": 4, "flash.geometry.channels": 2, "flash.geometry.chips_per_channel": 2,
    "flash.geometry.dies_per_chip": 1, "flash.geometry.planes_per_die": 2, "flash.geometry.blocks_per_plane": 4,
    "flash.geometry.pages_per_block": 4, "flash.geometry.page_bytes": 128,
    "flash.cells.read_lsb_us": 0.03, "flash.cells.program_lsb_us": 0.05, "flash.cells.erase_us": 0.09,
    "flash.interface.mb_per_s": 12800,
    "flash.interface.read_command_ns": 2, "flash.interface.read_command_plane_ns": 1,
    "flash.interface.program_command_ns": 2, "flash.interface.program_command_plane_ns": 1,
    "flash.interface.erase_command_ns": 2, "flash.interface.erase_command_plane_ns": 1,
}  # fmt: skip


def small_spec(**changes):
    """The small drive, with changes as `a__b=value`."""
    sets = SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    texts = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in sets.items()]
    tree = specs.apply_sets(specs.load_tree("instinfer-a6000", [csd.SPEC.target_name]), texts)
    return specs.build(csd.SPEC, tree, "small")
