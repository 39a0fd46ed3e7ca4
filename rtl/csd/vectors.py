"""What the attention kernels share with each other, and with the writer: the vectors, and the argtopk unit."""

from amaranth.hdl import Module, Mux, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import CsdParams
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.channel import pick
from tilewright.rtl.csd.memory import store
from tilewright.rtl.lib.arbiter import RoundRobin

__all__ = ["Turns", "Vectors"]


class Turns(wiring.Component):
    """Who has a unit that one user at a time may use: round robin, until he gives it back.

    Parameters
    ----------
    users : int

    Members
    -------
    ======== === ===== ==================================================================
    clear    In  1     nobody has it, and the first one comes first
    anew     In  1     the first one comes first
    wants    In  users
    releases In  users it is his for the last time; in the next tick the unit is free
    has      Out users one-hot; from the tick in which the unit is free and he wants it
    ======== === ===== ==================================================================
    """

    def __init__(self, *, users: int):
        self._users = users
        super().__init__(
            {"clear": In(1), "anew": In(1), "wants": In(users), "releases": In(users), "has": Out(users)}
        )

    def elaborate(self, platform):
        m = Module()
        turn = RoundRobin(count=self._users)
        m.submodules.turn = ResetInserter(self.clear | self.anew)(turn)
        owner = Signal(self._users)
        m.d.comb += [
            turn.requests.eq(self.wants),
            turn.ready.eq(~owner.any()),
            self.has.eq(Mux(owner.any(), owner, turn.grant)),
        ]
        m.d.sync += owner.eq(Mux(self.clear, 0, self.has & ~self.releases))
        return m


class Vectors(wiring.Component):
    """The lines that the host leaves and fetches, with a port to read and a port to write, each for one user a tick.

    Kernels take turns, round robin. The writer goes first: it reads and writes when it wants.

    Parameters
    ----------
    params : CsdParams
    users : int
        Kernels.
    black_box : bool
        The memory is outside of the netlist.

    Members
    -------
    ============= === ========== ==================================================
    anew          In  1          turns begin with the first kernel
    first_read    In  1          the writer reads
    first_from    In             this line
    first_write   In  1          the writer writes
    first_to      In             this line
    first_data    In  line
    read          In  users      kernels want to read
    read_from     In  a user
    reads         Out users      who does, one-hot
    data          Out line       what was read one tick ago
    write         In  users
    write_to      In  a user
    write_data    In  a user
    writes        Out users
    read_lines    Out 1          a line is read in this tick
    written_lines Out 1          a line is written in this tick
    ============= === ========== ==================================================
    """

    def __init__(self, *, params: CsdParams, users: int, black_box: bool = True):
        self._params, self._users, self._black_box = params, users, black_box
        address, line = bits_for(params.vector_lines - 1), params.lanes * FP16.width
        super().__init__(
            {
                "anew": In(1),
                "first_read": In(1),
                "first_from": In(address),
                "first_write": In(1),
                "first_to": In(address),
                "first_data": In(line),
                "read": In(users),
                "read_from": In(address).array(users),
                "reads": Out(users),
                "data": Out(line),
                "write": In(users),
                "write_to": In(address).array(users),
                "write_data": In(line).array(users),
                "writes": Out(users),
                "read_lines": Out(1),
                "written_lines": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.lines = lines = store(
            black_box=self._black_box, width=p.lanes * FP16.width, depth=p.vector_lines
        )
        read, write = RoundRobin(count=self._users), RoundRobin(count=self._users)
        m.submodules.read_turn = ResetInserter(self.anew)(read)
        m.submodules.write_turn = ResetInserter(self.anew)(write)
        m.d.comb += [
            read.requests.eq(self.read),
            read.ready.eq(~self.first_read),
            self.reads.eq(Mux(self.first_read, 0, read.grant)),
            lines.read_enable.eq(self.first_read | self.read.any()),
            lines.read_address.eq(Mux(self.first_read, self.first_from, pick(read.grant, [*self.read_from]))),
            self.data.eq(lines.read_data),
            write.requests.eq(self.write),
            write.ready.eq(~self.first_write),
            self.writes.eq(Mux(self.first_write, 0, write.grant)),
            lines.write_enable.eq(self.first_write | self.write.any()),
            lines.write_address.eq(Mux(self.first_write, self.first_to, pick(write.grant, [*self.write_to]))),
            lines.write_data.eq(
                Mux(self.first_write, self.first_data, pick(write.grant, [*self.write_data]))
            ),
            self.read_lines.eq(lines.read_enable),
            self.written_lines.eq(lines.write_enable),
        ]
        return m
