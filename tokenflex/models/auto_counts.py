"""``num_image_tokens="auto"``: the model's side of counts that are chosen for each image.

The model calls a hook to choose counts. Importing :mod:`tokenflex.routing.choice` sets the hook,
and ``tokenflex/_auto_classes.py`` imports that module with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

CHOICE_INPUTS = (
    "attention_mask",
    "pixel_values",
    "grids",
    "encoded_images",
    "image_index",
    "tiles_per_image",
)
"""Inputs of :meth:`ChoosesCounts.choose_counts` beside ``input_ids``."""
CHOICE_OPTIONS = ("num_image_tokens", "penalty", "budget")
"""Its options."""


class ChoosesCounts:
    """A mixin for models that choose counts.

    Attributes:
        count_chooser: ``count_chooser(model, input_ids, **inputs_and_options)`` returns inputs of
            ``generate`` with every image's count chosen and its placeholders repeated. None until
            :mod:`tokenflex.routing.choice` is imported. To choose in another way, set it on a
            model.
    """

    count_chooser: ClassVar[Callable[..., dict[str, Any]] | None] = None

    def ready_for_choice(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of ``generate`` without what depends on the length of prompts."""
        return inputs

    def choose_counts(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return inputs of ``generate`` with every image's count chosen.

        The arguments are those of :func:`tokenflex.routing.choice.choose_counts`.
        """
        if self.count_chooser is None:
            raise ValueError(
                "num_image_tokens='auto' needs a count_chooser, and the model has none: import "
                "tokenflex.routing.choice, which sets it"
            )
        return self.count_chooser(self, input_ids, **kwargs)

    def _generate_with_choice(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Generate at chosen counts. The output begins with the prompts as they were given.

        Args:
            inputs: ``input_ids``, unless they are among ``kwargs``.
            **kwargs: arguments of :meth:`choose_counts` and of ``generate``.

        Returns:
            The output of ``generate``. With ``return_dict_in_generate`` it has
            ``num_image_tokens``, the count chosen for each tile.
        """
        names = (*CHOICE_OPTIONS, *CHOICE_INPUTS)
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("input_ids must be given where counts are to be chosen, got None")
        chosen = self.choose_counts(input_ids, **options)
        output = self.generate(**chosen, **kwargs)  # type: ignore[attr-defined]
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        new = sequences[:, chosen["input_ids"].shape[1] :]
        prompts = input_ids.repeat_interleave(len(new) // len(input_ids), 0)
        sequences = torch.cat([prompts.to(new.device), new], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        output.num_image_tokens = chosen.get("num_image_tokens", [])
        return output


def asks_for_choice(kwargs: Mapping[str, Any]) -> bool:
    """Return whether arguments of ``generate`` leave counts to be chosen."""
    return isinstance(join_words(kwargs.get("num_image_tokens")), str) or any(
        kwargs.get(name) is not None for name in ("penalty", "budget", "tiles_per_image")
    )


def refuse_auto(num_image_tokens: Any) -> None:
    """Refuse "auto" where counts must be known: in training, and in every forward pass.

    Raises:
        ValueError: ``num_image_tokens`` is "auto".
    """
    if isinstance(join_words(num_image_tokens), str):
        raise ValueError(
            f"num_image_tokens must be counts here, got {num_image_tokens!r}: 'auto' is for "
            "generate; for a forward pass call model(**model.choose_counts(**inputs))"
        )


def join_words(num_image_tokens: Any) -> Any:
    """Return the one word of several calls, which a pipeline batches into a list."""
    words = num_image_tokens if isinstance(num_image_tokens, list) else []
    alike = bool(words) and all(isinstance(word, str) and word == words[0] for word in words)
    return words[0] if alike else num_image_tokens
