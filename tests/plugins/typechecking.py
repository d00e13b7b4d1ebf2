"""beartype for jaxtyping's import hook, at less of its price.

jaxtyping binds the arguments of every call by Python's own slow way and checks them twice, for the
sake of shapes that arguments and result have in common: a third of what the tests of `compression`
took. Only functions that speak of arrays need it; the others get beartype alone.

The hook also wraps a function that is defined inside another one anew at every call of the outer
one, and beartype writes and compiles two checks each time. What it compiles there is not the
function but a stand-in that has its signature and does nothing, so the check of one may serve all
that are defined at the same place with the same signature.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

_with_shapes = jaxtyping.jaxtyped
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


def checked(function: Any = None, *, typechecker: Any = None) -> Any:
    """The hook's decorator: jaxtyping's way, or beartype alone where nothing has a shape."""
    if function is None:
        return partial(checked, typechecker=typechecker)
    if isinstance(function, FunctionType) and "<locals>" not in function.__qualname__:
        hints = _resolved(function)
        if hints is not None and not any(_has_shape(hint) for hint in hints.values()):
            function.__annotations__ = hints
            return beartype(function)
    return _with_shapes(function, typechecker=typechecker)


def _resolved(function: FunctionType) -> dict[str, Any] | None:
    """Annotations without strings; None where a name in them is not there yet."""
    if not any(isinstance(hint, str) for hint in function.__annotations__.values()):
        return function.__annotations__
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return None


def _has_shape(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_shape, get_args(hint)))


# By the hook's first check of all, before anything of ours is decorated.
jaxtyping.jaxtyped = checked
