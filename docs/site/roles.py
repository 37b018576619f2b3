"""An extension of Griffe for docstrings in the style of transformers and PyTorch.

Sphinx's roles become links where the target has a page, and ``Example:`` opens a section, as
``Examples:`` does.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", flags=re.MULTILINE)


class Roles(Extension):
    """Replace ``:func:`name``` by a link that is plain code where nothing documents the name."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda role: _link(role, obj), text)


def _link(role: re.Match[str], obj: Object) -> str:
    name = role[2]
    try:
        path = obj.resolve(name)
    except Exception:  # an unknown name, or a parent that is not loaded
        path = name
    label = name.rpartition(".")[2] if role[1] else name
    return f'<autoref optional identifier="{path}"><code>{label}</code></autoref>'
