"""Export a model: check the request, write into a new folder, compare, and keep all or nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tokenflex.checkpoints import load_model
from tokenflex.counts import TokenCount, token_grid
from tokenflex.errors import ReportedError
from tokenflex.files import new_folder, read_json, write_json
from tokenflex.positions import check_sequential
from tokenflex.serving.export.language_model import plain_language_model
from tokenflex.serving.export.manifest import (
    MANIFEST,
    describe_graphs,
    describe_model,
    describe_part,
    tile_size,
)
from tokenflex.serving.export.parts import Part, language_parts, vision_parts
from tokenflex.serving.export.targets import LANGUAGE_MODEL, TARGETS
from tokenflex.serving.export.tracing import BATCHES, largest_error, trace
from tokenflex.terminal import watched, working

TOLERANCE = 1e-4
"""Largest difference to the model, relative to the largest value (or to 1 if that is smaller)."""
Report = Callable[[str], object]


def export(
    source: str | Path,
    output: str | Path,
    target: str,
    counts: Sequence[TokenCount] | None = None,
    *,
    tolerance: float = TOLERANCE,
    report: Report = print,
) -> None:
    """Write a model for another runtime into a new folder, and compare it with the model.

    Args:
        source: folder with a TokenFLEX checkpoint or a converted stock model.
        output: folder to write. It appears whole or not at all.
        target: a name of :data:`tokenflex.serving.export.targets.TARGETS`, or "language-model".
        counts: vision tokens per tile, a projector each; those that the model was trained with, or
            its default, if None. They are no part of a language model.
        tolerance: see :data:`TOLERANCE`.
        report: called with each line about the progress.

    Raises:
        FileExistsError: ``output`` exists.
        ModuleNotFoundError: a package of the target is not installed.
        ReportedError: what was written differs from the model by more than the tolerance.
        ValueError: the target is unknown, the source holds no such model, or a part of it cannot be
            exported; the message has the reason.
    """
    if target != LANGUAGE_MODEL and target not in TARGETS:
        names = ", ".join([*TARGETS, LANGUAGE_MODEL])
        raise ValueError(f"target must be one of {names}, got {target!r}")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output folder {output} exists; name one that does not")
    if target != LANGUAGE_MODEL:
        for package in TARGETS[target].packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    model, processor = load_model(source)
    with new_folder(output) as folder:
        if target == LANGUAGE_MODEL:
            _write_language_model(model, processor, folder, tolerance, report)
        else:
            _write_graphs(model, processor, folder, target, counts, tolerance, report)


def _write_language_model(
    model: Any, processor: Any, folder: Path, tolerance: float, report: Report
) -> None:
    check_sequential(f"--to {LANGUAGE_MODEL}", model.config)
    language_model = plain_language_model(model)
    with working("writing the language model"):
        language_model.save_pretrained(folder)
    _save_tokenizer(processor, folder)
    with working("comparing it with the model"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=language_model.dtype).eval()
    ids = torch.randint(
        loaded.config.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected, logits = language_model(ids).logits, loaded(ids).logits
    error = float((expected - logits).abs().max())
    _check("model", error, float(expected.abs().max()), tolerance)
    report(f"model  max error {error:.1e}  {type(loaded).__name__}")


def _write_graphs(
    model: Any,
    processor: Any,
    folder: Path,
    target: str,
    counts: Sequence[TokenCount] | None,
    tolerance: float,
    report: Report,
) -> None:
    runtime = TARGETS[target]
    model.float().requires_grad_(False)
    size = tile_size(model, processor)
    parts = vision_parts(
        model, size, distinct(_default_counts(model) if counts is None else counts)
    )
    no_language = ""
    try:
        language_model = plain_language_model(model)
        language_model.base_model.set_attn_implementation(runtime.attention)
        parts += language_parts(language_model)
    except ValueError as refusal:
        no_language = str(refusal)
    graphs: dict[str, tuple[Part, dict[str, Any]]] = {}
    for part in watched(parts, "exporting", len(parts), unit="graph", delay=0):
        path = folder / f"{part.name}{runtime.suffix}"
        runtime.save(trace(part), part, path)
        error, scale = largest_error(part, runtime.load(path, part))
        _check(part.name, error, scale, tolerance)
        batches = ", ".join(map(str, BATCHES))
        report(f"{path.name}  batches of {batches}  max error {error:.1e}")
        graphs[part.name] = part, describe_part(part, path.name, error)
    if no_language:
        report(f"no language model: {no_language}")
    manifest = {**describe_graphs(target, graphs), **describe_model(model, processor, size)}
    write_json(folder / MANIFEST, {**manifest, "no_language": no_language or None})
    _save_tokenizer(processor, folder)


def _save_tokenizer(processor: Any, folder: Path) -> None:
    """Save the tokenizer, without the name of a processor that is not in the folder."""
    processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config.pop("processor_class", None)
    write_json(path, config)


def distinct(counts: Sequence[TokenCount]) -> list[TokenCount]:
    """Return each count once; 4 and (2, 2) are the same.

    Raises:
        TypeError, ValueError: a count is not valid, or there is none.
    """
    if not counts:
        raise ValueError("counts must have at least one entry, got none")
    grids = {token_grid(count, name="counts"): None for count in counts}
    return [height * width if height == width else (height, width) for height, width in grids]


def _default_counts(model: Any) -> list[TokenCount]:
    trained = getattr(model.config, "trained_num_image_tokens", None)
    if trained:
        return [tuple(count) if isinstance(count, list) else count for count in trained]
    options = getattr(model.config, "tokenflex", None)  # of a converted model
    count = options["num_image_tokens"] if options else model.config.num_image_tokens
    return [tuple(count) if isinstance(count, list) else count]


def _check(name: str, error: float, scale: float, tolerance: float) -> None:
    limit = tolerance * max(1.0, scale)
    if not error <= limit:
        raise ReportedError(
            f"{name} differs from the model by {error:.1e}, more than {limit:.1e} "
            f"({tolerance:.0e} of its largest value): nothing was written"
        )
