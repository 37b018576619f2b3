"""Imports run one way: between packages, between the rooms of ``tokenflex``, between modules.

Rooms are the modules and folders right under ``tokenflex/``. Imports are read from the source,
including those inside of functions and ``if TYPE_CHECKING``, and modules named by a constant
string for ``importlib.import_module``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "tokenflex_kernels": set(),
    "tokenflex": {"tokenflex_kernels"},
    "benchmarks": {"tokenflex_kernels", "tokenflex"},
    "experiments": {"tokenflex_kernels", "tokenflex", "benchmarks"},
}
"""Each package and the packages it may import. ``tests`` may import all of them."""

ROOMS = (
    "version",
    "errors",
    "terminal",
    "interruption",
    "locks",
    "files",
    "hub",
    "images",
    "counts",
    "videos",
    "prompts",
    "positions",
    "plot_labels",
    "plots",
    "projector",
    "models",
    "data",
    "digits",
    "reading",
    "formats",
    "evaluation",
    "routing",
    "answers",
    "dropin",
    "packing",
    "training",
    "checkpoints",
    "serving",
    "harnesses",
    "cli",
    "__main__",
)
"""The rooms of ``tokenflex``, lowest first; each may import those before it."""

REGISTRIES = {
    "benchmarks.peers",
    "tokenflex.cli",
    "tokenflex.formats",
    "tokenflex.harnesses.driver",
    "tokenflex.routing.policies",
}
"""Modules that import others by a name that they compute."""

DOORS = {"tokenflex", "tokenflex._auto_classes"}
"""Load public classes on demand. They may name any room, and no room imports them."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Every module of the packages, and its file."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {module_name(path): path for path in paths}


def modules_named_in(tree: ast.AST, name: str, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = known[name].name == "__init__.py"
                parents = name.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known or alias.name.startswith("_") else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of the packages that it imports."""
    found = {}
    for name, path in sources().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = set(modules_named_in(tree, name, sources()))
        found[name] = {one for one in named if one.partition(".")[0] in {*PACKAGES, "tests"}}
    return found


def room_of(module: str) -> str | None:
    """The room of a module of ``tokenflex``; None for the package itself and other packages."""
    package, _, inner = module.partition(".")
    return inner.partition(".")[0] if package == "tokenflex" and inner else None


def arrows(wrong) -> list[str]:
    """Imports for which ``wrong(module, imported)`` holds."""
    pairs = ((name, other) for name, others in imports().items() for other in others)
    return sorted(f"{name} imports {other}" for name, other in pairs if wrong(name, other))


def test_packages_import_those_below_them():
    def wrong(name: str, other: str) -> bool:
        package, imported = name.partition(".")[0], other.partition(".")[0]
        return imported != package and imported not in PACKAGES[package]

    assert arrows(wrong) == []


def test_only_registries_import_by_name():
    """Others would hide an arrow: by a variable, an f-string, another name of the function."""

    def names(tree: ast.AST) -> set[str]:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        calls = [c for c in calls if ast.unparse(c.func).endswith("import_module")]
        constant = [c for c in calls if len(c.args) == 1 and isinstance(c.args[0], ast.Constant)]
        plain = {id(c.func) for c in constant if not str(c.args[0].value).startswith(".")}
        loads = [n for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))]
        used = {n.id if isinstance(n, ast.Name) else n.attr for n in loads if id(n) not in plain}
        renamed = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname
        }
        return (used | renamed) & {"import_module", "__import__", "resolve_name"}

    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in sources().items()}
    assert {name for name, tree in trees.items() if names(tree)} - DOORS == REGISTRIES


def test_no_private_module_is_imported_by_another_package():
    def wrong(name: str, other: str) -> bool:
        private = any(part.startswith("_") for part in other.split("."))
        crosses = name.partition(".")[0] != other.partition(".")[0]
        return private and crosses

    assert arrows(wrong) == []


def test_every_room_has_its_place_in_the_order():
    rooms = {room_of(name) for name in sources()} - {None, "_auto_classes"}
    assert rooms - {*ROOMS} == set()
    assert len({*ROOMS}) == len(ROOMS)


def test_rooms_import_those_below_them():
    def wrong(name: str, other: str) -> bool:
        room, imported = room_of(name), room_of(other)
        if name in DOORS or room is None:
            return False
        if other in DOORS:
            return True
        return imported is not None and ROOMS.index(imported) > ROOMS.index(room)

    assert arrows(wrong) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: others for name, others in imports().items() if name not in DOORS}
    TopologicalSorter(graph).prepare()  # a CycleError shows the circle


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import tokenflex.cli", {"tokenflex.cli"}),
        ("from tokenflex import cli", {"tokenflex.cli"}),
        ("from tokenflex.counts import AUTO", {"tokenflex.counts"}),
        ("def f():\n    from tokenflex.cli import parser", {"tokenflex.cli.parser"}),
        ("if TYPE_CHECKING:\n    import tokenflex.cli", {"tokenflex.cli"}),
        ("importlib.import_module('tokenflex.cli')", {"tokenflex.cli"}),
        ("from . import grading", {"tokenflex.routing.grading"}),
        ("from ..counts import AUTO", {"tokenflex.counts"}),
        ("from .grading import grade", {"tokenflex.routing.grading"}),
    ],
)
def test_imports_are_seen_wherever_they_stand(source, named):
    assert {*modules_named_in(ast.parse(source), "tokenflex.routing.choice", sources())} == named
