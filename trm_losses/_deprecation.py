"""Names on their way out: they go on working for a while, and say what to use instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Thing = TypeVar("Thing", bound=Callable[..., Any])


def deprecated(*, since: str, removed_in: str, use: str) -> Callable[[Thing], Thing]:
    """A function that warns when it is called, or a class that warns when an object is made.

    Args:
        since: the version that warns first.
        removed_in: the version without the name, at least one minor version later.
        use: what to use instead.

    Example:
        >>> @deprecated(since="0.2", removed_in="0.3", use="new_name")
        ... def old_name():
        ...     return 1
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     old_name()
        1
        >>> print(caught[0].message)
        old_name is deprecated since 0.2 and goes in 0.3; use new_name
    """

    def mark(thing: Thing) -> Thing:
        message = f"{thing.__name__} is deprecated since {since} and goes in {removed_in}; use {use}"
        owner: Any = thing
        is_class = isinstance(thing, type)
        called = owner.__init__ if is_class else owner

        @functools.wraps(called)
        def warned(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # a warning would break the graph
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return called(*args, **kwargs)

        if is_class:
            owner.__init__ = warned
            return thing
        return warned  # type: ignore[return-value]

    return mark
