"""Model AI accelerators at cycle level, with RTL that proves the model tells the truth."""

from tilewright._version import __version__

__all__ = ["__version__"]
