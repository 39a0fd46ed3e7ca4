"""A system: devices, the links between them and a graph of tasks; and devices known only by their roofline.

Sockets, drives, the GPU beside them and baseline GPUs or CPUs are devices. A device is either modelled in
cycles elsewhere (its tasks then carry a duration in that device's own ticks) or described by a roofline
preset under `arch/presets/system/`: peak rates from the datasheet and a stated efficiency.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import ceil, gcd
from operator import index
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from tilewright.arch import spec as specs
from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.quantity import exact
from tilewright.arch.spec import Exact, NonNegative, Positive, Section, Spec

SLUG = "system"

# ---- devices known by their roofline ------------------------------------------------------------------

# Unit of every datum of a roofline preset; vendor prefixes are decimal, so GB is 1e9 bytes.
UNITS = {
    "peak_tops.fp32": "Tops/s",
    "peak_tops.fp16": "Tops/s",
    "peak_tops.bf16": "Tops/s",
    "peak_tops.int8": "Tops/s",
    "memory.gb_per_s": "GB/s",
    "memory.gb": "GB",
    "efficiency.compute": "1",
    "efficiency.memory": "1",
    "host_link.gb_per_s": "GB/s",
    "launch_overhead_us": "us",
    "power.peak_w": "W",
    "power.idle_w": "W",
}


class PeakTops(Section):
    """Dense peak in 1e12 operations per second by number format; a multiply-accumulate is two operations.

    A format that the device has no arithmetic for is left out.
    """

    fp32: Positive | None = None
    fp16: Positive | None = None
    bf16: Positive | None = None
    int8: Positive | None = None


class Memory(Section):
    gb_per_s: Positive
    gb: Positive


class Efficiency(Section):
    """Achieved fraction of each peak: from a source of its own, or 1."""

    compute: Annotated[Exact, Field(gt=0, le=1)] = Fraction(1)
    memory: Annotated[Exact, Field(gt=0, le=1)] = Fraction(1)


class HostLink(Section):
    """Copies between host and device memory, in one direction."""

    gb_per_s: Positive


class Power(Section):
    """`peak_w` is the rated board or package power; `idle_w` is left out when nobody has published it."""

    peak_w: Positive
    idle_w: Positive | None = None


class RooflineParams(NamedTuple):
    """Achieved rates: peak times efficiency, exact."""

    ops_per_s: Mapping[str, Fraction]
    bytes_per_s: Fraction
    overhead_s: Fraction


class RooflineSpec(Spec):
    """A device that is not modelled in cycles: an operator takes the longer of its compute and memory time."""

    target_name: ClassVar[str] = SLUG

    peak_tops: PeakTops
    memory: Memory
    efficiency: Efficiency = Efficiency()
    host_link: HostLink | None = None
    launch_overhead_us: NonNegative = Fraction(0)
    power: Power

    @property
    def tick(self) -> Clock:
        """A picosecond: what times are rounded up to, having no clock of their own."""
        return Clock(Fraction(1, 10**12))

    def params(self) -> RooflineParams:
        peaks = ((f, getattr(self.peak_tops, f)) for f in PeakTops.model_fields)
        return RooflineParams(
            ops_per_s={f: p * 10**12 * self.efficiency.compute for f, p in peaks if p is not None},
            bytes_per_s=self.memory.gb_per_s * 10**9 * self.efficiency.memory,
            overhead_s=self.launch_overhead_us / 10**6,
        )

    @property
    def is_bound(self) -> bool:
        """Whether times are lower bounds, because an efficiency stands at 1 for want of a source.

        A speed-up over such a device is itself a lower bound and is to be printed as "at least".
        """
        return not all(_sourced(self, path) for path in ("efficiency.compute", "efficiency.memory"))

    def fits(self, n_bytes: int) -> bool:
        """Whether `n_bytes` of weights, cache and activations fit the device's memory."""
        return n_bytes <= self.memory.gb * 10**9

    def energy_j(self, busy_s: Fraction, idle_s: Fraction = Fraction(0)) -> Fraction:
        """Joules at rated power while busy: an upper bound, since no operator draws more than the rating.

        Idle time is charged at `idle_w`, or at rated power where that is unknown.
        """
        idle_w = self.power.peak_w if self.power.idle_w is None else self.power.idle_w
        return busy_s * self.power.peak_w + idle_s * idle_w

    def link(self, name: str) -> "Link":
        """The host link under the given name. Raises UserError when the preset states none."""
        if self.host_link is None:
            raise UserError(f"{self.name}: host_link.gb_per_s is not stated")
        return Link(name, self.host_link.gb_per_s * 10**9)


def _sourced(spec: Spec, path: str) -> bool:
    p = spec.provenance.get(path)
    return p is not None and p.kind != "assumed" and bool(p.source)


