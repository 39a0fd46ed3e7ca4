"""Page tables as the model keeps them, against those that commands are defined by; and what digests tell apart."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csd.test_drive import CONFIG, P, assert_folds, constant
from tests.csd.units import small_spec
from tilewright.arch import csd as arch
from tilewright.arch.csd_pages import PageTables
from tilewright.sim import csd, csd_tables
from tilewright.sim.csd_state import PAGES, PAGES2
from tilewright.sim.csd_tables import DONE, OVERWRITES, RECLAIMS, REFUSED, Tables

_OPS = (
    "WRITE first={first} tokens={n}",
    "WRITE form=channels first={span}",
    "TRANSPOSE first={span}",
    "READ first={first} count={count}",
    "READ form=channels first={span} count={count}",
    "ATTEND tokens={n} spans={spans}",
)


def commands(*lines):
    return arch.ISA.assemble("\n".join(lines)).flat()


def numbers(tables, config, record):
    """The pages' numbers in the order in which the drive wants them, by the tables of `arch`."""
    op, slot, heads = arch.OPS[int(record["op"])].name, int(record["slot"]), int(record["heads"])
    first, tokens, count = int(record["first"]), int(record["tokens"]), int(record["count"])
    if op == "ATTEND":
        found = [tables.token_pages(config, slot, heads, tokens)]
        if int(config["attention"]) and int(config["k"]) < tokens:
            found.append(tables.channel_pages(config, slot, heads, int(record["spans"])))
    elif op == "WRITE" and not record["form"]:
        found = [tables.write_tokens(config, slot, heads, first, tokens)]
    elif op == "WRITE":
        found = [tables.write_channels(config, slot, heads, first)]
    elif op == "TRANSPOSE":
        found = tables.transpose(config, slot, heads, first)
    elif op == "READ":
        found = [tables.read(config, int(record["form"]), slot, heads, first, count)]
    else:
        found = [tables.reclaim(count)] if op == "RECLAIM" else []
    return [number for places in found for number in places.number.ravel().tolist()]


def walk(p, code):
    """What commands find and give, as the drive has it: horizon by horizon. Stops at the one that is refused."""
    tables, rows = Tables(p), csd._rows(code)
    masks, digests = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
    pages, known, out, why = np.zeros(1 << 16, np.uint32), 0, [], DONE
    while known < len(rows) and why != REFUSED:
        first = known
        known, why = tables.follow(rows, masks, first, len(rows), digests)
        if why == RECLAIMS and known == first:
            tables.command(code[arch.configurations(code)[known]], code[known])
            known += 1
        end = tables.place(rows, first, known, pages, 0)
        assert end == tables.count(rows, first, known)
        bounds = [*np.sort(rows[first:known, [PAGES, PAGES2]], axis=1)[:, 0].tolist(), end]
        out += [pages[a:b].tolist() for a, b in pairwise(bounds)]
    return out, why


