"""A finished model's folder: replaced as a whole, without losing what others have put into it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tokenflex.files import read_json, settle_folder, sync_folder, write_json
from tokenflex.models.cards import keep_edited_card, write_card
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import is_conversion
from tokenflex.routing import storage as router

Sizes: TypeAlias = "Mapping[str, int]"
"""Name of a file in a checkpoint -> its bytes."""

# What transformers and this package write into a checkpoint's folder.
_CHECKPOINT_NAMES = re.compile(
    r"(adapter_|generation_|processor_|preprocessor_|video_preprocessor_|tokenizer_)?config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|vocab\.txt|merges\.txt|spiece\.model|chat_template\.(jinja|json)|tokenflex_conversion\.py"
)
RECORD = "best.json"
"""Says, in the folder of a run's best model, which evaluation it was the best of."""
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ROUTER_NAMES = {router.WEIGHTS, router.REPORT, router.CURVE}


def save_model(
    directory: Path,
    model: Any,
    processor: Any,
    weights: dict[str, Any] | None = None,
    *,
    replaced: Sizes | None = None,
    moment: str | None = None,
    record: Any = None,
) -> Sizes:
    """Save model and processor as transformers does; the folder appears whole or not at all.

    It replaces an earlier checkpoint. Files in that one are kept unless an earlier save wrote them
    or this one writes them anew. All is on the disk when this returns.

    Args:
        directory: The checkpoint's folder.
        model: The model.
        processor: Its processor.
        weights: The weights of a model that itself holds only shards.
        replaced: What the save of the earlier checkpoint returned, if known.
        moment: Sentence of the card that says when in a run the weights were so.
        record: Value of JSON to save beside the model as :data:`RECORD`; None for none.

    Returns:
        The names and sizes of the files that were written.

    Raises:
        FileExistsError: The folder holds something else.
    """
    check_checkpoint_folder(directory)

    def write(temporary: Path) -> None:
        # A copy: transformers removes what it has written from the dict.
        model.save_pretrained(temporary, state_dict=None if weights is None else {**weights})
        processor.save_pretrained(temporary)
        write_card(temporary, model.config, name=directory.parent.name, moment=moment)
        if record is not None:
            write_json(temporary / RECORD, record)
        keep_edited_card(directory, temporary)

    return replace_folder(directory, write, replaced=replaced)


def replace_folder(
    directory: Path, write: Callable[[Path], object], *, replaced: Sizes | None = None
) -> Sizes:
    """Replace a folder by what ``write`` writes into a new one, whole or not at all.

    ``replaced`` and the result are those of :func:`save_model`.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    previous = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        settle_folder(temporary)
        files = [path for path in sorted(temporary.iterdir()) if path.is_file()]
        written = {path.name: path.stat().st_size for path in files}
        if directory.exists():
            directory.rename(previous)
        temporary.rename(directory)
        sync_folder(directory.parent)
    finally:
        if previous.exists():
            restore_folder(previous, directory, replaced)
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def check_checkpoint_folder(directory: Path) -> None:
    """Refuse to replace something that is no checkpoint of ours.

    Raises:
        FileExistsError: It is a file, a link, or a folder with another model.
    """
    if directory.is_symlink():
        raise FileExistsError(
            f"{directory} must be a folder to be replaced by a checkpoint, and it is a link; move "
            "it, or give an output on the disk that it leads to"
        )
    if not directory.exists() or (directory.is_dir() and is_checkpoint(directory)):
        return
    if directory.is_dir() and not any(map(_CHECKPOINT_NAMES.fullmatch, os.listdir(directory))):
        return
    raise FileExistsError(
        f"{directory} must be a TokenFLEX checkpoint to be replaced by one, and it is not; move it"
    )


def is_checkpoint(directory: Path) -> bool:
    """Return whether a folder's ``config.json`` is of a TokenFLEX model, or of a conversion."""
    try:
        config = read_json(directory / "config.json")
        converted = is_conversion(directory)
    except (OSError, ValueError):
        return False
    is_ours = isinstance(config, dict) and config.get("model_type") == TokenFlexConfig.model_type
    return is_ours or converted


def restore_folder(previous: Path, directory: Path, written: Sizes | None = None) -> None:
    """End the replacement of a checkpoint's folder, which was renamed to ``previous`` before.

    Without a new folder the previous one gets its name back. Otherwise the files of others move
    from it into the new one, and the rest is deleted.

    Args:
        previous: The renamed folder.
        directory: The checkpoint's folder.
        written: Names and sizes of the files in ``previous`` that its save wrote, if known; its
            weights are recognised without them.
    """
    if not directory.exists():
        previous.rename(directory)
        return
    sizes, weights = written or {}, _weights_of(previous)

    def is_ours(path: Path) -> bool:
        return path.name in weights or sizes.get(path.name) == path.stat().st_size

    _move_others(previous, directory, is_ours)
    shutil.rmtree(previous)


def _weights_of(checkpoint: Path) -> set[str]:
    """Return the names of a checkpoint's weights, in one file or as its index says."""
    try:
        shards = {*read_json(checkpoint / _INDEX)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {_WEIGHTS}
    return {_WEIGHTS, _INDEX, *(name for name in shards if _SHARD.fullmatch(str(name)))}


def _move_others(source: Path, target: Path, is_ours: Callable[[Path], bool]) -> None:
    for entry in [*source.iterdir()]:
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and entry.name == router.FOLDER:
            # A router of ours was chosen for the weights that are replaced.
            ours = _ROUTER_NAMES if router.is_router_file(entry / router.WEIGHTS) else set()
            if not ours.issuperset(os.listdir(entry)):
                (target / router.FOLDER).mkdir(exist_ok=True)
                _move_others(entry, target / router.FOLDER, lambda path: path.name in ours)  # noqa: B023
        elif os.path.lexists(target / entry.name):
            continue
        elif is_folder or entry.is_symlink() or not is_ours(entry):
            entry.rename(target / entry.name)
