"""Read YAML into pydantic models strictly: unknown keys, repeated keys and true for 1 fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from tokenflex.errors import REASON_LENGTH
from tokenflex.files import excerpt, printable

M = TypeVar("M", bound=BaseModel)

MAX_VALUES = 100_000
KEY_LENGTH = 100  # characters of a key in an error
INDEX_LENGTH = 9  # digits of an entry's index; lists are shorter
MOST_MISTAKES = 1000  # named one by one in an error; a file may have many more


class ContradictionsError(ValueError):
    """Values of one part of a configuration do not go together.

    Args:
        reasons: All that is wrong with it, a sentence each.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Strict(BaseModel):
    """A part of a configuration: unknown keys are errors, and its values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[str]:
        """Yield all that is wrong with values that are each allowed by themselves."""
        yield from ()

    def absent_files(self, needed: Collection[str]) -> Iterator[str]:
        """Yield what is named and does not exist; ``needed`` has the kinds that a command reads."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _report_all(cls, values: Any, handler: Any, info: ValidationInfo) -> Any:
        """Raise all that is wrong at once: with wrong values also contradictions of the others."""
        needed = info.context or ()
        try:
            part = handler(values)
        except ValidationError as error:
            reasons = _reasons_beside(error, cls, values, needed)
            if not reasons:
                raise
            problems: list[Any] = [*error.errors(include_url=False)]
            problems.append(_problem(ContradictionsError(reasons), values))
            raise ValidationError.from_exception_data(cls.__name__, problems) from error
        reasons = [*part.contradictions(), *part.absent_files(needed)]
        if reasons:
            raise ContradictionsError(reasons)
        return part


def _problem(error: ValueError, values: Any) -> dict[str, Any]:
    return {"type": "value_error", "loc": (), "input": values, "ctx": {"error": error}}


def _reasons_beside(
    error: ValidationError, model: type[Strict], values: Any, needed: Collection[str]
) -> list[str]:
    """Return what contradicts among the values of a model that are not named in an error.

    A reason that mentions a key which is wrong or missing itself follows from that.
    """
    if not isinstance(values, dict):
        return []
    unknown = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
    known = {}
    for name, field in model.model_fields.items():
        if name in values:
            try:
                known[name] = TypeAdapter(field.rebuild_annotation()).validate_python(values[name])
                unknown.discard(name)  # it only names a file that does not exist
            except ValidationError:
                unknown.add(name)
    part, reasons = model.model_construct(**known), []
    for check in (part.contradictions(), part.absent_files(needed)):
        try:
            reasons += [*_until_unknown(check)]
        except (ArithmeticError, TypeError, ValueError):
            continue  # a default in the place of a wrong value
    if not unknown:
        return reasons
    mentioned = re.compile(rf"\b({'|'.join(map(re.escape, unknown))})\b")
    return [reason for reason in reasons if not mentioned.search(reason)]


def _until_unknown(reasons: Iterator[str]) -> Iterator[str]:
    """Yield reasons up to the first check that needs a value which is not there."""
    try:
        yield from reasons
    except AttributeError:
        return


def reason_of(check: Callable[[], object]) -> str | None:
    """Return the message of what a check raises; None if it passes."""
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
    """Refuses a key that is given twice, of which PyYAML silently keeps the last value."""

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
    """Parse one YAML document in UTF-8, from an untrusted source.

    Args:
        content: The bytes.
        name: Name of the document in errors.

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
    except (yaml.YAMLError, ValueError) as error:  # also invalid numbers and dates
        reason = printable(str(error), REASON_LENGTH)
        raise ValueError(f"{name} is not YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values that a node stands for; what it refers to counts each time.

    ``sizes`` holds those of nodes that were counted, by identity; None while one is being counted.
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


def set_key(values: Any, change: str) -> None:
    """Set one key of parsed YAML in place, such as ``stages.0.batch_size=8``.

    Args:
        values: Mappings and lists.
        change: Keys and indices, separated by dots, then "=" and a value in YAML. Mappings on the
            way are created; an index must exist.

    Raises:
        ValueError: ``change`` has another form, or leads through a value without keys.
    """
    where, equals, text = change.partition("=")
    parts = where.split(".")
    if not equals or not all(parts):
        raise ValueError(
            f"--set must be KEY=VALUE, such as stages.0.batch_size=8, got {excerpt(change)}"
        )
    where = printable(where, KEY_LENGTH)
    value = parse_yaml(text.encode(), f"the value of --set {where}")
    *way, last = parts
    for depth, part in enumerate(way, 1):
        child = _entry(values, part, ".".join(parts[:depth]))
        if child is None:
            child = {}
            _put(values, part, child, ".".join(parts[:depth]))
        values = child
    _put(values, last, value, where)


def _entry(values: Any, part: str, where: str) -> Any:
    if isinstance(values, list):
        return values[_index(values, part, where)]
    if not isinstance(values, dict):
        raise ValueError(
            f"--set {printable(where, KEY_LENGTH)} leads through {excerpt(values)}, which has no "
            "keys"
        )
    return values.get(part)


def _put(values: Any, part: str, value: Any, where: str) -> None:
    _entry(values, part, where)
    values[_index(values, part, where) if isinstance(values, list) else part] = value


def _index(values: list[Any], part: str, where: str) -> int:
    # Python refuses to read numbers of thousands of digits.
    if not (part.isdecimal() and len(part) <= INDEX_LENGTH and int(part) < len(values)):
        raise ValueError(
            f"--set {printable(where, KEY_LENGTH)} must name one of {len(values)} entries, 0 to "
            f"{len(values) - 1}, got {excerpt(part)}"
        )
    return int(part)


def read_yaml(
    path: str | Path,
    model: type[M],
    changes: Sequence[str] = (),
    *,
    needed: Callable[[Any], Collection[str]] | None = None,
) -> M:
    """Return a ``model`` with the values of a YAML file.

    Args:
        path: The file.
        model: Keys, types and bounds.
        changes: Values that replace those of the file, see :func:`set_key`.
        needed: Returns for the values of a file that is wrong which kinds of files, if absent, are
            to be named as well; see :func:`validated`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not YAML, gives a key twice, has an unknown key or a value that is not
            allowed. One line names each key with what was given and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    values = parse_yaml(path.read_bytes(), f"config file {path}")
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, got {excerpt(values)}")
    tried = [reason_of(partial(set_key, values, change)) for change in changes]
    faults = [reason for reason in tried if reason is not None]
    name = f"config file {path}"
    if faults:
        try:
            validated(values, model, name)
        except ValueError as error:
            faults.append(str(error))
        raise ValueError("; ".join(faults))
    try:
        return validated(values, model, name)
    except ValueError:
        if needed is not None:
            validated(values, model, name, needed=needed(values))
        raise


