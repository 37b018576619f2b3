"""Subclasses that stand in for the class of a live object, under its name.

transformers reads names: the class's in ``config.json``, its module's for the conversion of
checkpoint keys. A variant therefore has those of the class it stands for, and copies and pickles
make it again from that class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenflex.dropin.families import Family


def variant_of(
    stock: Any, family: Family, factory: Callable[[Any, Family], Any], methods: dict[str, Any]
) -> Any:
    """A subclass of ``stock`` with ``methods``.

    Args:
        stock: the class it stands for.
        family: what its methods read as ``_tokenflex_family``.
        factory: the function of a module that makes this variant from ``stock`` and ``family``.
        methods: what is overridden.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = stock.__reduce_ex__(self, protocol)
        return _new, (factory, stock, family), *state

    body = {
        **methods,
        "__reduce_ex__": __reduce_ex__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_tokenflex_family": family,
        "_tokenflex_stock_class": stock,
    }
    return type(stock.__name__, (stock,), body)


def _new(factory: Callable[[Any, Family], Any], stock: Any, family: Family) -> Any:
    variant = factory(stock, family)
    return variant.__new__(variant)
