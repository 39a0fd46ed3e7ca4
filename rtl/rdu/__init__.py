"""Reconfigurable dataflow units as RTL: compute units, memory units and the switches between them."""
