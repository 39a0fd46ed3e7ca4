"""What the RTL itself refuses: a controller that goes wrong is stopped by the banks' own assertions."""

import numpy as np
import pytest

from tilewright.arch.pim import ISA
from tilewright.arch.registry import load_spec
from tilewright.rtl.pim import controller
from tilewright.rtl.pim.run import Case, build_rtl, run_cases
from tilewright.verify.mutants import edited
from tilewright.workloads.pim import blank_image

pytestmark = pytest.mark.cosim

SMALL = [
    "channels=1", "dram.bankgroups=1", "dram.banks_per_group=2", "dram.rows=4", "dram.row_bytes=8",
    "dram.column_bytes=2", "pim.lanes=1", "pim.global_buffer_bytes=8", "asic.sram_bytes=16",
    "asic.adders=4", "asic.multipliers=2",
]  # fmt: skip
PROGRAM = "MAC_AB channels=1 row=0 cols=4\nMAC_AB channels=1 row=2 cols=4\nMAC_AB channels=1 row=1 cols=4 not_before=14000"


def outcome():
    spec = load_spec("pim-gpt", SMALL)
    p = spec.params()
    image = blank_image(p)
    image["acc"] = np.zeros_like(image["acc"])
    [done] = run_cases(build_rtl(spec), [Case(p, ISA.assemble(PROGRAM), image)])
    return done


def test_the_true_controller_breaks_no_rule():
    done = outcome()
    assert done.error is None
    # Refresh is due at tick 13650; the third instruction waits for tick 14000.
    assert done.timeline.counter("ref") == 1
    assert done.timeline.counter("mac_all") == 12


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Mux(opened.any(), CMD.PREAB, CMD.REFAB)", "CMD.REFAB", "refresh of an open bank"),
        ("needs_all & ~same.all()", "needs_all & ~opened.all()", "column access to a row that is not open"),
    ],
)
def test_a_bank_stops_an_illegal_command(old, new, said):
    with edited(controller, "ChannelController.elaborate", old, new):
        done = outcome()
    assert done.error is not None and said in done.error