@st.composite
def programs(draw):
    d, size = draw(st.sampled_from([(4, 1), (8, 8), (16, 2)]))
    channels, span = draw(st.sampled_from([(1, 8), (2, 16)]))
    lines = [f"CONFIG attention=sparf k=3 d={d} page_tokens={size} page_channels={channels} span={span}"]
    for _ in range(draw(st.integers(1, 30))):
        slot, first, n = (draw(st.integers(low, high)) for low, high in ((0, 3), (0, 6), (1, 24)))
        where = f" slot={slot} heads={draw(st.integers(1, min(2, 4 - slot)))}"
        op = draw(st.sampled_from([*_OPS, "RECLAIM"]))
        fields = {"first": first, "n": n, "span": first // 3, "count": n % 3 + 1, "spans": n // span}
        lines.append("RECLAIM count=1" if op == "RECLAIM" else op.format(**fields) + where)
    return lines


@settings(deadline=None, max_examples=150)
@given(programs())
def test_pages_are_those_of_the_tables(lines):
    """Whatever is written over, with gaps, in any order; up to the first command that can't be done."""
    p = small_spec(flash__geometry__blocks_per_plane=2, flash__geometry__pages_per_block=2).params()
    code = commands(*lines)
    try:
        arch.check(p, code)
    except ValueError:
        return
    tables, expected = PageTables(p), []
    for record in code:
        try:
            expected.append(numbers(tables, code[0], record))
        except ValueError:
            break
    try:
        found, why = walk(p, code)
    except ValueError:  # of a RECLAIM
        assert code[len(expected)]["op"] == arch.OP["RECLAIM"]
        return
    assert found == expected and (why == REFUSED) == (len(found) < len(code))


def test_commands_are_followed_up_to_what_writes_over_pages():
    """Pages 0 and 1 of slot 0 are to be looked up before they are given again; a RECLAIM stands alone."""
    code = commands(CONFIG, "WRITE tokens=8", "READ count=2", "WRITE tokens=8", "RECLAIM count=1")
    rows = csd._rows(code)
    tables, masks, digests = Tables(P), np.zeros(5, np.uint64), np.zeros(5, np.uint64)
    assert tables.follow(rows, masks, 0, 5, digests) == (3, OVERWRITES)
    assert tables.follow(rows, masks, 3, 5, digests) == (4, RECLAIMS)
    assert tables.follow(rows, masks, 4, 5, digests) == (4, RECLAIMS)


def attends(p, *before):
    """Digests of two ATTENDs alike on slots 0 and 2, after these WRITEs."""
    code = commands(CONFIG, *before, "ATTEND slot=0 tokens=32", "ATTEND slot=2 tokens=32")
    digests = np.zeros(len(code), np.uint64)
    i, why = Tables(p).follow(csd._rows(code), np.zeros(len(code), np.uint64), 0, len(code), digests)
    assert (i, why) == (len(code), DONE)
    return digests[-2:].tolist()


def test_digests_tell_dies_apart_and_nothing_else():
    """8 tokens are a group, 32 are four: 8 pages, of each of 2 channels 4. A channel has 4 planes, so that pages go round
    after 4."""
    p = P._replace(flash=P.flash._replace(multi_plane=False))
    assert p.flash.channels == 2 and p.flash.chips * p.flash.dies * p.flash.planes == 4
    fill = "WRITE slot={} tokens={}"
    one, other = attends(p, fill.format(0, 32), fill.format(2, 32))
    assert one == other
    one, other = attends(p, fill.format(0, 32), fill.format(4, 8), fill.format(2, 32))
    assert one != other
    # Where planes work on equal pages only, or pages differ in type, the page within the block tells them apart, too.
    typed = p._replace(flash=p.flash._replace(read=constant(*range(1, p.flash.pages + 1))))
    one, other = attends(typed, fill.format(0, 32), fill.format(2, 32))
    assert one != other


def test_what_digests_leave_out_would_be_seen(monkeypatch):
    """Slot 0 lies on all planes, slot 2 on one of each channel: pages of other slots come between. Digests that know
    nothing of pages would take one for the other."""
    between = ("slot=4 first=0", "slot=4 first=24", "slot=6 first=0", "slot=6 first=24")
    fill = [
        f"WRITE slot=2 first={8 * g} tokens=8\nWRITE {other} tokens=24" for g, other in enumerate(between)
    ]
    head = f".segment label={arch.CACHED}\n{CONFIG}WRITE slot=0 tokens=32\n"
    runs = "".join(f"ATTEND slot={slot} tokens=32 after=4\n" for slot in (0, 2, 0, 2, 0))
    program = arch.ISA.assemble(f"{head}{chr(10).join(fill)}\n.segment label=run\n{CONFIG}{runs}")
    p = P._replace(slots=8)
    assert_folds(p, program)
    follow = csd_tables.Tables.follow

    def blind(self, rows, masks, first, end, digests):
        out = follow(self, rows, masks, first, end, digests)
        digests[first : out[0]] = rows[first : out[0], 0]
        return out

    monkeypatch.setattr(csd_tables.Tables, "follow", blind)
    with pytest.raises(AssertionError):
        assert_folds(p, program)
