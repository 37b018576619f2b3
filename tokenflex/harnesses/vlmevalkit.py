"""TokenFLEX as models of VLMEvalKit: one per count, with the same count for every benchmark.

    from tokenflex.harnesses.vlmevalkit import register
    register("runs/my-model/checkpoint", [64, 144, 256])  # TokenFLEX-n64, -n144, -n256

With a count per benchmark, an adapter would report the best of several models as one. So the
benchmark's name affects neither the count nor the tiles.
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
    """The adapter, with the toolkit's own prompts for each benchmark.

    Args:
        checkpoint: Checkpoint folder.
        tokens: Vision tokens of each tile: ``64``, ``"12x16"`` or ``"auto"``.
        max_tiles: Most tiles of an image; the processor's default if None.
        **options: For ``generate``; greedy search and at most 1024 new tokens by default.
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
        """Answer an interleaved message; ``dataset`` has no effect.

        Raises:
            ValueError: A part is neither text nor image.
        """
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        conversation = [{"role": "user", "content": content}]
        return self.assistant.reply([conversation], **self.options)[0].text


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
        checkpoint: Checkpoint folder.
        counts: As :class:`TokenFlex` takes ``tokens``.
        name: Beginning of the names, which ``-n64`` and so on follow.
        supported: The list to add to; ``vlmeval.config.supported_VLM`` by default.
        **options: For :class:`TokenFlex`, the same at every count.
    """
    if supported is None:
        from vlmeval.config import supported_VLM

        supported = supported_VLM
    models = {
        f"{name}-n{count}": partial(TokenFlex, checkpoint=str(checkpoint), tokens=count, **options)
        for count in counts
    }
    supported.update(models)
    return [*models]
