"""Numbers, and what follows from them: specs, presets, instruction sets, Program and Timeline."""
