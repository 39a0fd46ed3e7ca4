"""The examples of README.md and docs/ are run: what a page shows is what a reader gets.

In a ```console block each line `$ tilewright ...` is run, in a folder that the page's blocks share; `$ cat > F`
with the lines up to `EOF` writes a file. The lines below a command must appear in its output in that order,
`...` stands for anything, in a line or for any lines. A block ```console no-run holds commands that take too
long or set up the checkout (make, pip, git). ```python blocks are doctests or run as they are; with `needs=MODULE`
behind the word only where that module is installed.
"""

import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
MAX_NO_RUN = 3  # in a page


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the words after its fence, its text and first line's number."""

    info: tuple[str, ...]
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    out, start, fence = [], 0, ""
    lines = page.splitlines()
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*(`{3,})(.*)", line)
        if mark and not fence:
            fence, info, start = mark[1], tuple(mark[2].split()), number
        elif mark and mark[1] == fence and not mark[2].strip():
            out.append(Block(info, "\n".join(lines[start : number - 1]) + "\n", start + 1))
            fence = ""
    assert not fence, f"line {start}: the block is not closed"
    return out


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines below it) of a console block; a trailing backslash joins lines."""
    out: list[tuple[str, list[str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            out.append((line[2:], []))
        elif out:
            out[-1][1].append(line.rstrip())
    return out


def missing(expected: list[str], output: str) -> str | None:
    """The first expected line that does not appear after the ones before it; spaces count as one."""
    have = [" ".join(line.split()) for line in output.splitlines()]
    at = 0
    for line in (" ".join(e.split()) for e in expected):
        if line in ("", "..."):
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("...")))
        while at < len(have) and not pattern.fullmatch(have[at]):
            at += 1
        if at == len(have):
            return line
        at += 1
    return None


def run(command: str, below: list[str], folder: Path) -> None:
    """Run one command of a page in `folder`; AssertionError where its output is not what the page shows."""
    heredoc = re.fullmatch(r"cat > ([\w.-]+) <<\s*'?EOF'?", command)
    if heredoc:
        end = below.index("EOF")
        (folder / heredoc[1]).write_text("\n".join(below[:end]) + "\n")
        return
    if re.fullmatch(r"cat [\w.-]+", command):
        output, code = (folder / command[4:]).read_text(), 0
    else:
        program, *arguments = shlex.split(command)
        assert program == "tilewright", f"{command}: only tilewright and cat are run; tag the block no-run"
        done = subprocess.run(
            [sys.executable, "-m", "tilewright", *arguments],
            check=False, cwd=folder, capture_output=True, text=True, timeout=300,
            env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
        )  # fmt: skip
        output, code = done.stdout + done.stderr, done.returncode
    absent = missing(below, output)
    assert absent is None, f"$ {command}\nthe page shows: {absent}\nthe output is:\n{output}"
    shows_error = any(line.startswith(("error:", "tilewright:")) for line in below)
    assert code == 0 or shows_error, f"$ {command}\nexit code {code}:\n{output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_examples_of_a_page(page, tmp_path):
    skipped = 0
    for block in blocks(page.read_text("utf-8")):
        if block.info[:1] == ("console",):
            if "no-run" in block.info:
                skipped += 1
                continue
            assert commands(block.text), f"{page.name}:{block.line}: a console block without a command"
            for command, below in commands(block.text):
                run(command, below, tmp_path)
        elif block.info[:1] == ("python",) and _installed(block.info[1:]):
            _python(block, f"{page.name}:{block.line}", tmp_path)
    assert skipped <= MAX_NO_RUN, f"{page.name} has {skipped} blocks that nobody runs"


def _installed(words: tuple[str, ...]) -> bool:
    """Whether every module named by a word `needs=MODULE` is there; a word of another kind fails."""
    assert all(word.startswith("needs=") for word in words), f"unknown words behind python: {' '.join(words)}"
    return all(importlib.util.find_spec(word.removeprefix("needs=")) is not None for word in words)


def _python(block: Block, name: str, folder: Path) -> None:
    if ">>>" in block.text:
        test = doctest.DocTestParser().get_doctest(block.text, {}, name, name, block.line)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        report: list[str] = []
        runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)
        return
    done = subprocess.run(
        [sys.executable, "-c", block.text],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{name}: {done.stderr}"


def test_links_between_pages_resolve():
    for page in PAGES + [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- the checker itself -------------------------------------------------------------------------------

PAGE = """\
Text.

```console
$ cat > a.yaml <<EOF
base: x
EOF
$ cat a.yaml
base: ...
```

````console no-run
$ make demo
```
````
"""


def test_blocks_of_a_page():
    first, second = blocks(PAGE)
    assert (first.info, first.line) == (("console",), 4)
    assert [c for c, _ in commands(first.text)] == ["cat > a.yaml <<EOF", "cat a.yaml"]
    assert second.info == ("console", "no-run") and second.text == "$ make demo\n```\n"
    with pytest.raises(AssertionError, match="line 1: the block is not closed"):
        blocks("```console\n$ x\n")


@pytest.mark.parametrize(
    ("expected", "absent"),
    [
        (["total 12 ms"], None),
        (["total   12 ms", "", "..."], None),
        (["a", "...", "total 12 ms"], None),
        (["total ... ms"], None),
        (["total 13 ms"], "total 13 ms"),
        (["total 12"], "total 12"),
        (["total 12 ms", "a"], "a"),  # order counts
        (["a", "a"], "a"),  # once is not twice
    ],
)
def test_lines_must_appear_in_order(expected, absent):
    assert missing(expected, "  a\nb\ntotal  12 ms\n") == absent


def test_a_wrong_example_fails(tmp_path):
    for command, below in commands(blocks(PAGE)[0].text):
        run(command, below, tmp_path)
    with pytest.raises(AssertionError, match="the page shows: base: y"):
        run("cat a.yaml", ["base: y"], tmp_path)
    with pytest.raises(AssertionError, match="only tilewright and cat are run"):
        run("make demo", [], tmp_path)
    with pytest.raises(AssertionError, match="Expected"):
        _python(Block(("python",), ">>> 1 + 1\n3\n", 1), "page", tmp_path)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        _python(Block(("python",), "1 / 0\n", 1), "page", tmp_path)
    assert _installed(("needs=json",)) and not _installed(("needs=json", "needs=no_such_module"))
    with pytest.raises(AssertionError, match="unknown words behind python: no-run"):
        _installed(("no-run",))
