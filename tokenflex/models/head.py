"""The head: from the language model's last hidden states to logits, as its own class computes them.

transformers keeps a language model's head in its causal class, not in the model under it. Most are
one Linear; some families add a bias, a scale or a cap.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

# Fields of families that transform logits in another way -> the value that has no effect.
_UNKNOWN_FIELDS = {
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "unpadded_vocab_size": None,
}


def build_head(config: PretrainedConfig) -> nn.Linear:
    """Make an output layer, with a bias where the language model's own class has one.

    Args:
        config: the language model's.

    Raises:
        ValueError: transformers has no causal language model of that config, or its logits are not
            those of a Linear and :func:`transform_logits`; the message names the field.
    """
    check_logits(config)
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal_class is None:
        raise ValueError(
            f"text_config must be of a causal language model, got model_type {config.model_type!r}"
        )
    with torch.device("meta"):  # only its shape is needed
        head: Any = causal_class(copy.deepcopy(config)).get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.in_features != config.hidden_size:
        raise ValueError(
            f"text_config of model_type {config.model_type!r} must give a head that is a Linear "
            f"of hidden_size {config.hidden_size}, got {head}"
        )
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def check_logits(config: PretrainedConfig) -> None:
    """Refuse a language model whose logits :func:`transform_logits` does not compute.

    Raises:
        ValueError: the message names the field of its config.
    """
    unknown = dict(_UNKNOWN_FIELDS)
    if config.model_type == "hyperclovax":  # multiplies by it, where Granite divides
        unknown["logits_scaling"] = 1
    for name, neutral in unknown.items():
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"text_config.{name} of model_type {config.model_type!r} must be {neutral}, as "
                f"its effect on logits is not known, got {value}"
            )


def transform_logits(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Transform the output of the head as the language model's family does.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite), and
    ``final_logit_softcapping`` c gives c * tanh(logits / c) (Gemma 2).

    Args:
        logits: [..., V].
        config: the language model's.
    """
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits
