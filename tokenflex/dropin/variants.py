"""Subclasses that replace the class of a live model or processor, under the name of that class.

transformers reads names: it writes the class's to ``config.json``, and converts the keys of a
checkpoint only for classes of its own modules. A variant therefore has the name and the module of
its stock class; only that of a config has another name, which no registry of transformers knows as
the stock one. Copies and pickles create a variant again from its stock class.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenflex.dropin.families import Family

_Stock: Any = object  # for a type checker, super() then has any method


class Variant(_Stock):
    """Base of the mixins that change a stock class; their ``super()`` is the stock class."""

    _tokenflex_method = ""  # the mixin is only for stock classes with this method
    _tokenflex_prefix = ""  # of the name of the variant
    _tokenflex_family: Family
    _tokenflex_stock_class: Any
    _tokenflex_mixins: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        arguments = self._tokenflex_stock_class, self._tokenflex_family, self._tokenflex_mixins
        return _new, arguments, *state


@functools.cache
def variant_of(stock: Any, family: Family, mixins: tuple[type, ...]) -> Any:
    """Return a subclass of ``stock`` with the methods of ``mixins``, subclasses of Variant."""
    name = "".join(mixin._tokenflex_prefix for mixin in mixins) + stock.__name__
    body = {
        "__module__": stock.__module__,
        "__qualname__": name,
        "__doc__": stock.__doc__,
        "_tokenflex_family": family,
        "_tokenflex_stock_class": stock,
        "_tokenflex_mixins": mixins,
    }
    return type(name, (*mixins, stock), body)


def change_class(instance: Any, family: Family, *mixins: type[Variant]) -> None:
    """Replace the class of ``instance`` by a variant, with those mixins whose method it has."""
    stock: Any = type(instance)
    fitting = (m for m in mixins if not m._tokenflex_method or hasattr(stock, m._tokenflex_method))
    instance.__class__ = variant_of(stock, family, tuple(fitting))


def restore_class(instance: Any) -> None:
    """Undo :func:`change_class`."""
    instance.__class__ = instance._tokenflex_stock_class


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT or data-parallel wrapper, or the model itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_converted(model: Any) -> bool:
    """Return whether a model, or base model, has a token-adaptive projector."""
    return isinstance(getattr(model, "base_model", model), Variant)


def _new(stock: Any, family: Family, mixins: tuple[type, ...]) -> Any:
    variant = variant_of(stock, family, mixins)
    return variant.__new__(variant)
