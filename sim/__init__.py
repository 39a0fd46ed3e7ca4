"""When it happens: Program -> Timeline, in integer ticks."""

from tilewright.sim.cache import configure_cache

configure_cache()
