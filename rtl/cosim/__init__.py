"""The co-simulation harness: one bench drives every target over its host port."""
