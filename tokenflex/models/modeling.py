"""The model: image -> encoder -> projector -> vision tokens; with the text, one sequence -> logits.

``forward`` takes a batch in one of two forms:

* ``input_ids`` [B, L], padded, with one placeholder per vision token, as ``generate`` and other
  libraries call it (:mod:`tokenflex.models.placeholders`);
* ``plan``, a :class:`tokenflex_kernels.PackPlan`: every sample of a batch in one row without
  padding, for training and evaluation (:mod:`tokenflex.models.packed`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.generic import can_return_tuple

from tokenflex.counts import Grid, ImageTokenCounts, token_grid
from tokenflex.models.attention import PACKED_ATTENTION
from tokenflex.models.auto_map import InstalledClass
from tokenflex.models.cards import SavedWithCard
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.exporting import UniformTokens, traces_one_count
from tokenflex.models.generation import TokenFlexGeneration, cache_name, takes_cache
from tokenflex.models.head import build_head, transform_logits
from tokenflex.models.image_features import ImageFeatures, build_projector
from tokenflex.models.loss import head_cross_entropy, head_distillation
from tokenflex.models.packed import pack_prompts
from tokenflex.models.placeholders import (
    ImageTokens,
    UnprojectedImages,
    check_placeholder,
    merge_prompt,
)
from tokenflex.models.prefixes import SharedPrefixes
from tokenflex.models.prompt_embeddings import batch_of_prompts, without_padding
from tokenflex.models.vision import EncodedImages
from tokenflex.positions import check_sequential
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex_kernels import PackPlan
from tokenflex_kernels.tracing import is_exporting


class TokenFlexPreTrainedModel(SavedWithCard, InstalledClass, PreTrainedModel):
    """The properties of both models that transformers reads."""

    config_class = TokenFlexConfig
    config: TokenFlexConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resize the embedding as transformers does, but keep the row of the placeholder.

        Raises:
            ValueError: ``image_token_id`` would lie outside the vocabulary.
        """
        if new_num_tokens is not None:
            multiple = pad_to_multiple_of or 1
            rows = -(-new_num_tokens // multiple) * multiple
            check_placeholder(self.config.image_token_id, rows)
        embedding: nn.Module = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        return embedding


@dataclass
class TokenFlexModelOutput(BaseModelOutputWithPast):
    """Output of the model without its head.

    Attributes:
        image_hidden_states: [sum of counts, D], the vision tokens; None without images, and with
            ``output_image_hidden_states=False``.
    """

    image_hidden_states: torch.Tensor | None = None


class TokenFlexModel(ImageFeatures, TokenFlexPreTrainedModel):
    """Encoder, projector and language model, without the language model's head."""

    def __init__(self, config: TokenFlexConfig) -> None:
        super().__init__(config)
        check_placeholder(config.image_token_id, config.text_config.vocab_size)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        _check_language_model(self.language_model)
        self._cache_name = cache_name(self.language_model)
        use_packed_attention(self.language_model)
        self._known_counts = {token_grid(n) for n in config.trained_num_image_tokens or ()}
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        linears = (self.projector.gate, self.projector.up, self.projector.down)
        position = self.projector.position
        if any(module is linear for linear in linears):
            # PyTorch's initialisation has a scale that follows the width; transformers' has not.
            module.reset_parameters()
        elif position is not None and module is position:
            nn.init.zeros_(position.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        grids: Grid | Sequence[Grid] | None = None,
        encoded_images: EncodedImages | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Sequence[int] | None = None,
        plan: PackPlan | None = None,
        shared_prefixes: SharedPrefixes | None = None,
        target_rows: torch.Tensor | None = None,
        output_image_hidden_states: bool = True,
        **kwargs: Any,
    ) -> TokenFlexModelOutput:
        """Return hidden states of a padded batch, or of a packed row when ``plan`` is given.

        The arguments are those of :meth:`TokenFlexForConditionalGeneration.forward`;
        ``target_rows`` are not used: TRL, which computes the loss itself, hands on a whole batch.
        """
        check_placeholder(self.config.image_token_id, self.config.text_config.vocab_size)
        if plan is not None and image_index is not None:
            raise ValueError("image_index is part of the plan: give it to plan_packing")
        images: ImageTokens | UniformTokens | UnprojectedImages | None
        others = (encoded_images, mm_encoder_outputs, plan)
        if (
            is_exporting()
            and pixel_values is not None
            and all(other is None for other in others)
            and traces_one_count(num_image_tokens, image_index)
        ):
            images, _ = self._trace_one_count(pixel_values, num_image_tokens, grids)
        else:
            images = self._image_tokens(
                *(pixel_values, num_image_tokens, grids, encoded_images, mm_encoder_outputs),
                image_index,
                project=plan is None or output_image_hidden_states,
            )
        prompt = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if plan is None:
            if shared_prefixes is not None:
                raise ValueError("shared_prefixes are those of a plan: give the plan with them")
            assert not isinstance(images, UnprojectedImages)
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            embedding = self.get_input_embeddings()
            if isinstance(images, UniformTokens):
                inputs = images.merge(embedding, self.config, **prompt, seen=seen)
            else:
                inputs = merge_prompt(embedding, self.config, images, **prompt, seen=seen)
            inputs[self._cache_name] = past_key_values
        else:
            assert not isinstance(images, UniformTokens)
            del prompt["position_ids"]
            for name, value in {**prompt, "past_key_values": past_key_values}.items():
                if value is not None:
                    raise ValueError(f"plan holds the whole batch: give no {name} with it")
            if "vision_index" in kwargs:  # would be lost among the language model's options
                raise TypeError(
                    "vision_index is part of the plan: give image_index to plan_packing"
                )
            inputs = pack_prompts(
                self.language_model, self.config, plan, images, shared_prefixes, position_ids
            )
        outputs = self.language_model(**{**kwargs, **inputs}, return_dict=True)
        return TokenFlexModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=images.tokens
            if isinstance(images, (ImageTokens, UniformTokens)) and output_image_hidden_states
            else None,
        )


