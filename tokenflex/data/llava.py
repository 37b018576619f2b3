"""LLaVA's layout: records ``{id, image, conversations: [{from, value}]}``."""

from __future__ import annotations

from tokenflex.data.messages import MessagesDataset


class LlavaDataset(MessagesDataset):
    """Samples from a LLaVA file: one JSON list, or a record a line (JSONL).

    ``image`` is a path, a list of paths, or missing for a conversation without images. ``value``
    holds ``<image>`` at the images, and ``from`` is ``human``, ``gpt`` or ``system``. Arguments,
    errors and broken records are those of :class:`tokenflex.data.messages.MessagesDataset`, which
    reads the same files.
    """
