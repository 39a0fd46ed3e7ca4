"""A spec's RTL as Verilog: `tilewright rtl`."""

from collections.abc import Sequence

from tilewright import __version__
from tilewright.arch import registry
from tilewright.devices import spec_hash
from tilewright.output import say


def verilog(name: str, sets: Sequence[str] = ()) -> str:
    """Verilog of the machine, under a comment that says what it is of.

    A machine of equal channels is written as one of them: the macro that a chip repeats. A target whose machines are
    too large otherwise says what it writes of one in `part`. Raises UserError.
    """
    spec = registry.load_spec(name, sets)
    full = spec_hash(spec)
    channels = getattr(spec, "channels", 1)
    part = ""
    if channels > 1:
        spec = registry.load_spec(name, [*sets, "channels=1"])
        part = f"one channel of {channels}"
        say(f"{part}: the macro that the machine repeats")
    from tilewright.rtl.cosim.verilog import to_verilog

    machine = registry.room("rtl", spec.target_name)
    if hasattr(machine, "part") and machine.part(spec):
        part = machine.part(spec)
        say(f"{part}: the whole is too large to be written at once")
    text = to_verilog(machine.top(spec))
    title = f"{spec.name}{', ' + part if part else ''}"
    lines = (
        f"{title} (target {spec.target_name})",
        f"spec {full}",
        f"tilewright {__version__}",
        "Memories above 64 KiB are instances of black boxes, tilewright_*: behavioural ones lie beside the RTL, in rtl/",
    )
    return "".join(f"// {line}\n" for line in lines) + text
