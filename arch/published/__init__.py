"""What others have published about a target: rows of data with source and kind, to be set beside our own.

One file `<slug>.yaml` for a target. Nothing in a model is fitted to these rows, and no model reads them.
"""

from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import model_validator

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.spec import Exact, Section, check_yaml

# published: read in the original; secondary: somebody else's note of it; derived: arithmetic on published values;
# recalled: from memory of the original, confirmed by nobody.
RowKind = Literal["published", "secondary", "derived", "recalled"]


class PublishedRow(Section):
    """A figure of the original: from `low` to `high` (one value: both equal), or `words` where it gives no number."""

    title: str
    unit: str
    kind: RowKind
    source: str
    low: Exact | None = None
    high: Exact | None = None
    words: str = ""

    @model_validator(mode="after")
    def _check(self) -> "PublishedRow":
        if self.low is None or self.high is None:
            if not self.words or self.low is not self.high:
                raise ValueError("low and high, or words")
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Published(Section):
    """The rows of a target by key. `generate` is the number of tokens that the original generates."""

    target: str
    source: str
    generate: int
    rows: dict[str, PublishedRow]


def _files() -> dict[str, Path]:
    folder = Path(str(resources.files("tilewright.arch.published")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def published(slug: str) -> Published:
    """The published rows of a target. Raises UserError for a target that has none."""
    files = _files()
    if slug not in files:
        raise UserError(f"no published rows for {slug!r}: {nearest(slug, files)}")
    text = files[slug].read_text("utf-8")
    check_yaml(text, files[slug].name)
    return Published.model_validate(yaml.safe_load(text))
