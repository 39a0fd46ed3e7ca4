"""From configuration records to the tables that the kernels of `sim.rdu_engine` step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Record
from tilewright.sim import rdu_state as e
from tilewright.sim.rdu_engine import fill_table
from tilewright.sim.rdu_ways import (
    EAST,
    LOCAL,
    SCALAR,
    VECTOR,
    WEST,
    Input,
    Net,
    Tables,
    Unit,
    Ways,
    switch_tables,
)

Columns = dict[str, list[int]]


@dataclass(frozen=True)
class Kernel:
    """What a kernel's execution runs on.

    `units` are the names of the chains' units and `tags` their tags. `work` are for each PCU the lane operations (of
    stages that do not just pass a word on, and of accumulation) and the multiply-accumulates of an iteration. `routes` are for each source of packets
    (chain, link, network, links of its tree), `tiers` the memories of the AGCUs. `waits` are for each token queue its
    unit and the one that signals. `own` says whether no switch table but the given records' was looked up.
    """

    machine: e.Machine
    bits: int  # of a bank's number
    units: tuple[str, ...]
    tags: tuple[int, ...]
    work: tuple[tuple[int, int], ...]
    routes: tuple[tuple[int, int, int, int], ...]
    tiers: tuple[int, ...]
    waits: tuple[tuple[str, str], ...]
    own: bool
    ways: Ways
    net: Net


class _Builder:
    """The rows of the machine's tables, unit by unit. Links and flows are those of `ways` until all are known."""

    def __init__(self, p: arch.RduParams, records: Mapping[str, np.ndarray], ways: Ways):
        self.p, self.records, self.ways = p, records, ways
        self.chains: list[list[int]] = []
        self.pcu: list[list[int]] = []
        self.pmu: list[list[int]] = []
        self.agcu: list[list[int]] = []
        self.group: list[list[int]] = []
        self.bank: list[list[int]] = []
        self.nodes: list[tuple[int, int]] = []  # kind, row
        self.node_of: dict[Unit, int] = {}
        self.chain_node: list[int] = []
        self.units: list[str] = []
        self.tags: list[int] = []
        self.tiers: list[int] = []
        self.work: list[tuple[int, int]] = []
        self.holds: dict[tuple[int, int], int] = {}  # tokens at the start, by chain and input
        self.waits: list[tuple[str, str]] = []
        self.chain_of: dict[str, int] = {}
        self.banks: list[np.ndarray] = []
        self.ring = 0
        # Where a row's columns take numbers of links, and of flows, once these are known.
        self.inputs: list[tuple[list[int], int, tuple[int, int, int, int]]] = []
        self.outputs: list[tuple[list[int], tuple[int, int]]] = []
        self.senders: list[tuple[int, int]] = []  # node and chain of each route

    def _rows(self, record: Record) -> tuple[Columns, list[int]]:
        """The columns of a region's records, and which of them hold: the last for its place."""
        rows = self.records.get(record.region)
        if rows is None:
            return {}, []
        columns: Columns = {f.name: rows[f.name].tolist() for f in record.layout}
        if record is arch.CONFIG_TOKEN:  # several for a place
            return columns, list(range(len(rows)))
        at = zip(*(columns[name] for name in record.at), strict=True)
        return columns, list({place: i for i, place in enumerate(at)}.values())

    def _send(
        self, node: int, chain: int, row: list[int], columns: tuple[int, int], at: Input, flow: int
    ) -> None:
        """A unit's output leads into a switch: link and flow go to these columns of its row."""
        row[columns[0]], row[columns[1]] = self.ways.send(self.units[chain], at, flow)
        self.outputs.append((row, columns))
        self.senders.append((node, chain))

    # ---- units ------------------------------------------------------------------------------------------

    def _chain(
        self, node: int, name: str, r: Columns, i: int, levels: int, prefix: str = "", **more: int
    ) -> int:
        """A new chain; `more` may be running, base and mask of addresses, and the least interval."""
        row = [0] * e.CHAIN
        counts = [max(r[f"{prefix}count{n}"][i], 1) if n < levels else 1 for n in range(arch.LEVELS)]
        lead = 0
        while lead < arch.LEVELS and counts[lead] == 1:
            lead += 1
        row[e.RUN] = more["running"]
        row[e.ZEROS] = arch.LEVELS + 2
        row[e.LEAD] = lead
        row[e.ENDS] = lead if lead < arch.LEVELS else arch.LEVELS + 2
        for field, at in (("wait", e.WAIT), ("wait_level", e.WAIT_LEVEL), ("signal", e.SIGNAL)):
            row[at] = r[prefix + field][i]
        row[e.SIGNAL_LEVEL] = r[prefix + "signal_level"][i]
        row[e.INTERVAL] = max(r[prefix + "interval"][i], more.get("interval", 0))
        mask = more.get("mask", 0)
        row[e.ORIGIN], row[e.MASK] = more.get("base", 0) & mask, mask
        row[e.CAUSE], row[e.FIRST] = len(arch.CAUSES), -1
        back = 0
        for n in range(arch.LEVELS):
            stride = r[f"{prefix}stride{n}"][i] if mask and n < levels else 0
            row[e.COUNT + n], row[e.STRIDE + n] = counts[n], stride & mask
            row[e.DELTA + n] = stride - back & mask
            back += (counts[n] - 1) * stride
            row[e.QUEUE + n if n < arch.TOKENS else e.QUEUE] = -1
        number = len(self.chains)
        self.chains.append(row)
        self.chain_node.append(node)
        self.units.append(name)
        self.tags.append(r["tag"][i])
        for n in range(arch.TOKENS):
            self.holds[number, n] = r[f"{prefix}hold{n}"][i]
        return number

    def _ring(self, length: int) -> list[int]:
        size = 1 << max(length, 1).bit_length()
        base, self.ring = self.ring, self.ring + size
        return [base, size - 1, 0, 0]

    def _node(self, kind: int, index: int) -> int:
        self.nodes.append((kind, index))
        return len(self.nodes) - 1

    def _pcus(self) -> None:
        p = self.p
        stages, which = self._rows(arch.CONFIG_STAGE)
        working: dict[tuple[int, int], int] = {}  # stages, by place
        for i in which:
            if stages["operation"][i] != arch.STAGE_OPS.index("pass"):
                at = stages["x"][i], stages["y"][i]
                working[at] = working.get(at, 0) + 1
        r, rows = self._rows(arch.CONFIG_PCU)
        for i in rows:
            x, y, mode = r["x"][i], r["y"][i], r["mode"][i]
            name = f"pcu@{x},{y}"
            systolic = mode == arch.MODES.index("systolic")
            if systolic and not p.systolic:
                raise UserError(
                    f"{name}: mode systolic, but the machine has no systolic arrays (pcu.systolic)"
                )
            folds, tree, gated = (bool(r[name][i]) for name in ("fold", "tree", "gated"))
            function = r["function"][i]
            if gated and (systolic or folds or tree):
                raise UserError(f"{name}: a gate goes with SIMD mode without fold and tree")
            slow = p.op_latency if folds and not systolic and p.op_latency > 1 else 0
            row = [0] * e.PCU_ROW
            node = self.node_of[Unit("pcu", x, y)] = self._node(e.PCU, len(self.pcu))
            chain = self._chain(node, name, r, i, p.counters, running=int(mode != 0), interval=slow)
            row[e.UNIT], row[e.SYSTOLIC] = chain, int(systolic)
            tail = arch.tail_latency(p, function)
            row[e.LATENCY] = (
                arch.TAIL + tail if systolic else arch.simd_latency(p, folds, tree, function, gated)
            )
            row[e.FILL] = arch.systolic_fill(p) - 1
            row[e.COLUMNS] = p.stages
            row[e.FINAL] = r["fold_level"][i] if systolic or folds else 0
            for network, link, flow, sends, field in (
                (VECTOR, e.VECTOR, e.VECTOR_FLOW, "send_vector", "flow"),
                (SCALAR, e.SCALAR, e.SCALAR_FLOW, "send_scalar", "scalar_flow"),
            ):
                row[link] = -1
                if mode and r[sends][i]:
                    self._send(node, chain, row, (link, flow), Input(network, x, y, LOCAL), r[field][i])
            row[e.SEQUENCE], row[e.STEP] = r["sequence"][i], r["sequence_step"][i]
            row[e.FROZEN] = row[e.ARRAY_FROZEN] = -1
            row[e.RING : e.RING + 4] = self._ring(row[e.LATENCY] + 1)
            row[e.ARRAY : e.ARRAY + 4] = self._ring(row[e.FILL] + 1 if systolic else 1)
            self.pcu.append(row)
            operations = p.lanes * (working.get((x, y), 0) + folds)
            self.work.append((0, p.lanes * p.stages) if systolic else (operations, 0))
            inputs = [
                (network, n, r[f"{kind}{n}_level"][i])
                for network, (kind, count) in enumerate(
                    (("vector", p.vector_inputs), ("scalar", p.scalar_inputs))
                )
                for n in range(count)
                if r[f"{kind}s"][i] >> n & 1
            ]
            row[e.INPUTS_USED] = len(inputs)
            for k, (network, n, level) in enumerate(inputs):
                row[e.INPUT_LEVEL + k] = level
                self.inputs.append((row, e.INPUT + k, (network, x, y, LOCAL + n)))

    def _pmus(self) -> None:
        p = self.p
        r, rows = self._rows(arch.CONFIG_PMU)
        bits = p.banks.bit_length() - 1
        offsets: dict[tuple, int] = {}
        depths: dict[tuple, int] = {}
        mask = (1 << arch.ADDRESS_BITS) - 1
        for i in rows:
            x, y, enable = r["x"][i], r["y"][i], r["enable"][i]
            name = f"{x},{y}"
            try:
                arch.check_pmu(p, {f: values[i] for f, values in r.items()}, f"pmu@{name}: ")
            except ValueError as error:
                raise UserError(str(error)) from None
            row = [0] * e.PMU_ROW
            node = self.node_of[Unit("pmu", x, y)] = self._node(e.PMU, len(self.pmu))
            for side, kind in enumerate(("write", "read")):
                row[e.SIDE + side] = self._chain(
                    node,
                    f"pmu.{kind}@{name}",
                    r,
                    i,
                    p.pmu_counters,
                    f"{kind}_",
                    running=enable >> side & 1,
                    base=r[f"{kind}_base"][i],
                    mask=mask,
                )
                row[e.LANE + side] = r[f"{kind}_lane_stride"][i]
            row[e.LOW], row[e.WORDS] = r["low"][i], r["words"][i]
            row[e.SCALE] = r["sequence_scale"][i]
            positions = [r[f"bank_bit{k}"][i] for k in range(bits)]
            row[e.SKEW_BITS], row[e.SKEW_SHIFT] = r["skew_bits"][i], r["skew_shift"][i]
            row[e.POSITION : e.POSITION + bits] = positions
            top = max(positions[-1] + 1, row[e.SKEW_SHIFT] + row[e.SKEW_BITS] if row[e.SKEW_BITS] else 0)
            row[e.TABLE_MASK] = (1 << top) - 1
            for side in range(2):
                key = (row[e.LANE + side], top, *row[e.SKEW_BITS : e.POSITION + bits])
                row[e.TABLE + side] = -1
                if top <= 12:  # larger ones would not pay
                    if key not in offsets:
                        offsets[key] = sum(len(t) for t in self.banks)
                        table = np.zeros((1 << top, arch.BANK_BITS + 1), np.uint64)
                        fill_table(np.array(row, np.int64), row[e.LANE + side], bits, p.lanes, table)
                        self.banks.append(table)
                        depths[key] = int(np.flatnonzero(np.any(table, axis=0)).max()) + 1
                    row[e.TABLE + side], row[e.TABLE_DEPTH + side] = offsets[key], depths[key]
                row[e.ALWAYS + side] = self._always(row, side)
            row[e.GIVES] = -1
            if enable & 2:
                at = Input(VECTOR, x, y, LOCAL)
                self._send(node, row[e.SIDE + 1], row, (e.GIVES, e.GIVES_FLOW), at, r["flow"][i])
            row[e.PMU_SEQUENCE], row[e.PMU_STEP] = r["sequence"][i], r["sequence_step"][i]
            row[e.PMU_FROZEN] = -1
            row[e.PMU_RING : e.PMU_RING + 4] = self._ring(4)
            self.pmu.append(row)
            if enable & 1:
                self.inputs.append((row, e.FED, (VECTOR, x, y, LOCAL)))

    def _always(self, row: list[int], side: int) -> int:
        """Whether a side's addresses are all within range, whatever the counters are."""
        if side == 0 and row[e.SCALE]:
            return 0
        half = 1 << arch.ADDRESS_BITS - 1
        chain = self.chains[row[e.SIDE + side]]
        low = high = chain[e.ORIGIN] - row[e.LOW]
        reach = [(chain[e.COUNT + n] - 1, chain[e.STRIDE + n]) for n in range(arch.LEVELS)]
        for times, stride in (*reach, (self.p.lanes - 1, row[e.LANE + side])):
            stride -= 2 * half if stride >= half else 0
            low, high = low + min(times * stride, 0), high + max(times * stride, 0)
        return int(low >= 0 and high < row[e.WORDS])

    def _agcus(self, args: Mapping[int, int]) -> None:
        p = self.p
        r, rows = self._rows(arch.CONFIG_AGCU)
        line = p.lanes * arch.WORD_BITS // 8
        groups: dict[tuple[int, int], list[int]] = {}
        for i in sorted(rows, key=lambda i: r["agcu"][i]):
            groups.setdefault((r["tier"][i], r["agcu"][i] % int(p.channels[r["tier"][i]])), []).append(i)
        for (tier, _), members in sorted(groups.items()):
            node = self._node(e.GROUP, len(self.group))
            group = [0] * e.GROUP_ROW
            group[e.FIRST_AGCU], group[e.AGCUS] = len(self.agcu), len(members)
            group[e.RATE_P], group[e.RATE_Q] = int(p.rate_p[tier]), int(p.rate_q[tier])
            group[e.TIER], group[e.FIRST_BANK] = tier, len(self.bank)
            dram = dict(zip(arch.DRAM, p.dram[tier].tolist(), strict=True))
            if dram["timed"]:
                group[e.LAST_GROUP], group[e.NEXT_REFRESH] = -1, dram["refi"]
                self.bank += [[-1, 0, 0]] * (1 << dram["group_bits"] + dram["bank_bits"])
            self.group.append(group)
            for i in members:
                number = r["agcu"][i]
                name = f"agcu@{number}"
                side, y = divmod(number, p.agcus_per_side)
                port, x = (EAST, p.columns - 1) if side else (WEST, 0)
                self.node_of[Unit("agcu east" if side else "agcu west", x, y)] = node
                size = arch.ELEMENT_BYTES[r["format"][i]]
                words, direction = r["words"][i], r["direction"][i]
                if direction and not p.tier_lines[tier]:
                    raise UserError(f"{name}: the machine has no memory {arch.TIERS[tier]}")
                if direction and not 1 <= words <= p.lanes:
                    raise UserError(f"{name}: words must be in 1..{p.lanes}, not {words}")
                row = [0] * e.AGCU_ROW
                row[e.AGCU] = self._chain(
                    node,
                    name,
                    r,
                    i,
                    p.agcu_counters,
                    running=int(direction != 0),
                    base=args.get(r["argument"][i], 0),
                    mask=(1 << arch.ARGS.by_name["value"].bits) - 1,
                )
                row[e.STORE] = int(direction == 2)
                row[e.PORT] = -1
                if direction == 1:
                    at = Input(VECTOR, x, y, port)
                    self._send(node, row[e.AGCU], row, (e.PORT, e.AGCU_FLOW), at, r["flow"][i])
                elif direction == 2:
                    self.inputs.append((row, e.PORT, (VECTOR, x, y, port)))
                row[e.AGCU_SEQUENCE], row[e.AGCU_STEP] = r["sequence"][i], r["sequence_step"][i]
                row[e.AHEAD] = int(p.latency[tier]) + arch.LOAD_LATENCY - 1
                row[e.AGCU_RING : e.AGCU_RING + 4] = self._ring(p.in_flight)
                row[e.MOST], row[e.LINE_SHIFT] = p.in_flight, line.bit_length() - 1
                row[e.USED], row[e.ALIGNED] = words * size, size
                self.agcu.append(row)
                self.tiers.append(tier)

    # ---- tokens -----------------------------------------------------------------------------------------

    def _place(self, x: int, y: int, agcu: int) -> list[int]:
        """The chains of the unit at which a control wire ends."""
        p = self.p
        if agcu:
            names = [f"agcu@{y + (p.agcus_per_side if x == p.columns - 1 else 0)}"]
        elif arch.is_pcu(x, y):
            names = [f"pcu@{x},{y}"]
        else:
            names = [f"pmu.{side}@{x},{y}" for side in ("write", "read")]
        return [self.chain_of[name] for name in names if name in self.chain_of]

    def _tokens(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Queues (chain, tokens held, places), and wires (chain's output, queue, ticks) in order."""
        p = self.p
        self.chain_of = {name: i for i, name in enumerate(self.units)}
        source: dict[tuple[int, int], tuple[int, int]] = {}
        r, rows = self._rows(arch.CONFIG_TOKEN)
        for i in rows:
            x, y, tx, ty = (r[f][i] for f in ("x", "y", "to_x", "to_y"))
            ticks = p.token * (abs(x - tx) + abs(y - ty) + 1)
            outs = self._place(x, y, r["from_agcu"][i])
            ins = self._place(tx, ty, r["to_agcu"][i])
            side, output = divmod(r["output"][i], arch.TOKENS)
            to_side, into = divmod(r["input"][i], arch.TOKENS)
            if side < len(outs) and to_side < len(ins):
                # An input has one source: the last record's.
                source[ins[to_side], into] = (outs[side] * arch.TOKENS + output, ticks)
        queues: list[tuple[int, int, int]] = []
        wires: list[tuple[int, int, int]] = []
        for (chain, n), hold in self.holds.items():
            wait = self.chains[chain][e.WAIT] >> n & 1
            if not wait and (chain, n) not in source:
                continue
            output, ticks = source.get((chain, n), (-1, 1))
            if output >= 0:
                wires.append((output, len(queues), ticks))
            self.chains[chain][e.QUEUE + n] = len(queues)
            queues.append((chain, hold, ticks + 2 * arch.TOKENS_HELD + 2))
            self.waits.append((self.units[chain], self.units[output // arch.TOKENS] if output >= 0 else ""))
        return queues, sorted(wires)

    # ---- the machine ------------------------------------------------------------------------------------

    def build(self, args: Mapping[int, int], fold: bool) -> Kernel:
        p, ways = self.p, self.ways
        self._pcus()
        self._pmus()
        self._agcus(args)
        queues, wires = self._tokens()
        for row, column, output in self.inputs:
            row[column] = ways.into(*output)
        net = ways.net(fold)
        for row, column, _ in self.inputs:
            row[column] = net.link[row[column]]
        for row, (link, flow) in self.outputs:
            row[link], row[flow] = net.link[row[link]], net.flow[row[flow]]
        links, switches, ports, flow_out, flow_next = self._switches(net)
        slots = int(links[:, e.CAPACITY].sum())
        queue = np.zeros((len(queues), e.TOKEN_QUEUE), np.int64)
        places = 0
        for n, (chain, hold, length) in enumerate(queues):
            queue[n, [e.BASE, e.SIZE, e.GIVEN]] = places, length, hold
            queue[n, e.WAITER] = self.chain_node[chain]
            places += length
        clock = np.zeros(e.CLOCK, np.int64)
        clock[e.CREDIT], clock[e.LANES] = p.credit, p.lanes
        if any(row[e.SCALE] and self.chains[row[e.SIDE]][e.RUN] for row in self.pmu):
            assert arch.SEQUENCE_BITS == 20  # what the kernels have as literals
            clock[e.SEQUENCE_MASK] = (1 << arch.SEQUENCE_BITS) - 1
        # All nodes are looked at in tick 0.
        n_nodes = len(self.nodes)
        wheel = np.zeros((e.WHEEL, (n_nodes + 63 >> 6) or 1), np.uint64)
        for node in range(n_nodes):
            wheel[0, node >> 6] |= np.uint64(1 << (node & 63))

        def table(rows: list[list[int]], width: int) -> np.ndarray:
            return np.array(rows, np.int64).reshape(-1, width)

        machine = e.Machine(
            clock=clock,
            when=np.zeros(n_nodes, np.int64),
            wheel=wheel,
            kind=np.array([k for k, _ in self.nodes], np.int64),
            place=np.array([i for _, i in self.nodes], np.int64),
            chain=table(self.chains, e.CHAIN),
            activity=np.zeros((len(self.chains), 1 + len(arch.CAUSES)), np.int64),
            link=links,
            slots=np.zeros(slots, np.int64),
            items=np.zeros(slots, np.int64),
            queue=queue,
            tokens=np.zeros(places, np.int64),
            wire=np.searchsorted([w[0] for w in wires], np.arange(len(self.chains) * arch.TOKENS + 1)).astype(
                np.int64
            ),
            wire_queue=np.array([w[1] for w in wires], np.int64),
            wire_ticks=np.array([w[2] for w in wires], np.int64),
            pcu=table(self.pcu, e.PCU_ROW),
            pmu=table(self.pmu, e.PMU_ROW),
            agcu=table(self.agcu, e.AGCU_ROW),
            group=table(self.group, e.GROUP_ROW),
            bank=table(self.bank, e.BANK_ROW),
            dram=np.array(p.dram, np.int64),
            switch=table(switches, 4),
            ports=np.array(ports, np.int64),
            flow_out=flow_out,
            flow_next=flow_next,
            ring=np.zeros(self.ring, np.int64),
            planes=np.zeros((len(self.pmu), 2, arch.BANK_BITS + 1), np.uint64),
            tables=np.concatenate([np.zeros((0, arch.BANK_BITS + 1), np.uint64), *self.banks]),
        )
        return Kernel(
            machine,
            p.banks.bit_length() - 1,
            tuple(self.units),
            tuple(self.tags),
            tuple(self.work),
            tuple(
                (chain, net.link[route.link], route.network, route.links)
                for (_, chain), route in zip(self.senders, ways.routes, strict=True)
            ),
            tuple(self.tiers),
            tuple(self.waits),
            ways.own,
            ways,
            net,
        )

    def _switches(self, net: Net) -> tuple[np.ndarray, list[list[int]], list[int], np.ndarray, np.ndarray]:
        """Links, switches, their ports, and each flow's outputs and flows behind them."""
        links = np.zeros((len(net.links), e.LINK), np.int64)
        slots = 0
        for row, link in zip(links, net.links, strict=True):
            row[e.BASE], row[e.CAPACITY] = slots, link.capacity
            row[e.FORWARD], row[e.BACKWARD] = link.forward, link.backward
            if isinstance(link.end, Unit):
                row[e.SINK] = self.node_of.get(link.end, 0)  # nobody ever waits at a unit that isn't there
            slots += link.capacity
        for (node, _), route in zip(self.senders, self.ways.routes, strict=True):
            links[net.link[route.link], e.SOURCE] = node
        switches: list[list[int]] = []
        ports: list[int] = []
        local: dict[int, int] = {}
        for ins, outs in net.ports:
            node = self._node(e.SWITCH, len(switches))
            switches.append([len(ports), len(ins), len(ports) + len(ins), len(outs)])
            ports += [*ins, *outs]
            links[ins, e.SINK] = node
            links[outs, e.SOURCE] = node
            local |= {out: n for n, out in enumerate(outs)}
        flow_out = np.zeros(len(net.outs), np.int64)
        flow_next = np.zeros((len(net.outs), len(arch.MESH) + arch.INPUTS), np.int64)
        for flow, hops in enumerate(net.outs):
            for out, following in hops.items():
                flow_out[flow] |= 1 << local[out]
                flow_next[flow, local[out]] = following
        return links, switches, ports, flow_out, flow_next


def build(
    p: arch.RduParams,
    records: Mapping[str, np.ndarray],
    args: Mapping[int, int],
    *,
    older: Tables | None = None,
    fold: bool = True,
) -> Kernel:
    """The kernel that a segment's records configure.

    `args` are argument registers; `older` are the entries (network, x, y, port, flow) -> (outputs, next flow) that
    earlier segments left in the switches. Raises UserError for what no machine could run, naming the unit.
    """
    ways = Ways(p, switch_tables(records), older or {})
    return _Builder(p, records, ways).build(args, fold)
