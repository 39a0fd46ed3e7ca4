"""How work is tiled onto a machine: (graph, spec) -> Program."""
