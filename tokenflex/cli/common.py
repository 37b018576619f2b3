"""What several commands begin with."""

from __future__ import annotations

import os
import warnings


def device() -> str:
    """Where models run: on the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices out of ours, and warnings to one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
