"""Configurations read strictly: unknown and repeated keys, and answers for numbers, are errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from tokenflex.errors import REASON_LENGTH
from tokenflex.files import excerpt, printable

M = TypeVar("M", bound=BaseModel)

MAX_VALUES = 100_000
KEY_LENGTH = 100  # characters of where a mistake is
MOST_MISTAKES = 1000  # that an error names one by one; a file of a stranger may have many more


class ContradictionsError(ValueError):
    """Values of one part of a configuration do not go together.

    Args:
        reasons: All that is wrong with it, a sentence each.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after the file is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def contradictions(self) -> Iterator[str]:
        """Yield what is wrong with values that are each allowed by themselves, all of it."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_contradictions(self) -> Strict:
        reasons = [*self.contradictions()]
        if reasons:
            raise ContradictionsError(reasons)
        return self


def reason_of(check: Callable[[], object]) -> str | None:
    """Return what a check raises, for :meth:`Strict.contradictions`; None where it passes."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _no_answer(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


# Python takes True for 1: steps: true would be one step.
Int = Annotated[int, BeforeValidator(_no_answer)]
Float = Annotated[float, BeforeValidator(_no_answer)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML as it is meant to be: of a key that is given twice the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(content: bytes, name: str) -> Any:
    """Parse YAML from a stranger, in UTF-8.

    Args:
        content: The bytes of one document.
        name: What errors call it.

    Raises:
        ValueError: It is not YAML, gives a key twice, nests too deeply, or refers to itself or so
            often to its own parts that it stands for more than :data:`MAX_VALUES` values.
    """
    loader = None
    try:
        loader = _UniqueKeys(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{name} nests lists and mappings too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # also numbers and dates that are none
        reason = printable(str(error), REASON_LENGTH)
        raise ValueError(f"{name} is not YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values that a node stands for, those that it refers to each time.

    Args:
        node: Of a document's graph.
        sizes: Of nodes that were counted, by identity; None while one is being counted.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = None
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    size = sizes[id(node)]
    if size is None:
        raise ValueError("a list or mapping holds itself")
    return size


def read_yaml(path: str | Path, model: type[M]) -> M:
    """``model`` from a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, gives a key twice, has an unknown one or a value that is not
            allowed; one line names the key, what came and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    values = parse_yaml(path.read_bytes(), f"config file {path}")
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, got {excerpt(values)}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"config file {path}: {_one_line(error, model)}") from error


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    problems = error.errors()
    nested = {
        problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))
    }
    mistakes: list[str] = []
    described: set[type[BaseModel]] = set()
    for problem in problems:
        # Of a list whose entries are wrong pydantic says that it is too short, as none are left.
        if problem["type"] == "too_short" and problem["loc"] in nested:
            continue
        mistakes += _messages(problem, model, described)
    if len(mistakes) > MOST_MISTAKES:
        mistakes[MOST_MISTAKES:] = [f"and {len(mistakes) - MOST_MISTAKES} more"]
    return "; ".join(mistakes)


def _messages(
    problem: Any, model: type[BaseModel], described: set[type[BaseModel]]
) -> Iterator[str]:
    """Yield what is wrong; of models in ``described`` the known keys were named before."""
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]") or "the file"
    key, given = printable(key, KEY_LENGTH), excerpt(problem["input"])
    if problem["type"] == "extra_forbidden":
        owner = _model_at(problem["loc"], model)
        expected = (
            "" if owner in described else f"; expected one of {', '.join(owner.model_fields)}"
        )
        described.add(owner)
        yield f"{key} is no known key (got {given}{expected})"
    elif problem["type"] == "missing":
        yield f"{key} is missing"
    elif problem["type"] == "value_error":  # one of ours: it says itself what came
        error = problem["ctx"]["error"]
        for reason in getattr(error, "reasons", [str(error)]):
            yield f"{key}: {printable(reason, REASON_LENGTH)}"
    else:
        yield f"{key}: {problem['msg']} (got {given})"


def _model_at(location: tuple[int | str, ...], model: Any) -> type[BaseModel]:
    """Return the model in which a key was found."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    found: type[BaseModel] = model
    return found
