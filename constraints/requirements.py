"""Print what pyproject.toml requires, with all extras, for ``pip install --requirement``.

The environments of ``make test-versions`` run the working tree, so they need no build of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
project = tomllib.loads(text)["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
print(*sorted({line for group in groups for line in group if "tokenflex[" not in line}), sep="\n")
