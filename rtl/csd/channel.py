"""A flash channel in time: which command or page its bus carries, and what its dies do meanwhile."""

from amaranth.hdl import Array, Assert, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.flash import DATA_OUT, ERASE, KINDS, PROGRAM, READ, FlashParams

__all__ = ["TIME_BITS", "FlashChannel", "address_layout", "any_of", "pick", "timing_layout"]

TIME_BITS = 24  # of a flash time in ticks; see arch.csd.MAX_TICKS
IDLE, BUSY, HOLD = range(3)


def any_of(terms):
    """Whether one of the terms holds; 0 for none."""
    return Cat(*terms).any() if terms else Const(0)


def pick(selection, values):
    """The value whose bit of the one-hot `selection` is set; 0 for none."""
    out = 0
    for bit, value in zip(selection, values, strict=True):
        out = out | Mux(bit, value, 0)
    return out


def address_layout(p: FlashParams) -> data.StructLayout:
    """Where an operation works within a channel."""
    sizes = {"chip": p.chips, "die": p.dies, "plane": p.planes, "block": p.blocks, "page": p.pages}
    return data.StructLayout({name: bits_for(size - 1) for name, size in sizes.items()})


def timing_layout() -> data.StructLayout:
    """Times in ticks: commands of a kind for one plane, and more for each further one; a page's data in or out;
    reads and programs by type of page (LSB, CSB, MSB)."""
    three = data.ArrayLayout(TIME_BITS, 3)
    return data.StructLayout(
        {
            "command": three,
            "command_plane": three,
            "page_transfer": TIME_BITS,
            "read": three,
            "program": three,
            "erase": TIME_BITS,
        }
    )


