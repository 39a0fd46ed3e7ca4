"""From configuration records to the nodes, links and queues that the kernels of `sim.rdu_engine` step.

Every way that packets can take is followed from its source. A link is a stretch between two switches, or between a
switch and a unit; with `fold` a stretch without any choice is one link: where all packets of a link go on by one
other, which takes none but these, and where each link by itself moves a packet a tick (its credits cover its
latencies there and back), the two are to their ends as one with the sums of their places and of their latencies.
The switch in between passes packet n on at the latest of its arrival, the tick after packet n - 1, and the return of
packet n - C's credit; of these the first link's credits cover the second, and the sums the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch.errors import UserError
from tilewright.sim import rdu_engine as e

LOCAL = len(arch.MESH)
STEP = ((0, -1), (1, 0), (0, 1), (-1, 0))
Tables = Mapping[tuple[int, int, int, int, int], tuple[int, int]]


@dataclass
class _Link:
    """A stretch; `sink` is a switch's input ("switch", network, x, y, port), or a unit's ("unit", unit, input)."""

    sink: tuple
    capacity: int
    forward: int
    backward: int
    source: str = ""
    hops: int = 1


@dataclass(frozen=True)
class Kernel:
    """What a kernel's execution runs on.

    `units` are the names of the chains' units and `tags` their tags. `routes` are for each source of packets
    (chain, link, network, links of its tree), `tiers` the memories of the AGCUs. For errors, `parties` gives for
    each link the units whose packets it takes and those that these are for, and `waits` are for each token queue its unit and the one that signals.
    `own` says whether no switch table but the given records' was looked up.
    """

    machine: e.Machine
    units: tuple[str, ...]
    tags: tuple[int, ...]
    routes: tuple[tuple[int, int, int, int], ...]
    tiers: tuple[int, ...]
    parties: Callable[[], tuple[list[list[str]], list[list[str]]]]
    waits: tuple[tuple[str, str], ...]
    own: bool
    bits: int


class _Builder:
    def __init__(
        self, p: arch.RduParams, records: Mapping[str, np.ndarray], tables: Tables, base: Mapping, fold
    ):
        self.p, self.tables, self.base, self.fold = p, tables, base, fold
        self.units: list[str] = []
        self.tags: list[int] = []
        self.chains: list[list[int]] = []
        self.nodes: list[tuple[int, int]] = []
        self.links: list[_Link] = []
        self.flows: list[dict[int, int]] = []  # of each: the next flow by the link that takes it
        self.flow_link: list[int] = []
        self.known: dict[tuple, int] = {}
        self.link_of: dict[tuple, int] = {}
        self.routes: list[list[int]] = []
        self.own = True
        self.records = {
            name: {f: rows[f].tolist() for f in rows.dtype.names} | {"n": len(rows)}
            for name, rows in records.items()
            if name.startswith("config.") and len(rows)
        }

    # ---- ways of packets --------------------------------------------------------------------------------

    def _link(self, key: tuple, sink: tuple, forward: int) -> int:
        if key not in self.link_of:
            self.link_of[key] = len(self.links)
            self.links.append(_Link(sink, self.p.fifo_depth, forward, self.p.credit))
        return self.link_of[key]

    def _behind(self, network: int, x: int, y: int, port: int) -> int:
        """The link behind an output of a switch."""
        p = self.p
        key = ("out", network, x, y, port)
        if key in self.link_of:
            return self.link_of[key]
        if port >= LOCAL:
            return self._link(
                key, ("unit", ("pcu" if arch.is_pcu(x, y) else "pmu", x, y), port - LOCAL), p.hop
            )
        dx, dy = STEP[port]
        nx, ny = x + dx, y + dy
        if 0 <= nx < p.columns and 0 <= ny < p.rows:
            border = dx and max(x, nx) % p.die_columns == 0
            sink = ("switch", network, nx, ny, arch.OPPOSITE[port])
            return self._link(key, sink, p.die_hop if border else p.hop)
        if network == 0 and dx and y < p.agcus_per_side:
            return self._link(key, ("unit", ("agcu", y + (dx > 0) * p.agcus_per_side), 0), p.hop)
        raise UserError(f"a packet leaves the mesh at switch {x},{y} by its {arch.MESH[port]} port")

    def _ways(self, network: int, x: int, y: int, port: int, flow: int) -> tuple[int, int]:
        """Outputs of a packet, as a mask, and its flow behind them."""
        p = self.p
        if flow & arch.DYNAMIC:
            tx = flow & (1 << arch.X_BITS) - 1
            ty = flow >> arch.X_BITS & (1 << arch.Y_BITS) - 1
            local = flow >> arch.X_BITS + arch.Y_BITS & (1 << arch.LOCAL_BITS) - 1
            along_x = 1 << (1 if tx > x else 3) if tx != x else 0
            along_y = 1 << (2 if ty > y else 0) if ty != y else 0
            order = (along_y, along_x) if p.y_first else (along_x, along_y)
            out = order[0] or order[1] or 1 << LOCAL + local
            return out, flow
        key = (network, x, y, port, flow)
        if key not in self.tables:
            self.own = False
        found = self.tables.get(key) or self.base.get(key)
        if not found or not found[0]:
            raise UserError(
                f"flow {flow:#x} leads nowhere from port {port} of the {arch.NETWORKS[network]} switch {x},{y}"
            )
        return found

    def _trace(self, link: int, flow: int) -> int:
        """The number of a flow on a link, all that follows being known."""
        start = (link, flow)
        if start in self.known:
            return self.known[start]
        stack = [start]
        while stack:
            at = stack.pop()
            if at in self.known:
                continue
            number = self.known[at] = len(self.flows)
            self.flows.append({})
            self.flow_link.append(at[0])
            sink = self.links[at[0]].sink
            if sink[0] == "switch":
                out, following = self._ways(*sink[1:], at[1])
                port = 0
                while out >> port:
                    if out >> port & 1:
                        self._check_port(sink, port)
                        behind = self._behind(*sink[1:4], port)
                        self.flows[number][behind] = following
                        stack.append((behind, following))
                    port += 1
        return self.known[start]

    def _check_port(self, sink: tuple, port: int) -> None:
        _, network, x, y, _ = sink
        p = self.p
        if port < LOCAL:
            return
        inputs = (p.vector_inputs, p.scalar_inputs)[network] if arch.is_pcu(x, y) else 1 - network
        if port - LOCAL >= inputs:
            raise UserError(
                f"a packet is for input {port - LOCAL} of the unit at {x},{y}, whose "
                f"{arch.NETWORKS[network]} inputs number {inputs}"
            )

    def _inject(
        self, node: int, chain: int, name: str, network: int, sink: tuple, flow: int
    ) -> tuple[int, int]:
        """Link and flow number of what a unit sends."""
        link = self._link(("in", network, name), sink, self.p.hop)
        self.links[link].source = name
        number = self._trace(link, flow)
        links, stack, seen = 0, [(link, flow)], set()
        while stack:
            at = stack.pop()
            if at in seen:
                raise UserError(f"{name}: flow {flow:#x} leads in a circle")
            seen.add(at)
            links += 1
            stack += self.flows[self.known[at]].items()
        self.routes.append([chain, link, network, links])
        self.sources[link] = node
        return link, number

    # ---- units ------------------------------------------------------------------------------------------

    def _chain(self, name: str, r: dict, i: int, levels: int, prefix: str = "", **more: int) -> int:
        """A new chain; `more`: running, base, mask, op_latency."""
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
        r = self.records.get("config.pcu", {"n": 0})
        for i in range(r["n"]):
            x, y, mode = r["x"][i], r["y"][i], r["mode"][i]
            name = f"pcu@{x},{y}"
            systolic = mode == arch.MODES.index("systolic")
            if systolic and not p.systolic:
                raise UserError(
                    f"{name}: mode systolic, but the machine has no systolic arrays (pcu.systolic)"
                )
            folds, tree = r["fold"][i] != 0, r["tree"][i] != 0
            function, gated = r["function"][i], r["gated"][i]
            if gated and (systolic or folds or tree):
                raise UserError(f"{name}: a gate goes with SIMD mode without fold and tree")
            slow = p.op_latency if folds and not systolic and p.op_latency > 1 else 0
            chain = self._chain(name, r, i, p.counters, running=int(mode != 0), interval=slow)
            row = [0] * e.PCU_ROW
            node = self.node_of["pcu", x, y] = self._node(e.PCU, len(self.pcu))
            row[e.UNIT], row[e.SYSTOLIC] = chain, int(systolic)
            tail = arch.tail_latency(p, function)
            row[e.LATENCY] = (
                arch.TAIL + tail if systolic else arch.simd_latency(p, folds, tree, function, gated)
            )
            row[e.FILL] = arch.systolic_fill(p) - 1
            row[e.COLUMNS] = p.stages
            row[e.FINAL] = r["fold_level"][i] if systolic or folds else 0
            for network, link, flow, sends, field in (
                (0, e.VECTOR, e.VECTOR_FLOW, "send_vector", "flow"),
                (1, e.SCALAR, e.SCALAR_FLOW, "send_scalar", "scalar_flow"),
            ):
                row[link] = -1
                if mode and r[sends][i]:
                    row[link], row[flow] = self._inject(
                        node, chain, name, network, ("switch", network, x, y, LOCAL), r[field][i]
                    )
            row[e.SEQUENCE], row[e.STEP] = r["sequence"][i], r["sequence_step"][i]
            row[e.FROZEN] = row[e.ARRAY_FROZEN] = -1
            row[e.RING : e.RING + 4] = self._ring(row[e.LATENCY] + 1)
            row[e.ARRAY : e.ARRAY + 4] = self._ring(row[e.FILL] + 1 if systolic else 1)
            self.pcu.append(row)
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
                self.inputs.append((row, e.INPUT + k, ("out", network, x, y, LOCAL + n)))

    def _pmus(self) -> None:
        p = self.p
        r = self.records.get("config.pmu", {"n": 0})
        bits = p.banks.bit_length() - 1
        offsets: dict[tuple, int] = {}
        mask = (1 << arch.ADDRESS_BITS) - 1
        for i in range(r["n"]):
            x, y, enable = r["x"][i], r["y"][i], r["enable"][i]
            name = f"{x},{y}"
            arch.check_pmu(p, {f: r[f][i] for f in r if f != "n"}, f"pmu@{name}: ")
            row = [0] * e.PMU_ROW
            node = self.node_of["pmu", x, y] = self._node(e.PMU, len(self.pmu))
            for side, kind in enumerate(("write", "read")):
                row[e.SIDE + side] = self._chain(
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
                        offsets[key] = sum(len(t) for t in self.table_parts)
                        table = np.zeros((1 << top, arch.BANK_BITS + 1), np.uint64)
                        e.fill_table(np.array(row, np.int64), row[e.LANE + side], bits, p.lanes, table)
                        self.table_parts.append(table)
                    row[e.TABLE + side] = offsets[key]
                row[e.ALWAYS + side] = self._always(row, side)
            row[e.GIVES] = -1
            if enable & 2:
                row[e.GIVES], row[e.GIVES_FLOW] = self._inject(
                    node, row[e.SIDE + 1], f"pmu.read@{name}", 0, ("switch", 0, x, y, LOCAL), r["flow"][i]
                )
            row[e.PMU_SEQUENCE], row[e.PMU_STEP] = r["sequence"][i], r["sequence_step"][i]
            row[e.PMU_FROZEN] = -1
            row[e.PMU_RING : e.PMU_RING + 4] = self._ring(4)
            self.pmu.append(row)
            self.inputs.append((row, e.FED, ("out", 0, x, y, LOCAL)))

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
        r = self.records.get("config.agcu", {"n": 0})
        line = p.lanes * arch.WORD_BITS // 8
        groups: dict[tuple[int, int], list[int]] = {}
        for i in sorted(range(r["n"]), key=lambda i: r["agcu"][i]):
            groups.setdefault((r["tier"][i], r["agcu"][i] % int(p.channels[r["tier"][i]])), []).append(i)
        for (tier, _), members in sorted(groups.items()):
            node = self._node(e.GROUP, len(self.group))
            group = [0] * e.GROUP_ROW
            group[e.FIRST_AGCU], group[e.AGCUS] = len(self.agcu), len(members)
            group[e.RATE_P], group[e.RATE_Q] = int(p.rate_p[tier]), int(p.rate_q[tier])
            self.group.append(group)
            for i in members:
                number = r["agcu"][i]
                name = f"agcu@{number}"
                side, y = divmod(number, p.agcus_per_side)
                port, x = (1, p.columns - 1) if side else (3, 0)
                self.node_of["agcu", number] = node
                size = arch.ELEMENT_BYTES[r["format"][i]]
                words, direction = r["words"][i], r["direction"][i]
                if direction and not p.tier_lines[tier]:
                    raise UserError(f"{name}: the machine has no memory {arch.TIERS[tier]}")
                if direction and not 1 <= words <= p.lanes:
                    raise UserError(f"{name}: words must be in 1..{p.lanes}, not {words}")
                row = [0] * e.AGCU_ROW
                row[e.AGCU] = self._chain(
                    name,
                    r,
                    i,
                    p.agcu_counters,
                    running=int(direction != 0),
                    base=args.get(r["argument"][i], 0) % line,
                    mask=(1 << arch.ARGS.by_name["value"].bits) - 1,
                )
                row[e.STORE] = int(direction == 2)
                row[e.PORT] = -1
                if direction == 1:
                    row[e.PORT], row[e.AGCU_FLOW] = self._inject(
                        node, row[e.AGCU], name, 0, ("switch", 0, x, y, port), r["flow"][i]
                    )
                elif direction == 2:
                    self.stores.append((row, e.PORT, ("out", 0, x, y, port)))
                row[e.AGCU_SEQUENCE], row[e.AGCU_STEP] = r["sequence"][i], r["sequence_step"][i]
                row[e.AHEAD] = int(p.latency[tier]) + arch.LOAD_LATENCY - 1
                row[e.AGCU_RING : e.AGCU_RING + 4] = self._ring(p.in_flight)
                row[e.MOST], row[e.LINE_SHIFT] = p.in_flight, line.bit_length() - 1
                row[e.USED], row[e.ALIGNED] = words * size, size
                self.agcu.append(row)
                self.tiers.append(tier)

    # ---- tokens -----------------------------------------------------------------------------------------

    def _place(self, x: int, y: int, agcu: int) -> tuple[str, list[int]]:
        """The unit that a control wire ends at, and its chains."""
        p = self.p
        if agcu:
            number = y + (p.agcus_per_side if x and x == p.columns - 1 else 0)
            name = f"agcu@{number}"
            return name, [self.chain_of[name]] if name in self.chain_of else []
        if arch.is_pcu(x, y):
            name = f"pcu@{x},{y}"
            return name, [self.chain_of[name]] if name in self.chain_of else []
        names = [f"pmu.{side}@{x},{y}" for side in ("write", "read")]
        return f"pmu@{x},{y}", [self.chain_of[n] for n in names if n in self.chain_of]

    def _tokens(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Queues (chain, tokens held, places), and wires (chain's output, queue, ticks) in order."""
        p = self.p
        self.chain_of = {name: i for i, name in enumerate(self.units)}
        source: dict[tuple[int, int], tuple[int, int]] = {}
        r = self.records.get("config.token", {"n": 0})
        for i in range(r["n"]):
            x, y, tx, ty = (r[f][i] for f in ("x", "y", "to_x", "to_y"))
            ticks = p.token * (abs(x - tx) + abs(y - ty) + 1)
            _, outs = self._place(x, y, r["from_agcu"][i])
            _, ins = self._place(tx, ty, r["to_agcu"][i])
            side, output = divmod(r["output"][i], arch.TOKENS)
            to_side, into = divmod(r["input"][i], arch.TOKENS)
            if side < len(outs) and to_side < len(ins):
                # An input has one source: the last record's.
                source[ins[to_side], into] = (outs[side] * arch.TOKENS + output, ticks)
        queues, wires = [], []
        self.waits = []
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

    # ---- links ------------------------------------------------------------------------------------------

    def _joined(self) -> list[int]:
        """For each link the one that stands for it; those that stand for several are changed."""
        follows: list[set[int]] = [set() for _ in self.links]
        leads: list[set[int]] = [set() for _ in self.links]
        for flow, link in enumerate(self.flow_link):
            follows[link] |= self.flows[flow].keys()
            for out in self.flows[flow]:
                leads[out].add(link)
        stands = list(range(len(self.links)))
        if not self.fold:
            return stands

        def free(link: int) -> bool:
            part = self.links[link]
            return part.capacity >= part.forward + part.backward

        alone = [len(f) == 1 and leads[next(iter(f))] == {k} for k, f in enumerate(follows)]
        joins = [
            alone[k] and free(k) and free(next(iter(f))) and next(iter(f)) != k for k, f in enumerate(follows)
        ]
        entered = {next(iter(follows[k])) for k in range(len(self.links)) if joins[k]}
        for k in range(len(self.links)):
            if k in entered or not joins[k]:
                continue
            head, at = self.links[k], k
            while joins[at]:
                at = next(iter(follows[at]))
                part = self.links[at]
                stands[at] = k
                head.sink = part.sink
                head.capacity += part.capacity
                head.forward += part.forward
                head.backward += part.backward
        return stands

    def build(self, args: Mapping[int, int]) -> Kernel:
        p = self.p
        self.holds: dict[tuple[int, int], int] = {}
        self.sources: dict[int, int] = {}
        self.node_of: dict[tuple, int] = {}
        self.inputs: list[tuple[list[int], int, tuple]] = []
        self.stores: list[tuple[list[int], int, tuple]] = []
        self.ring = 0
        self.pcu: list[list[int]] = []
        self.pmu: list[list[int]] = []
        self.agcu: list[list[int]] = []
        self.group: list[list[int]] = []
        self.tiers: list[int] = []
        self.table_parts: list[np.ndarray] = []
        self._pcus()
        self._pmus()
        self._agcus(args)
        queues, wires = self._tokens()
        for row, at, key in (*self.inputs, *self.stores):
            row[at] = (
                self.link_of[key] if key in self.link_of else self._link(key, ("unit", ("", 0), 0), p.hop)
            )
        self.link_ends = [_unit_name(link.sink) for link in self.links]
        stands = self._joined()

        # Links that remain, and switches: what shares an input or an output.
        kept = [k for k in range(len(self.links)) if stands[k] == k]
        number = {k: n for n, k in enumerate(kept)}
        into: dict[int, set[int]] = {}
        for flow, link in enumerate(self.flow_link):
            for out in self.flows[flow]:
                if stands[link] != stands[out]:
                    into.setdefault(stands[link], set()).add(stands[out])
        members: dict[int, tuple[list[int], list[int]]] = {}
        parent: dict[tuple[str, int], tuple[str, int]] = {}

        def root(a):
            while parent.setdefault(a, a) != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            return a

        for link, outs in into.items():
            for out in outs:
                parent[root(("o", out))] = root(("i", link))
        roots: dict[tuple[str, int], int] = {}
        for link in sorted(into):
            members.setdefault(roots.setdefault(root(("i", link)), len(roots)), ([], []))[0].append(link)
        for out in sorted({o for outs in into.values() for o in outs}):
            members[roots[root(("o", out))]][1].append(out)
        switches, ports = [], []
        local: dict[int, int] = {}
        sink_node = {}
        source_node = dict(self.sources)
        for s, (ins, outs) in sorted(members.items()):
            ins.sort(key=lambda link: self.links[link].sink[4])  # the switch's port decides who goes first
            node = self._node(e.SWITCH, s)
            switches.append([len(ports), len(ins), len(ports) + len(ins), len(outs)])
            ports += [number[k] for k in (*ins, *outs)]
            for n, out in enumerate(outs):
                local[out] = n
                source_node[out] = node
            for k in ins:
                sink_node[k] = node
        flow_out = np.zeros(max(len(self.flows), 1), np.int64)
        flow_next = np.zeros((max(len(self.flows), 1), 8), np.int64)

        def skip(flow: int) -> int:
            """The flow at the end of a joined link."""
            while self.flows[flow]:
                (out, *others) = self.flows[flow]
                if others or stands[out] != stands[self.flow_link[flow]]:
                    break
                flow = self.known[out, self.flows[flow][out]]
            return flow

        end = [skip(flow) for flow in range(len(self.flows))]
        for flow, outs in enumerate(self.flows):
            for out, following in outs.items():
                if stands[out] != stands[self.flow_link[flow]]:
                    flow_out[flow] |= 1 << local[stands[out]]
                    flow_next[flow, local[stands[out]]] = end[self.known[out, following]]
        nobody = self._node(e.SWITCH, len(switches))
        switches.append([0, 0, 0, 0])
        links = np.zeros((max(len(kept), 1), e.LINK), np.int64)
        slots = 0
        for n, k in enumerate(kept):
            part = self.links[k]
            row = links[n]
            row[e.BASE], row[e.CAPACITY] = slots, part.capacity
            row[e.FORWARD], row[e.BACKWARD] = part.forward, part.backward
            row[e.SOURCE] = source_node.get(k, nobody)
            row[e.SINK] = sink_node.get(k, nobody)
            if part.sink[0] == "unit":
                row[e.SINK] = self.node_of.get(part.sink[1], nobody)
            slots += part.capacity
        for rows, columns in (
            (self.pcu, ((e.VECTOR, e.VECTOR_FLOW), (e.SCALAR, e.SCALAR_FLOW))),
            (self.pmu, ((e.GIVES, e.GIVES_FLOW),)),
            (self.agcu, ((e.PORT, e.AGCU_FLOW),)),
        ):
            for row in rows:
                for link, flow in columns:
                    if row[link] >= 0:
                        row[link] = number[stands[row[link]]]
                        row[flow] = end[row[flow]] if end else 0
        for row, at, _ in self.inputs:
            row[at] = number[stands[row[at]]]
        return Kernel(
            self._machine(queues, wires, links, slots, switches, ports, flow_out, flow_next),
            tuple(self.units),
            tuple(self.tags),
            tuple((chain, number[k], network, hops) for chain, k, network, hops in self.routes),
            tuple(self.tiers),
            lambda: self._parties(kept, stands),
            tuple(self.waits),
            self.own,
            p.banks.bit_length() - 1,
        )

    def _parties(self, kept: list[int], stands: list[int]) -> tuple[list[list[str]], list[list[str]]]:
        """For each link the units whose packets it takes, and those that they are for, by name."""
        sources: list[set[str]] = [set() for _ in self.flows]
        ends: list[set[str]] = [set() for _ in self.flows]
        following = [[self.known[hop] for hop in hops.items()] for hops in self.flows]
        for _, link, _, _ in self.routes:
            left = [f for f, k in enumerate(self.flow_link) if k == link]
            order = []
            while left:
                flow = left.pop()
                sources[flow].add(self.links[link].source)
                order.append(flow)
                left += following[flow]
            for flow in reversed(order):
                sink = self.link_ends[self.flow_link[flow]]
                ends[flow] |= {sink} if sink else set[str]().union(*(ends[f] for f in following[flow]))
        give: dict[int, set[str]] = {k: set() for k in kept}
        take: dict[int, set[str]] = {k: set() for k in kept}
        for flow, link in enumerate(self.flow_link):
            give[stands[link]] |= sources[flow]
            take[stands[link]] |= ends[flow]
        return [sorted(give[k]) for k in kept], [sorted(take[k]) for k in kept]

    def _machine(self, queues, wires, links, slots, switches, ports, flow_out, flow_next) -> e.Machine:
        n_nodes = len(self.nodes)
        words = n_nodes + 63 >> 6
        queue = np.zeros((max(len(queues), 1), e.TOKEN_QUEUE), np.int64)
        chain_node = {}
        for kind, rows in ((e.PCU, self.pcu), (e.PMU, self.pmu)):
            for node, (k, i) in enumerate(self.nodes):
                if k == kind:
                    for column in (e.UNIT,) if kind == e.PCU else (e.SIDE, e.SIDE + 1):
                        chain_node[rows[i][column]] = node
        for node, (k, i) in enumerate(self.nodes):
            if k == e.GROUP:
                group = self.group[i]
                for a in range(group[e.FIRST_AGCU], group[e.FIRST_AGCU] + group[e.AGCUS]):
                    chain_node[self.agcu[a][e.AGCU]] = node
        size = 0
        for n, (chain, hold, length) in enumerate(queues):
            queue[n, e.BASE], queue[n, e.SIZE] = size, length
            queue[n, e.GIVEN], queue[n, e.WAITER] = hold, chain_node[chain]
            size += length
        outputs = len(self.chains) * arch.TOKENS
        wire = np.searchsorted([w[0] for w in wires], np.arange(outputs + 1)).astype(np.int64)
        clock = np.zeros(e.CLOCK, np.int64)
        clock[e.CREDIT], clock[e.LANES] = self.p.credit, self.p.lanes
        if any(row[e.SCALE] and self.chains[row[e.SIDE]][e.RUN] for row in self.pmu):
            clock[e.SEQUENCE_MASK] = (1 << arch.SEQUENCE_BITS) - 1
        wheel = np.zeros((e.WHEEL, max(words, 1)), np.uint64)
        when = np.full(n_nodes, e.NEVER, np.int64)
        for node, (kind, _) in enumerate(self.nodes):
            if kind != e.SWITCH:
                when[node] = 0
            else:
                when[node] = e.NEVER
                if node != n_nodes - 1:
                    when[node] = 0
            if when[node] == 0:
                wheel[0, node >> 6] |= np.uint64(1 << (node & 63))

        def table(rows: list, width: int) -> np.ndarray:
            return np.array(rows, np.int64).reshape(-1, width)

        return e.Machine(
            clock=clock,
            when=when,
            wheel=wheel,
            kind=np.array([k for k, _ in self.nodes], np.int64),
            index=np.array([i for _, i in self.nodes], np.int64),
            chain=table(self.chains, e.CHAIN),
            activity=np.zeros((len(self.chains), 1 + len(arch.CAUSES)), np.int64),
            link=links,
            slots=np.zeros(max(slots, 1), np.int64),
            items=np.zeros(max(slots, 1), np.int64),
            queue=queue,
            tokens=np.zeros(max(size, 1), np.int64),
            wire=wire,
            wire_queue=np.array([w[1] for w in wires], np.int64),
            wire_ticks=np.array([w[2] for w in wires], np.int64),
            pcu=table(self.pcu, e.PCU_ROW),
            pmu=table(self.pmu, e.PMU_ROW),
            agcu=table(self.agcu, e.AGCU_ROW),
            group=table(self.group, e.GROUP_ROW),
            switch=np.array(switches, np.int64),
            ports=np.array(ports, np.int64),
            flow_out=flow_out,
            flow_next=flow_next,
            ring=np.zeros(max(self.ring, 1), np.int64),
            planes=np.zeros((len(self.pmu), 2, arch.BANK_BITS + 1), np.uint64),
            tables=np.concatenate([np.zeros((0, arch.BANK_BITS + 1), np.uint64), *self.table_parts]),
        )


def _unit_name(sink: tuple) -> str:
    """The unit that a link ends at, "" for a switch."""
    if sink[0] == "switch":
        return ""
    kind, *place = sink[1]
    return f"{'pmu.write' if kind == 'pmu' else kind}@{','.join(map(str, place))}"


def build(
    p: arch.RduParams,
    records: Mapping[str, np.ndarray],
    args: Mapping[int, int],
    *,
    older: Tables | None = None,
    fold: bool = True,
) -> Kernel:
    """The kernel that a segment's records configure.

    `args` are argument registers; `older` are the entries (flow of a port of a switch) -> (outputs, next flow) that
    earlier segments left in the switches' tables. Raises UserError for what no machine could run, naming the unit.
    """
    return _Builder(p, records, switch_tables(records), older or {}, fold).build(args)


def switch_tables(records: Mapping[str, np.ndarray]) -> Tables:
    """Entries of switches: (network, x, y, port, flow) -> (outputs, next flow)."""
    rows = records.get("config.switch")
    if rows is None:
        return {}
    columns = [rows[f].tolist() for f in ("network", "x", "y", "port", "flow", "out", "next_flow")]
    return {
        key: (out, following) for *key_, out, following in zip(*columns, strict=True) for key in [tuple(key_)]
    }
