"""Run a unit of a dataflow machine in Amaranth's simulator, packets in and packets out."""

from functools import cache

from amaranth.sim import Simulator

from tilewright.arch import rdu
from tilewright.arch import spec as specs


def small(**sets):
    """Params of Plasticine with keys changed: pcu__lanes=4 is pcu.lanes=4."""
    tree = specs.load_tree("plasticine", ["rdu"])
    sets = {"memory__ddr__channels": 16, **sets}  # short lines must keep up with the memory's rate
    tree = specs.apply_sets(tree, [f"{key.replace('__', '.')}={value}" for key, value in sets.items()])
    return specs.build(rdu.RduSpec, tree, "small").params()


@cache
def unit(kind, **sets):
    """The unit of class `kind` with the params of `small`, the same one each time: to build it takes a second."""
    return kind(params=small(**sets))


_simulators = {}


def simulate(component, bench):
    """Run a testbench from reset; a component's simulator is built once."""
    if component in _simulators:
        simulator, now = _simulators[component]
        now[0] = bench
        simulator.reset()
    else:
        now = [bench]

        async def current(ctx):
            await now[0](ctx)

        simulator = Simulator(component)
        if any(
            hasattr(component, name) for name in ("start", "table_enable", "move")
        ):  # others are combinational
            simulator.add_clock(1e-6)
        simulator.add_testbench(current)
        _simulators[component] = simulator, now
    simulator.run()


def packet(words, sequence=0, last=0, flow=0):
    return {"data": [int(w) for w in words], "sequence": int(sequence), "last": int(last), "flow": int(flow)}


class Run:
    """What happened: for each output the (tick, packet) pairs, for each token output its ticks, the activity."""

    def __init__(self, outputs, tokens, activities):
        self.packets = {name: [] for name in outputs}
        self.tokens = {name: [] for name in tokens}
        self.activity = {name: [] for name in activities}
        self.conflicts = 0
        self.ticks = 0

    def words(self, name):
        return [p["data"] for _, p in self.packets[name]]

    def at(self, name):
        return [t for t, _ in self.packets[name]]


def run(
    component,
    configs,
    feeds,
    outputs,
    *,
    offer=None,
    accept=None,
    tokens=None,
    loop=None,
    activities=(),
    every=None,
    limit=2000,
    runs=1,
):
    """Start the unit and run it until done; tick 0 is the one after `start`.

    `configs`: value of each port that is constant. `feeds`: for each input stream its packets, offered one by one,
    on ticks where `offer(name, tick)`. Outputs are ready where `accept(name, tick)`. `tokens`: for each port of
    control inputs the mask at each tick; `loop` wires token
    outputs to inputs. `every(ctx, component, tick)` stands for what is around the unit, after all inputs of the
    tick are set. The unit is started `runs` times.
    """
    signals = [name for name in ("signal", "write_signal", "read_signal") if hasattr(component, name)]
    results = []

    async def bench(ctx):
        for name, value in configs.items():
            ctx.set(getattr(component, name), value)
        for _ in range(runs):
            out = Run(outputs, signals, activities)
            queues = {name: list(items) for name, items in feeds.items()}
            ctx.set(component.start, 1)
            await ctx.tick()
            ctx.set(component.start, 0)
            for tick in range(limit):
                for name, queue in queues.items():
                    port = getattr(component, name)
                    offered = bool(queue) and (offer is None or offer(name, tick))
                    ctx.set(port.valid, int(offered))
                    if offered:
                        ctx.set(port.payload, queue[0])
                for name in outputs:
                    ctx.set(getattr(component, name).ready, int(accept is None or accept(name, tick)))
                for name, masks in (tokens or {}).items():
                    ctx.set(getattr(component, name), masks.get(tick, 0))
                for source, sink in (loop or {}).items():
                    port = getattr(component, sink)
                    ctx.set(
                        port, (tokens or {}).get(sink, {}).get(tick, 0) | ctx.get(getattr(component, source))
                    )
                if ctx.get(component.done):
                    break
                if every:
                    every(ctx, component, tick)
                for name in activities:
                    out.activity[name].append(ctx.get(getattr(component, name)))
                for name in signals:
                    if mask := ctx.get(getattr(component, name)):
                        out.tokens[name].append((tick, mask))
                if hasattr(component, "conflict"):
                    out.conflicts += ctx.get(component.conflict)
                for name, queue in queues.items():
                    port = getattr(component, name)
                    if ctx.get(port.valid) and ctx.get(port.ready):
                        queue.pop(0)
                for name in outputs:
                    port = getattr(component, name)
                    if ctx.get(port.valid) and ctx.get(port.ready):
                        p = port.payload
                        out.packets[name].append(
                            (
                                tick,
                                {
                                    "data": [ctx.get(p.data[k]) for k in range(p.data.shape().length)],
                                    "sequence": ctx.get(p.sequence),
                                    "last": ctx.get(p.last),
                                    "flow": ctx.get(p.flow),
                                },
                            )
                        )
                await ctx.tick()
                out.ticks = tick + 1
            else:
                raise AssertionError(f"not done after {limit} ticks")
            for name, queue in queues.items():
                assert not queue, f"{len(queue)} packets are left at {name}"
            results.append(out)

    simulate(component, bench)
    return results[0] if runs == 1 else results


def cause(name):
    """The activity that stands for a cause."""
    return rdu.CAUSE[name]
