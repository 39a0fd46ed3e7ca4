"""The meaning of a program for reconfigurable dataflow units: `interpret` executes it and knows no time.

An image is a dict of arrays:

| name                     | dtype, shape                  | holds                                          |
| ------------------------ | ----------------------------- | ---------------------------------------------- |
| "hbm", "ddr", "remote"   | uint8 [lines * line bytes]    | off-chip memories, as far as they are looked at |
| "scratch"                | uint32 [pmus, banks, words]   | scratchpads, PMUs row by row                   |

A section is a process network (Kahn 1974): units are processes, streams are queues without bounds, tokens are
counted. Such a network gives one result whatever the order in which its processes work, but for what they share, the
words of a PMU and off-chip memory, whose order tokens have to settle. So every kernel is executed in three ORDERS: what
reads comes as early as can be, what reads a PMU as late as can be, and what reads off-chip memory as late as can be.
A program for which they differ is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch import rdu
from tilewright.arch.formats import BF16, FP32
from tilewright.arch.isa import Program
from tilewright.arch.rdu import (
    DYNAMIC,
    INPUTS,
    LEVELS,
    LOCAL_BITS,
    MESH,
    TOKENS,
    X_BITS,
    Y_BITS,
    RduParams,
    RduSpec,
)
from tilewright.workloads import formats
from tilewright.workloads.rdu_kernels import lane_op, place, reduce_tree, round_bf16, special

Image = dict[str, NDArray[Any]]
Words = NDArray[np.uint32]
Config = Mapping[str, int] | np.void

BLANK_BYTES = 1 << 20
"""Bytes of each off-chip memory that a blank image has, at most; a program that reaches further is given more."""
_HALF = np.uint32(rdu.WORD_BITS - BF16.width)
_SEQUENCES = 1 << rdu.SEQUENCE_BITS
_ADDRESSES = 1 << rdu.ADDRESS_BITS
_STEP = ((0, -1), (1, 0), (0, 1), (-1, 0))
_EAST, _WEST = MESH.index("east"), MESH.index("west")
LOAD, STORE = 1, 2  # directions of an AGCU
_FEW = 5  # iterations that a process takes at once where an order says so


def blank_image(params: RduParams) -> Image:
    """An image of zeros; see the module's table for its arrays."""
    line = params.lanes * rdu.WORD_BITS // 8
    lines = [min(int(n), BLANK_BYTES // line) for n in params.tier_lines]
    memories = {name: np.zeros(n * line, np.uint8) for name, n in zip(rdu.TIERS, lines, strict=True)}
    return memories | {"scratch": np.zeros((params.pmus, params.banks, params.bank_words), np.uint32)}


def interpret(
    spec: RduSpec,
    program: Program,
    image: Mapping[str, NDArray[Any]],
    decisions: Mapping[str, Any] | None = None,
) -> tuple[Image, dict[str, Any]]:
    """The image that `program` leaves, and the decisions that its timing depends on: none on this machine.

    `image` is not changed; `decisions` are handed through. Raises ValueError naming segment and unit for an address
    beyond memory or across lines, a flow that leads nowhere, units that wait for one another, packets left over,
    results that depend on who is first, and bytes that a kernel shares with a COPY under way, of which one writes.
    """
    machine = Machine(spec.params(), {name: np.array(array) for name, array in image.items()})
    machine.run(program)
    return machine.image, dict(decisions or {})


# ---- counter chains and queues ------------------------------------------------------------------------


class Chain:
    """A counter chain and the tokens it takes: which iterations may run, and what each of them means."""

    def __init__(self, config: Config, prefix: str = ""):
        self.counts = [max(1, int(config[f"{prefix}count{n}"])) for n in range(LEVELS)]
        self.sizes = np.cumprod([1, *self.counts, 1]).tolist()  # iterations of each level, LEVELS + 2 of them
        self.total = self.sizes[LEVELS]
        self.position = 0
        self._wait_every = self.sizes[int(config[f"{prefix}wait_level"])]
        self._signal_every = self.sizes[int(config[f"{prefix}signal_level"])]
        wait, signal = int(config[f"{prefix}wait"]), int(config[f"{prefix}signal"])
        self.waits = [i for i in range(TOKENS) if wait >> i & 1]
        self.signals = [i for i in range(TOKENS) if signal >> i & 1]
        self.tokens = [int(config[f"{prefix}hold{i}"]) for i in range(TOKENS)]

    def allowed(self) -> int:
        """Where the tokens taken in so far let the chain run to."""
        if not self.waits:
            return self.total
        return min(self.total, min(self.tokens[i] for i in self.waits) * self._wait_every)

    def starving(self) -> list[int]:
        """Control inputs without the token that the next iteration needs."""
        return [i for i in self.waits if self.tokens[i] * self._wait_every <= self.position]

    def events(self, first: int, end: int) -> int:
        """How many signals the iterations from `first` to before `end` give."""
        return end // self._signal_every - first // self._signal_every if self.signals else 0

    def pops(self, level: int, position: int) -> int:
        """How often an input of that level has been popped before iteration `position`."""
        return position // self.sizes[level]

    def counters(self, iterations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Loop indices int64[LEVELS, n]."""
        sizes, counts = np.array(self.sizes[:LEVELS])[:, None], np.array(self.counts)[:, None]
        return iterations[None, :] // sizes % counts


class Queue:
    """All packets that an input has been given: words uint32[n, lanes] and sequence ids."""

    def __init__(self, lanes: int):
        self._data = np.zeros((16, lanes), np.uint32)
        self._sequence = np.zeros(16, np.int64)
        self.count = 0

    def push(self, data: Words, sequence: NDArray[np.int64]) -> None:
        end = self.count + len(data)
        if end > len(self._data):
            more = max(end, 2 * len(self._data))
            self._data = np.concatenate(
                [self._data, np.zeros((more - len(self._data), data.shape[1]), np.uint32)]
            )
            self._sequence = np.concatenate([self._sequence, np.zeros(more - len(self._sequence), np.int64)])
        self._data[self.count : end], self._sequence[self.count : end] = data, sequence
        self.count = end

    @property
    def data(self) -> Words:
        return self._data[: self.count]

    @property
    def sequence(self) -> NDArray[np.int64]:
        return self._sequence[: self.count]


# ---- processes ----------------------------------------------------------------------------------------


@dataclass
class Process:
    """A unit, or a side of one, under execution. `offset` is added to its control ports."""

    name: str
    place: tuple[str, int, int]
    config: Config
    chain: Chain
    offset: int = 0
    inputs: dict[tuple[str, int], tuple[Queue, int]] = field(default_factory=dict)
    """Queue and level of each input in use."""
    sinks: dict[str, list[Queue]] = field(default_factory=dict)
    """Where the packets of each network go."""
    wires: dict[int, list[tuple[Chain, int]]] = field(default_factory=dict)
    """Whose control inputs a control output feeds."""
    sent: int = 0

    def ready(self, few: bool) -> int:
        """The end of the iterations that can be done now."""
        end = self.chain.allowed()
        for queue, level in self.inputs.values():
            end = min(end, queue.count * self.chain.sizes[level])
        return min(end, self.chain.position + _FEW) if few else end

    def packets(self, kind: str, i: int, iterations: NDArray[np.int64]) -> tuple[Words, NDArray[np.int64]]:
        """What input i holds in these iterations: words [n, lanes], and sequence ids."""
        queue, level = self.inputs[kind, i]
        at = iterations // self.chain.sizes[level]
        return queue.data[at], queue.sequence[at]

    def give(self, rows: Words) -> None:
        if not len(rows):
            return
        config = self.config
        sequence = int(config["sequence"]) + int(config["sequence_step"]) * (self.sent + np.arange(len(rows)))
        self.sent += len(rows)
        for network, queues in self.sinks.items():
            for queue in queues:
                queue.push(rows if network == "vector" else rows[:, :1], sequence % _SEQUENCES)

    def step(self, few: bool) -> bool:
        """Do what can be done; whether that was anything."""
        first, end = self.chain.position, self.ready(few)
        if end <= first:
            return False
        self.work(first, end)
        self.chain.position = end
        for i in self.chain.signals:
            for chain, index in self.wires.get(i + self.offset, ()):
                chain.tokens[index] += self.chain.events(first, end)
        return True

    @property
    def role(self) -> str:
        """What it does, by the names in ORDERS."""
        raise NotImplementedError

    def work(self, first: int, end: int) -> None:
        raise NotImplementedError

    def hindrance(self) -> str:
        """For what the process waits, or an empty text if it has ended."""
        if self.chain.position >= self.chain.total:
            return ""
        if tokens := self.chain.starving():
            return f"{self.name} waits for a token at control input {tokens[0] + self.offset}"
        for (kind, i), (queue, level) in self.inputs.items():
            if queue.count * self.chain.sizes[level] <= self.chain.position:
                return f"{self.name} waits for packet {queue.count} of {kind} input {i}"
        raise AssertionError(f"{self.name} could go on")


@dataclass
class Pcu(Process):
    """A compute unit; what it folds is computed when a whole fold has come in."""

    params: RduParams | None = None
    stages: Sequence[Config] = ()
    computed: int = 0
    role = "compute"

    def work(self, first: int, end: int) -> None:
        systolic = rdu.MODES[int(self.config["mode"])] == "systolic"
        fold = rdu.FOLDS[int(self.config["fold"])]
        length = self.chain.sizes[int(self.config["fold_level"])] if systolic or fold != "none" else 1
        end -= end % length
        if end <= self.computed:
            return
        iterations = np.arange(self.computed, end)
        self.computed = end
        rows = self._systolic(iterations, length) if systolic else self._simd(iterations, length, fold)
        self.give(rows)

    def _tail(self, rows: Words, gates: Words | None = None) -> Words:
        config = self.config
        rows = special(rdu.FUNCTIONS[int(config["function"])], rows, self.params)  # type: ignore[arg-type]
        if gates is not None:
            rows = lane_op("multiply", "fp32", rows, gates)
        return round_bf16(rows) if int(config["round"]) else rows

    def _systolic(self, iterations: NDArray[np.int64], length: int) -> Words:
        p = self.params
        assert p is not None
        a = (self.packets("vector", 0, iterations)[0] >> _HALF).reshape(-1, length, p.lanes)
        b = (self.packets("vector", 1, iterations)[0] >> _HALF).reshape(-1, length, p.lanes)[..., : p.stages]
        sums = np.zeros((len(a), p.lanes, p.stages), np.uint32)
        for k in range(length):
            left, right = np.broadcast_arrays(a[:, k, :, None], b[:, k, None, :])
            products = formats.multiply(left, right, BF16, FP32).astype(np.uint32)
            sums = products if k == 0 else lane_op("add", "fp32", sums, products)
        return self._tail(np.ascontiguousarray(sums.transpose(0, 2, 1)).reshape(-1, p.lanes))

    def _simd(self, iterations: NDArray[np.int64], length: int, fold: str) -> Words:
        p, config = self.params, self.config
        assert p is not None
        own = np.zeros((p.registers, len(iterations), p.lanes), np.uint32)
        for kind, i in self.inputs:
            own[i + (INPUTS if kind == "scalar" else 0)] = self.packets(kind, i, iterations)[0]
        counters = self.chain.counters(iterations).astype(np.uint32)
        for stage in self.stages:
            a, b = (_operand(stage, name, own, counters) for name in "ab")
            operation, kind = rdu.STAGE_OPS[int(stage["operation"])], rdu.TYPES[int(stage["type"])]
            own[int(stage["to"])] = lane_op(operation, kind, a, b, own[int(stage["c"])].copy())
        rows = own[int(config["result"])]
        kind, tree = rdu.TYPES[int(config["fold_type"])], rdu.FOLDS[int(config["tree"])]
        if fold != "none":
            parts = rows.reshape(-1, length, p.lanes)
            rows = parts[:, 0]
            for k in range(1, length):
                rows = lane_op(fold, kind, rows, parts[:, k])
        if tree != "none":
            rows = np.repeat(reduce_tree(tree, kind, rows)[:, None], p.lanes, axis=1)
        return self._tail(rows, own[int(config["gate"])] if int(config["gated"]) else None)


def _operand(stage: Config, name: str, own: Words, counters: Words) -> Words:
    index = int(stage[name])
    match rdu.OPERANDS[int(stage[f"{name}_from"])]:
        case "register":
            return own[index].copy()
        case "constant":
            return np.full(own.shape[1:], int(stage["constant"]), np.uint32)
        case "counter":
            return np.broadcast_to(counters[index][:, None], own.shape[1:])
        case _:
            return np.broadcast_to(np.arange(own.shape[2], dtype=np.uint32), own.shape[1:])


@dataclass
class Side(Process):
    """One side of a memory unit, whose words `memory` uint32[banks, words] it shares with the other."""

    memory: Words = field(default_factory=lambda: np.zeros((1, 1), np.uint32))
    lanes: int = 1

    def _places(
        self, first: int, end: int, prefix: str, shift: NDArray[np.int64] | int
    ) -> tuple[Any, Any, Any]:
        counters = self.chain.counters(np.arange(first, end))
        strides = np.array([int(self.config[f"{prefix}stride{n}"]) for n in range(LEVELS)])
        start = int(self.config[f"{prefix}base"]) + (counters * strides[:, None]).sum(axis=0) + shift
        lanes = np.arange(self.lanes) * int(self.config[f"{prefix}lane_stride"])
        return place(self.config, (start[:, None] + lanes) % _ADDRESSES, len(self.memory))


class Writer(Side):
    """The write side."""

    role = "write"

    def work(self, first: int, end: int) -> None:
        data, sequence = self.packets("vector", 0, np.arange(first, end))
        valid, bank, index = self._places(first, end, "write_", sequence * int(self.config["sequence_scale"]))
        self.memory[bank[valid], index[valid]] = data[valid]  # of several the last stays


class Reader(Side):
    """The read side."""

    role = "read"

    def work(self, first: int, end: int) -> None:
        valid, bank, index = self._places(first, end, "read_", 0)
        words = self.memory[np.where(valid, bank, 0), np.where(valid, index, 0)]
        self.give(np.where(valid, words, 0).astype(np.uint32)[valid.any(axis=1)])


@dataclass
class Gate(Process):
    """An AGCU between the network and `memory` uint8[bytes]."""

    memory: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    base: int = 0
    lanes: int = 1
    kept: tuple[tuple[int, int], ...] = ()
    """Bytes, from first to before end, that are another's."""

    @property
    def role(self) -> str:
        return "load" if int(self.config["direction"]) == LOAD else "store"

    def work(self, first: int, end: int) -> None:
        config = self.config
        words, size = int(config["words"]), rdu.ELEMENT_BYTES[int(config["format"])]
        counters = self.chain.counters(np.arange(first, end))
        strides = np.array([int(config[f"stride{n}"]) for n in range(LEVELS)])
        at = self.base + (counters * strides[:, None]).sum(axis=0)
        line = self.lanes * rdu.WORD_BITS // 8
        for address in at[(at < 0) | (at + words * size > len(self.memory))][:1]:
            raise ValueError(
                f"{self.name}: byte {address} lies outside its memory of {len(self.memory)} bytes"
            )
        for address in at[(at % size != 0) | (at % line + words * size > line)][:1]:
            raise ValueError(
                f"{self.name}: {words} elements of {size} bytes at byte {address} are not within a line of {line}"
            )
        for start, stop in self.kept:
            for address in at[(at < stop) & (at + words * size > start)][:1]:
                raise ValueError(f"{self.name}: byte {address} is in use by a COPY that no WAIT has ended")
        where = at[:, None] + np.arange(words * size)
        half = rdu.FORMATS[int(config["format"])] == "bf16"
        if int(config["direction"]) == LOAD:
            elements = self.memory[where].view("<u2" if half else "<u4").astype(np.uint32)
            rows = np.zeros((end - first, self.lanes), np.uint32)
            rows[:, :words] = elements << _HALF if half else elements
            self.give(rows)
        else:
            data = self.packets("vector", 0, np.arange(first, end))[0][:, :words]
            raw = (data >> _HALF).astype("<u2") if half else data.astype("<u4")
            self.memory[where] = np.ascontiguousarray(raw).view(np.uint8)


@dataclass(frozen=True)
class Order:
    """Which processes come first: those of one rank, by their roles, only when none of the ranks before can go on."""

    roles: tuple[tuple[str, ...], ...]
    back: bool = False  # within a rank, from the last one on
    few: bool = False  # a few iterations at a time


ORDERS = (
    Order((("load", "read"), ("compute",), ("write", "store"))),
    Order((("store", "write", "compute"), ("load",), ("read",))),
    Order((("store", "write", "compute"), ("read",), ("load",)), back=True, few=True),
)


# ---- the machine --------------------------------------------------------------------------------------


class Machine:
    """An image, the configuration that is loaded, and argument registers."""

    def __init__(self, params: RduParams, image: Image):
        self.params, self.image = params, image
        p = params
        shape = (p.pmus, p.banks, p.bank_words)
        if image["scratch"].shape != shape:
            raise ValueError(f"scratch has shape {image['scratch'].shape}, the machine's is {shape}")
        self.config: dict[str, np.ndarray] = {}
        self.tables: dict[tuple[str, int, int, int, int], tuple[int, int]] = {}
        self.args = np.zeros(256, np.int64)
        self.copied: dict[str, list[tuple[str, int, int]]] = {"reads": [], "writes": []}
        positions = [(x, y) for y in range(p.rows) for x in range(p.columns) if not rdu.is_pcu(x, y)]
        self.pmu_index = {at: i for i, at in enumerate(positions)}

    def run(self, program: Program) -> None:
        segments = list(program.segments)
        for number, segment in enumerate(segments):
            for _ in range(segment.repeat):
                for op in segment.regions["code"]:
                    try:
                        self._execute(op, segments)
                    except ValueError as error:
                        raise ValueError(f"segment {number}: {error}") from None

    def _execute(self, op: np.void, segments: list[Any]) -> None:
        name = rdu.OPS[int(op["op"])].name
        if name in ("PROGRAM_LOAD", "ARGUMENT_LOAD"):
            if int(op["section"]) >= len(segments):
                raise ValueError(f"{name}: there is no segment {int(op['section'])}")
            regions = segments[int(op["section"])].regions
            if name == "ARGUMENT_LOAD":
                for record in regions.get("args", ()):
                    self.args[int(record["index"])] = int(record["value"])
                return
            self.config = {r.region: regions[r.region] for r in rdu.CONFIGS if r.region in regions}
            for s in self.config.get("config.switch", ()):
                key = (
                    rdu.NETWORKS[int(s["network"])],
                    int(s["x"]),
                    int(s["y"]),
                    int(s["port"]),
                    int(s["flow"]),
                )
                self.tables[key] = int(s["out"]), int(s["next_flow"])
        elif name == "COPY":
            self._copy(op)
        elif name == "WAIT":
            self.copied = {"reads": [], "writes": []}
        elif name == "KERNEL_EXECUTE":
            self._kernel()

    def _copy(self, op: np.void) -> None:
        line = self.params.lanes * rdu.WORD_BITS // 8
        source, target = (self.image[rdu.TIERS[int(op[name])]] for name in ("source", "target"))
        first, to, size = (int(op[name]) * line for name in ("from", "to", "lines"))
        for what, memory, start in (("reads", source, first), ("writes", target, to)):
            if start + size > len(memory):
                raise ValueError(f"COPY {what} {size} bytes from {start} on; the memory has {len(memory)}")
        if source is target and size and abs(first - to) < size:
            raise ValueError(f"COPY of {size} bytes from {first} to {to}: they overlap")
        target[to : to + size] = source[first : first + size]
        # A COPY waits for the one before; kernels do not.
        self.copied = {
            "reads": [(rdu.TIERS[int(op["source"])], first, first + size)] if size else [],
            "writes": [(rdu.TIERS[int(op["target"])], to, to + size)] if size else [],
        }

    def _kernel(self) -> None:
        shared = (*rdu.TIERS, "scratch")
        before = {name: self.image[name].copy() for name in shared}
        self._network(ORDERS[0])
        after = {name: self.image[name].copy() for name in shared}
        for order in ORDERS[1:]:
            for name in shared:
                self.image[name][...] = before[name]
            self._network(order)
            for name in shared:
                if not np.array_equal(self.image[name], after[name]):
                    at = [int(i[0]) for i in np.nonzero(self.image[name] != after[name])]
                    where = f"{name}: byte {at[0]}"
                    if name == "scratch":
                        x, y = next(place for place, i in self.pmu_index.items() if i == at[0])
                        where = f"pmu@{x},{y}: word {at[2]} of bank {at[1]}"
                    raise ValueError(f"{where} depends on which unit is first: a token is missing")

    def _network(self, order: Order) -> None:
        """Execute the loaded section."""
        processes = self._processes()
        ranks = [
            [p for p in processes[:: -1 if order.back else 1] if p.role in roles] for roles in order.roles
        ]
        at = 0
        while at < len(ranks):
            at = 0 if sum(p.step(order.few) for p in ranks[at]) else at + 1
        waiting = [text for p in processes if (text := p.hindrance())]
        if waiting:
            raise ValueError(f"deadlock: {'; '.join(waiting[:8])}")
        for p in processes:
            for (kind, i), (queue, level) in p.inputs.items():
                if left := queue.count - p.chain.pops(level, p.chain.total):
                    raise ValueError(f"{p.name}: {left} packets are left at {kind} input {i}")

    # ---- units, streams and tokens of the loaded section ----------------------------------------------

    def _processes(self) -> list[Process]:
        p = self.params
        found: list[Process] = []
        stages: dict[tuple[int, int], dict[int, np.void]] = {}
        for s in self.config.get("config.stage", ()):
            stages.setdefault((int(s["x"]), int(s["y"])), {})[int(s["stage"])] = s
        for c in self.config.get("config.pcu", ()):
            if rdu.MODES[int(c["mode"])] == "off":
                continue
            x, y = int(c["x"]), int(c["y"])
            mine = [s for _, s in sorted(stages.get((x, y), {}).items())]
            unit = Pcu(f"pcu@{x},{y}", ("unit", x, y), c, Chain(c), params=p, stages=mine)
            for kind, mask, lanes in (("vector", c["vectors"], p.lanes), ("scalar", c["scalars"], 1)):
                for i in range(INPUTS):
                    if int(mask) >> i & 1:
                        unit.inputs[kind, i] = Queue(lanes), int(c[f"{kind}{i}_level"])
            found.append(unit)
        for c in self.config.get("config.pmu", ()):
            x, y = int(c["x"]), int(c["y"])
            memory = self.image["scratch"][self.pmu_index[x, y]]
            at = ("unit", x, y)
            if int(c["enable"]) & 1:
                side: Process = Writer(
                    f"pmu.write@{x},{y}", at, c, Chain(c, "write_"), memory=memory, lanes=p.lanes
                )
                side.inputs["vector", 0] = Queue(p.lanes), 0
                found.append(side)
            if int(c["enable"]) & 2:
                chain = Chain(c, "read_")
                found.append(
                    Reader(f"pmu.read@{x},{y}", at, c, chain, offset=TOKENS, memory=memory, lanes=p.lanes)
                )
        for c in self.config.get("config.agcu", ()):
            if int(c["direction"]) not in (LOAD, STORE):
                continue
            i = int(c["agcu"])
            tier, store = rdu.TIERS[int(c["tier"])], int(c["direction"]) == STORE
            memory = self.image[tier]
            shared = self.copied["writes"] + (self.copied["reads"] if store else [])
            kept = tuple((start, stop) for name, start, stop in shared if name == tier)
            base = int(self.args[int(c["argument"])])
            at = ("agcu", *self._gate(i)[:2])
            gate = Gate(f"agcu@{i}", at, c, Chain(c), memory=memory, base=base, lanes=p.lanes, kept=kept)
            if store:
                gate.inputs["vector", 0] = Queue(p.lanes), 0
            found.append(gate)
        self._wire(found)
        return found

    def _gate(self, i: int) -> tuple[int, int, int]:
        """Column, row and port of the switch on which AGCU i hangs."""
        side, y = divmod(i, self.params.agcus_per_side)
        return (self.params.columns - 1, y, _EAST) if side else (0, y, _WEST)

    def _wire(self, processes: list[Process]) -> None:
        takers = {(q.place, kind, i): queue for q in processes for (kind, i), (queue, _) in q.inputs.items()}
        for q in processes:
            if isinstance(q, Writer) or (isinstance(q, Gate) and q.inputs):
                continue
            outputs = [("vector", "flow", 1)]
            if isinstance(q, Pcu):
                sends = (int(q.config["send_vector"]), int(q.config["send_scalar"]))
                outputs = [("vector", "flow", sends[0]), ("scalar", "scalar_flow", sends[1])]
            for network, flow, sent in outputs:
                if not sent:
                    continue
                ends: list[Queue] = []
                for place_, i in self._ends(q, network, int(q.config[flow])):
                    if (place_, network, i) not in takers:
                        kind, x, y = place_
                        raise ValueError(
                            f"{q.name}: nobody takes its packets at {network} input {i} of {kind} {x},{y}"
                        )
                    ends.append(takers[place_, network, i])
                q.sinks[network] = ends
        chains = {(q.place, q.offset): q.chain for q in processes}
        givers = {(q.place, q.offset): q for q in processes}
        for t in self.config.get("config.token", ()):
            source = ("agcu" if t["from_agcu"] else "unit", int(t["x"]), int(t["y"]))
            sink = ("agcu" if t["to_agcu"] else "unit", int(t["to_x"]), int(t["to_y"]))
            output, index = int(t["output"]), int(t["input"])
            giver = givers.get((source, output // TOKENS * TOKENS))
            chain = chains.get((sink, index // TOKENS * TOKENS))
            if giver is not None and chain is not None:
                giver.wires.setdefault(output, []).append((chain, index % TOKENS))

    def _ends(self, q: Process, network: str, flow: int) -> list[tuple[tuple[str, int, int], int]]:
        """Where packets end, as (place, input)."""
        p = self.params
        x, y, port = q.place[1], q.place[2], len(MESH)
        if isinstance(q, Gate):
            x, y, port = self._gate(int(q.config["agcu"]))
        ends, todo, seen = [], [(x, y, port, flow)], set()
        while todo:
            here = todo.pop()
            x, y, port, flow = here
            if here in seen:
                raise ValueError(f"{q.name}: its {network} packets go in circles at switch {x},{y}")
            seen.add(here)
            if flow & DYNAMIC:
                mask, after = self._dimension_order(x, y, flow), flow
            elif (network, x, y, port, flow) in self.tables:
                mask, after = self.tables[network, x, y, port, flow]
            else:
                raise ValueError(f"{q.name}: switch {x},{y} knows no flow {flow} at {network} port {port}")
            for out in range(len(MESH) + INPUTS):
                if not mask >> out & 1:
                    continue
                if out >= len(MESH):
                    ends.append((("unit", x, y), out - len(MESH)))
                    continue
                nx, ny = x + _STEP[out][0], y + _STEP[out][1]
                if 0 <= nx < p.columns and 0 <= ny < p.rows:
                    todo.append((nx, ny, rdu.OPPOSITE[out], after))
                elif out in (_EAST, _WEST) and y < p.agcus_per_side:
                    ends.append((("agcu", x, y), 0))
                else:
                    raise ValueError(f"{q.name}: its {network} packets leave the mesh at {x},{y}")
        return ends

    def _dimension_order(self, x: int, y: int, flow: int) -> int:
        to_x, to_y = flow & (1 << X_BITS) - 1, flow >> X_BITS & (1 << Y_BITS) - 1
        local = flow >> X_BITS + Y_BITS & (1 << LOCAL_BITS) - 1
        along_x = 0 if to_x == x else 1 << (_EAST if to_x > x else _WEST)
        along_y = 0 if to_y == y else 1 << MESH.index("south" if to_y > y else "north")
        first, second = (along_y, along_x) if self.params.y_first else (along_x, along_y)
        return first or second or 1 << len(MESH) + local
