"""Image-text types of transformers without a family, and what stands against each.

:func:`reason` is the one place that tells why a model type is not supported: the error for such a
model and the table of docs/families.md have their words from here.
"""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

NOT_TRIED = "not tried yet"
NO_IMAGE_TEXT = "it is no image-text type of the installed transformers"

_ENCODER_DECODER = (
    "it is an encoder-decoder: its decoder attends to the image, and the prompt has no placeholders"
)
_CROSS_ATTENTION = "its layers attend to the image, and the prompt has no placeholders"
_QUERIES = (
    "its whole model, not its base model, projects the learned queries of a Q-Former, which have "
    "no patch grid"
)
_CODES = "it reads images as codes of a VQ model, not as features of an encoder"
_NO_ENCODER = "it has no vision encoder: one layer embeds the pixels of each placeholder"
_OMNI = "its positions (M-RoPE) are computed from its audio, too, without the types of tokens"

_REASONS: dict[str, str] = {
    "blip": _ENCODER_DECODER,
    "blip-2": _QUERIES,
    "chameleon": _CODES,
    "deepseek_ocr2": "its encoder returns learned queries, which have no patch grid",
    "deepseek_vl_hybrid": "its projector joins the grids of two encoders",
    "diffusion_gemma": "it generates by block diffusion, with an encoder and a decoder of its own",
    "emu3": _CODES,
    "evolla": "it reads proteins, not images",
    "florence2": "it is an encoder-decoder, whose encoder reads the image beside the text",
    "fuyu": _NO_ENCODER,
    "gemma4_unified": _NO_ENCODER,
    "gemma3n": (
        "it was not tried: its vision encoder is a MobileNet of the library timm, without which "
        "the tests run"
    ),
    "git": "its image features stand before every prompt, which has no placeholders",
    "granite4_vision": (
        "several Q-Formers add features of several layers to several layers of its language model: "
        "there is no one projector to replace"
    ),
    "hunyuan_vl": (
        "its image tokens hold learned ones between rows and at both ends, which positions count"
    ),
    "idefics": _CROSS_ATTENTION,
    "idefics2": "its processor writes its fixed number of placeholders by itself",
    "inkling_mm_model": _NO_ENCODER,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "kosmos-2": "its projector returns learned queries, and its model takes a mask of their places",
    "kosmos-2.5": (
        "its projector returns learned queries, and its model takes a mask of their places"
    ),
    "llama4": "its whole model, not its base model, encodes and projects images",
    "minicpmv4_7": "its generate lays out positions (M-RoPE) without the counts of the call",
    "mistral4": (
        "it is a language model without images; mistral3 with a mistral4 inside is supported"
    ),
    "mllama": _CROSS_ATTENTION,
    "molmo2": (
        "its projector pools overlapping crops by an index of the processor, and its features are "
        "added to the embeddings of several kinds of tokens"
    ),
    "nemotron_h_omni": "its whole model, not a base model, encodes and projects images",
    "pi0": "it controls robots: it has no text generation",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "shieldgemma2": (
        "its weights are of a classifier, which AutoModelForImageTextToText does not load"
    ),
    "t5gemma2": "it is an encoder-decoder, whose encoder reads the image beside the text",
    "udop": "it is an encoder-decoder, whose encoder joins patches with the words on them",
    "unlimited_ocr": (
        "its image tokens hold learned ones at the ends of rows and between an image's two views"
    ),
    "vision-encoder-decoder": _ENCODER_DECODER,
}


def reason(model_type: str) -> str:
    """Return why a model type without a family is not supported: a fact, or :data:`NOT_TRIED`."""
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return NO_IMAGE_TEXT
    return _REASONS.get(model_type, NOT_TRIED)
