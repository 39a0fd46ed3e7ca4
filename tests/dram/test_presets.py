"""Devices: what the files say, what the loader refuses, and energy from their currents."""

from fractions import Fraction

import pytest
import yaml

from tilewright.arch.dram import check_timing, dram_presets, load_dram_preset
from tilewright.arch.dram_energy import (
    activate_energy_pj,
    background_energy_pj,
    read_energy_pj,
    refresh_energy_pj,
    write_energy_pj,
)
from tilewright.arch.errors import UserError


@pytest.mark.parametrize("name", dram_presets())
def test_every_preset_loads_with_provenance(name):
    preset = load_dram_preset(name)
    check_timing(preset.timing)
    assert preset.compile().n_banks == 16
    assert preset.organisation.row_bytes == 2048
    assert preset.organisation.accesses_per_row == 64
    assert all(q.source for q in preset.provenance.values())
    assumed = {key for key, q in preset.provenance.items() if q.kind == "assumed"}
    assert assumed <= {"timing.n_rrefd", "organisation.rows", "organisation.columns"}
    for key, ticks in preset.timing.items():
        assert preset.provenance[f"timing.{key}"].value == ticks


def test_the_1250_mv_preset():
    preset = load_dram_preset("gddr6-14000-1250mv")
    assert preset.clock.period_s == Fraction(570, 10**12)
    t = preset.timing
    assert (t["n_rcd_rd"], t["n_rcd_wr"], t["n_rp"], t["n_ras"], t["n_rc"], t["n_faw"]) == (
        30,
        20,
        30,
        60,
        90,
        43,
    )
    assert preset.vdd_v == Fraction(5, 4) and preset.currents_ma == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ras": 91}, "n_ras 91 must be at most n_rc 90"),
        ({"n_rp": 90}, "n_rp 90 must be below n_rc 90"),
        ({"n_rrd_s": 12}, "n_rrd_s 12 must be at most n_rrd_l 11"),
        ({"n_ccd_s": 5}, "n_ccd_s 5 must be at most n_ccd_l 4"),
        ({"n_wtr_s": 12}, "n_wtr_s 12 must be at most n_wtr_l 11"),
        ({"n_faw": 10}, "n_rrd_s 11 must be at most n_faw 10"),
        ({"n_rcd_rd": 61}, "n_rcd_rd 61 must be at most n_ras 60"),
        ({"n_rfc_pb": 212}, "n_rfc_pb 212 must be at most n_rfc 211"),
        # 211 + 30 + max(60, 4) = 301 is one too few.
        ({"n_refi": 301}, "n_refi 301 must be above .* = 301"),
    ],
)
def test_timings_that_contradict_each_other(change, message):
    timing = dict(load_dram_preset("gddr6-14000-1250mv").timing)
    check_timing(timing | {"n_refi": 302})
    with pytest.raises(UserError, match=message):
        check_timing(timing | change)


def altered(tmp_path, alter):
    from tilewright.arch import dram

    source = dram._PRESETS / "gddr6-14000-1250mv.yaml"
    data = yaml.safe_load(source.read_text())
    alter(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_file_in_nanoseconds_is_rounded_up_to_ticks(tmp_path):
    def alter(data):
        data["timing"]["n_rp"] |= {"value": 17.101, "unit": "ns"}  # 30.0018 ticks of 0.57 ns

    preset = load_dram_preset(altered(tmp_path, alter))
    assert preset.name == "mine" and preset.timing["n_rp"] == 31


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda d: d["timing"].update(n_rpp=d["timing"]["n_rp"]),
            "timing: unknown key 'n_rpp', did you mean n_rp?",
        ),
        (lambda d: d["timing"].pop("n_rp"), "timing.n_rp is missing"),
        (lambda d: d["timing"]["n_rp"].pop("source"), "timing.n_rp: source is missing"),
        (lambda d: d["timing"]["n_rp"].update(kind="guess"), "kind must be one of published"),
        (lambda d: d["timing"]["n_rp"].update(unit="mV"), "unit must be one of tCK"),
        (lambda d: d["timing"]["n_rp"].update(value=1.5), "timing.n_rp must be an integer, not 3/2"),
        (lambda d: d["timing"]["n_rp"].update(value="x"), "timing.n_rp: must be a finite number"),
        (lambda d: d["timing"].update(n_rp=30), "timing.n_rp: must be a mapping, not 30"),
        (lambda d: d.update(standard="GDDR66"), "unknown standard 'GDDR66', did you mean GDDR6"),
        (lambda d: d["organisation"]["rows"].update(value=0), "rows must be an integer of 1 or more, not 0"),
        (lambda d: d["organisation"]["access_bytes"].update(value=48), "access_bytes 48 must divide the row"),
        (lambda d: d["timing"]["n_ras"].update(value=91), "n_ras 91 must be at most n_rc 90"),
        (lambda d: d["clock_period"].update(value=0), "clock_period must be above 0"),
    ],
)
def test_malformed_files(tmp_path, alter, message):
    with pytest.raises(UserError, match=message):
        load_dram_preset(altered(tmp_path, alter))


