"""Attention inside a storage drive as RTL: the engine's units, the flash controller and its tables."""
