"""A router beside its checkpoint: ``CHECKPOINT/router/``, whole or not there.

``router.safetensors`` holds the weights, and in its header the settings as JSON, so that the two
are written in one step. ``report.json`` is what its training measured, for people.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokenflex.files import excerpt, parse_json, printable, write_atomically, write_json
from tokenflex.routing.router import Router

FOLDER = "router"
WEIGHTS = "router.safetensors"
REPORT = "report.json"
CURVE = "curve.png"
_SETTINGS = ("counts", "vision_width", "text_width", "hidden_width", "penalty")
_ATTRIBUTE = "_token_router"
# What settings and tensors of strangers raise, the last where a claimed size exceeds any integer.
_NOT_WHOLE = (
    *(SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError),
)


def save_router(router: Router, checkpoint: str | Path, report: dict[str, Any]) -> Path:
    """Write a router and its report into a checkpoint's folder, in place of an earlier one.

    Returns:
        The folder they are in.

    Raises:
        FileNotFoundError: the checkpoint folder is not there.
        FileExistsError: a file would be replaced that is not a router's.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"checkpoint folder {checkpoint} does not exist")
    check_router_folder(checkpoint)
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    settings = json.dumps({name: getattr(router, name) for name in _SETTINGS})
    weights = {name: tensor.contiguous() for name, tensor in router.state_dict().items()}
    write_atomically(
        folder / WEIGHTS,
        lambda temporary: save_file(weights, temporary, metadata={"router": settings}),
    )
    write_json(folder / REPORT, report)
    return folder


def check_router_folder(checkpoint: str | Path) -> None:
    """Refuse a checkpoint where :func:`save_router` would replace a file of something else.

    Raises:
        FileExistsError: it would.
    """
    folder = Path(checkpoint) / FOLDER
    for name in (WEIGHTS, REPORT, CURVE):
        if (folder / name).exists() and not is_router_file(folder / WEIGHTS):
            raise FileExistsError(
                f"{folder / name} exists and was not written with a router; move it"
            )


def is_router_file(path: Path) -> bool:
    """Return whether a file is one that :func:`save_router` has written."""
    try:
        with safe_open(path, framework="pt") as opened:
            return "router" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_router(checkpoint: str | Path) -> Router:
    """The router that lies in a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none; the message says how to make one.
        ValueError: the file is cut off, is not a router's, or holds values that are not finite.
    """
    path = Path(checkpoint) / FOLDER / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {checkpoint} has no router to choose counts with; make one with "
            f"`tokenflex route --model {checkpoint} --data DATA --counts 64,144,256`"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            settings = parse_json(metadata["router"].encode(), "its settings")
            names = opened.keys()
            _check_shapes(settings, {name: opened.get_slice(name).get_shape() for name in names})
            weights = {name: opened.get_tensor(name) for name in names}
        router = Router(**settings)
        router.load_state_dict(weights)
    except _NOT_WHOLE as error:
        reason = str(error)
        raise ValueError(
            f"router file {path} is not a whole router: {type(error).__name__}: "
            f"{printable(reason, 300)}"
        ) from error
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"router file {path} holds values in {name} that are not finite")
    return router.eval()


def _check_shapes(settings: Any, shapes: dict[str, list[int]]) -> None:
    """Compare what settings claim with the file's header, before anything is allocated.

    Raises:
        ValueError: the tensors are not those of a router of these settings.
    """
    if not isinstance(settings, dict) or set(settings) - set(_SETTINGS):
        raise ValueError(f"its settings must be {', '.join(_SETTINGS)}, got {excerpt(settings)}")
    with torch.device("meta"):
        router = Router(**settings)
    for name, tensor in router.state_dict().items():
        if shapes.get(name) != list(tensor.shape):
            raise ValueError(
                f"its settings make {name} {excerpt(str(list(tensor.shape)))}, its tensor is "
                f"{excerpt(str(shapes.get(name)))}"
            )


def attach_router(model: Any, router: Router) -> None:
    """Let ``model`` choose with ``router``. It does not become one of the model's weights.

    Raises:
        ValueError: the router was made for features or embeddings of another width.
    """
    for name, width in (
        ("vision_width", model.config.vision_config.hidden_size),
        ("text_width", model.get_input_embeddings().weight.shape[1]),
    ):
        if getattr(router, name) != width:
            raise ValueError(
                f"router must be one for this model, of {name} {width}, got {getattr(router, name)}"
            )
    model.__dict__[_ATTRIBUTE] = router  # past nn.Module, which would save and train it


def router_of(model: Any) -> Router:
    """The attached router, or the one that lies beside the weights ``model`` was loaded from.

    Raises:
        FileNotFoundError: there is neither; the message says how to make one.
        ValueError: the file is broken, or does not fit the model.
    """
    if _ATTRIBUTE not in model.__dict__:
        attach_router(model, load_router(model.name_or_path or "CHECKPOINT"))
    return model.__dict__[_ATTRIBUTE]


def has_router(model: Any) -> bool:
    """Whether :func:`router_of` has one to give, whole or broken."""
    if _ATTRIBUTE in model.__dict__:
        return True
    return bool(model.name_or_path) and (Path(model.name_or_path) / FOLDER / WEIGHTS).is_file()
