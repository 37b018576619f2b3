"""A stock model's folder becomes the folder of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tokenflex.counts import TokenCount, tokens_of
from tokenflex.dropin.families import family_of
from tokenflex.dropin.fitting import FitReport, fit_projector
from tokenflex.dropin.processor import check_default_count
from tokenflex.dropin.replace import replace_projector
from tokenflex.files import new_folder
from tokenflex.models.cards import write_card
from tokenflex.models.loading import check_length


def convert_stock(
    source: str | Path,
    target: str | Path,
    *,
    num_image_tokens: TokenCount = 256,
    images: Sequence[Any] = (),
    patch_merge: int | None = None,
    device: str = "cpu",
    train: Callable[[Any, Any], Any] | None = None,
    progress: Callable[[str], object] = lambda step: None,
) -> FitReport | None:
    """Load a stock model, give it a token-adaptive projector, and save it with its processor.

    Args:
        source: Folder of the stock model, or its ``org/name`` on the Hugging Face Hub. Code of a
            repository is never run.
        target: Folder to write. It appears whole or not at all.
        num_image_tokens: Vision tokens per image where a call gives no count.
        images: Pictures to fit the new projector on; with none its weights are random.
        patch_merge: See :func:`tokenflex.replace_projector`.
        device: Where the vision encoder runs over the pictures.
        train: Called with the converted model and its processor before they are saved; returns the
            model to save.
        progress: Called with the name of each step before it.

    Returns:
        The errors before and after fitting; None without images.

    Raises:
        FileExistsError: The target exists.
        ValueError: The source is no stock model of a supported family, or cannot be loaded.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"target folder {target} exists; name one that does not")
    check_default_count(num_image_tokens, name="num_image_tokens")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"config of {source} cannot be loaded: {_line(error)}") from error
    family = family_of(config)
    check_length(config, tokens_of(num_image_tokens))
    progress(f"loading the {family.model_type} of {source}")
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype="auto", trust_remote_code=False
        )
    except Exception as error:  # tokenizers and weights raise their own kinds
        raise ValueError(f"{source} cannot be loaded: {_line(error)}") from error
    model.to(device).eval()
    replace_projector(
        model, processor, num_image_tokens=num_image_tokens, patch_merge=patch_merge, init="random"
    )
    report = None
    if images:
        progress(f"fitting the new projector on {len(images)} pictures")
        report = fit_projector(model, list(images), processor)
    if train is not None:
        model = train(model, processor)
    progress(f"saving {target}")
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(
            folder,
            model.config,
            sources={"stock model": str(source)},
            name=target.name,
        )
    return report


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
