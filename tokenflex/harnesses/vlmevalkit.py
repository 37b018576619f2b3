"""TokenFLEX as a model of VLMEvalKit: one entry per count, the same count for every benchmark.

    from tokenflex.harnesses.vlmevalkit import register
    register("runs/my-model/checkpoint", [64, 144, 256])  # TokenFLEX-n64, -n144, -n256

An adapter that picks a count per benchmark reports the best of several models as one; here the
benchmark's name reaches neither the count nor the tiles.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from vlmeval.vlm.base import BaseModel
except ModuleNotFoundError as error:
    raise ImportError(
        f"tokenflex.harnesses.vlmevalkit needs {error.name}: install VLMEvalKit "
        "(github.com/open-compass/VLMEvalKit)"
    ) from error

from tokenflex.harnesses.assistant import Assistant

MAX_NEW_TOKENS = 1024


class TokenFlex(BaseModel):
    """The adapter; prompts are the toolkit's own for each benchmark.

    Args:
        checkpoint: checkpoint folder.
        tokens: vision tokens of each tile: ``64``, ``"12x16"`` or ``"auto"``.
        max_tiles: images are cut into at most so many; the processor's own if None.
        **options: for ``generate``; greedy, at most 1024 new tokens, where they say nothing else.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        checkpoint: str | Path,
        tokens: int | str,
        max_tiles: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.assistant = Assistant(checkpoint, tokens, max_tiles=max_tiles)
        self.options = {"max_new_tokens": MAX_NEW_TOKENS, **options}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to an interleaved message; ``dataset`` changes nothing.

        Raises:
            ValueError: a part is neither text nor image.
        """
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        return self.assistant.reply([[{"role": "user", "content": content}]], **self.options)[
            0
        ].text


def register(
    checkpoint: str | Path,
    counts: Sequence[int | str],
    *,
    name: str = "TokenFLEX",
    supported: MutableMapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Add one model per count to VLMEvalKit's list, and return their names.

    Args:
        checkpoint: checkpoint folder.
        counts: as :class:`TokenFlex` takes ``tokens``.
        name: what the names begin with; ``-n64`` and so on follow.
        supported: the list to add to; ``vlmeval.config.supported_VLM`` if None.
        **options: for :class:`TokenFlex`, the same at every count.
    """
    if supported is None:
        from vlmeval.config import supported_VLM

        supported = supported_VLM
    names = [f"{name}-n{count}" for count in counts]
    for one, count in zip(names, counts, strict=True):
        supported[one] = partial(TokenFlex, checkpoint=str(checkpoint), tokens=count, **options)
    return names
