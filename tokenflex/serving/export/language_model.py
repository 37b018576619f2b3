"""The language model of a model alone, as transformers knows it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tokenflex.dropin.language import check_plain_language_model
from tokenflex.dropin.variants import is_converted
from tokenflex.models.generation import never_generate


def plain_language_model(model: Any) -> Any:
    """Return transformers' causal language model around the weights of ``model``, not copied.

    It never answers with the image placeholder: its generation config suppresses it.

    Raises:
        ValueError: the language side of a converted model is more than a plain language model.
    """
    if is_converted(model):
        check_plain_language_model(model)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    config = copy.deepcopy(model.config.get_text_config())
    config._attn_implementation = "sdpa"
    config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):  # the weights exist
        language_model = causal_class(config).eval()
    if type(language_model.base_model) is not type(decoder):
        raise ValueError(
            f"the language model of {model.config.model_type} cannot be used without its vision "
            f"model: it is a {type(decoder).__name__}, and transformers' language model a "
            f"{type(language_model.base_model).__name__}"
        )
    setattr(language_model, language_model.base_model_prefix, decoder)
    language_model.set_output_embeddings(head)
    generation_config = copy.deepcopy(model.generation_config)
    never_generate(generation_config, model.config.image_token_id)
    language_model.generation_config = generation_config
    return language_model
