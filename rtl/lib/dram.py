"""When a DRAM channel may issue a command: the constraint table as ages and comparators."""

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.dram import DramParams, Scope

AGE_BITS = 16


class DramTiming(wiring.Component):
    """Says, in the same tick, which causes hold a command back.

    For every node of the channel (itself, its bank groups, its banks) and every command that some constraint
    counts from, a register holds the ticks since it last issued there, and where a constraint has a window
    also since the ones before. They saturate; all ones is "never". A constraint is met when its age has
    reached its latency. Latencies are inputs: which constraints exist is structure, their numbers are not.

    Parameters
    ----------
    params : DramParams
        The constraints; `row_latency` is not read.
    causes : int
        Number of causes.

    Members
    -------
    ========== === ======================= ==========================================================
    clear      In  1                       forget all history
    run        In  1                       time passes: ages grow, `issue` counts
    latency    In  array of rows, 16 bits  latency of each constraint row, at least 1
    command    In  range(n_commands)       the command asked about, and issued if `issue`
    bank       In  range(n_banks)          its bank, where it addresses one
    issue      In  1                       it issues in this tick
    blocked    Out causes                  the causes that hold it back in this tick
    ========== === ======================= ==========================================================
    """

    def __init__(self, *, params: DramParams, causes: int):
        self._params = params
        super().__init__(
            {
                "clear": In(1),
                "run": In(1),
                "latency": In(AGE_BITS).array(len(params.row_prev)),
                "command": In(range(params.n_commands)),
                "bank": In(range(max(params.n_banks, 2))),
                "issue": In(1),
                "blocked": Out(causes),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        never = (1 << AGE_BITS) - 1
        # The deepest window in use for each (scope, preceding command): registers that nothing reads are not built.
        depth = {}
        for scope, prev, window in zip(p.row_scope, p.row_prev, p.row_window, strict=True):
            key = int(scope), int(prev)
            depth[key] = max(depth.get(key, 0), int(window))
        instances = {Scope.CHANNEL: 1, Scope.BANKGROUP: p.n_bankgroups, Scope.BANK: p.n_banks}
        group = Signal(range(max(p.n_bankgroups, 2)))
        m.d.comb += group.eq(Array(b // p.banks_per_group for b in range(p.n_banks))[self.bank])
        address = {Scope.CHANNEL: 0, Scope.BANKGROUP: group, Scope.BANK: self.bank}

        age = {}  # (scope, prev, window) at the node that the command addresses
        for (scope, prev), windows in depth.items():
            histories = []
            for node in range(instances[scope]):
                history = [
                    Signal(AGE_BITS, init=never, name=f"age_{Scope(scope).name.lower()}{node}_{prev}_{w}")
                    for w in range(windows)
                ]
                hit = self.issue & (self.command == prev)
                if scope != Scope.CHANNEL:
                    hit = hit & (address[scope] == node)
                aged = [Mux(a == never, never, a + 1) for a in history]
                with m.If(self.clear):
                    m.d.sync += [a.eq(never) for a in history]
                with m.Elif(self.run & hit):
                    m.d.sync += [history[0].eq(1)] + [history[w].eq(aged[w - 1]) for w in range(1, windows)]
                with m.Elif(self.run):
                    m.d.sync += [a.eq(b) for a, b in zip(history, aged, strict=True)]
                histories.append(history)
            for w in range(windows):
                seen = Signal(AGE_BITS, name=f"seen_{Scope(scope).name.lower()}_{prev}_{w}")
                m.d.comb += seen.eq(Array(h[w] for h in histories)[address[scope]])
                age[scope, prev, w] = seen

        causes = [[] for _ in range(len(self.blocked))]
        for command in range(p.n_commands):
            asked = self.command == command
            for row in range(p.row_start[command], p.row_start[command + 1]):
                since = age[int(p.row_scope[row]), int(p.row_prev[row]), int(p.row_window[row]) - 1]
                causes[p.row_cause[row]].append(asked & (since < self.latency[row]))
        for bit, terms in zip(self.blocked, causes, strict=True):
            if terms:
                m.d.comb += bit.eq(_any(terms))
        return m


def _any(terms):
    out = terms[0]
    for t in terms[1:]:
        out = out | t
    return out
