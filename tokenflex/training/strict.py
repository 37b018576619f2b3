"""Configurations read strictly: unknown and repeated keys, and answers for numbers, are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after the file is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, got {values!r}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"config file {path}: {_one_line(error, model)}") from error


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    return "; ".join(_message(problem, model) for problem in error.errors())


def _message(problem: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]") or "the file"
    if problem["type"] == "extra_forbidden":
        allowed = _keys_beside(problem["loc"], model)
        return f"{key} is no known key (got {_short(problem['input'])}; expected one of {allowed})"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":  # one of ours: it says itself what came
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg']} (got {_short(problem['input'])})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _keys_beside(location: tuple[int | str, ...], model: Any) -> str:
    """The keys that are known where an unknown one was found."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return ", ".join(model.model_fields)
