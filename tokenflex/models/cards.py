"""Model cards: the ``README.md`` of a saved model, as model hubs show it.

A card is written beside every saved model. Its last line holds a digest of the rest, so that a card
that somebody has edited is recognised and kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tokenflex.files import printable, read_json, write_text
from tokenflex.terminal import work_bar

CARD = "README.md"
PICTURE = "accuracy.png"
_TASK = "image-text-to-text"
_GENERAL = "This model card has been automatically generated."
"""Part of the card that transformers writes for a repository without one."""
_DIGEST = re.compile(r"\n<!-- written by tokenflex ([0-9a-f]{16}) -->\n\Z")
_FOLDER = "path/to/this/folder"
_OURS = """\
import tokenflex
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({source})
processor = AutoProcessor.from_pretrained({source})
"""
_CONVERSION = """\
import tokenflex
from PIL import Image

model, processor = tokenflex.from_pretrained({source})
"""
_ASK = """\
picture = Image.open("picture.png").convert("RGB")
content = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[picture], text=prompt, num_image_tokens={count}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50)
print(processor.batch_decode(output, skip_special_tokens=True)[0])
"""
_CITATION = """\
@article{tokenflex2025,
  title = {TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference},
  year = {2025},
  journal = {arXiv preprint arXiv:2504.03154}
}
"""


class SavedWithCard:
    """A model whose saved folders have a card."""

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as transformers does, and write a model card.

        A card that is known for the same weights and config stays as it is: that of this folder, or
        that of the local folder which the model was loaded from.
        """
        folder = Path(save_directory)
        known = is_main_process and is_generated(folder / CARD)
        before = _Saved.of(folder) if known else None
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, **kwargs
        )
        if not is_main_process or not folder.is_dir():
            return
        if before is None or before != _Saved.of(folder):
            _write_or_copy(folder, self.config)  # type: ignore[attr-defined]

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Upload with our card in place of the general one that transformers writes."""
        share_card(Path(working_dir), self.config, repo_id)  # type: ignore[attr-defined]
        return super()._upload_modified_files(  # type: ignore[misc]
            working_dir, repo_id, *args, **kwargs
        )


def write_card(
    folder: Path,
    config: Any,
    *,
    report: Mapping[str, Any] | None = None,
    sources: Mapping[str, str | None] | None = None,
    name: str | None = None,
    repository: str | None = None,
    moment: str | None = None,
) -> bool:
    """Write the card of a saved model, unless its folder has one that somebody else wrote.

    Args:
        folder: The model's folder.
        config: The config of a model of ours, or of a converted stock model.
        report: Accuracies as :func:`tokenflex.evaluation.evaluate` returns them; the card shows
            them beside ``accuracy.png``, if the folder has it. None for no such section.
        sources: Folders or hub names of the weights that the model began with, by "vision encoder",
            "language model" or "stock model"; None for those that the config names.
        name: Title; None for the folder's name.
        repository: Name of the model on the hub, which the card loads it by; None for a folder.
        moment: Sentence that says when in a run the weights were so; None for its end.

    Returns:
        True if the card was written.
    """
    path = folder / CARD
    if os.path.lexists(path) and not is_generated(path):  # also a link that leads nowhere
        return False
    text = card_text(
        config,
        name or folder.resolve().name,
        report=report,
        sources=sources,
        picture=(folder / PICTURE).is_file(),
        repository=repository,
        moment=moment,
    )
    write_text(path, text)
    return True


def share_card(folder: Path, config: Any, repository: str) -> None:
    """Replace the general card that transformers writes for a new repository by ours.

    It is the card of the local folder that the model was loaded from, if the weights are the same.
    """
    path = folder / CARD
    if path.is_file() and _GENERAL in path.read_text(encoding="utf-8", errors="replace"):
        path.unlink()
        _write_or_copy(folder, config, repository)


def _write_or_copy(folder: Path, config: Any, repository: str | None = None) -> None:
    """Write a card, or copy that of the folder which the model was loaded from unchanged."""
    source = Path(getattr(config, "_name_or_path", "") or folder)
    card, path = source / CARD, folder / CARD
    known = source.resolve() != folder.resolve() and card.is_file() and _Saved.of(source)
    if not known or known != _Saved.of(folder, like=known):
        write_card(folder, config, name=repository, repository=repository)
        return
    if os.path.lexists(path) and not is_generated(path):
        return
    if is_generated(card):
        text = _renamed(card.read_text(encoding="utf-8"), repository or folder.resolve().name)
        text = text.replace(_literal(_FOLDER), _literal(repository or _FOLDER))
        text = _signed(text)
        write_text(path, text)
    else:
        shutil.copyfile(card, path)
    if (source / PICTURE).is_file():
        shutil.copyfile(source / PICTURE, folder / PICTURE)


def _renamed(text: str, name: str) -> str:
    """Return a generated card with another title, unsigned."""
    card = ModelCard(_DIGEST.sub("", text), ignore_metadata_errors=True)
    card.data["model_name"] = name
    body = re.sub(
        r"^# .*$", lambda _: f"# {_title(name)}", card.text.strip("\n"), count=1, flags=re.M
    )
    return f"---\n{card.data.to_yaml()}\n---\n\n{body}\n"


@dataclass(frozen=True)
class _Saved:
    """Config and hashes of the weights in a folder, which tell whether a card still fits it."""

    config: Any
    sizes: dict[str, int]
    hashes: dict[str, str]

    @classmethod
    def of(cls, folder: Path, like: _Saved | None = None) -> _Saved | None:
        """Read a folder; None if it has no card, or no model.

        Weights are not read if config or sizes differ from those of ``like``.
        """
        try:
            config = _without_notes(read_json(folder / "config.json"))
        except (OSError, ValueError):
            return None
        if like is None and not os.path.lexists(folder / CARD):
            return None
        files = sorted(folder.glob("*.safetensors"))
        sizes = {path.name: path.stat().st_size for path in files}
        if like is not None and (config, sizes) != (like.config, like.sizes):
            return cls(config, sizes, {})
        return cls(config, sizes, {path.name: _hash_of(path) for path in files})


def _without_notes(config: Any) -> Any:
    """Return a config without keys that loading and saving change; the weights tell their types."""
    if not isinstance(config, dict):
        return config
    notes = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {key: _without_notes(value) for key, value in config.items() if key not in notes}


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    bar = work_bar(f"hashing {path.name}", path.stat().st_size, unit="B")
    with bar, path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def keep_edited_card(earlier: Path, folder: Path) -> None:
    """Copy a card that somebody has edited from a folder into the one that replaces it."""
    if (earlier / CARD).is_file() and not is_generated(earlier / CARD):
        shutil.copy2(earlier / CARD, folder / CARD)


def is_generated(path: Path) -> bool:
    """Return whether a card is exactly as :func:`write_card` wrote it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    found = _DIGEST.search(text)
    return found is not None and found.group(1) == _digest(text[: found.start()])


