"""Where results go: files that appear whole or not at all, tables on stdout, progress on stderr."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Progress

STDOUT = "-"


def check_outputs(*paths: str | None) -> None:
    """Raises UserError, before any work begins, for an output that cannot be written or is named twice."""
    given = [p for p in paths if p is not None]
    for path in given:
        if given.count(path) > 1:
            raise UserError(f"two outputs go to {'stdout' if path == STDOUT else path}")
        if path == STDOUT:
            continue
        target = Path(path)
        if target.is_dir():
            raise UserError(f"cannot write {path}: it is a directory")
        if not target.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no directory {target.parent}")
        where = target if target.exists() and not target.is_file() else target.parent
        if not os.access(where, os.W_OK):
            raise UserError(f"cannot write {path}: permission denied")


@contextlib.contextmanager
def replacing(path: str, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write; it takes the place of `path` once it is complete. "-" is stdout.

    Raises UserError when it cannot be written.
    """
    mode, encoding = ("wb", None) if binary else ("w", "utf-8")
    if path == STDOUT:
        yield sys.stdout.buffer if binary else sys.stdout
        return
    target = Path(path)
    try:
        if target.exists() and not target.is_file():  # a pipe or a device cannot be replaced
            with target.open(mode, encoding=encoding) as file:
                yield file
            return
        target = target.resolve()  # a link stays a link
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, mode, encoding=encoding) as file:
                yield file
            Path(name).chmod(_permissions(target))
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _permissions(target: Path) -> int:
    """Those of the file to be replaced, or what the user's mask leaves of a new one's."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def read_text(path: str, what: str) -> str:
    """The text of a UTF-8 file. Raises UserError."""
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {what} {path}: not UTF-8 text") from None
    except ValueError as error:  # a NUL in the path
        raise UserError(f"cannot read {what} {path!r}: {error}") from None


def say(message: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    print(f"tilewright: {message}", file=sys.stderr, flush=True)


def show(tables: Sequence[Any]) -> None:
    """Print rich tables and lines of text to stdout, as wide as the terminal (80 columns in a pipe)."""
    from rich.console import Console

    console = Console(highlight=False, legacy_windows=False)
    with console.capture() as captured:
        for item in tables:
            console.print(item, markup=False) if isinstance(item, str) else console.print(item)
    # Without the blanks that fill the last column.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


@contextlib.contextmanager
def progress_bar(title: str, delay_s: float = 1.0) -> Iterator[Progress | None]:
    """A callback that draws a bar on stderr once the work has taken `delay_s`; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)
    began = time.monotonic()

    def advance(done: int, total: int) -> None:
        if time.monotonic() - began > delay_s:
            bar.update(task, completed=done, total=total or None)
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