def validated(values: Any, model: type[M], name: str, *, needed: Collection[str] = ()) -> M:
    """Return a ``model`` with these values.

    Args:
        values: Mappings and lists, as YAML holds them.
        model: Keys, types and bounds.
        name: What holds the values, in errors.
        needed: Kinds of files that must exist, as :meth:`Strict.absent_files` takes them.

    Raises:
        ValueError: There is an unknown key or a value that is not allowed. One line names each key
            with what was given and what was expected.
    """
    try:
        return model.model_validate(values, context=needed)
    except ValidationError as error:
        raise ValueError(f"{name}: {_one_line(error, model)}") from error


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    # pydantic calls the validator of a model that holds its own kind twice.
    problems = [*{(p["loc"], p["type"], p["msg"]): p for p in error.errors()}.values()]
    nested = {
        problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))
    }
    mistakes: list[str] = []
    described: set[type[BaseModel]] = set()
    for problem in problems:
        # pydantic calls a list of wrong entries too short, as none are left.
        if problem["type"] == "too_short" and problem["loc"] in nested:
            continue
        mistakes += _messages(problem, model, described)
    if len(mistakes) > MOST_MISTAKES:
        mistakes[MOST_MISTAKES:] = [f"and {len(mistakes) - MOST_MISTAKES} more"]
    return "; ".join(mistakes)


def _messages(
    problem: Any, model: type[BaseModel], described: set[type[BaseModel]]
) -> Iterator[str]:
    """Yield messages; the known keys of models in ``described`` have been named before."""
    key = ".".join(str(part) for part in problem["loc"] if not _is_mark(part)) or "the file"
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
    elif problem["type"] == "value_error":  # one of ours, whose message is complete
        error = problem["ctx"]["error"]
        for reason in getattr(error, "reasons", [str(error)]):
            yield f"{key}: {printable(reason, REASON_LENGTH)}"
    else:
        hint = ""
        word = "yes" if problem["input"] is True else "no"
        is_word = problem["type"] == "string_type" or (
            problem["type"] == "literal_error" and f"'{word}'" in problem["ctx"]["expected"]
        )
        if isinstance(problem["input"], bool) and is_word:
            hint = (
                f'; YAML reads {word} as {str(problem["input"]).lower()}: write "{word}" in '
                f"quotes, with --set {key}='\"{word}\"'"
            )
        expected = problem["msg"]
        if problem["type"] == "tuple_type":
            expected = "Input should be a list, such as [1, 2]"
        elif problem["type"] in ("too_short", "too_long"):
            expected = expected.replace("Tuple", "List", 1)
        yield f"{key}: {expected} (got {given}{hint})"


def _is_mark(part: int | str) -> bool:
    """Return whether a part of a location is no key: pydantic's "[key]", or the tag of a union."""
    return isinstance(part, str) and part.startswith("[") and part.endswith("]")


def _model_at(location: tuple[int | str, ...], model: Any) -> type[BaseModel]:
    """Return the model that a key belongs to."""
    candidates: Sequence[Any] = ()
    for part in location[:-1]:
        if _is_mark(part):
            model = next(get_args(c)[0] for c in candidates if Tag(str(part)) in get_args(c))
        elif isinstance(part, str):
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)]
            # Of what has a check of its own (Annotated) the model itself, unless a tag follows.
            candidates += [get_args(c)[0] for c in candidates if hasattr(c, "__metadata__")]
            of_models = (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
            model = next(of_models, None)
    return cast("type[BaseModel]", model)