def card_text(
    config: Any,
    name: str,
    *,
    report: Mapping[str, Any] | None = None,
    sources: Mapping[str, str | None] | None = None,
    picture: bool = False,
    repository: str | None = None,
    moment: str | None = None,
) -> str:
    """Return the card of a model as Markdown; see :func:`write_card`."""
    accuracy: Mapping[str, float] = (report or {}).get("accuracy", {})
    parts = _parts_of(config, sources or {})
    known = [source for _, source in parts.values() if source]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["tokenflex", "vision-language-model"],
        base_model=[source for source in known if _is_hub_name(source)] or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type="own",
                dataset_name="evaluation data of the run",
                metric_type="accuracy",
                metric_name=f"accuracy at {count} vision tokens",
                metric_value=round(value, 4),
            )
            for count, value in accuracy.items()
        ],
    )
    options = getattr(config, "tokenflex", None)  # of a conversion
    if isinstance(options, dict):
        count, code = options.get("num_image_tokens"), _CONVERSION
        kind = f"a converted `{config.model_type}`"
    else:
        count, code, kind = config.num_image_tokens, _OURS, "a TokenFLEX model"
    code = (code + _ASK).format(source=_literal(repository or _FOLDER), count=count)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_title(name)}",
        f"A vision-language model, {kind}, whose number of vision tokens is an argument of each "
        "call: its token-adaptive projector (adaptive average pooling, LayerNorm, SwiGLU) turns "
        "the encoder's patches into as many tokens as wanted.",
        *([moment] if moment else []),
        _facts(config, parts, count),
        "## Use",
        "With the package `tokenflex` installed (extra `[hf]`), on a picture of yours:\n\n"
        f"```python\n{code}```",
    ]
    if accuracy and report is not None:
        sections += _accuracy_section(report, picture)
    sections += ["## Licence", _licence(known), "## Citation", f"```bibtex\n{_CITATION}```"]
    text = "\n\n".join(sections) + "\n"
    return _signed(text)


