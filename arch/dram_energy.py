"""Energy of DRAM commands from datasheet currents, in picojoules per device.

The equations are those of DRAMsim3 (Li et al., "DRAMsim3", IEEE CAL 2020; `src/configuration.cc`): what a command
draws above the standby current, times the time for which it does. Volt x milliampere x nanosecond is a picojoule.
DRAMsim3 multiplies by cycles and never by the clock period, so what it prints as pJ is this divided by tCK in ns.

Voltages are in V, currents in mA. Arguments are floats or Fractions; Fractions stay exact. Every function raises
UserError when the currents contradict each other, so that an energy would come out negative.
"""

from fractions import Fraction
from typing import TypeVar

from tilewright.arch.errors import UserError

Number = TypeVar("Number", float, Fraction)


def _above_standby(name: str, current: Number, standby: str, standby_current: Number) -> Number:
    if current < standby_current:
        raise UserError(f"{name} {current} mA must be at least {standby} {standby_current} mA")
    return current - standby_current


def activate_energy_pj(
    vdd: Number, idd0: Number, idd3n: Number, idd2n: Number, t_rc_ns: Number, t_ras_ns: Number
) -> Number:
    """One ACT and its precharge: a row cycle at IDD0, less the standby of t_ras open and t_rc - t_ras closed."""
    if t_rc_ns < t_ras_ns:
        raise UserError(f"t_rc_ns {t_rc_ns} must be at least t_ras_ns {t_ras_ns}")
    standby = idd3n * t_ras_ns + idd2n * (t_rc_ns - t_ras_ns)
    cycle = idd0 * t_rc_ns
    if cycle < standby:
        raise UserError(f"idd0 {idd0} mA must be at least the mean of idd3n {idd3n} mA and idd2n {idd2n} mA")
    return vdd * (cycle - standby)


def read_energy_pj(vdd: Number, idd4r: Number, idd3n: Number, t_burst_ns: Number) -> Number:
    """One column read: the burst at IDD4R, above active standby. Termination and bus are not in it."""
    return vdd * _above_standby("idd4r", idd4r, "idd3n", idd3n) * t_burst_ns


def write_energy_pj(vdd: Number, idd4w: Number, idd3n: Number, t_burst_ns: Number) -> Number:
    """One column write: the burst at IDD4W, above active standby."""
    return vdd * _above_standby("idd4w", idd4w, "idd3n", idd3n) * t_burst_ns


def refresh_energy_pj(vdd: Number, idd5: Number, idd3n: Number, t_rfc_ns: Number) -> Number:
    """One refresh: IDD5AB and t_rfc for all banks, IDD5PB and t_rfc_pb for one."""
    return vdd * _above_standby("idd5", idd5, "idd3n", idd3n) * t_rfc_ns


def background_energy_pj(vdd: Number, idd_standby: Number, t_ns: Number) -> Number:
    """Standby for t_ns: IDD3N while a row is open, IDD2N while all are closed, IDD2P or IDD6x asleep."""
    if min(idd_standby, t_ns) < 0:
        raise UserError(f"standby current {idd_standby} mA and time {t_ns} ns must be 0 or more")
    return vdd * idd_standby * t_ns
