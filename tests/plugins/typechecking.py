"""beartype for jaxtyping's import hook, with one check per signature.

The hook wraps a function that is defined inside another one anew at every call of the outer one,
and beartype writes and compiles two checks each time: a tenth of the suite. What it compiles is not
the function but a stand-in that has its signature and does nothing, so the check of one may serve
all that are defined at the same place with the same signature.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checks: dict[tuple[str, str, inspect.Signature], Callable[..., Any]] = {}


def beartype_once(stand_in: Any) -> Any:
    """`stand_in`, a function or a class, with its arguments and result checked by beartype."""
    if inspect.isclass(stand_in):
        return beartype(stand_in)
    key = (stand_in.__module__, stand_in.__qualname__, inspect.signature(stand_in))
    try:
        if key not in _checks:
            _checks[key] = beartype(stand_in)
    except TypeError:  # a default without a hash
        return beartype(stand_in)
    return _checks[key]
