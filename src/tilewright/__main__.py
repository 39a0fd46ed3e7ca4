"""Entry point of `tilewright` and `python -m tilewright`."""

import os
import sys
from collections.abc import Sequence

import typer

from tilewright.arch.errors import UserError
from tilewright.cli import app

# Typer has its own copy of click or uses the installed one, as its version goes: the base of its errors.
_CLICK_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for a mismatch that was looked for, 2 for bad input, 130 for Ctrl-C.

    Bad input is one line on stderr; any traceback is a bug.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="tilewright", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except Exception as error:
        if not isinstance(error, _CLICK_ERROR):
            raise
        code = _fail(f"{error.format_message()}")  # type: ignore[attr-defined]
    if code == 130:
        print("tilewright: interrupted", file=sys.stderr)
    if code == 141:
        # The reader has gone: nothing is left to be said, not even by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str) -> int:
    print(f"tilewright: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
