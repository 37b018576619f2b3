"""Processors of each family, and pictures for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tests.dropin.table import BUILDERS, IMAGE_TEXTS, PIXELS, WITH_TORCHVISION

PROCESSORS = sorted(BUILDERS)
NEED_TORCHVISION = sorted(WITH_TORCHVISION)


_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_TEXT {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def stock_processor(name: str) -> Any:
    processor = BUILDERS[name]()
    processor.chat_template = _TEMPLATE.replace("IMAGE_TEXT", image_text(name))
    return processor


def image_text(name: str) -> str:
    """Return the text for an image in a prompt."""
    return IMAGE_TEXTS.get(name, "<image>")


def picture(seed: int, height: int = PIXELS, width: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