class FlashChannel(wiring.Component):
    """Schedules reads, programs and erases of one channel exactly as `sim.flash` does, suspension apart.

    It knows operations in slots, all of which are within the window. What is pushed at tick t has arrived at t + 1. In a
    tick the bus ends first, then arrays by unit, then the bus is given what the policy says: `sim.flash` has the rules.
    Cells are not here: an operation is its address and a tag.

    Parameters
    ----------
    params : FlashParams
        Structure and policy; times are inputs. Without suspension.
    types : tuple of int
        The type of each page of a block: 0, 1 or 2 for LSB, CSB, MSB.
    slots : int
        Operations that it holds.
    tag : int
        Bits of a tag.

    Members
    -------
    ============== === ============= =================================================================
    clear          In  1             forget everything
    anew           In  1             the first unit comes first
    times          In  timing_layout
    push           In  1             an operation; only while `ready`
    kind           In  2             `arch.flash.READ`, `PROGRAM` or `ERASE`
    address        In  layout        page 0 for an erase
    tag            In  tag
    ready          Out 1             there is a free slot
    slot           Out slots         the one that a pushed operation gets, one-hot
    held           Out slots         operations that are not finished
    finished       Out slots         operations that are done with this tick, one-hot for reads
    read_valid     Out 1             a page has been read: its last byte was on the bus in the tick before
    read_address   Out layout
    read_tag       Out tag
    bus            Out 1             the bus moves something in this tick
    command        Out 1             a command is given to a unit
    command_kind   Out 2
    command_planes Out               of how many operations it is made
    ============== === ============= =================================================================
    """

    def __init__(self, *, params: FlashParams, types, slots: int, tag: int):
        assert (params.suspend < 0).all() and len(types) == params.pages, params
        self._params, self._types, self._slots = params, tuple(types), slots
        self._address = address_layout(params)
        super().__init__(
            {
                "clear": In(1),
                "anew": In(1),
                "times": In(timing_layout()),
                "push": In(1),
                "kind": In(2),
                "address": In(self._address),
                "tag": In(tag),
                "ready": Out(1),
                "slot": Out(slots),
                "held": Out(slots),
                "finished": Out(slots),
                "read_valid": Out(1),
                "read_address": Out(self._address),
                "read_tag": Out(tag),
                "bus": Out(1),
                "command": Out(1),
                "command_kind": Out(2),
                "command_planes": Out(range(params.planes + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, n = self._params, self._slots
        units, cached = range(p.units), int(p.cache_read)

        # What slots hold. `older` [i]: slots that were pushed before slot i; `needs` [i]: those that it waits for.
        kind = [Signal(2, name=f"kind_{i}") for i in range(n)]
        unit = [Signal(range(max(p.units, 2)), name=f"unit_{i}") for i in range(n)]
        address = [Signal(self._address, name=f"address_{i}") for i in range(n)]
        tags = [Signal.like(self.tag, name=f"tag_{i}") for i in range(n)]
        older = [Signal(n, name=f"older_{i}") for i in range(n)]
        needs = [Signal(n, name=f"needs_{i}") for i in range(n)]
        waiting = Signal(n)

        def oldest(candidates, name):
            """One-hot: the candidate that none is older than."""
            chosen = Signal(n, name=name)
            m.d.comb += [chosen[i].eq(candidates[i] & ~(older[i] & candidates).any()) for i in range(n)]
            return chosen

        # What units do: the slots of the array's command, and of the pages that wait for the bus or are on it.
        state = [Signal(2, name=f"state_{u}") for u in units]
        doing = [Signal(2, name=f"doing_{u}") for u in units]
        left = [Signal(TIME_BITS + 2, name=f"left_{u}") for u in units]
        group = [Signal(n, name=f"group_{u}") for u in units]
        out = [Signal(n, name=f"out_{u}") for u in units]
        before = [Signal(p.units, name=f"before_{u}") for u in units]  # units whose pages go out before

        # 1. The bus ends.
        bus_left = Signal(TIME_BITS + 6)
        moves, move_unit = Signal(n), Signal(p.units)  # the page on the bus; 0 for a command
        carries, ends = Signal(), Signal()
        m.d.comb += [
            ends.eq(carries & (bus_left == 0)),
            self.read_valid.eq(ends & moves.any()),
            self.read_address.eq(pick(moves, [a.as_value() for a in address])),
            self.read_tag.eq(pick(moves, tags)),
        ]
        rests, out_1, state_1, joins_1 = [], [], [], []
        for u in units:
            rest, emptied, joins = (
                Signal(n, name=f"rest_{u}"),
                Signal(name=f"emptied_{u}"),
                Signal(name=f"moved_{u}"),
            )
            m.d.comb += [
                rest.eq(Mux(ends, out[u] & ~moves, out[u])),
                emptied.eq(self.read_valid & move_unit[u] & ~rest.any() & (state[u] == HOLD)),
                joins.eq(emptied & cached),
            ]
            rests.append(rest)
            out_1.append(Mux(joins, group[u], rest))
            state_1.append(Mux(emptied, IDLE, state[u]))
            joins_1.append(joins)

        # 2. Arrays end.
        out_2, state_2, joins_2, finishes = [], [], [], []
        for u in units:
            end, free = Signal(name=f"end_{u}"), Signal(name=f"free_{u}")
            pages, after = Signal(n, name=f"pages_{u}"), Signal(2, name=f"after_{u}")
            m.d.comb += [
                end.eq((state[u] == BUSY) & (left[u] == 0)),
                free.eq(~out_1[u].any()),
                pages.eq(Mux(end & (doing[u] == READ) & free, group[u], out_1[u])),
                after.eq(Mux(end, Mux((doing[u] == READ) & ~(free & cached), HOLD, IDLE), state_1[u])),
            ]
            out_2.append(pages)
            state_2.append(after)
            joins_2.append(end & (doing[u] == READ) & free)
            finishes.append(Mux(end & (doing[u] != READ), group[u], 0))
        finished = 0
        for mask in finishes:
            finished = finished | mask
        m.d.comb += self.finished.eq(Mux(self.read_valid, moves, 0) | finished)

        # Whose pages go first: those whose bus ended join before those whose array did, these by unit.
        before_2 = []
        for v in units:
            earlier = Cat(
                rests[u].any() | (joins_2[v] & (joins_1[u] | joins_2[u] if u < v else joins_1[u]))
                for u in units
            )
            # Who joins anew is behind all others.
            stay = Cat(rests[u].any() & ~joins_2[u] for u in units)
            value = Signal(p.units, name=f"before_now_{v}")
            m.d.comb += value.eq(Mux(joins_1[v] | joins_2[v], earlier, before[v] & stay))
            before_2.append(value)

        # 3. What is ready.
        ready = Signal(n)
        m.d.comb += [ready[i].eq(waiting[i] & ~(needs[i] & ~self.finished).any()) for i in range(n)]

        # 4. The bus is given what the first stage of the policy that has work has.
        free = Signal()
        m.d.comb += free.eq(~carries | ends)
        queued = Cat(pages.any() for pages in out_2)
        can = {
            (u, k): Signal(name=f"can_{u}_{KINDS[k]}") for u in units for k in (READ, PROGRAM, ERASE)
        }  # fmt: skip
        mine = {(u, k): Cat(ready[i] & (unit[i] == u) & (kind[i] == k) for i in range(n)) for u, k in can}
        for (u, k), able in can.items():
            takes = state_2[u] == IDLE
            if k != READ:
                takes = takes & ~out_2[u].any()
            m.d.comb += able.eq(takes & mine[u, k].any())
        turn = Signal(p.units, init=(1 << p.units) - 1)  # units from the one after the last that was served
        data_out = Signal()
        commands = Signal(p.units)  # the unit that is given a command, one-hot
        command_kind = Signal(2)
        found = ~free
        for number, stage in enumerate(p.stages.tolist()):
            has = Signal(name=f"has_{number}")
            if stage[0] == DATA_OUT:
                m.d.comb += has.eq(~found & queued.any())
                with m.If(has):
                    m.d.comb += data_out.eq(1)
            else:
                kinds = [k for k in stage if k >= 0]
                asked = Signal(p.units, name=f"asked_{number}")
                ahead, chosen = (
                    Signal(p.units, name=f"ahead_{number}"),
                    Signal(p.units, name=f"chosen_{number}"),
                )
                m.d.comb += [
                    asked.eq(Cat(any_of([can[u, k] for k in kinds]) for u in units)),
                    ahead.eq(Mux((asked & turn).any(), asked & turn, asked)),
                    chosen.eq(ahead & -ahead),
                    has.eq(~found & asked.any()),
                ]
                with m.If(has):
                    m.d.comb += commands.eq(chosen)
                    for k in reversed(kinds):
                        with m.If(any_of([chosen[u] & can[u, k] for u in units])):
                            m.d.comb += command_kind.eq(k)
            found = found | has

        # A page goes out: that of the unit that is first, the oldest of its command.
        first = Cat(queued[u] & ~(before_2[u] & queued).any() for u in units)
        page = oldest(pick(first, out_2), "page")

        # A command: the oldest ready operation, and for each other plane the oldest that may join it.
        asked = Signal(n)
        m.d.comb += asked.eq(
            pick(commands, [pick(Cat(command_kind == k for k in (READ, PROGRAM, ERASE)), [mine[u, k] for k in (READ, PROGRAM, ERASE)]) for u in units])
        )  # fmt: skip
        leader = oldest(asked, "leader")
        lead = Signal(self._address)
        m.d.comb += lead.eq(pick(leader, [a.as_value() for a in address]))
        chosen = leader
        if p.multi_plane and p.planes > 1:
            same = Cat(
                asked[i]
                & ((address[i].die == lead.die) if p.unit_dies > 1 else Const(1))
                & ((address[i].page == lead.page) if p.same_page else Const(1))
                for i in range(n)
            )
            for plane in range(p.planes):
                others = Cat(same[i] & (address[i].plane == plane) & (lead.plane != plane) for i in range(n))
                chosen = chosen | oldest(others, f"joins_{plane}")
        members = Signal(n)
        m.d.comb += members.eq(chosen)
        planes = sum(members[i] for i in range(n))
        types = Array(Const(t, 2) for t in self._types)
        longest = Signal(TIME_BITS)
        work = 0
        for i in range(n):
            cells = Mux(
                kind[i] == READ,
                self.times.read[types[address[i].page]],
                self.times.program[types[address[i].page]],
            )
            own = Signal(TIME_BITS, name=f"work_{i}")
            m.d.comb += own.eq(Mux(members[i], Mux(kind[i] == ERASE, self.times.erase, cells), 0))
            work = Mux(own > work, own, work) if i else own
        move = Signal(TIME_BITS + 6)
        m.d.comb += [
            longest.eq(work),
            self.bus.eq(self.command | data_out | (carries & ~ends)),
            self.command.eq(commands.any()),
            self.command_kind.eq(command_kind),
            self.command_planes.eq(Mux(self.command, planes, 0)),
            move.eq(
                self.times.command[command_kind]
                + sum(
                    Mux(
                        self.command_planes >= k,
                        (self.times.command_plane[command_kind] if k > 1 else 0)
                        + Mux(command_kind == PROGRAM, self.times.page_transfer, 0),
                        0,
                    )
                    for k in range(1, p.planes + 1)
                )
            ),
        ]

        # The next tick.
        m.d.sync += [
            carries.eq(self.bus),
            bus_left.eq(
                Mux(self.command, move - 1, Mux(data_out, self.times.page_transfer - 1, bus_left - 1))
            ),
            moves.eq(Mux(data_out, page, Mux(free, 0, moves))),
        ]
        with m.If(data_out):
            m.d.sync += move_unit.eq(first)
        for u in units:
            m.d.sync += [
                out[u].eq(out_2[u]),
                state[u].eq(state_2[u]),
                left[u].eq(left[u] - 1),
                before[u].eq(before_2[u]),
            ]
            with m.If(commands[u]):
                m.d.sync += [
                    state[u].eq(BUSY),
                    doing[u].eq(command_kind),
                    left[u].eq(move + longest - 1),
                    group[u].eq(members),
                ]
        with m.If(self.command):
            # All behind the one that was served; none of them stands for all.
            m.d.sync += turn.eq(~(commands | (commands - 1)))

        # Operations come and go.
        taken = Signal(n)
        own_unit = (
            self.address.chip if p.unit_dies == p.dies else self.address.chip * p.dies + self.address.die
        )
        block = data.StructLayout({k: v.width for k, v in self._address if k != "page"})
        where = Signal(block.size)
        m.d.comb += [
            self.ready.eq(~self.held.all()),
            self.slot.eq(~self.held & -~self.held),
            taken.eq(Mux(self.push, self.slot, 0)),
            where.eq(self.address.as_value()),
        ]
        dependence = Cat(
            (address[i].as_value()[: block.size] == where)
            & Mux(
                self.kind == READ,
                (kind[i] == ERASE) | ((kind[i] == PROGRAM) & (address[i].page == self.address.page)),
                (self.kind == ERASE) | (kind[i] != READ),
            )
            for i in range(n)
        )
        live = self.held & ~self.finished
        m.d.sync += [
            self.held.eq(live | taken),
            waiting.eq((waiting & ~Mux(self.command, members, 0)) | taken),
        ]
        for i in range(n):
            with m.If(taken[i]):
                m.d.sync += [
                    kind[i].eq(self.kind),
                    unit[i].eq(own_unit),
                    address[i].eq(self.address),
                    tags[i].eq(self.tag),
                    older[i].eq(live),
                    needs[i].eq(live & dependence),
                ]
            with m.Else():
                m.d.sync += [older[i].eq(older[i] & ~taken), needs[i].eq(needs[i] & ~self.finished)]
        m.d.sync += Assert(~(self.push & ~self.ready), "an operation without a slot")
        with m.If(self.clear):
            m.d.sync += [s.eq(0) for s in (carries, moves, self.held, waiting, *state, *out, *before)]
        with m.If(self.clear | self.anew):
            m.d.sync += turn.eq((1 << p.units) - 1)
        return m
