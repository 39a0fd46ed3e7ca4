"""Errors that are the user's to mend: one line, what and where, the bad value, what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input. The face prints the message on one line and exits with 2."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name: the closest known one, or all of them.

    >>> nearest("chanels", ["channels", "banks"])
    'did you mean channels?'
    >>> nearest("zzz", ["channels", "banks"])
    'allowed: banks, channels'
    """
    names = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "allowed: " + ", ".join(names)
