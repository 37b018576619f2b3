"""Imports run one way: between packages, between the rooms of ``tokenflex``, between modules.

Rooms are the modules and folders right under ``tokenflex/``. Imports are read from the source,
including those inside of functions and ``if TYPE_CHECKING``, and modules named by a constant
string for ``importlib.import_module``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "tokenflex_kernels": set(),
    "tokenflex": {"tokenflex_kernels"},
    "experiments": {"tokenflex_kernels", "tokenflex"},
    "benchmarks": {"tokenflex_kernels", "tokenflex"},
}
"""Each package and the packages it may import. ``tests`` may import all of them."""

ROOMS = (
    "errors",
    "interruption",
    "locks",
    "files",
    "images",
    "counts",
    "prompts",
    "positions",
    "plot_labels",
    "plots",
    "projector",
    "models",
    "data",
    "digits",
    "formats",
    "evaluation",
    "routing",
    "answers",
    "training",
    "dropin",
    "serving",
    "harnesses",
    "cli",
    "__main__",
)
"""The rooms of ``tokenflex``, lowest first; each may import those before it."""

DOORS = {"tokenflex", "tokenflex._auto_classes"}
"""Load public classes on demand. They may name any room, and no room imports them."""

PENDING_PRIVATE = {
    "tokenflex_kernels._checks",
    "tokenflex_kernels._library",
    "tokenflex_kernels._projector_ops",
    "tokenflex_kernels._versions",
}
"""Private modules that packages above still import."""


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
                yield inner if inner in known else base
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


def test_no_private_module_is_imported_by_another_package():
    def wrong(name: str, other: str) -> bool:
        private = any(part.startswith("_") for part in other.split("."))
        crosses = name.partition(".")[0] != other.partition(".")[0]
        return private and crosses and other not in PENDING_PRIVATE

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


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return components


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: others for name, others in imports().items() if name not in DOORS}
    assert circles(graph) == []


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


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]
    assert circles({name: {other} for name, other in pairwise("abcd")}) == []


def test_the_compiled_half_knows_no_package():
    for path in sorted((ROOT / "csrc").iterdir()):
        text = path.read_text(encoding="utf-8")
        assert 'import("tokenflex' not in text, path.name
