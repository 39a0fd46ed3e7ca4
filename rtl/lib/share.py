"""Modules that are written once however often they are instantiated.

Amaranth writes a module for every instance: a machine of a thousand adders has a thousand modules of one text,
and every tool behind it reads them all. A component whose `elaborate` is marked `@shared` becomes an instance
of one module instead, where the design is elaborated for a `ModuleLibrary`, as `cosim.verilog.to_verilog` does.
Elsewhere, in Amaranth's own simulator for one, nothing changes.
"""

import functools

from amaranth.back import rtlil
from amaranth.hdl import Elaboratable, Instance
from amaranth.lib.wiring import In

__all__ = ["ModuleLibrary", "shared"]


class ModuleLibrary:
    """The shared modules of a design; given to Amaranth in place of a platform."""

    def __init__(self):
        self._names = {}  # (class, parameters) of a component: name of its module
        self._waiting = []  # (name, component) whose module is still to be written

    def instance(self, component):
        """An instance of the component's module, on the component's own ports. It must be combinational."""
        # What it was constructed with: its private attributes, and the widths of its ports.
        parameters = {k: v for k, v in vars(component).items() if k.startswith("_") and "__" not in k}
        key = (type(component), repr(sorted(parameters.items())), repr(component.signature))
        if key not in self._names:
            self._names[key] = f"{type(component).__name__}_{len(self._names)}"
            self._waiting.append((self._names[key], component))
        ports = {
            f"{'i' if member.flow is In else 'o'}_{name}": getattr(component, name)
            for name, member in component.signature.members.items()
        }
        return Instance(self._names[key], **ports)

    def modules(self):
        """The RTLIL of each module that instances were asked for so far, and of those that these need."""
        parts = []
        while self._waiting:
            name, component = self._waiting.pop()
            ports = [getattr(component, port) for port in component.signature.members]
            own = _Own(component)
            text = rtlil.convert(own, name=name, platform=self, emit_src=False, ports=ports)
            parts.append(text.replace("attribute \\top 1\n", ""))
        return parts


class _Own(Elaboratable):
    """A component as the module that its instances share."""

    def __init__(self, component):
        self._component = component

    def elaborate(self, platform):
        return type(self._component).elaborate.__wrapped__(self._component, platform)


def shared(elaborate):
    """Marks the `elaborate` of a combinational component that keeps its parameters in private attributes (where they
    are not the widths of its ports)."""

    @functools.wraps(elaborate)
    def wrapper(self, platform):
        if isinstance(platform, ModuleLibrary):
            return platform.instance(self)
        return elaborate(self, platform)

    return wrapper
