# amaranth: UnusedElaboratable=no
"""Units that are written once, however many of them a machine has."""

from amaranth.hdl import ClockDomain, ClockSignal, Elaboratable, Module, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.rtl.lib.share import ModuleLibrary, shared

__all__ = ["SharedModule"]


class SharedModule(Elaboratable):
    """A clocked component, `kind(**parameters)`, as one module that all of the same parameters share.

    Its members are those of the component. Elaborated without a `ModuleLibrary` it is the component.
    """

    def __init__(self, kind, **parameters):
        self._kind, self._parameters = kind, parameters
        self._component = kind(**parameters)

    def __getattr__(self, name):
        return getattr(self._component, name)

    def elaborate(self, platform):
        if not isinstance(platform, ModuleLibrary):
            return self._component
        flat = _flat(self._kind)(self._component, self._parameters)
        flat.clk, flat.rst = ClockSignal(), ResetSignal()
        instance = platform.instance(flat)
        # Inside the module, clock and reset are ports like any other.
        flat.clk, flat.rst = Signal(name="clk"), Signal(name="rst")
        return instance


class _Flat(Elaboratable):
    """What a `ModuleLibrary` takes: the component with a port for each signal of its interfaces, and for the clock."""

    def __init__(self, component, parameters):
        self._parameters = sorted(parameters.items())
        self.component = component
        members = {"clk": In(1), "rst": In(1)}
        for path, member, value in component.signature.flatten(component):
            name = "__".join(map(str, path))
            members[name] = (In if member.flow is In else Out)(member.shape)
            setattr(self, name, Value.cast(value))
        self.signature = wiring.Signature(members)

    @shared
    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(self.rst)]
        m.submodules.unit = self.component
        return m


_kinds = {}


def _flat(kind):
    """`_Flat` under the component's name, by which the library names the module."""
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (_Flat,), {})
    return _kinds[kind]