def _signed(text: str) -> str:
    return f"{text}\n<!-- written by tokenflex {_digest(text)} -->\n"


def _title(name: str) -> str:
    """Return a name on one line, without signs of Markdown."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", printable(name, 200))


def _literal(text: str) -> str:
    """Return a text as Python writes it, in double quotes."""
    return json.dumps(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parts_of(config: Any, sources: Mapping[str, str | None]) -> dict[str, tuple[Any, str]]:
    """Return the configs of encoder and language model, and where they were loaded from."""
    parts = {
        "vision encoder": getattr(config, "vision_config", None),
        "language model": getattr(config, "text_config", None),
    }
    known = {
        title: (part, sources.get(title) or getattr(part, "_name_or_path", "") or "")
        for title, part in parts.items()
        if part is not None
    }
    others = {title: (None, source) for title, source in sources.items() if title not in parts}
    return known | {title: (part, source or "") for title, (part, source) in others.items()}


def _facts(config: Any, parts: Mapping[str, tuple[Any, str]], count: Any) -> str:
    rows = []
    for title, (part, source) in parts.items():
        layers = getattr(part, "num_hidden_layers", None)
        width = getattr(part, "hidden_size", None)
        sizes = f"{layers} layers of width {width}" if layers and width else ""
        model_type = "" if part is None else f"`{part.model_type}`"
        words = [model_type, sizes, source and f"from `{_shown(source)}`"]
        rows.append((title, ", ".join(word for word in words if word)))
    trained = getattr(config, "trained_num_image_tokens", None)
    counts = f"{count} by default"
    if trained:
        counts += f"; trained with {', '.join(map(_label, trained))}"
    rows.append(("vision tokens of an image or tile", counts))
    lines = ["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows)]
    return "\n".join(lines)


def _label(count: Any) -> str:
    return "x".join(map(str, count)) if isinstance(count, (list, tuple)) else str(count)


def _accuracy_section(report: Mapping[str, Any], picture: bool) -> list[str]:
    counts = list(report["accuracy"])
    rows = [("all questions", report["accuracy"]), *report.get("accuracy_by_kind", {}).items()]
    if len(rows) == 2:  # one kind of question: the same numbers again
        rows = rows[:1]
    lines = [f"| vision tokens | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(f'{at[c]:.3f}' for c in counts)} |" for row, at in rows]
    asked = sum(report.get("questions", {}).values())
    said = f"Share of {asked:,} questions of the run's evaluation data that are answered right."
    shown = [f"![Accuracy against vision tokens]({PICTURE})"] if picture else []
    return ["## Accuracy", said, "\n".join(lines), *shown]


def _licence(sources: list[str]) -> str:
    """Name the licences that the cards of local parts state, and the rule for all others."""
    known = {source: _licence_of(source) for source in sources}
    stated = [f"`{_shown(source)}`: {licence}" for source, licence in known.items() if licence]
    rule = "The weights derive from those of the parts, so the parts' licences hold for them"
    return f"{rule}: {'; '.join(stated)}." if stated else f"{rule}; name yours here."


def _licence_of(source: str) -> str | None:
    path = Path(source) / CARD
    try:
        return ModelCard.load(path).data.license if path.is_file() else None
    except Exception:  # a card of any other form
        return None


def _shown(source: str) -> str:
    """Return a hub name as it is, and the last part alone of a path on this machine."""
    return source if _is_hub_name(source) else Path(source).name


def _is_hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()
