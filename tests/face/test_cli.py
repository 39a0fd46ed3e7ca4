"""The command line itself: help without rooms, exit codes, one line for every mistake, outputs whole or absent."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.face.invoke import refused, tilewright, tiny_model
from tilewright import __version__
from tilewright.arch import registry
from tilewright.arch import spec as specs

PROCESS = [sys.executable, "-m", "tilewright"]


def test_help_loads_neither_numba_nor_a_target():
    probe = """
import sys
from tilewright.__main__ import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
loaded = set(sys.modules)
rooms = [m for m in loaded if m.startswith(("tilewright.sim", "tilewright.rtl", "tilewright.mappers"))]
targets = [m for m in loaded if m.startswith("tilewright.") and m.rpartition(".")[2] in ("pim", "lut", "rdu", "csd")]
heavy = loaded & {"numba", "numpy", "amaranth", "pydantic"}
assert not (rooms or targets or heavy), (rooms, targets, heavy)
"""
    done = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout and "verify" in done.stdout


def test_version():
    assert tilewright("--version") == (0, f"tilewright {__version__}\n", "")


def test_without_arguments_it_helps():
    ran = tilewright()
    assert ran.code == 0 and "Usage: tilewright" in ran.out


@pytest.mark.parametrize("command", ["list", "show", "run", "exec", "verify", "rtl", "reproduce", "flash"])
def test_every_command_has_help(command):
    ran = tilewright(command, "--help")
    assert ran.code == 0 and f"Usage: tilewright {command}" in ran.out


@pytest.mark.parametrize("command", ["tables", "dram", "sweep"])
def test_what_is_not_there_is_no_command(command):
    assert command in refused(command)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("show pim-gtp", "'pim-gtp': did you mean pim-gpt?"),
        ("show pim-gpt --set dram.row=1", "unknown key dram.row: did you mean rows?"),
        ("show pim-gpt --set chanels=1", "unknown key chanels: did you mean channels?"),
        ("show pim-gpt --set channels=eight", "channels must be a valid integer, not 'eight'"),
        ("show pim-gpt --set dram.timing=4", "dram.timing must be a section of keys, not 4"),
        ("show pim-gpt --set channels=0", "channels must be greater than or equal to 1, not 0"),
        ("show pim-gpt --set dram.timing.t_rp_ns=-1", "dram.timing.t_rp_ns must be greater than 0, not -1"),
        ("show pim-gpt --set dram.row_bytes=100", "row_bytes 100 must be a multiple of column_bytes 32"),
        ("show pim-gpt --set pim.global_buffer_bytes=33", "pim.global_buffer_bytes 33 must be a multiple of"),
        ("show pim-gpt --set dram.timing.t_refi_ns=500", "t_refi_ns is 1000 ticks, too short"),
        ("show pim-gpt --set channels", "expected KEY.PATH=VALUE"),
        ("show pim-gpt --json --schema", "exclude each other"),
        ("show nowhere.yaml", "cannot read nowhere.yaml: No such file"),
        ("show ./", "cannot read .: Is a directory"),
        ("run pim-gpt --model gpt2-x", "did you mean gpt2-xl?"),
        ("run pim-gpt --model gpt2-xl --generate 2000", "1024 positions"),
        ("run t4 --model gpt2-xl --generate 2000", "1024 positions"),
        ("run pim-gpt --model llama-2-70b", "llama-2-70b does not fit pim-gpt: needs "),
        ("run t4 --model llama-2-70b", "122.0 GB more than its memory"),
        ("run pim-gpt --model bert-base", "encoders"),
        ("run pim-gpt --model gpt2-xl --generate 0", "nothing to run"),
        ("run pim-gpt --model gpt2-xl --batch 0", "--batch must be in 1.."),
        ("run pim-gpt --model gpt2-xl --context=-1", "--context must be in 0.."),
        ("run pim-gpt --model gpt2-xl --spans both", "--spans"),
        ("run pim-gpt --model gpt2-xl --json - --csv -", "two outputs go to stdout"),
        ("run pim-gpt --model gpt2-xl --json nowhere/run.json", "no directory nowhere"),
        ("run pim-gpt --model gpt2-xl --json .", "it is a directory"),
        ("run pim-gpt gddr6-aim --model gpt2-xl --mapping-out m", "exactly one mapped spec, not 2"),
        ("run pim-gpt --model gpt2-xl --mapping nowhere", "cannot read mapping nowhere"),
        ("run pim-gpt", "Missing option '--model'"),
        ("run", "Missing argument"),
        ("exec pim-gpt nowhere.asm", "cannot read program nowhere.asm"),
        ("exec pim-gpt .", "cannot read program .: Is a directory"),
        ("rtl t4 -o -", "unknown spec 't4'"),
        ("verify nothing", "'nothing' is no target, spec or replay file"),
        ("verify pim --specs 0", "--specs must be at least 1"),
        ("lst", "No such command 'lst'"),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    assert words in refused(*arguments.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: pim-gpt\nchanels: 4\n", "s.yaml:2: unknown key chanels: did you mean channels?"),
        ("base: pim-gpt\nchannels: 0\n", "s.yaml:2: channels must be greater than or equal to 1, not 0"),
        ("base: pim-gpt\ndram: {rows: wide}\n", "s.yaml:2: dram.rows must be a valid integer, not 'wide'"),
        ("a: &a [1, 2]\nb: [*a, *a]\n", "s.yaml:1: YAML anchors and aliases are not allowed"),
        ("base: pim-gpt\nbase: t4\n", "s.yaml:2: key base is given twice"),
        ("base: s.yaml\n", "based on itself"),
        ("base: [\n", "not valid YAML"),
        ("", "the file is empty"),
        ("target: gpu\n", "unknown target 'gpu'"),
        ("name: x\n", "key target is missing"),
        ("[" * 50, "nested deeper than 12"),
        ("a: 1\n---\nb: 2\n", "second YAML document"),
    ],
)
def test_a_mistake_in_a_spec_file(tmp_path, text, words):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert words in refused("show", path)


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(bytes(range(256)))
    assert "not UTF-8 text" in refused("show", path)
    assert "not UTF-8 text" in refused("exec", "pim-gpt", path)
    assert "not UTF-8 text" in refused("run", "pim-gpt", "--model", path)
    assert "not UTF-8 text" in refused("run", "pim-gpt", "--model", "gpt2-small", "--mapping", path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_forbidden_file_is_refused(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("base: pim-gpt\n")
    path.chmod(0)
    assert "Permission denied" in refused("show", path)


def test_a_model_without_its_shape(tmp_path):
    assert "n_embd" in refused("run", "pim-gpt", "--model", tiny_model(tmp_path, n_embd=None))


def test_a_bomb_as_mapping(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("a: &a [x, x]\nb: &b [*a, *a]\n")
    assert "anchors and aliases" in refused("run", "pim-gpt", "--model", "gpt2-small", "--mapping", path)


def test_list_names_everything():
    ran = tilewright("list")
    for name in ("pim-gpt", "gddr6-aim", "t4", "xeon-6154", "gpt2-xl", "llama-3-8b", "gddr6-14000-1250mv"):
        assert name in ran.out


def test_show_says_where_a_value_comes_from(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = tilewright("show", "pim-gpt", "--set", "dram.timing.t_rp_ns=13.25")
    line = next(row for row in ran.out.splitlines() if row.startswith("t_rp_ns"))
    assert line.split() == ["t_rp_ns", "13.25", "ns", "assumed", "set", "on", "the", "command", "line"]
    # ceil(13.25 / 0.5) ticks
    assert ["n_rp", "27"] in [row.split() for row in ran.out.splitlines()]
    assert f"assumed ({len(registry.load_spec('pim-gpt').assumed())} of " in ran.out


def test_show_json_has_every_value_with_its_provenance():
    document = json.loads(tilewright("show", "pim-gpt", "--json").out)
    assert document["values"]["channels"]["value"] == 8
    assert document["values"]["tick_ns"] == {
        "value": 0.5, "unit": "ns", "kind": "derived",
        "source": "half a cycle of the 1 GHz device clock, as the GDDR6-AiM table counts",
        "where": document["values"]["tick_ns"]["where"],
    }  # fmt: skip
    assert "dram.rows" in document["assumed"] and "channels" not in document["assumed"]
    assert len(document["spec_hash"]) == 64


def test_equal_machines_have_equal_hashes(tmp_path):
    def hash_of(*arguments):
        return json.loads(tilewright("show", *arguments, "--json").out)["spec_hash"]

    path = tmp_path / "another-name.yaml"
    path.write_text("base: pim-gpt\n")
    assert hash_of("pim-gpt") == hash_of(path)
    assert hash_of("pim-gpt") != hash_of("pim-gpt", "--set", "channels=4")


def test_schema_knows_the_preset():
    schema = json.loads(tilewright("show", "pim-gpt", "--schema").out)
    assert {"base", "channels", "dram", "target"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False and "required" not in schema
    rows = schema["$defs"]["DramSection"]["properties"]["rows"]["anyOf"]
    assert rows[0]["type"] == "integer" and rows[1]["properties"]["value"]["type"] == "integer"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["list", "show pim-gpt", "run pim-gpt gddr6-aim t4 --model gpt2-small"])
def test_tables_fit_the_terminal_without_colour(monkeypatch, columns, command):
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = tilewright(*command.split())
    assert ran.code == 0 and "\x1b" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= columns


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("what was there")
    monkeypatch.setattr("tilewright.report._write_result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tilewright("run", "t4", "--model", "gpt2-small", "--json", path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m tilewright list | head -n 1"
    done = subprocess.run(command, check=False, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Specs") and done.stderr == ""


def test_interrupt_ends_with_one_line(tmp_path):
    out = tmp_path / "run.json"
    arguments = [
        "run",
        "pim-gpt",
        "--model",
        "gpt2-xl",
        "--generate",
        "1000",
        "--no-fold",
        "--json",
        str(out),
    ]
    process = subprocess.Popen([*PROCESS, *arguments], stdout=-1, stderr=-1, text=True)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if "compiling" not in line]
    assert (process.returncode, stdout, lines) == (130, "", ["tilewright: interrupted"])
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_a_command_loads(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tilewright.__main__.app", interrupted)
    assert tilewright("list") == (130, "", "tilewright: interrupted\n")


def test_every_preset_can_be_shown():
    for slug in ("pim", "system"):
        for name in specs.presets(slug):
            assert tilewright("show", name).code == 0
