"""Does the RTL compute what the interpreter says, in the ticks that the cycle model says? `engine.run` answers."""