@dataclass
class TokenFlexOutput(CausalLMOutputWithPast):
    """Output of the model.

    Attributes:
        image_hidden_states: [sum of counts, D], the vision tokens; None without images, with
            ``targets`` and with ``output_image_hidden_states=False``.
        distillation_loss: scalar, the weighted sum of KL(p_teacher || p_student) over the targets,
            without a gradient; None without a teacher.
    """

    image_hidden_states: torch.Tensor | None = None
    distillation_loss: torch.Tensor | None = None


# transformers looks for its own mixin among the direct bases.
class TokenFlexForConditionalGeneration(
    TokenFlexPreTrainedModel, TokenFlexGeneration, GenerationMixin
):
    """A vision-language model whose vision-token count is an argument of the call."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TokenFlexConfig) -> None:
        super().__init__(config)
        self.model = TokenFlexModel(config)
        self.lm_head = build_head(config.text_config)
        embedding = self.get_input_embeddings()
        path = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{path}.weight"}
        self.post_init()
        self.suppress_placeholder()

    @classmethod
    def from_parts(
        cls,
        config: TokenFlexConfig,
        vision_model: PreTrainedModel,
        causal_language_model: PreTrainedModel,
    ) -> TokenFlexForConditionalGeneration:
        """Make a model around an existing encoder and language model, with their weights.

        Args:
            config: its ``vision_config`` and ``text_config`` must be those of the parts.
            vision_model: the encoder.
            causal_language_model: the language model with its head.

        Raises:
            ValueError: the head is not the one that a model of ``config`` has, so that a saved
                model could not be loaded again.
        """
        with torch.device("meta"):  # allocate no weights for the parts that exist
            model = cls(config)
        head = causal_language_model.get_output_embeddings()
        if _describe(head) != _describe(model.lm_head):
            raise ValueError(
                f"causal_language_model must have the head that config.text_config gives, "
                f"{_describe(model.lm_head)}, got {_describe(head)}"
            )
        model.model.vision_model = vision_model
        model.model.language_model = causal_language_model.base_model
        use_packed_attention(model.model.language_model)
        model.lm_head = head
        model.generation_config = copy.deepcopy(causal_language_model.generation_config)
        model.suppress_placeholder()
        reference = model.lm_head.weight
        projector = model.model.projector.to_empty(device=reference.device)
        projector.to(reference.dtype).reset_parameters()
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the placeholder suppressed in the generation config."""
        self.suppress_placeholder()
        super().save_pretrained(*args, **kwargs)

    @property
    def takes_shared_prefixes(self) -> bool:
        """True if sequences of a plan may share prefixes, which only our attention supports."""
        return self.model.language_model.config._attn_implementation == PACKED_ATTENTION

    @property
    def projector(self) -> TokenAdaptiveProjector:
        """The projector."""
        return self.model.projector

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`TokenFlexModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def encode_images(
        self, pixel_values: torch.Tensor, grids: Grid | Sequence[Grid] | None = None
    ) -> EncodedImages:
        """See :meth:`TokenFlexModel.encode_images`."""
        return self.model.encode_images(pixel_values, grids)

    @torch.no_grad()
    def merged_embeddings(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        grids: Grid | Sequence[Grid] | None = None,
        encoded_images: EncodedImages | None = None,
        image_index: Sequence[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return the embeddings of prompts with their vision tokens in place.

        They are all that the language model needs: a server of the plain language model, written by
        ``tokenflex export --to language-model``, answers from them (``prompt_embeds``) as this
        model does. The arguments are those of :meth:`forward`.

        Args:
            input_ids: int64 [L], a prompt, or [B, L], a batch.
            attention_mask: of the same shape, 0 on padding.

        Returns:
            [L, D] for a prompt; for a batch a list with one [L_i, D] per prompt, without its
            padding. Without gradients, in the dtype of the embedding.

        Raises:
            ValueError: placeholders, counts and tiles do not fit together, or all tokens of an
                image share a position, which a plain language model does not give them.

        Example:
            >>> inputs = processor(images=[a, b], text=prompts, num_image_tokens=[64, 256])
            >>> first, second = model.merged_embeddings(**inputs)
        """
        check_sequential("merged_embeddings", self.config)
        ids, mask = batch_of_prompts(input_ids, attention_mask)
        images = self.model._image_tokens(
            *(pixel_values, num_image_tokens, grids, encoded_images, None, image_index),
            project=True,
        )
        assert not isinstance(images, UnprojectedImages)
        embeds: torch.Tensor = merge_prompt(
            self.get_input_embeddings(),
            self.config,
            images,
            input_ids=ids,
            inputs_embeds=None,
            attention_mask=mask,
            position_ids=None,
            seen=0,
        )["inputs_embeds"]
        prompts = without_padding(embeds, mask)
        return prompts if input_ids.ndim == 2 else prompts[0]

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        grids: Grid | Sequence[Grid] | None = None,
        encoded_images: EncodedImages | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Sequence[int] | None = None,
        plan: PackPlan | None = None,
        shared_prefixes: SharedPrefixes | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        targets: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        target_rows: torch.Tensor | None = None,
        teacher: dict[str, Any] | None = None,
        distillation: float = 0.0,
        output_image_hidden_states: bool = True,
        **kwargs: Any,
    ) -> TokenFlexOutput:
        """Return logits, and the loss where ``labels`` are given; with ``targets`` the loss alone.

        Args:
            input_ids: int64 [B, L] with one ``image_token_id`` per vision token.
            pixel_values: [tiles, 3, height, width], all tiles of the batch in order of appearance;
                patches for a NaFlex encoder, see :meth:`encode_images`.
            num_image_tokens: an int (a perfect square) or (h, w) for all tiles, or one per tile;
                the config's ``num_image_tokens`` if None.
            attention_mask: [B, L], 0 on padding.
            position_ids: int64 [B, L]; of a packed row [1, total], in place of the plan's.
            past_key_values: transformers' cache.
            inputs_embeds: [B, L, D] in place of ``input_ids``; images then stand where it holds
                the placeholder's embedding.
            labels: int64 like ``input_ids`` (for a packed row [1, total]), -100 where there is no
                loss. The loss is the mean over the others, or their sum over
                ``num_items_in_batch`` where that is given.
            grids: (height, width) of all tiles or of each in patches, where they are not the
                encoder's square: see :meth:`encode_images`.
            encoded_images: :meth:`encode_images` of the tiles in place of ``pixel_values``: images
                encoded once serve any number of calls, each at its own counts.
            mm_encoder_outputs: ``{"image": get_image_features(...)}``, the same at one count.
            image_index: the tile that each run of placeholders shows, in order of appearance, so
                that several prompts may show one image that is encoded once; host ints. None where
                each is shown once, in order.
            plan: a packed batch in place of ``input_ids``; sequences do not see each other. Its
                ``image_index`` lets several of them show one image that is encoded once, and each
                of its images may then be several tiles.
            shared_prefixes: with ``plan``, its sequences that continue another, see
                :func:`tokenflex.models.prefixes.share_prefixes`; for models that
                :attr:`takes_shared_prefixes`.
            logits_to_keep: the number of last positions, or a 1-D index of positions; 0 is all.
            targets: int64 [N], the next token at each of the kept positions, row after row, in
                place of ``labels``; see :func:`tokenflex.models.loss.head_cross_entropy`.
            target_weights: [N], the weight of each target in the loss.
            target_rows: int64 [1, N], with ``labels`` of one row: the positions before those that
                are not -100. In training the loss is then computed in chunks from these alone, and
                no logits are returned; otherwise it has no effect. Other labels are not learned.
            teacher: with ``targets``, the same samples at other counts: ``num_image_tokens``,
                ``plan``, ``shared_prefixes`` and ``logits_to_keep`` of a second pass, without
                gradients, over images that are encoded once for both.
            distillation: the weight of KL(p_teacher || p_student) at the targets in the loss; see
                :func:`tokenflex.models.loss.head_distillation`.
            output_image_hidden_states: False returns no ``image_hidden_states``. With ``plan`` the
                projector can then write the vision tokens straight into the packed row.

        Returns:
            ``logits`` [B, L, V] ([1, total, V] for a packed row), ``loss``, ``past_key_values``.
            With ``targets`` no logits and no ``image_hidden_states``, and the loss is their
            weighted sum; with ``teacher`` also ``distillation_loss``.

        Raises:
            ValueError: placeholders, counts and tiles do not fit together; both numbers are named.
        """
        teacher_hidden = None
        if teacher is not None:
            if targets is None:
                raise ValueError("a teacher is for targets: give targets with it")
            if pixel_values is not None:
                encoded_images = self.encode_images(pixel_values, grids)
                pixel_values = grids = None
            teacher_hidden = self._teacher_hidden(encoded_images, **teacher)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            num_image_tokens=num_image_tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            grids=grids,
            encoded_images=encoded_images,
            mm_encoder_outputs=mm_encoder_outputs,
            image_index=image_index,
            plan=plan,
            shared_prefixes=shared_prefixes,
            output_image_hidden_states=output_image_hidden_states and targets is None,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden.index_select(1, logits_to_keep)
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = loss = distillation_loss = None
        if targets is not None:
            loss, distillation_loss = self._target_loss(
                hidden.flatten(0, 1), targets, target_weights, labels, teacher_hidden, distillation
            )
        elif labels is not None and target_rows is not None and self.training:
            loss = self._loss_at(hidden, labels, target_rows, kwargs.get("num_items_in_batch"))
        else:
            logits = transform_logits(self.lm_head(hidden), self.config.text_config)
        if labels is not None and logits is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        return TokenFlexOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            distillation_loss=distillation_loss,
        )

    def _loss_at(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        target_rows: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Return the mean loss of the labels after ``target_rows``, 0 where there are none."""
        _check_target_rows(target_rows, labels, hidden)
        rows = target_rows[0]
        targets = labels[0].index_select(0, rows + 1)
        hidden = hidden[0].index_select(0, rows)
        is_learned = targets != -100  # labels may have been masked since the rows were found
        number = num_items_in_batch
        if number is None:
            number = is_learned.sum().clamp(min=1)
        total: torch.Tensor
        if type(self.lm_head) is nn.Linear:
            # Divided afterwards: half precision would lose the gradients of a mean over many.
            total, _ = self._target_loss(hidden, targets.clamp(min=0), is_learned.to(hidden.dtype))
        else:
            logits = transform_logits(self.lm_head(hidden), self.config.text_config)
            total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total / number

    @torch.no_grad()
    def _teacher_hidden(
        self, images: EncodedImages | None, *, logits_to_keep: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """Return [targets, D] of the teacher's pass, in the mode that the modules are in.

        It runs before the student's pass, so that its memory is free again by then.
        """
        if images is not None:
            images = EncodedImages(images.features.detach(), images.grids)
        device = self.get_input_embeddings().weight.device.type
        # PyTorch before #165068 caches casts without gradients, which the student would reuse.
        autocasts = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=autocasts, cache_enabled=False):
            hidden = self.model(
                encoded_images=images, output_image_hidden_states=False, return_dict=True, **inputs
            ).last_hidden_state
        return hidden.index_select(1, logits_to_keep).flatten(0, 1)

    def _target_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        teacher_hidden: torch.Tensor | None = None,
        distillation: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if target_weights is None or labels is not None:
            raise ValueError("targets come with target_weights, and in place of labels")
        if type(self.lm_head) is not nn.Linear:  # adapted or quantised: more than its weight
            raise ValueError(
                f"targets need a plain Linear as the head, give labels to {type(self.lm_head)}"
            )
        weight, bias = self.lm_head.weight, self.lm_head.bias
        inputs = hidden, weight, bias, targets, target_weights

        def transform(logits: torch.Tensor) -> torch.Tensor:
            return transform_logits(logits, self.config.text_config)

        if teacher_hidden is None:
            return head_cross_entropy(*inputs, transform), None
        return head_distillation(*inputs, teacher_hidden, distillation, transform)


def _check_target_rows(
    target_rows: torch.Tensor, labels: torch.Tensor, hidden: torch.Tensor
) -> None:
    if not isinstance(target_rows, torch.Tensor) or target_rows.dtype != torch.int64:
        got = getattr(target_rows, "dtype", type(target_rows).__name__)
        raise TypeError(f"target_rows must be an int64 tensor, got {got}")
    if target_rows.ndim != 2 or len(target_rows) != 1:
        raise ValueError(f"target_rows must be [1, N], got shape {list(target_rows.shape)}")
    if labels.shape != hidden.shape[:2] or len(labels) != 1:
        raise ValueError(
            f"target_rows belong to labels of one row, [1, {hidden.shape[1]}], got shape "
            f"{list(labels.shape)} for hidden states of {list(hidden.shape[:2])}"
        )


def use_packed_attention(language_model: PreTrainedModel) -> None:
    """Replace "sdpa" by the same attention for packed rows too; keep other choices."""
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(PACKED_ATTENTION)


def _check_language_model(language_model: PreTrainedModel) -> None:
    """Refuse language models without embeddings as inputs, or with another cache, as Mamba's."""
    parameters = inspect.signature(type(language_model).forward).parameters
    # Since transformers 5.24 all caches have one name, those of states without positions as well.
    has_cache = "past_key_values" in parameters or {"cache", "position_ids"} <= {*parameters}
    for name, taken in (
        ("inputs_embeds", "inputs_embeds" in parameters),
        ("past_key_values", has_cache),
    ):
        if not taken:
            raise ValueError(
                f"text_config must be of a language model that takes {name}, got model_type "
                f"{language_model.config.model_type!r}"
            )


def _describe(head: Any) -> str:
    bias = "no bias" if getattr(head, "bias", None) is None else "a bias"
    return f"{list(head.weight.shape)} with {bias}"


AutoModel.register(TokenFlexConfig, TokenFlexModel)
AutoModelForImageTextToText.register(TokenFlexConfig, TokenFlexForConditionalGeneration)
_AutoModelForMultimodalLM = getattr(modeling_auto, "AutoModelForMultimodalLM", None)
if _AutoModelForMultimodalLM is not None:  # not in every supported release
    _AutoModelForMultimodalLM.register(TokenFlexConfig, TokenFlexForConditionalGeneration)

# By these names transformers and TRL know the models that take images, and transformers' Trainer
# those whose labels it must shift for label smoothing. The registries above hold the classes.
for _names, _class in (
    (MODEL_MAPPING_NAMES, TokenFlexModel),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, TokenFlexForConditionalGeneration),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, TokenFlexForConditionalGeneration),
    (
        getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
        TokenFlexForConditionalGeneration,
    ),
):
    _names[TokenFlexConfig.model_type] = _class.__name__
