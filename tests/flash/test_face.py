"""`tilewright flash`: tables, JSON, and one line for every mistake."""

import json

import pytest

from tests.face.invoke import refused, tilewright
from tilewright.arch.flash import load_flash
from tilewright.devices import spec_hash

HEADER = "arrival_ns,op,channel,chip,die,plane,block,page\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def test_json_of_two_reads(trace):
    path = trace(HEADER + "0,read,0,0,0,0,0,0\n0,read,1,0,0,0,0,0\n")
    ran = tilewright("flash", "mqsim", "--trace", path, "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["cycles"] == 99_891 and found["tick_s"] == "1/1000000000"  # 290 + 75000 + 24601
    assert found["time_s"] == pytest.approx(99.891e-6)
    assert found["operations_per_s"] == pytest.approx(2 / 99.891e-6)
    assert found["kinds"]["read"]["latency_ticks"] == {
        "min": 99_891, "mean": 99_891, "p50": 99_891, "p90": 99_891, "p99": 99_891, "p99.9": 99_891, "max": 99_891,
    }  # fmt: skip
    assert found["kinds"]["erase"]["latency_ticks"] == {}
    assert found["units"]["channel 1"] == {
        "busy": 24_891,
        "stalls": dict.fromkeys(("transfer", "suspended", "sibling", "bus"), 0)
        | {"array": 75_000, "host": 0, "idle": 0},
    }
    assert found["channels"]["channel 1"] == {"bytes_read": 8192, "bytes_programmed": 0}
    assert found["dies"]["die 1.0.0"] == {"reads": 1, "programs": 0, "erases": 0}
    assert found["counters"]["bytes"] == 16_384
    assert found["spec_hash"] == spec_hash(load_flash("mqsim"))
    assert found["spans"] == [{"name": "read", "start": 0, "end": 99_891}]
    assert found["assumed"] == load_flash("mqsim").assumed()


def test_tables_and_overrides(trace, tmp_path):
    path = trace(
        "arrival_ns,op,logical_page\n" + "".join(f"0,read,{i}\n" for i in range(64)) + "0,program,3\n"
    )
    out = tmp_path / "r.json"
    sets = ["--set", "geometry.channels=1", "--set", "geometry.chips_per_channel=1"]
    ran = tilewright("flash", "mqsim", "--trace", path, "--json", out, *sets)
    assert ran.code == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert any(line.startswith("read ") for line in lines) and any(
        line.startswith("program ") for line in lines
    )
    assert not any(line.startswith("erase ") for line in lines)
    assert any(line.startswith("channel 0 ") for line in lines)
    assert any(line.startswith("die 0.0.1 ") for line in lines)
    assert any("32 of 33 commands are multi-plane" in line for line in lines)
    found = json.loads(out.read_text())
    assert list(found["units"]) == ["channel 0", "die 0.0.0", "die 0.0.1"]
    # The fixed 48 dies of a larger device are rows by channel.
    ran = tilewright("flash", "mqsim", "--trace", path)
    assert any(line.startswith("dies 7.* (8)") for line in ran.out.splitlines())


def test_mistakes(trace, tmp_path):
    good = trace(HEADER + "0,read,0,0,0,0,0,0\n")
    assert refused("flash", "mqsin", "--trace", good).startswith(
        "unknown flash preset 'mqsin': did you mean mqsim?"
    )
    assert "Missing option '--trace'" in refused("flash", "mqsim")
    assert (
        refused("flash", "mqsim", "--trace", "no.csv")
        == "cannot read trace no.csv: No such file or directory"
    )
    assert "there is no directory" in refused(
        "flash", "mqsim", "--trace", good, "--json", tmp_path / "a" / "b"
    )
    assert refused("flash", "mqsim", "--trace", good, "--set", "geometry.chanels=3").endswith(
        "did you mean channels?"
    )
    bad = trace(HEADER + "# twice\n0,program,0,0,0,0,0,4\n5,program,0,0,0,0,0,4\n")
    assert refused("flash", "mqsim", "--trace", bad) == (
        f"{bad}:4: page 4 of channel 0 chip 0 die 0 plane 0 block 0 is programmed already: erase the block first"
    )
