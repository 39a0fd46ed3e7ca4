"""The bench inside the simulator: it plays jobs over the host port and knows no machine.

The host acts on falling edges, halfway between the machine's own: no order within an edge matters.
"""

import ctypes
import json
import os
from pathlib import Path

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge, SimTimeoutError, with_timeout
from cocotb.utils import get_sim_time

TICK_PS = 1000


class _ArrayValue(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("rawvals", ctypes.c_void_p),
    ]


class Memory:
    """A Verilog memory, moved as a whole by VPI array transfers (IEEE 1800-2017, 38.16 and 38.35).

    One call a block instead of one a word; `words` and `bits` describe it. Raises LookupError for a path that
    names no memory, IndexError for words that it does not have, ValueError for values too wide for it.
    """

    _SIZE, _REG_ARRAY, _TYPE, _RAW_TWO_STATE = 4, 116, 1, 17  # IEEE 1800-2017, annex K

    def __init__(self, path):
        self.path = path
        vpi = ctypes.CDLL(None)
        vpi.vpi_handle_by_name.restype = vpi.vpi_handle_by_index.restype = ctypes.c_void_p
        handle = vpi.vpi_handle_by_name(path.encode(), None)
        if not handle or vpi.vpi_get(self._TYPE, ctypes.c_void_p(handle)) != self._REG_ARRAY:
            raise LookupError(f"no memory {path!r} in the design")
        self._vpi, self._handle = vpi, ctypes.c_void_p(handle)
        self.words = vpi.vpi_get(self._SIZE, self._handle)
        first = ctypes.c_void_p(vpi.vpi_handle_by_index(self._handle, 0))
        self.bits = vpi.vpi_get(self._SIZE, first)
        self.bytes = -(-self.bits // 8)

    def _check(self, first, count):
        if not 0 <= first <= self.words - count:
            raise IndexError(
                f"{self.path} has words 0 to {self.words - 1}, not {first} to {first + count - 1}"
            )

    def load(self, first, rows):
        """Write (words, bytes) uint8 rows; bytes beyond the width must be 0."""
        self._check(first, len(rows))
        data = np.zeros((len(rows), self.bytes), np.uint8)
        size = min(self.bytes, rows.shape[1])
        data[:, :size] = rows[:, :size]
        if rows[:, size:].any() or (self.bits % 8 and (data[:, -1] >> self.bits % 8).any()):
            raise ValueError(f"{self.path} has words of {self.bits} bits: a value does not fit")
        value = _ArrayValue(self._RAW_TWO_STATE, 0, data.ctypes.data)
        if len(rows):
            self._vpi.vpi_put_value_array(
                self._handle,
                ctypes.byref(value),
                ctypes.byref(ctypes.c_int32(first)),
                ctypes.c_uint32(len(rows)),
            )

    def dump(self, first, count):
        """Read `count` words as (words, bytes) uint8 rows."""
        self._check(first, count)
        if count == 0:
            return np.zeros((0, self.bytes), np.uint8)
        value = _ArrayValue(self._RAW_TWO_STATE, 0, None)
        self._vpi.vpi_get_value_array(
            self._handle, ctypes.byref(value), ctypes.byref(ctypes.c_int32(first)), ctypes.c_uint32(count)
        )
        raw = ctypes.string_at(value.rawvals, count * self.bytes)
        return np.frombuffer(raw, np.uint8).reshape(count, self.bytes)


class Host:
    """The host's side of the port."""

    def __init__(self, dut):
        self._dut = dut
        self._tick = FallingEdge(dut.clk)

    async def reset(self):
        dut = self._dut
        dut.host__we.value = 0
        dut.host__start.value = 0
        dut.host__addr.value = 0
        dut.host__wdata.value = 0
        if hasattr(dut, "rst"):
            dut.rst.value = 1
            await self._tick
            await self._tick
            dut.rst.value = 0
        await self._tick

    async def write(self, address, words):
        addr, wdata = self._dut.host__addr, self._dut.host__wdata
        self._dut.host__we.value = 1
        for i, word in enumerate(words.tolist(), address):
            addr.value = i
            wdata.value = word
            await self._tick
        self._dut.host__we.value = 0

    async def read(self, address, count):
        addr, rdata = self._dut.host__addr, self._dut.host__rdata
        words = np.zeros(count, np.uint32)
        for i in range(count):
            addr.value = address + i
            await self._tick
            words[i] = rdata.value.to_unsigned()
        return words

    async def wait(self, max_ticks):
        if not self._dut.host__done.value:
            await with_timeout(RisingEdge(self._dut.host__done), max_ticks * TICK_PS, "ps")

    async def start(self, max_ticks):
        """Run to the edge of `done`; the ticks from the edge that samples `start`."""
        self._dut.host__start.value = 1
        await RisingEdge(self._dut.clk)
        began = get_sim_time("step")
        await self._tick
        self._dut.host__start.value = 0
        if self._dut.host__done.value:
            return 0
        await self.wait(max_ticks)
        ended = get_sim_time("step")
        await self._tick
        return (ended - began) // TICK_PS


@cocotb.test()
async def play(dut):
    folder = Path(os.environ["TILEWRIGHT_COSIM_JOBS"])
    jobs = json.loads((folder / "jobs.json").read_text())
    words, rows = np.load(folder / "words.npy"), np.load(folder / "rows.npy")
    memories = {}

    def memory(path):
        if path not in memories:
            memories[path] = Memory(path)
        return memories[path]

    Clock(dut.clk, TICK_PS, "ps", impl="gpi").start(start_high=False)
    host = Host(dut)
    await host.reset()
    with (
        (folder / "reads.bin").open("wb") as reads,
        (folder / "dumps.bin").open("wb") as dumps,
        (folder / "results.jsonl").open("w") as results,
    ):
        for index, job in enumerate(jobs):
            if job["reset"]:
                await host.reset()
            result = {"cycles": None, "error": None, "dumps": []}
            max_ticks = job["max_ticks"]
            try:
                await host.wait(max_ticks)
                for path, first, count, size in job["loads"]:
                    block, rows = rows[: count * size], rows[count * size :]
                    memory(path).load(first, block.reshape(count, size))
                for address, count in job["writes"]:
                    block, words = words[:count], words[count:]
                    await host.write(address, block)
                if job["start"]:
                    result["cycles"] = await host.start(max_ticks)
            except SimTimeoutError:
                result["error"] = f"job {index}: not done after {max_ticks} ticks"
            else:
                for address, count in job["reads"]:
                    reads.write((await host.read(address, count)).astype("<u4").tobytes())
                for path, first, count in job["dumps"]:
                    block = memory(path).dump(first, count)
                    dumps.write(block.tobytes())
                    result["dumps"].append(block.shape)
            # A failed assertion ends the process: what a job left must be on disk before the next one starts.
            reads.flush()
            dumps.flush()
            results.write(json.dumps(result) + "\n")
            results.flush()
            if result["error"]:
                return
