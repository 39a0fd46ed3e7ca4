"""Programmable wires for control tokens."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import CONFIG_TOKEN, TOKENS, RduParams, is_pcu
from tilewright.rtl.layouts import layout_of

__all__ = ["TokenNetwork", "agcu_place"]

OUTPUTS = 2 * TOKENS  # numbers of a PMU's: those of the read side follow its write side's


def agcu_place(params: RduParams, i: int) -> tuple[int, int]:
    """Column and row of the switch at which AGCU i hangs: those of the west side first, each side from the north."""
    side, y = divmod(i, params.agcus_per_side)
    return side * (params.columns - 1), y


class TokenNetwork(wiring.Component):
    """Wires from token outputs to token inputs, circuit-switched: each input has one source, or none.

    A token of output (x, y, n) at tick t is at an input of (to_x, to_y) at tick t + token * (|to_x - x| + |to_y - y|
    + 1), and so is one a tick. An input that is wired anew at tick t takes what comes out from t + 1 on. Tokens on
    their way at ``start`` are lost. One output may be wired to several inputs.

    Parameters
    ----------
    params : RduParams

    Members
    -------
    ============ === ======================= ================================================================
    start        In  1                       a run begins
    clear        In  1                       cut all wires
    enable       In  1                       lay the wire of `config`, in place of another to the same input
    config       In  layout_of(CONFIG_TOKEN) one record
    from_x_y     In  4, PMU: 8               token outputs of the unit at (x, y): `signal`; of a PMU `write_signal`,
                                             above it `read_signal`
    to_x_y       Out 4, PMU: 8               likewise its token inputs
    from_agcu_i  In  4                       token outputs of AGCU i
    to_agcu_i    Out 4                       its token inputs
    ============ === ======================= ================================================================
    """

    def __init__(self, *, params: RduParams):
        p = self._params = params
        self._units = {
            (x, y): TOKENS if is_pcu(x, y) else 2 * TOKENS for y in range(p.rows) for x in range(p.columns)
        }
        agcus = range(2 * p.agcus_per_side)
        members = {}
        for direction, flow in (("from", In), ("to", Out)):
            members |= {f"{direction}_{x}_{y}": flow(n) for (x, y), n in self._units.items()}
            members |= {f"{direction}_agcu_{i}": flow(TOKENS) for i in agcus}
        super().__init__(
            {
                "start": In(1),
                "clear": In(1),
                "enable": In(1),
                "config": In(layout_of(CONFIG_TOKEN)),
                **members,
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, c = self._params, self.config
        # Outputs by number: agcu flag, row, column, output; places without any are never named.
        ends = {(0, *at): f"{at[0]}_{at[1]}" for at in self._units}
        ends |= {(1, *agcu_place(p, i)): f"agcu_{i}" for i in range(2 * p.agcus_per_side)}
        outputs = []
        for agcu in range(2):
            for y in range(p.rows):
                for x in range(p.columns):
                    name = ends.get((agcu, x, y))
                    port = getattr(self, f"from_{name}") if name else Const(0, OUTPUTS)
                    outputs.append(Cat(port, Const(0, OUTPUTS - len(port))))
        sources = Signal(OUTPUTS * len(outputs))
        source = Signal(range(len(sources)))
        longest = p.token * (p.columns + p.rows - 1)
        ticks = Signal(range(longest + 1))
        dx, dy = Signal(len(c.x)), Signal(len(c.y))
        m.d.comb += [
            sources.eq(Cat(*outputs)),
            source.eq(((c.from_agcu * p.rows + c.y) * p.columns + c.x) * OUTPUTS + c.output),
            dx.eq(Mux(c.x < c.to_x, c.to_x - c.x, c.x - c.to_x)),
            dy.eq(Mux(c.y < c.to_y, c.to_y - c.y, c.y - c.to_y)),
            ticks.eq(p.token * (dx + dy + 1)),
        ]
        for (agcu, x, y), name in ends.items():
            chosen = Signal(name=f"chosen_{name}")
            m.d.comb += chosen.eq(self.enable & (c.to_agcu == agcu) & (c.to_x == x) & (c.to_y == y))
            port = getattr(self, f"to_{name}")
            for i in range(len(port)):
                wired = Signal(name=f"wired_{name}_{i}")
                wire = Signal.like(source, name=f"wire_{name}_{i}")
                last = Signal(bits_for(longest - 1), name=f"last_{name}_{i}")  # ticks but one
                way = Signal(longest, name=f"way_{name}_{i}")  # bit n is at the input n ticks from now
                token = Signal(name=f"token_{name}_{i}")
                m.d.comb += [token.eq(wired & sources.bit_select(wire, 1)), port[i].eq(way[0] & ~self.start)]
                with m.If(self.clear):
                    m.d.sync += wired.eq(0)
                with m.Elif(chosen & (c.input == i)):
                    m.d.sync += [wired.eq(1), wire.eq(source), last.eq(ticks - 1)]
                m.d.sync += way.eq(Mux(self.start, 0, (way >> 1) | (token << last)))
        return m
