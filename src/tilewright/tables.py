"""Numbers and tables as people read them."""

import shutil

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def engineering(value: float | None, unit: str) -> str:
    """Three digits and a prefix.

    >>> engineering(0.00123456, "s"), engineering(0, "J"), engineering(None, "J")
    ('1.23 ms', '0 J', '-')
    """
    if value is None:
        return "-"
    if value == 0:
        return f"0 {unit}"
    # Compared after rounding, so that 999.9 becomes 1.00 k and not 1e+03.
    rounded = float(f"{value:.2e}")
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(rounded) >= s), (1e-12, "p"))
    scaled = rounded / scale
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def count(n: int) -> str:
    """
    >>> count(124439808), count(12)
    ('124 M', '12')
    """
    return str(n) if n < 10**4 else engineering(n, "")


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def width() -> int:
    """Columns of the terminal, as COLUMNS or the terminal says; 80 in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns


class Grid(Table):
    """Where the terminal is too narrow, names give way first, and the last column by whole words; numbers never do."""

    GAP = 2
    NAME = 12
    """Characters of a name that are always left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._fit(options.max_width)
        yield from super().__rich_console__(console, options)

    def _fit(self, room: int) -> None:
        texts = [[str(column.header), *map(str, column.cells)] for column in self.columns]
        widths = [max(map(cell_len, column)) for column in texts]
        last = len(widths) - 1
        words = max(cell_len(word) for text in texts[last] for word in text.split() or [""])
        least = widths[last] if last == 0 or self.columns[last].justify == "right" else words
        left = room - sum(widths[1:last]) - self.GAP * last - least
        if last == 0 or sum(widths) + self.GAP * last <= room or left < min(widths[0], self.NAME):
            return
        self.columns[0].max_width = min(widths[0], left)
        for column, width in zip(self.columns[1:], widths[1:], strict=True):
            if column.justify == "right":
                column.min_width = width


def grid(title: str, *columns: str) -> Table:
    """A plain table; a column's name after ">" is set to the right. The last column folds into lines."""
    table = Grid(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for i, column in enumerate(columns):
        last = i == len(columns) - 1
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    return table
