"""Helpers of several commands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflex.terminal import show_work

if TYPE_CHECKING:
    from tokenflex.training.data_config import DataConfig


def device() -> str:
    """Return the device of models: "cuda" if there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """Show progress, without bars and notices of other libraries; print warnings as one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_work()
    import huggingface_hub
    from transformers.utils import logging

    huggingface_hub.logging.set_verbosity_error()  # it warns of each retry
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def saved_frame_sampling(checkpoint: Path) -> dict[str, Any]:
    """Return ``max_frames`` and ``fps`` of a checkpoint's processor, as far as it has values.

    They are read from its file, so that faults of the data are told before the model is loaded.

    Raises:
        ValueError: The file is broken, or a value is not allowed.
    """
    from tokenflex.files import read_json
    from tokenflex.videos import FrameSampling

    file = checkpoint / "processor_config.json"
    values = read_json(file) if file.is_file() else None
    if not isinstance(values, dict):
        return {}
    rule = {key: values[key] for key in ("max_frames", "fps") if values.get(key) is not None}
    try:
        FrameSampling(**rule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint file {file} must hold a rule for frames: {error}") from None
    return rule


def data_config(
    data: str,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> DataConfig:
    """Return the configuration of the data that a command's options describe.

    Args:
        data: The name of a format, such as "digits", or the path of the data.
        given: Options by their keys in a configuration; None or False for one that was not given.
        defaults: Values of options that were not given, for formats that take them.
        name: The format of the data at the path; detected if None.

    Raises:
        FileNotFoundError: Nothing exists at the path.
        ValueError: The format is unknown, an option does not fit it, or a value is not allowed.
    """
    from tokenflex.formats import FORMATS, detect_format
    from tokenflex.training.data_config import DataConfig
    from tokenflex.training.strict import validated

    if name is None:
        name = data if data in FORMATS else detect_format(data)
    if name not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {name!r}")
    data_format = FORMATS[name]
    values: dict[str, Any] = {"path": Path(data)} if data_format.needs_path else {}
    values |= {key: value for key, value in (defaults or {}).items() if key in data_format.keys}
    for key, value in given.items():
        if value not in (None, False):
            if key not in data_format.keys:
                raise ValueError(f"--{key.replace('_', '-')} does not fit data of format {name}")
            values[key] = value
    for problem in data_format.options.model_construct(**values).contradictions():
        raise ValueError(f"--{problem}")
    return validated({"name": name, **values}, DataConfig, "the options of --data")
