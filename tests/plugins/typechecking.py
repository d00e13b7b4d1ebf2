"""beartype for jaxtyping's import hook, at less of its price.

jaxtyping binds the arguments of every call by Python's own slow way and checks them twice, for the
sake of shapes that arguments and result have in common: a third of what the tests of `compression`
took. beartype's check of a call looks at both, so that within one memo of shapes it is enough;
and functions that do not speak of arrays need no memo.

The hook also wraps a function that is defined inside another one anew at every call of the outer
one, and beartype would write and compile its check each time. The check depends on the function's
code and hints alone: it is compiled once, and calls whichever function was defined last.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

_with_shapes = jaxtyping.jaxtyped
_memo = _with_shapes("context")
_CHECKED = "__beartype_func"
"""The argument by which a check that beartype wrote is told what it calls."""


@dataclasses.dataclass(frozen=True)
class _Check:
    """What was compiled for one function, to serve others of its code."""

    hints: dict[str, Any]
    compiled: FunctionType
    has_shapes: bool

    def around(self, function: FunctionType) -> Callable[..., Any]:
        compiled = self.compiled
        again = FunctionType(
            compiled.__code__, compiled.__globals__, compiled.__name__, compiled.__defaults__
        )
        again.__kwdefaults__ = (compiled.__kwdefaults__ or {}) | {_CHECKED: function}
        again = wraps(function)(again)
        return _within_a_memo(again) if self.has_shapes else again


_checks: dict[CodeType, _Check] = {}


def beartype_once(stand_in: Any) -> Any:
    """The checker that the hook is told; what `checked` leaves to jaxtyping comes here."""
    return beartype(stand_in)


def checked(function: Any = None, *, typechecker: Any = None) -> Any:
    """The hook's decorator: beartype, and jaxtyping's memo where something has a shape."""
    if function is None:
        return partial(checked, typechecker=typechecker)
    if inspect.isclass(function):
        return _with_checked_fields(function)
    if not isinstance(function, FunctionType):
        return _with_shapes(function, typechecker=typechecker)
    if not function.__annotations__:
        return function
    known = _checks.get(function.__code__)
    if known is not None and known.hints == function.__annotations__:
        return known.around(function)
    return _checked_anew(function, typechecker)


def _checked_anew(function: FunctionType, typechecker: Any) -> Any:
    written, hints = dict(function.__annotations__), _resolved(function)
    shapes = [shape for hint in (hints or {}).values() for shape in _shapes(hint)]
    # Shapes that are computed from arguments need these bound; what a generator yields comes when
    # the memo of its call is gone. Both are rare, and jaxtyping knows how.
    is_special = any("{" in shape for shape in shapes) or inspect.isgeneratorfunction(function)
    if hints is None or (shapes and is_special):
        return _with_shapes(function, typechecker=typechecker)
    function.__annotations__ = hints
    compiled = beartype(function)
    if "<locals>" in function.__qualname__ and _CHECKED in (compiled.__kwdefaults__ or {}):
        _checks[function.__code__] = _Check(written, compiled, bool(shapes))
    return _within_a_memo(compiled) if shapes else compiled


def _within_a_memo(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check` with one memory of the sizes that its arguments and its result name."""

    @wraps(check)
    def within(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with _memo:
            return check(*args, **kwargs)

    return within


def _with_checked_fields(cls: type[Any]) -> type[Any]:
    made = vars(cls).get("__init__")
    if dataclasses.is_dataclass(cls) and made is not None and not hasattr(made, "__wrapped__"):
        cls.__init__ = checked(made)
    return cls


def _resolved(function: FunctionType) -> dict[str, Any] | None:
    """Annotations without strings; None where a name in them is not there yet."""
    if not any(isinstance(hint, str) for hint in function.__annotations__.values()):
        return function.__annotations__
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return None


def _shapes(hint: Any) -> list[str]:
    """Those of the arrays that a hint speaks of, as they are written in it."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return [str(hint.dim_str)]
    return [shape for part in get_args(hint) for shape in _shapes(part)]


# By the hook's first check of all, before anything of ours is decorated.
jaxtyping.jaxtyped = checked
