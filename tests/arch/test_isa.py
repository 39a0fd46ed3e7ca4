"""Instruction sets: words, text and records of one field table never differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Field, InstructionSet, Op, Program, Record, Segment

TOY = InstructionSet(
    "toy",
    (
        Record(
            "code",
            (
                Field("row", 12, "row"),
                Field("cols", 8, "columns", 1),
                Field("mask", 8, "lanes", base=16),
                Field("bias", 5, "added", signed=True),
                Field("mode", 2, "rounding", names=("near", "zero", "up")),
            ),
            (Op("LOAD", ("row", "cols", "mask")), Op("ADD", ("row", "bias", "mode"))),
        ),
        Record("config.unit", (Field("x", 4), Field("y", 4), Field("k", 16, default=7)), at=("x", "y"),
               command=False),
    ),
)  # fmt: skip
CODE = TOY.record("code")


def only(text):
    (segment,) = TOY.assemble(text).segments
    return segment.regions


def test_fields_fill_words_from_bit_0():
    # op 8 | row 12 | cols 8 | mask 8 | bias 5 | mode 2 | tag 16 | not_before 32 = 91 bits, 3 words.
    assert CODE.bits == 91
    record = TOY.make("LOAD", row=0x123, cols=0x45, mask=0x67, tag=0x89AB, not_before=0xCDEF0123)
    # word 0: op 0, row 0x123 at 8, cols 0x45 at 20, the low 4 bits of mask (0x7) at 28.
    # word 1: mask's 0x6 at 0, bias at 4, mode at 9, tag at 11 (16 bits), the low 5 bits of not_before at 27.
    # word 2: the other 27 bits of not_before.
    words = [
        0x7_45_123_00,
        0x6 | 0x89AB << 11 | (0xCDEF0123 & 0x1F) << 27,
        0xCDEF0123 >> 5,
    ]
    assert CODE.encode(record).tolist() == [words]
    assert CODE.decode(np.array([words], np.uint32)).tolist() == record.tolist()


def test_signed_fields_come_back_negative():
    record = TOY.make("ADD", bias=-16, mode=2)
    assert CODE.decode(CODE.encode(record))["bias"].tolist() == [-16]
    # bias is 5 bits at bit 40, two's complement: 0b10000 in word 1 at bit 8 - 4 = 4.
    assert CODE.encode(record)[0, 1] >> 4 & 0x1F == 0b10000


def test_text_of_every_kind_of_field():
    code = only("ADD row=0x10 bias=-3 mode=up tag=first not_before=9")["code"]
    assert code[["op", "row", "bias", "mode", "tag", "not_before"]].tolist() == [(1, 16, -3, 2, 0, 9)]
    assert only("unit@3,5 k=0b101")["config.unit"].tolist() == [(3, 5, 5)]
    assert only("unit@3,5")["config.unit"].tolist() == [(3, 5, 7)]  # k at its default
    assert TOY.format("code", TOY.make("LOAD", mask=255, row=2)) == ["LOAD row=2 mask=0xff"]
    assert TOY.format("config.unit", TOY.make("unit", x=1, y=2)) == ["unit@1,2"]


def test_comments_blank_lines_and_segments():
    program = TOY.assemble(
        """
        # a comment
        LOAD row=1   # another
        .segment repeat=3 label=decode
        LOAD row=2
        ADD row=3
        .segment
        LOAD row=4
        """
    )
    got = [(s.repeat, s.label, s.regions["code"]["row"].tolist()) for s in program.segments]
    assert got == [(1, "", [1]), (3, "decode", [2, 3]), (1, "", [4])]


def test_tags_are_numbered_as_they_appear_and_survive_any_order():
    program = TOY.assemble("LOAD tag=b\nLOAD tag=a\nLOAD tag=b\n")
    assert program.tags == ["b", "a"]
    assert program.text().splitlines() == ["LOAD tag=b", "LOAD tag=a", "LOAD tag=b"]
    # A mapper's list of tags may hold them in another order, and some that no command carries.
    code = np.concatenate([TOY.make("LOAD", tag=2), TOY.make("LOAD", tag=0)])
    text = Program(TOY, [Segment({"code": code})], ["x", "y", "z"]).text()
    assert text.splitlines() == [".tags x y z", "LOAD tag=z", "LOAD tag=x"]
    again = TOY.assemble(text)
    assert again.tags == ["x", "y", "z"]
    assert next(iter(again.segments)).regions["code"]["tag"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("LAOD row=1", "p.asm:2: unknown instruction 'LAOD': did you mean LOAD?"),
        ("LOAD rows=1", "p.asm:2: LOAD has no field 'rows': did you mean row?"),
        ("LOAD bias=1", "p.asm:2: LOAD has no field 'bias': allowed: cols, mask, not_before, row, tag"),
        ("LOAD row=4096", "p.asm:2: row must be in 0..4095, not 4096"),
        ("LOAD row=-1", "p.asm:2: row must be in 0..4095, not -1"),
        ("ADD bias=16", "p.asm:2: bias must be in -16..15, not 16"),
        ("LOAD row=ten", "p.asm:2: row must be an integer 0..4095, not 'ten'"),
        ("LOAD row=1.5", "p.asm:2: row must be an integer 0..4095, not '1.5'"),
        ("ADD mode=nera", "p.asm:2: mode has no 'nera': did you mean near?"),
        ("ADD mode=odd", "p.asm:2: mode has no 'odd': allowed: near, up, zero"),
        ("ADD mode=3", "p.asm:2: mode must be in 0..2, not 3"),
        ("LOAD row=1 row=2", "p.asm:2: row is given twice"),
        ("LOAD row", "p.asm:2: expected field=value, not 'row'"),
        ("LOAD row=", "p.asm:2: expected field=value, not 'row='"),
        ("unit k=1", "p.asm:2: unit takes 2 coordinates after @, not ''"),
        ("unit@1 k=1", "p.asm:2: unit takes 2 coordinates after @, not '1'"),
        ("unit@1,16", "p.asm:2: y must be in 0..15, not 16"),
        ("unit@1,2 tag=a", "p.asm:2: unit has no field 'tag': allowed: k, x, y"),
        ("LOAD@1 row=1", "p.asm:2: LOAD takes 0 coordinates after @, not '1'"),
        (".segment repeat=0", "p.asm:2: repeat must be a positive integer, not '0'"),
        (".segment repeats=2", "p.asm:2: .segment has no 'repeats': did you mean repeat?"),
    ],
)
def test_a_mistake_names_its_line(line, message):
    with pytest.raises(UserError) as error:
        TOY.assemble(f"LOAD row=1\n{line}\n", "p.asm")
    assert str(error.value) == message


def test_make_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"record code has no field 'rwo': did you mean row\?"):
        TOY.make("LOAD", rwo=1)
    with pytest.raises(ValueError, match=r"bias must be in -16\.\.15, not -17"):
        TOY.make("ADD", bias=-17)


def test_a_table_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match=r"field a must have 1\.\.63 bits, not 64"):
        Field("a", 64)
    with pytest.raises(ValueError, match="field a has 3 names for 1 bits"):
        Field("a", 1, names=("x", "y", "z"))
    with pytest.raises(ValueError, match="record code has two fields 'op'"):
        Record("code", (Field("op", 4),), (Op("GO", ()),))
    with pytest.raises(ValueError, match="operation GO reads unknown field 'b'"):
        Record("code", (Field("a", 4),), (Op("GO", ("b",)),))
    with pytest.raises(ValueError, match="record code is placed by unknown field 'x'"):
        Record("code", (Field("a", 4),), at=("x",))
    with pytest.raises(ValueError, match="mnemonic pcu is defined twice"):
        InstructionSet("t", (Record("config.pcu", (Field("a", 4),)), Record("args.pcu", (Field("a", 4),))))


# ---- any table ----------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """An instruction set of one or two record types with random fields, and records that only set what is read."""
    records = []
    for region in ("code", "config.unit")[: draw(st.integers(1, 2))]:
        fields = []
        for i in range(draw(st.integers(1, 6))):
            bits, signed = draw(st.integers(1, 63)), draw(st.booleans())
            names = () if signed or bits < 2 or draw(st.booleans()) else ("a", "b", "c")
            low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
            default = draw(st.integers(0, 2) if names else st.integers(low, high))
            base = draw(st.sampled_from([10, 16]))
            fields.append(Field(f"f{i}", bits, "", default, signed, names, base))
        every = [f.name for f in fields]
        reads = st.lists(st.sampled_from(every), unique=True).map(tuple)
        ops = tuple(Op(f"{region}{i}".upper(), draw(reads)) for i in range(draw(st.integers(0, 3))))
        at = () if ops else tuple(every[: draw(st.integers(0, len(every)))])
        records.append(Record(region, tuple(fields), ops, at, draw(st.booleans())))
    isa = InstructionSet("any", tuple(records))
    tags = draw(st.lists(st.sampled_from("pqrstuvw"), unique=True))
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        regions = {}
        for record in isa.records:
            rows = [_row(draw, record, len(tags)) for _ in range(draw(st.integers(1, 4)))]
            regions[record.region] = np.concatenate(rows)
        segments.append(Segment(regions, draw(st.integers(1, 9)), draw(st.sampled_from(["", "here"]))))
    return Program(isa, segments, tags)


def _row(draw, record, tags):
    op = draw(st.sampled_from(record.ops)) if record.ops else None
    values = {}
    for f in record.layout:
        if f.name == "op" or (op and f.name not in (*op.fields, "tag", "not_before")):
            continue
        high = len(f.names) - 1 if f.names else max(tags - 1, 0) if f.tag else f.high
        values[f.name] = draw(st.integers(f.low, high))
    return record.make(op.name if op else None, **values)


@settings(max_examples=60)
@given(tables())
def test_any_table_round_trips(program):
    isa = program.isa
    for segment in program.segments:
        for region, rows in segment.regions.items():
            record = isa.record(region)
            words = record.encode(rows)
            np.testing.assert_array_equal(record.decode(words), rows)
            # The words are the fields one after the other, as one integer.
            for row, line in zip(rows, words, strict=True):
                value = shift = 0
                for f in record.layout:
                    value |= (int(row[f.name]) % (1 << f.bits)) << shift
                    shift += f.bits
                assert value == sum(int(w) << (32 * i) for i, w in enumerate(line))
    again = isa.assemble(program.text())
    assert list(again.tags) == list(program.tags)
    for one, two in zip(program.segments, again.segments, strict=True):
        assert (one.repeat, one.label) == (two.repeat, two.label)
        for region in one.regions:
            np.testing.assert_array_equal(one.regions[region], two.regions[region])
