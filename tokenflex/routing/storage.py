"""A router beside its checkpoint, in ``CHECKPOINT/router/``.

``router.safetensors`` holds the weights and, in its header, the settings as JSON, so that both are
written in one step. ``report.json`` holds the measurements of training, for people.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokenflex.counts import token_grid
from tokenflex.files import (
    checkpoint_folder,
    excerpt,
    parse_json,
    printable,
    read_json,
    write_atomically,
    write_json,
)
from tokenflex.routing.router import Router

FOLDER = "router"
WEIGHTS = "router.safetensors"
REPORT = "report.json"
CURVE = "curve.png"
_SETTINGS = (
    *("counts", "vision_width", "text_width", "hidden_width", "penalty"),
    *("calibration", "confidence_calibration"),
)
_ATTRIBUTE = "_token_router"
# Errors of foreign settings and tensors; OverflowError where a claimed size exceeds any integer.
_NOT_WHOLE = (
    *(SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError),
)


def save_router(router: Router, checkpoint: str | Path, report: dict[str, Any]) -> Path:
    """Write a router and its report into a checkpoint's folder, replacing an earlier router.

    Returns:
        The router's folder.

    Raises:
        FileNotFoundError: The checkpoint folder does not exist.
        FileExistsError: A file to replace does not belong to a router.
    """
    folder = check_router_folder(checkpoint)
    folder.mkdir(exist_ok=True)
    settings = json.dumps({name: getattr(router, name) for name in _SETTINGS})
    weights = {name: tensor.contiguous() for name, tensor in router.state_dict().items()}
    write_atomically(
        folder / WEIGHTS,
        lambda temporary: save_file(weights, temporary, metadata={"router": settings}),
    )
    write_json(folder / REPORT, report)
    return folder


def check_router_folder(checkpoint: str | Path) -> Path:
    """Return the router's folder, of which :func:`save_router` replaces a router's files only.

    Raises:
        FileNotFoundError: The checkpoint folder does not exist.
        FileExistsError: A file of something else exists.
    """
    folder = checkpoint_folder(checkpoint) / FOLDER
    for name in (WEIGHTS, REPORT, CURVE):
        if (folder / name).exists() and not is_router_file(folder / WEIGHTS):
            raise FileExistsError(
                f"{folder / name} exists and was not written with a router; move it"
            )
    return folder


def is_router_file(path: Path) -> bool:
    """Return whether :func:`save_router` has written the file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return "router" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_router(checkpoint: str | Path) -> Router:
    """Load the router of a checkpoint's folder.

    Raises:
        FileNotFoundError: The checkpoint has no router; the message says how to make one.
        ValueError: The file is cut off, is not a router's, or holds values that are not finite.
    """
    path = Path(checkpoint) / FOLDER / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {checkpoint} has no router to choose counts with; make one with "
            f"`tokenflex route --model {checkpoint} --data DATA "
            f"--counts {_counts_to_try(checkpoint)}`"
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
        raise ValueError(
            f"router file {path} is not a whole router: {type(error).__name__}: "
            f"{printable(str(error), 300)}"
        ) from error
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"router file {path} holds values in {name} that are not finite")
    return router.eval()


def _counts_to_try(checkpoint: str | Path) -> str:
    """Return the counts of a checkpoint's training for a command line, or else an example."""
    try:
        trained = read_json(Path(checkpoint) / "config.json")["trained_num_image_tokens"]
        grids = [token_grid(tuple(n) if isinstance(n, list) else n) for n in trained]
    except (OSError, KeyError, TypeError, ValueError):  # none, or a config of something else
        grids = []
    if len({*grids}) == 1:  # and a quarter of it, as a router's largest count is a trained one
        grids.append(((grids[0][0] + 1) // 2, (grids[0][1] + 1) // 2))
    by_size: dict[int, str] = {}  # a router's counts are of different numbers of tokens
    for height, width in grids:
        size = height * width
        by_size.setdefault(size, str(size) if height == width else f"{height}x{width}")
    if len(by_size) < 2:
        return "64,144,256"
    return ",".join(by_size[size] for size in sorted(by_size))


def _check_shapes(settings: Any, shapes: dict[str, list[int]]) -> None:
    """Compare settings with the shapes in the file's header before anything is allocated.

    Raises:
        ValueError: The shapes do not follow from the settings.
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
    """Attach ``router`` to ``model`` as its chooser, not as one of its weights.

    Raises:
        ValueError: The router was made for features or embeddings of another width.
    """
    for name, width in (
        ("vision_width", model.projector.vision_width),
        ("text_width", model.get_input_embeddings().weight.shape[1]),
    ):
        if getattr(router, name) != width:
            raise ValueError(
                f"router must be one for this model, of {name} {width}, got {getattr(router, name)}"
            )
    model.__dict__[_ATTRIBUTE] = router  # past nn.Module, which would save and train it


def router_of(model: Any) -> Router:
    """Return the attached router, or load the one beside the weights of ``model``.

    Raises:
        FileNotFoundError: There is no router; the message says how to make one.
        ValueError: The file is broken, or does not fit the model.
    """
    if _ATTRIBUTE not in model.__dict__:
        attach_router(model, load_router(model.name_or_path or "CHECKPOINT"))
    return model.__dict__[_ATTRIBUTE]


def has_router(model: Any) -> bool:
    """Return whether a router is attached, or a file of one exists, whole or broken."""
    if _ATTRIBUTE in model.__dict__:
        return True
    return bool(model.name_or_path) and (Path(model.name_or_path) / FOLDER / WEIGHTS).is_file()