def roofline_presets() -> list[str]:
    """Names of the roofline devices that ship with the package."""
    return list(specs.presets(SLUG))


def load_roofline(name: str, sets: Sequence[str] = ()) -> RooflineSpec:
    """The roofline device of a preset name or a YAML path, with `a.b=value` overrides.

    Raises UserError on unknown names and keys, values out of range, a unit other than the key's, and an
    efficiency below 1 without a source: a guess there would decide every comparison.
    """
    tree = specs.apply_sets(specs.load_tree(name, [SLUG]), sets)
    target = tree.get("target")
    if not isinstance(target, specs.Leaf) or target.value != SLUG:
        got = target.value if isinstance(target, specs.Leaf) else None
        raise UserError(f"{name}: target of a roofline device must be {SLUG!r}, not {got!r}")
    spec = specs.build(RooflineSpec, tree, name)
    assert isinstance(spec, RooflineSpec)
    for path, p in spec.provenance.items():
        if p.unit and p.unit != UNITS[path]:
            raise UserError(f"{p.where}: {path} is in {UNITS[path]}, not {p.unit!r}")
    for part in Efficiency.model_fields:
        value, path = getattr(spec.efficiency, part), f"efficiency.{part}"
        if value != 1 and not _sourced(spec, path):
            where = spec.provenance[path].where
            raise UserError(
                f"{where}: {path} must be 1, or have a source and a kind other than assumed; not {float(value)}"
            )
    return spec


# ---- devices, links and tasks -------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A server of tasks, one at a time. `clock` is the tick of its tasks' durations; None: the system's."""

    name: str
    clock: Clock | None = None


