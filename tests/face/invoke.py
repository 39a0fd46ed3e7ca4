"""The command line, called in this process."""

import contextlib
import io
import json
from typing import NamedTuple

from tilewright.__main__ import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def tilewright(*arguments: object) -> Ran:
    """Exit code, stdout and stderr of a command."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    out.seek(0)
    return Ran(code or 0, out.read(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line with which a command refuses its input."""
    ran = tilewright(*arguments)
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.startswith("tilewright: ") and ran.err.count("\n") == 1, ran.err
    return ran.err.removeprefix("tilewright: ").rstrip("\n")


def tiny_model(folder, **changes: object) -> str:
    """The path of a GPT-2 small enough to run in no time; a change to None leaves the key out."""
    config = {
        "model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_ctx": 16, "tie_word_embeddings": True,
    } | changes  # fmt: skip
    path = folder / "tiny.json"
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(path)