def test_unreadable_files(tmp_path):
    with pytest.raises(
        UserError, match=r"unknown DRAM preset 'gddr6-14000-1250v', did you mean gddr6-14000-1250mv\?"
    ):
        load_dram_preset("gddr6-14000-1250v")
    with pytest.raises(UserError, match="No such file"):
        load_dram_preset(str(tmp_path / "none.yaml"))
    twice = tmp_path / "twice.yaml"
    twice.write_text("title: a\ntitle: b\n")
    with pytest.raises(UserError, match=r"twice.yaml:2: key title is given twice"):
        load_dram_preset(str(twice))
    twice.write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_dram_preset(str(twice))


def test_energy_of_the_dramsim3_preset():
    preset = load_dram_preset("gddr6-8gb-x16-dramsim3")
    i, vdd = preset.currents_ma, preset.vdd_v

    def ns(key):
        return preset.timing[key] * Fraction("0.66")

    # 1.35 V x (71 x 78 - 61 x 54 - 60 x 24 = 804 mA ticks) x 0.66 ns
    act = activate_energy_pj(vdd, i["idd0"], i["idd3n"], i["idd2n"], ns("n_rc"), ns("n_ras"))
    assert act == Fraction("716.364")
    # 1.35 x (248 - 61) x 1 tick x 0.66
    assert read_energy_pj(vdd, i["idd4r"], i["idd3n"], ns("n_bl")) == Fraction("166.617")
    # 1.35 x (231 - 61) x 0.66
    assert write_energy_pj(vdd, i["idd4w"], i["idd3n"], ns("n_bl")) == Fraction("151.47")
    # 1.35 x (286 - 61) x 126 x 0.66
    assert refresh_energy_pj(vdd, i["idd5ab"], i["idd3n"], ns("n_rfc")) == Fraction("25259.85")
    # A microsecond with a row open: 1.35 x 61 x 1000
    assert background_energy_pj(vdd, i["idd3n"], Fraction(1000)) == 82350
    # A per-bank refresh that draws less than standby is a mistake of the datasheet, not a gain.
    with pytest.raises(UserError, match="idd5 45 mA must be at least idd3n 61 mA"):
        refresh_energy_pj(vdd, i["idd5pb"], i["idd3n"], ns("n_rfc_pb"))


def test_energy_refuses_contradictions_and_takes_floats():
    assert read_energy_pj(1.0, 150.0, 50.0, 2.0) == 200.0
    with pytest.raises(UserError, match=r"idd0 50\.0 mA must be at least the mean"):
        activate_energy_pj(1.0, 50.0, 60.0, 55.0, 45.0, 30.0)
    with pytest.raises(UserError, match=r"t_rc_ns 20\.0 must be at least t_ras_ns 30\.0"):
        activate_energy_pj(1.0, 50.0, 60.0, 55.0, 20.0, 30.0)
    with pytest.raises(UserError, match="must be 0 or more"):
        background_energy_pj(1.0, 60.0, -1.0)
