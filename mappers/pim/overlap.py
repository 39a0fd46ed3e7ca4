"""Lets channels and ASIC work at the same time where instructions do not depend on one another.

Both share nothing but the SRAM, so the columns that an instruction reads and writes decide. They are bounded by
one interval for each operand; a field that moves from step to step counts with its largest value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilewright.arch.pim import N_CHANNEL_OPS, OP, OPS, PimParams
from tilewright.mappers.pim.layout import ceil_div


@dataclass(frozen=True)
class Use:
    """The unit of an instruction, and the SRAM columns that it may touch."""

    asic: bool
    reads: tuple[range, ...]
    writes: tuple[range, ...]

    def conflicts(self, other: "Use") -> bool:
        """One of both writes a column that the other reads or writes."""
        return any(
            a.start < b.stop and b.start < a.stop
            for mine, theirs in (
                (self.writes, other.reads), (self.writes, other.writes), (self.reads, other.writes),
            )
            for a in mine
            for b in theirs
        )  # fmt: skip


def sram_use(p: PimParams, op: str, fields: Mapping[str, int]) -> Use:
    """What an instruction with these fields touches."""
    asic = OP[op] >= N_CHANNEL_OPS
    repeats = fields.get("outs", 1) - 1
    if asic:
        columns, reach = ceil_div(fields["n"], p.lanes), 0
    else:
        columns = {
            "MAC_AB": 0, "GEMV": p.bursts, "RD_MAC": p.bursts, "WR_EL": (repeats + 1) * p.bursts
        }.get(op, fields.get("cols", 1))  # fmt: skip
        reach = (fields["channels"].bit_length() - 1) * fields.get("stride", 0)

    def interval(name: str) -> range:
        repeated = op in ("GEMV", "SOFTMAX", "ROPE") and name in ("src", "dst")
        start = fields.get(name, 0)
        return range(start, start + columns + reach + repeated * repeats * fields.get("pitch", 0))

    operands = OPS[OP[op]].fields
    return Use(
        asic,
        tuple(interval(name) for name in ("src", "src2", "src3") if name in operands),
        (interval("dst"),) if "dst" in operands else (),
    )


def schedule(uses: Sequence[Use]) -> list[tuple[int, bool]]:
    """An order of instructions for overlap, as their indices, and whether each may execute alongside others.

    The order within a unit stays. An instruction of the channels moves up past those of the ASIC that it does
    not depend on, but for the first behind the channel instruction before it: that one is dispatched at once.

    An instruction may be alongside unless it depends on the latest one of the other unit: those before it have
    completed. The first waits, as it does not know what came before.
    """
    order: list[int] = []
    for i, use in enumerate(uses):
        at = i
        while not use.asic and at > 1 and all(uses[j].asic for j in order[at - 2 : at]):
            if use.conflicts(uses[order[at - 1]]):
                break
            at -= 1
        order.insert(at, i)
    out: list[tuple[int, bool]] = []
    under_way: dict[bool, Use] = {}
    for i in order:
        other = under_way.get(not uses[i].asic)
        alongside = bool(out) and (other is None or not uses[i].conflicts(other))
        if not alongside:
            under_way.clear()
        under_way[uses[i].asic] = uses[i]
        out.append((i, alongside))
    return out
