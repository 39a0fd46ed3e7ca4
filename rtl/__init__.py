"""The machines themselves, as Amaranth components."""
