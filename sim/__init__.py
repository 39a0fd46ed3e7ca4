"""When it happens: Program -> Timeline, in integer ticks."""