@dataclass(frozen=True)
class Link:
    """A server of transfers, one at a time, in one direction.

    A transfer holds the link for ceil(bytes / rate) ticks and arrives ceil(latency) ticks after that; the
    link is free for the next transfer meanwhile. Raises UserError on a rate or latency out of range.
    """

    name: str
    bytes_per_s: Fraction
    latency_s: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes_per_s", exact(self.bytes_per_s, f"link {self.name}: bytes_per_s"))
        object.__setattr__(self, "latency_s", exact(self.latency_s, f"link {self.name}: latency_s"))
        if self.bytes_per_s <= 0:
            raise UserError(f"link {self.name}: bytes_per_s must be positive, not {self.bytes_per_s}")
        if self.latency_s < 0:
            raise UserError(f"link {self.name}: latency_s must not be negative, not {self.latency_s}")

    def transfer_ticks(self, n_bytes: int, clock: Clock) -> int:
        return ceil(n_bytes / self.bytes_per_s / clock.period_s)

    def latency_ticks(self, clock: Clock) -> int:
        return ceil(self.latency_s / clock.period_s)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of work for a device (`duration_ticks`, in the device's ticks) or for a link (`bytes`).

    It becomes ready when every task in `after` has finished (a transfer: arrived) and not before system
    tick `not_before`. Among tasks that became ready together, the lower `priority` goes first. A task of
    zero ticks is a barrier: it occupies nothing and is over as soon as it is ready.
    """

    name: str
    device: str
    duration_ticks: int | None = None
    bytes: int | None = None
    after: tuple[str, ...] = ()
    not_before: int = 0
    priority: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.after, str):
            raise UserError(f"task {self.name}: after must be a tuple of names, not {self.after!r}")
        if (self.duration_ticks is None) == (self.bytes is None):
            raise UserError(f"task {self.name}: give either duration_ticks or bytes")
        for key in ("duration_ticks", "bytes", "not_before"):
            value = getattr(self, key)
            if value is None:
                continue
            if _integer(self.name, key, value) < 0:
                raise UserError(f"task {self.name}: {key} must not be negative, not {value}")
        _integer(self.name, "priority", self.priority)


def _integer(task: str, key: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise UserError(f"task {task}: {key} must be an integer, not {value!r}") from None


@dataclass(frozen=True)
class System:
    """Devices and links that share one exact clock. Raises UserError when two of them share a name."""

    clock: Clock
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        names = self.servers()
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"system: two devices or links are called {name!r}")

    def servers(self) -> tuple[str, ...]:
        """Names of everything that serves tasks: devices, then links."""
        return tuple(d.name for d in self.devices) + tuple(k.name for k in self.links)

    def ticks_of(self, n: int, device: Device) -> int:
        """System ticks that cover `n` ticks of the device: ceil of the exact ratio."""
        return ceil(n * self.ratio(device))

    def ratio(self, device: Device) -> Fraction:
        """System ticks in one tick of the device."""
        return Fraction(1) if device.clock is None else device.clock.period_s / self.clock.period_s


def common_clock(clocks: Iterable[Clock]) -> Clock:
    """The slowest clock in which every given period is a whole number of ticks: nothing is rounded in it.

    >>> common_clock([Clock.from_mhz(Fraction(1000)), Clock.from_mhz(Fraction(1500))]).period_s
    Fraction(1, 3000000000)
    """
    periods = [c.period_s for c in clocks]
    if not periods:
        raise UserError("system: a common clock needs at least one clock")
    return Clock(
        reduce(
            lambda a, b: Fraction(
                gcd(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator
            ),
            periods,
        )
    )


# ---- the task graph in integers -----------------------------------------------------------------------


class Graph(NamedTuple):
    """A checked task graph in integers; one entry for each task, in the order given.

    `server` indexes `servers`; `service` is the ticks that it is held, `lag` the ticks until the result
    has arrived after that, `release` the earliest tick, `before` the indices of the predecessors.
    """

    servers: tuple[str, ...]
    names: tuple[str, ...]
    server: tuple[int, ...]
    service: tuple[int, ...]
    lag: tuple[int, ...]
    release: tuple[int, ...]
    priority: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]


def resolve(system: System, tasks: Sequence[Task]) -> Graph:
    """The tasks as integers in system ticks.

    Raises UserError on a name given twice, an unknown device or predecessor (with the nearest name), work of
    the wrong sort for its server, and a cycle (naming it).
    """
    devices = {d.name: d for d in system.devices}
    links = {k.name: k for k in system.links}
    servers = system.servers()
    position = {name: i for i, name in enumerate(servers)}
    ids: dict[str, int] = {}
    for i, task in enumerate(tasks):
        if task.name in ids:
            raise UserError(f"task {task.name}: the name is given twice")
        ids[task.name] = i

    def cost(task: Task) -> tuple[int, int]:
        if task.device in links:
            if task.bytes is None:
                raise UserError(
                    f"task {task.name}: {task.device} is a link and needs bytes, not duration_ticks"
                )
            link = links[task.device]
            return link.transfer_ticks(task.bytes, system.clock), link.latency_ticks(system.clock)
        if task.device not in devices:
            hint = nearest(task.device, servers)
            raise UserError(f"task {task.name}: unknown device {task.device!r}: {hint}")
        if task.duration_ticks is None:
            raise UserError(
                f"task {task.name}: {task.device} is a device and needs duration_ticks, not bytes"
            )
        return system.ticks_of(task.duration_ticks, devices[task.device]), 0

    def predecessors(task: Task) -> tuple[int, ...]:
        for name in task.after:
            if name not in ids:
                raise UserError(f"task {task.name}: comes after unknown task {name!r}: {nearest(name, ids)}")
        return tuple(ids[name] for name in task.after)

    costs = [cost(t) for t in tasks]
    graph = Graph(
        servers=servers,
        names=tuple(ids),
        server=tuple(position[t.device] for t in tasks),
        service=tuple(service for service, _ in costs),
        lag=tuple(lag for _, lag in costs),
        release=tuple(t.not_before for t in tasks),
        priority=tuple(t.priority for t in tasks),
        before=tuple(predecessors(t) for t in tasks),
    )
    topological(graph.names, graph.before)
    return graph


def topological(names: Sequence[str], before: Sequence[Sequence[int]]) -> list[int]:
    """Indices in an order in which each comes after its predecessors. Raises UserError naming a cycle.

    >>> topological(["a", "b"], [(1,), (0,)])
    Traceback (most recent call last):
        ...
    tilewright.arch.errors.UserError: tasks wait for each other: a -> b -> a
    """
    followers = successors(before)
    missing = [len(b) for b in before]
    order = [i for i, n in enumerate(missing) if n == 0]
    for i in order:  # grows while it is walked
        for j in followers[i]:
            missing[j] -= 1
            if missing[j] == 0:
                order.append(j)
    if len(order) == len(names):
        return order
    # Every task left over has a predecessor that is left over: walking back must close a cycle.
    i = next(i for i, n in enumerate(missing) if n)
    walk: dict[int, None] = {}
    while i not in walk:
        walk[i] = None
        i = next(j for j in before[i] if missing[j])
    path = list(walk)
    cycle = path[path.index(i) :][::-1]
    start = cycle.index(min(cycle))
    cycle = cycle[start:] + cycle[:start]
    shown = [names[j] for j in cycle]
    if len(shown) > 8:
        shown[4:-3] = [f"({len(shown) - 7} more)"]
    raise UserError(f"tasks wait for each other: {' -> '.join([*shown, names[cycle[0]]])}")


def successors(before: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same graph read forwards; a predecessor named twice counts twice."""
    out: list[list[int]] = [[] for _ in before]
    for j, predecessors in enumerate(before):
        for i in predecessors:
            out[i].append(j)
    return out
