"""Drive a clocked component in Amaranth's simulator, one dictionary of inputs and outputs a tick."""

from amaranth.sim import Simulator


def _port(component, path):
    for name in path.split("."):
        component = getattr(component, name)
    return component


def play(component, ticks, drive, outputs):
    """What the outputs were at each tick, as a list of dictionaries.

    `drive(tick, before)` returns the inputs of a tick by dotted name; those it leaves out keep their value.
    `before` holds the outputs of the tick before, {} at first. Outputs are sampled after the inputs of the same
    tick have settled, before its clock edge.
    """
    seen = []

    async def bench(ctx):
        for tick in range(ticks):
            for path, value in drive(tick, seen[-1] if seen else {}).items():
                ctx.set(_port(component, path), int(value))
            seen.append({path: ctx.get(_port(component, path)) for path in outputs})
            await ctx.tick()

    simulator = Simulator(component)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return seen
