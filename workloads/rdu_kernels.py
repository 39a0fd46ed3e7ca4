"""What the units of a dataflow machine compute: words in, words out, in a written order, without time.

Words are uint32: float32, int32, or a bfloat16 in the upper half. Configurations are mappings from the fields of the
records in `arch.rdu` to integers, which NumPy records and dictionaries from `configuration` both are. Iterations are
taken one by one, in the order of the counter chain; only lanes are NumPy's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch import rdu
from tilewright.arch.formats import BF16, FP32
from tilewright.arch.isa import Record
from tilewright.workloads import asic, formats

Words = NDArray[np.uint32]
Config = Mapping[str, int] | np.void
Arguments = Mapping[int, int] | Sequence[int]

_HALF = np.uint32(rdu.WORD_BITS - BF16.width)
_SIGN = np.uint32(FP32.sign)
_ADDRESSES = 1 << rdu.ADDRESS_BITS
_BYTES = 1 << rdu.ARGS.by_name["value"].bits
_DIRECTIONS = rdu.CONFIG_AGCU.by_name["direction"].names


def configuration(record: Record, **fields: int | str) -> dict[str, int]:
    """A record's fields, those left out at their defaults; enumerations by name or number.

    Raises ValueError for a field that the record doesn't have, or a value that it doesn't hold.
    """
    known = record.by_name
    numbers = {
        name: known[name].names.index(value) if isinstance(value, str) and name in known else value
        for name, value in fields.items()
    }
    made = record.make(**numbers)[0]  # type: ignore[arg-type]
    return {f.name: int(made[f.name]) for f in record.fields}


# ---- compute units ------------------------------------------------------------------------------------


def round_bf16(words: ArrayLike) -> Words:
    """float32 words rounded to bfloat16, which stands in the upper half of the word."""
    return formats.convert(words, FP32, BF16).astype(np.uint32) << _HALF


def lane_op(operation: str, kind: str, a: ArrayLike, b: ArrayLike, choose: ArrayLike = 0) -> Words:
    """One operation of STAGE_OPS on words of a type of TYPES, elementwise.

    >>> hex(lane_op("add", "bf16", 0x3F800000, 0x3B800000))  # 1 + 2**-8, a tie, to the even 1
    '0x3f800000'
    """
    x, y = np.broadcast_arrays(np.asarray(a, np.uint32), np.asarray(b, np.uint32))
    integer = kind == "int32"
    signed = x.view(np.int32) if x.ndim else x.astype(np.int32)
    other = y.view(np.int32) if y.ndim else y.astype(np.int32)
    wide, wider = x.astype(np.uint64), y.astype(np.uint64)
    shift = y & np.uint32(31)
    unrounded: Any
    if operation == "less":
        order = signed < other if integer else formats.compare(x, y, FP32)[0]
        return np.asarray(order, np.uint32)
    if operation == "select":
        return np.where(np.asarray(choose) != 0, x, y).astype(np.uint32)
    if operation in ("shift_left", "shift_right", "and", "or", "xor"):
        return {
            "shift_left": wide << shift.astype(np.uint64) & np.uint64(0xFFFFFFFF),
            "shift_right": signed >> shift.astype(np.int32),
            "and": x & y,
            "or": x | y,
            "xor": x ^ y,
        }[operation].astype(np.uint32)
    if operation == "pass":
        unrounded = x
    elif integer:
        unrounded = {
            "add": wide + wider,
            "subtract": wide - wider,
            "multiply": wide * wider,
            "maximum": np.where(signed < other, y, x),
            "minimum": np.where(signed < other, x, y),
        }[operation]
        unrounded = unrounded & 0xFFFFFFFF
    elif operation == "multiply":
        unrounded = formats.multiply(x, y, FP32, FP32)
    elif operation in ("add", "subtract"):
        unrounded = formats.add(x, y ^ _SIGN if operation == "subtract" else y, FP32)
    elif operation == "maximum":
        unrounded = formats.maximum(x, y, FP32)
    else:
        below = formats.maximum(x ^ _SIGN, y ^ _SIGN, FP32)
        unrounded = np.where(below == FP32.nan, below, below ^ _SIGN)
    words = np.asarray(unrounded).astype(np.uint32)
    return round_bf16(words) if kind == "bf16" else words


def reduce_tree(fold: str, kind: str, lanes: Words) -> Words:
    """The reduction across the last axis, a power of two long: adjacent words first, level by level."""
    while lanes.shape[-1] > 1:
        lanes = lane_op(fold, kind, lanes[..., 0::2], lanes[..., 1::2])
    return lanes[..., 0]


def special(function: str, words: ArrayLike, counts: asic.Counts) -> Words:
    """A special function of FUNCTIONS on float32 words: the methods of `asic`, sigmoid(x) = 1 / (1 + e**-x).

    "none" gives the words as they are; every NaN of the others is the canonical one.
    """
    bits = np.asarray(words, np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        match function:
            case "none":
                return bits
            case "exp":
                y = asic.exp(x, counts)
            case "reciprocal":
                y = asic.reciprocal(x, counts)
            case "rsqrt":
                y = asic.rsqrt(x, counts)
            case _:
                y = asic.reciprocal(np.float32(1) + asic.exp(-x, counts), counts)
    return np.where(np.isnan(y), np.uint32(FP32.nan), y.view(np.uint32))


class Iteration(NamedTuple):
    """One iteration of a counter chain: loop indices, and at which levels it is the first and the last."""

    counters: tuple[int, ...]
    first: tuple[bool, ...]
    last: tuple[bool, ...]


def iterations(config: Config, prefix: str = "") -> Iterator[Iteration]:
    """The iterations of a chain, in order; `first[n]` and `last[n]` for every level that three bits can name."""
    counts = [max(1, int(config[f"{prefix}count{n}"])) for n in range(rdu.LEVELS)]
    total = 1
    for count in counts:
        total *= count
    for i in range(total):
        counters, rest = [], i
        for count in counts:
            counters.append(rest % count)
            rest //= count
        zero = [True]
        end = [True]
        for counter, count in zip(counters, counts, strict=True):
            zero.append(zero[-1] and counter == 0)
            end.append(end[-1] and counter == count - 1)
        yield Iteration(tuple(counters), (*zero, zero[-1]), (*end, end[-1]))


class Packets(NamedTuple):
    """Packets of one stream: uint32[n, lanes], and n sequence ids and last flags."""

    data: Words
    sequence: NDArray[np.int64]
    last: NDArray[np.bool_]


def _packets(config: Config, rows: list[Words], last: list[bool], lanes: int) -> Packets:
    sequence = int(config["sequence"]) + int(config["sequence_step"]) * np.arange(len(rows))
    data = np.array(rows, np.uint32).reshape(len(rows), lanes)
    return Packets(data, sequence % (1 << rdu.SEQUENCE_BITS), np.array(last, bool))


def pcu(
    config: Config,
    stages: Sequence[Config],
    vectors: Sequence[ArrayLike],
    scalars: Sequence[ArrayLike] = (),
    *,
    lanes: int,
    registers: int = rdu.REGISTERS,
    counts: asic.Counts | None = None,
) -> Packets:
    """What leaves a PCU in one run.

    `vectors[i]`, uint32[n, lanes], and `scalars[i]`, uint32[n], are the packets at input i. In systolic mode the
    array has a row for each lane and a column for each of `stages`. Special functions need `counts`, how far their
    series and iterations go: RduParams have them. Raises ValueError for a gate beside a fold, a tree or the array.
    """
    loaded = [np.asarray(v, np.uint32).reshape(-1, lanes) for v in vectors]
    single = [np.asarray(s, np.uint32).reshape(-1) for s in scalars]
    at = {(kind, i): 0 for kind in ("vector", "scalar") for i in range(rdu.INPUTS)}
    mode = rdu.MODES[int(config["mode"])]
    fold, tree = (rdu.FOLDS[int(config[name])] for name in ("fold", "tree"))
    fold_type = rdu.TYPES[int(config["fold_type"])]
    function = rdu.FUNCTIONS[int(config["function"])]
    gated = bool(config["gated"])
    if gated and (fold != "none" or tree != "none" or mode != "simd"):
        raise ValueError("a gate goes with SIMD mode without fold and tree")
    if function != "none" and counts is None:
        raise ValueError(f"function {function} needs counts of terms and iterations")
    rows: list[Words] = []
    flags: list[bool] = []
    gates: list[Words] = []
    total = np.zeros(lanes, np.uint32)
    sums = np.zeros((lanes, len(stages)), np.uint32)

    for it in iterations(config):
        own = np.zeros((registers, lanes), np.uint32)
        for kind, mask, inputs in (
            ("vector", config["vectors"], loaded),
            ("scalar", config["scalars"], single),
        ):
            for i in range(rdu.INPUTS):
                if not int(mask) >> i & 1:
                    continue
                own[i + (rdu.INPUTS if kind == "scalar" else 0)] = inputs[i][at[kind, i]]
                at[kind, i] += it.last[int(config[f"{kind}{i}_level"])]
        starts, ends = (side[int(config["fold_level"])] for side in (it.first, it.last))
        leaves = it.last[int(config["last_level"])]

        if mode == "systolic":
            a, b = own[0] >> _HALF, own[1][: len(stages)] >> _HALF
            products = formats.multiply(a[:, None], b[None, :], BF16, FP32).astype(np.uint32)
            sums = products if starts else lane_op("add", "fp32", sums, products)
            if ends:
                rows += [sums[:, k] for k in range(len(stages))]
                flags += [False] * (len(stages) - 1) + [leaves]
            continue

        for stage in stages:
            a, b = (_operand(stage, name, own, it) for name in "ab")
            operation, kind = rdu.STAGE_OPS[int(stage["operation"])], rdu.TYPES[int(stage["type"])]
            own[int(stage["to"])] = lane_op(operation, kind, a, b, own[int(stage["c"])])
        value = own[int(config["result"])]
        if fold != "none":
            total = value if starts else lane_op(fold, fold_type, total, value)
            if not ends:
                continue
            value = total
        if tree != "none":
            value = np.full(lanes, reduce_tree(tree, fold_type, value), np.uint32)
        rows.append(value)
        flags.append(leaves)
        gates.append(own[int(config["gate"])])
    if counts is not None:
        rows = [special(function, row, counts) for row in rows]
    if gated:
        rows = [lane_op("multiply", "fp32", row, gate) for row, gate in zip(rows, gates, strict=True)]
    if int(config["round"]):
        rows = [round_bf16(row) for row in rows]
    return _packets(config, rows, flags, lanes)


def _operand(stage: Config, name: str, own: Words, it: Iteration) -> Words:
    index = int(stage[name])
    lanes = own.shape[1]
    match rdu.OPERANDS[int(stage[f"{name}_from"])]:
        case "register":
            return own[index].copy()
        case "constant":
            return np.full(lanes, int(stage["constant"]), np.uint32)
        case "counter":
            return np.full(lanes, it.counters[index], np.uint32)
        case _:
            return np.arange(lanes, dtype=np.uint32)


# ---- memory units -------------------------------------------------------------------------------------


def place(config: Config, addresses: ArrayLike, banks: int) -> tuple[Any, Any, Any]:
    """(valid, bank, index) of each address."""
    word = (np.asarray(addresses, np.int64) - int(config["low"])) % _ADDRESSES
    bits = banks.bit_length() - 1
    positions = [int(config[f"bank_bit{i}"]) for i in range(bits)]
    bank, index = np.zeros_like(word), word
    for i, position in reversed(list(enumerate(positions))):
        bank = bank + ((word >> position & 1) << i)
        index = (index >> position + 1 << position) + index % (1 << position)
    stripes = 1 << int(config["skew_bits"])
    row = word >> int(config["skew_shift"])
    bank = bank // stripes * stripes + (bank + row) % stripes
    return word < int(config["words"]), bank, index


def addresses(config: Config, side: str, lanes: int, sequence: ArrayLike | None = None) -> NDArray[np.int64]:
    """Addresses int64[iterations, lanes] of side "write" or "read"; `sequence` ids are those of packets written."""
    prefix = f"{side}_"
    rows = []
    for it in iterations(config, prefix):
        first = int(config[f"{prefix}base"])
        for n, counter in enumerate(it.counters):
            first += counter * int(config[f"{prefix}stride{n}"])
        rows.append([first + lane * int(config[f"{prefix}lane_stride"]) for lane in range(lanes)])
    out = np.array(rows, np.int64)
    if sequence is not None:
        out += np.asarray(sequence, np.int64)[:, None] * int(config["sequence_scale"])
    return out % _ADDRESSES


def pmu_write(config: Config, memory: Words, packets: Packets) -> None:
    """Write packets, one for each iteration of the write side, into memory uint32[banks, words]."""
    where = addresses(config, "write", packets.data.shape[1], packets.sequence)
    for row, data in zip(where, packets.data, strict=True):
        for address, word in zip(row, data, strict=True):
            valid, bank, index = place(config, address, len(memory))
            if valid:
                memory[bank, index] = word


def pmu_read(config: Config, memory: Words, lanes: int) -> Packets:
    """The packets that the read side gives for memory uint32[banks, words] at rest."""
    rows, last = [], []
    for row, it in zip(addresses(config, "read", lanes), iterations(config, "read_"), strict=True):
        valid, bank, index = place(config, row, len(memory))
        if valid.any():
            words = memory[np.where(valid, bank, 0), np.where(valid, index, 0)]
            rows.append(np.where(valid, words, 0).astype(np.uint32))
            last.append(it.last[int(config["last_level"])])
    return _packets(config, rows, last, lanes)


# ---- gates to off-chip memory -------------------------------------------------------------------------


def agcu_addresses(config: Config, args: Arguments, lanes: int) -> NDArray[np.int64]:
    """Byte address int64[iterations] of each iteration's first element.

    Raises ValueError for `words` outside 1..lanes, and where elements are not in one line of `lanes` words or not on
    multiples of their size.
    """
    words, size = int(config["words"]), rdu.ELEMENT_BYTES[int(config["format"])]
    if not 1 <= words <= lanes:
        raise ValueError(f"words must be in 1..{lanes}, not {words}")
    base = int(args[int(config["argument"])])
    strides = [int(config[f"stride{n}"]) for n in range(rdu.LEVELS)]
    out = np.array(
        [
            (base + sum(c * stride for c, stride in zip(it.counters, strides, strict=True))) % _BYTES
            for it in iterations(config)
        ],
        np.int64,
    )
    line = lanes * rdu.WORD_BITS // 8
    bad = (out % line + words * size > line) | (out % size != 0)
    if bad.any():
        first = int(out[bad.argmax()])
        raise ValueError(
            f"{words} elements of {size} bytes at address {first} are not in one line of {line} bytes, or not on "
            f"multiples of their size"
        )
    return out


def agcu_requests(config: Config, args: Arguments, lanes: int) -> NDArray[np.int64]:
    """The lines int64[requests] that an AGCU asks its channel for, in order.

    Consecutive iterations in one line share its request, but for a load's that takes tokens, and after a store's that
    gives some.
    """
    lines = agcu_addresses(config, args, lanes) // (lanes * rdu.WORD_BITS // 8)
    load = _DIRECTIONS[int(config["direction"])] == "load"
    out: list[int] = []
    alone = True
    for line, it in zip(lines.tolist(), iterations(config), strict=True):
        if load:
            alone = alone or (bool(config["wait"]) and it.first[int(config["wait_level"])])
        if alone or out[-1] != line:
            out.append(line)
        alone = not load and bool(config["signal"]) and it.last[int(config["signal_level"])]
    return np.array(out, np.int64)


def agcu_load(config: Config, args: Arguments, memory: NDArray[np.uint8], lanes: int) -> Packets:
    """The packets that an AGCU loads from the bytes of a memory at rest."""
    words = int(config["words"])
    size = rdu.ELEMENT_BYTES[int(config["format"])]
    rows, last = [], []
    for address, it in zip(agcu_addresses(config, args, lanes), iterations(config), strict=True):
        elements = memory[address : address + words * size].view("<u4" if size == 4 else "<u2")
        row = np.zeros(lanes, np.uint32)
        row[:words] = elements.astype(np.uint32) << np.uint32(rdu.WORD_BITS - 8 * size)
        rows.append(row)
        last.append(it.last[int(config["last_level"])])
    return _packets(config, rows, last, lanes)


def agcu_store(config: Config, args: Arguments, memory: NDArray[np.uint8], packets: Packets) -> None:
    """Store packets, one for each iteration, into the bytes of a memory."""
    words = int(config["words"])
    size = rdu.ELEMENT_BYTES[int(config["format"])]
    where = agcu_addresses(config, args, packets.data.shape[1])
    for address, row in zip(where, packets.data, strict=True):
        elements = row[:words] >> np.uint32(rdu.WORD_BITS - 8 * size)
        memory[address : address + words * size] = elements.astype("<u4" if size == 4 else "<u2").view(
            np.uint8
        )
