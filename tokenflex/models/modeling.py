"""The model: image -> encoder -> projector -> vision tokens; with the text, one sequence -> logits.

Two ways in, through one ``forward``:

* ``input_ids`` [B, L], padded, one placeholder per vision token: what ``generate`` and other
  libraries call;
* ``plan``, a :class:`tokenflex_kernels.PackPlan`: every sample of a batch in one row without
  padding, for training and evaluation.
"""

from __future__ import annotations

import inspect
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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

from tokenflex.counts import Grid, ImageTokenCounts, token_grid, token_grids
from tokenflex.models.attention import PACKED_ATTENTION
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.generation import RepeatsImages, takes_cache
from tokenflex.models.head import build_head, transform_logits
from tokenflex.models.loss import head_cross_entropy, head_distillation
from tokenflex.models.prefixes import SharedPrefixes
from tokenflex.models.vision import EncodedImages, encode
from tokenflex.positions import shared_image_positions
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex.selection.choice import (
    asks_for_choice,
    choose_counts,
    generate_with_choice,
    refuse_auto,
)
from tokenflex_kernels import PackPlan, merge_vision, pack_embeddings


class TokenFlexPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both models."""

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


class TokenFlexModel(TokenFlexPreTrainedModel):
    """Encoder, projector and language model, without the language model's head."""

    def __init__(self, config: TokenFlexConfig) -> None:
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.projector = TokenAdaptiveProjector(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            hidden_width=config.projector_hidden_width,
            num_tokens=config.num_image_tokens,
            pooling=config.pooling,
            eps=config.projector_eps,
            position=config.projector_position,
        )
        self.language_model = AutoModel.from_config(config.text_config)
        _check_language_model(self.language_model)
        use_packed_attention(self.language_model)
        self._known_counts = {token_grid(n) for n in config.trained_num_image_tokens or ()}
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        linears = (self.projector.gate, self.projector.up, self.projector.down)
        position = self.projector.position
        if any(module is linear for linear in linears):
            # PyTorch's own initialisation: its scale follows the width, transformers' does not.
            module.reset_parameters()
        elif position is not None and module is position:
            nn.init.zeros_(position.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        grids: Grid | Sequence[Grid] | None = None,
        encoded_images: EncodedImages | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Project every tile to its own number of vision tokens; encode it if it is not yet.

        Args:
            pixel_values: as :meth:`encode_images` takes them.
            num_image_tokens: one count for all tiles or one per tile; the config's if None.
            grids: as :meth:`encode_images` takes them.
            encoded_images: what :meth:`encode_images` gave, in place of pixels and grids.

        Returns:
            ``last_hidden_state``, patch features [sum of H*W, C], and ``pooler_output``, a list
            with [count, D] vision tokens for each tile.

        Raises:
            ValueError: counts and tiles do not fit together.

        Warns:
            UserWarning: once for a count that the model was not trained with, where the config
                says with which it was.
        """
        if (pixel_values is None) == (encoded_images is None):
            raise ValueError("give exactly one of pixel_values and encoded_images")
        if encoded_images is None:
            assert pixel_values is not None
            encoded_images = self.encode_images(pixel_values, grids)
        elif grids is not None:
            raise ValueError("encoded_images hold their grids: give no grids with them")
        refuse_auto(num_image_tokens)
        counts = self.projector.num_tokens if num_image_tokens is None else num_image_tokens
        out_grids = token_grids(counts, len(encoded_images), name="num_image_tokens")
        self._warn_of_unknown(out_grids)
        # Without images too: in distributed training every rank must run the same modules.
        in_grids = list(encoded_images.grids)
        features, dtype = encoded_images.features, next(self.projector.parameters()).dtype
        if dtype != torch.float32:  # float32 weights serve any features, others their own type
            features = features.to(dtype)
        tokens = self.projector(features, out_grids, grids=in_grids)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded_images.features,
            pooler_output=list(tokens.split([height * width for height, width in out_grids])),
        )

    def encode_images(
        self, pixel_values: torch.Tensor, grids: Grid | Sequence[Grid] | None = None
    ) -> EncodedImages:
        """Run the encoder, once for any number of counts asked for afterwards.

        Args:
            pixel_values: [tiles, 3, height, width]; for a NaFlex encoder (SigLIP 2) [images,
                patches, 3 * patch size^2], as its image processor gives them.
            grids: (height, width) in patches, of all tiles or of each: needed by NaFlex encoders,
                and where tiles are of another shape than the encoder's ``image_size``.

        Returns:
            The patch features of the encoder's last layer, without special tokens or padding.

        Raises:
            TypeError: ``pixel_values`` are not floats.
            ValueError: pixels, grids and encoder do not fit together.
        """
        _check_device("pixel_values", pixel_values, self.vision_model)
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.dtype)
        return encode(self.vision_model, self.config.vision_config, pixel_values, grids)

    def _warn_of_unknown(self, grids: list[Grid]) -> None:
        if not self._known_counts or self._known_counts.issuperset(grids):
            return
        unknown = sorted(set(grids) - self._known_counts)
        self._known_counts.update(unknown)  # warned of once
        warnings.warn(
            f"num_image_tokens asks for {_in_words(unknown)} vision tokens, but the model was "
            f"trained with {self.config.trained_num_image_tokens}: answers may be worse",
            stacklevel=2,
        )

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
        plan: PackPlan | None = None,
        vision_index: torch.Tensor | None = None,
        shared_prefixes: SharedPrefixes | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a padded batch, or of a packed row when ``plan`` is given.

        The arguments are those of :meth:`TokenFlexForConditionalGeneration.forward`.
        """
        images = (mm_encoder_outputs or {}).get("image")
        sources = [images, pixel_values, encoded_images]
        if sum(source is not None for source in sources) > 1:
            raise ValueError(
                "give the images as one of pixel_values, encoded_images and mm_encoder_outputs"
            )
        if pixel_values is not None or encoded_images is not None:
            images = self.get_image_features(pixel_values, num_image_tokens, grids, encoded_images)
        if plan is not None:
            others = {
                "input_ids": input_ids,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
            }
            for name, value in others.items():
                if value is not None:
                    raise ValueError(f"plan holds the whole batch: give no {name} with it")
            return self._forward_packed(plan, images, vision_index, shared_prefixes)
        if shared_prefixes is not None:
            raise ValueError("shared_prefixes are those of a plan: give the plan with them")

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids, inputs_embeds and plan")
        if input_ids is not None:
            if input_ids.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
            embedding = self.get_input_embeddings()
            _check_device("input_ids", input_ids, embedding)
            inputs_embeds = embedding(input_ids)
        assert inputs_embeds is not None
        if images is not None:
            if input_ids is None:
                raise ValueError("input_ids must say where the images stand, got inputs_embeds")
            counts = [len(tokens) for tokens in images.pooler_output]
            rows = placeholder_rows(input_ids, counts, self.config.image_token_id)
            vision = torch.cat(list(images.pooler_output)).to(inputs_embeds)
            inputs_embeds = merge_vision(inputs_embeds, vision, rows)
            if self.config.image_positions == "shared":
                seen = 0 if past_key_values is None else past_key_values.get_seq_length()
                length = seen + input_ids.shape[1]
                if position_ids is None:
                    position_ids = torch.arange(seen, length, device=rows.device)
                if attention_mask is None:  # or transformers takes equal positions for new samples
                    attention_mask = input_ids.new_ones(input_ids.shape[0], length)
                position_ids = shared_image_positions(
                    position_ids.expand_as(input_ids).flatten(), rows, _image_of_each(counts, rows)
                ).view_as(input_ids)
        elif input_ids is not None and _is_first_call(past_key_values):
            placeholder_rows(input_ids, [], self.config.image_token_id)  # there must be none
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _forward_packed(
        self,
        plan: PackPlan,
        images: BaseModelOutputWithPooling | None,
        vision_index: torch.Tensor | None,
        shared_prefixes: SharedPrefixes | None,
    ) -> BaseModelOutputWithPast:
        implementation = self.language_model.config._attn_implementation
        if shared_prefixes is not None:
            _check_shared_prefixes(shared_prefixes, plan, implementation)
        embedding = self.get_input_embeddings()
        table: torch.Tensor = embedding.weight
        if images is None or not images.pooler_output:
            vision = table.new_zeros(0, table.shape[1])
        else:
            vision = torch.cat(list(images.pooler_output)).to(table.dtype)
        if vision_index is not None:
            vision = vision.index_select(0, vision_index)
        elif images is not None:
            counts = tuple(len(tokens) for tokens in images.pooler_output)
            if counts != plan.token_counts:
                raise ValueError(
                    "num_image_tokens must be the counts that the plan was made for, "
                    f"{plan.token_counts}, got {counts}"
                )
        if type(embedding) is nn.Embedding:
            packed = pack_embeddings(table, vision, plan)
        else:  # scaled, adapted or sharded: more than its table
            packed = merge_vision(embedding(plan.input_ids), vision, plan.vision_rows)
        boundaries: dict[str, Any] = {
            "cu_seq_lens_q": plan.cu_seqlens,
            "cu_seq_lens_k": plan.cu_seqlens,
            "max_length_q": plan.max_seqlen,
            "max_length_k": plan.max_seqlen,
        }
        position_ids, attention_mask = plan.position_ids, None
        if implementation == PACKED_ATTENTION:
            boundaries["sequence_lengths"] = torch.tensor(plan.lengths, dtype=torch.int64)
            if shared_prefixes is not None:
                boundaries["shared_prefixes"] = shared_prefixes
                position_ids = shared_prefixes.position_ids
            # transformers leaves a mask of four dimensions alone; ours reads the boundaries.
            attention_mask = packed.new_empty(1, 1, 0, 0)
        elif not implementation.startswith("flash"):
            boundaries = {}  # sdpa, eager, flex: transformers masks by position_ids
        if self.config.image_positions == "shared" and images is not None:
            if not boundaries:
                raise ValueError(
                    "image_positions='shared' packs with the language model's attention "
                    f"{PACKED_ATTENTION!r} or flash: {implementation!r} knows samples by their "
                    "positions"
                )
            shown = _image_of_each([len(one) for one in images.pooler_output], plan.vision_rows)
            shown = shown if vision_index is None else shown[vision_index]
            position_ids = shared_image_positions(position_ids, plan.vision_rows, shown)
        return self.language_model(
            inputs_embeds=packed[None],
            position_ids=position_ids[None],
            attention_mask=attention_mask,
            use_cache=False,
            **boundaries,
        )


@dataclass
class TokenFlexOutput(CausalLMOutputWithPast):
    """transformers' output, and of a loss with a teacher the part that it is ``distillation`` of.

    Attributes:
        distillation_loss: scalar, the weighted sum of KL(p_teacher || p_student) over the targets,
            without a gradient; None without a teacher.
    """

    distillation_loss: torch.Tensor | None = None


class TokenFlexForConditionalGeneration(RepeatsImages, TokenFlexPreTrainedModel, GenerationMixin):
    """A vision-language model whose vision-token count is an argument of the call."""

    def __init__(self, config: TokenFlexConfig) -> None:
        super().__init__(config)
        self.model = TokenFlexModel(config)
        self.lm_head = build_head(config.text_config)
        embedding = self.get_input_embeddings()
        path = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{path}.weight"}
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        config: TokenFlexConfig,
        vision_model: PreTrainedModel,
        causal_language_model: PreTrainedModel,
    ) -> TokenFlexForConditionalGeneration:
        """A model around an encoder and a language model that are there, with their weights.

        Args:
            config: its ``vision_config`` and ``text_config`` must be those of the parts.
            vision_model: the encoder.
            causal_language_model: the language model with its head.

        Raises:
            ValueError: the head is not the one that a model of ``config`` has: it could not be
                loaded again once saved.
        """
        with torch.device("meta"):  # a frame: both big parts are at hand, do not fill them twice
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
        model.generation_config = causal_language_model.generation_config
        reference = model.lm_head.weight
        projector = model.model.projector.to_empty(device=reference.device)
        projector.to(reference.dtype).reset_parameters()
        return model

    @property
    def takes_shared_prefixes(self) -> bool:
        """Whether sequences of a plan may share prefixes: only our own attention knows how."""
        return self.model.language_model.config._attn_implementation == PACKED_ATTENTION

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, whose further arguments are those of :meth:`forward`.

        It never answers with the image placeholder, unless ``suppress_tokens`` says otherwise.
        With ``num_image_tokens="auto"`` each image's count is chosen, as ``penalty`` or ``budget``
        say: see :func:`tokenflex.selection.choice.generate_with_choice`.

        Example:
            >>> inputs = processor(images=picture, text=question)
            >>> images = model.encode_images(inputs["pixel_values"])
            >>> for count in (64, 144, 256):  # one pass of the encoder for three answers
            ...     inputs = processor(images=picture, text=question, num_image_tokens=count)
            ...     inputs.pop("pixel_values")
            ...     model.generate(**inputs, encoded_images=images)
        """
        if asks_for_choice(kwargs):
            return generate_with_choice(self, *args, **kwargs)
        generation_config = kwargs.get("generation_config") or self.generation_config
        if generation_config.suppress_tokens is None:
            kwargs.setdefault("suppress_tokens", [self.config.image_token_id])
        encoded_images = kwargs.pop("encoded_images", None)
        outputs = kwargs.get("mm_encoder_outputs")
        if encoded_images is not None:
            for name in ("pixel_values", "mm_encoder_outputs"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"encoded_images hold the images: give no {name} with them")
            with torch.no_grad():
                images = self.get_image_features(
                    num_image_tokens=kwargs.pop("num_image_tokens", None),
                    grids=kwargs.pop("grids", None),
                    encoded_images=encoded_images,
                )
            kwargs["mm_encoder_outputs"] = {"image": images}
        elif outputs is not None:
            # Beam search repeats images inside the object it is given: let it have a copy.
            kwargs["mm_encoder_outputs"] = {
                modality: BaseModelOutputWithPooling(**output)
                for modality, output in outputs.items()
            }
        return super().generate(*args, **kwargs)

    def choose_counts(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """See :func:`tokenflex.selection.choice.choose_counts`."""
        return choose_counts(self, input_ids, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`TokenFlexModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def encode_images(
        self, pixel_values: torch.Tensor, grids: Grid | Sequence[Grid] | None = None
    ) -> EncodedImages:
        """See :meth:`TokenFlexModel.encode_images`."""
        return self.model.encode_images(pixel_values, grids)

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
        plan: PackPlan | None = None,
        vision_index: torch.Tensor | None = None,
        shared_prefixes: SharedPrefixes | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        targets: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        teacher: dict[str, Any] | None = None,
        distillation: float = 0.0,
        **kwargs: Any,
    ) -> TokenFlexOutput:
        """Logits, and the loss where ``labels`` are given; with ``targets`` the loss alone.

        Args:
            input_ids: int64 [B, L] with one ``image_token_id`` per vision token.
            pixel_values: [tiles, 3, height, width], all tiles of the batch in order of appearance;
                patches for a NaFlex encoder, see :meth:`encode_images`.
            num_image_tokens: an int (a perfect square) or (h, w) for all tiles, or one per tile;
                the config's ``num_image_tokens`` if None.
            attention_mask: [B, L], 0 on padding.
            position_ids: int64 [B, L].
            past_key_values: transformers' cache.
            inputs_embeds: [B, L, D] in place of ``input_ids``.
            labels: int64 like ``input_ids`` (for a packed row [1, total]), -100 where there is no
                loss; the mean over the others is taken.
            grids: (height, width) of all tiles or of each in patches, where they are not the
                encoder's square: see :meth:`encode_images`.
            encoded_images: :meth:`encode_images` of the tiles in place of ``pixel_values``: images
                encoded once serve any number of calls, each at its own counts.
            mm_encoder_outputs: ``{"image": get_image_features(...)}``, the same at one count.
            plan: a packed batch in place of ``input_ids``; sequences do not see each other.
            vision_index: int64 [vision rows of the plan], with ``plan``: which row of the
                projected vision tokens stands at each vision row; row v at vision row v if None.
                It lets several sequences show one image that is encoded once.
            shared_prefixes: with ``plan``, which of its sequences go on from another, see
                :func:`tokenflex.models.prefixes.share_prefixes`; for models that
                :attr:`takes_shared_prefixes`.
            logits_to_keep: the last so many positions, or the positions of a 1-D index; 0 is all.
            targets: int64 [N], the next token at each of the kept positions, row after row, in
                place of ``labels``; see :func:`tokenflex.models.loss.head_cross_entropy`.
            target_weights: [N], how much each of the ``targets`` counts.
            teacher: with ``targets``, the same samples at other counts: ``num_image_tokens``,
                ``plan``, ``vision_index``, ``shared_prefixes`` and ``logits_to_keep`` of a second
                pass, without gradients, over images that are encoded once for both.
            distillation: what KL(p_teacher || p_student) at the targets counts in the loss; see
                :func:`tokenflex.models.loss.head_distillation`.

        Returns:
            ``logits`` [B, L, V] ([1, total, V] for a packed row), ``loss``, ``past_key_values``.
            With ``targets`` no logits, and the loss is their weighted sum; with ``teacher`` also
            ``distillation_loss``.

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
            plan=plan,
            vision_index=vision_index,
            shared_prefixes=shared_prefixes,
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
        else:
            logits = transform_logits(self.lm_head(hidden), self.config.text_config)
        if labels is not None:
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
            distillation_loss=distillation_loss,
        )

    @torch.no_grad()
    def _teacher_hidden(
        self, images: EncodedImages | None, *, logits_to_keep: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """[targets, D] of the teacher's pass, in the mode that the modules are in.

        It goes before the student's pass, which keeps for backward what this one does not.
        """
        if images is not None:
            images = EncodedImages(images.features.detach(), images.grids)
        device = self.get_input_embeddings().weight.device.type
        # PyTorch before #165068 caches what is cast without gradients: the student would find it.
        autocasts = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=autocasts, cache_enabled=False):
            hidden = self.model(encoded_images=images, **inputs).last_hidden_state
        return hidden.index_select(1, logits_to_keep).flatten(0, 1)

    def _target_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor | None,
        labels: torch.Tensor | None,
        teacher_hidden: torch.Tensor | None,
        distillation: float,
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


def use_packed_attention(language_model: PreTrainedModel) -> None:
    """Replace "sdpa" by the same attention that also takes packed rows; keep other choices."""
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(PACKED_ATTENTION)


def _check_shared_prefixes(shared: SharedPrefixes, plan: PackPlan, implementation: str) -> None:
    if implementation != PACKED_ATTENTION:
        raise ValueError(
            f"shared_prefixes need the language model's attention to be {PACKED_ATTENTION!r}, got "
            f"{implementation!r}: give each sequence its own prefix instead"
        )
    if len(shared.parents) != plan.num_samples or len(shared.position_ids) != plan.num_tokens:
        raise ValueError(
            f"shared_prefixes must be of the plan, of {plan.num_samples} sequences and "
            f"{plan.num_tokens} rows, got {len(shared.parents)} and {len(shared.position_ids)}"
        )


def _check_language_model(language_model: PreTrainedModel) -> None:
    """Refuse what takes no vision tokens, or has a cache of its own, as Mamba does."""
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


def _is_first_call(past_key_values: Any) -> bool:
    """Whether a call sees a prompt from its start, not the next token of one."""
    return past_key_values is None or not past_key_values.get_seq_length()


def _image_of_each(counts: list[int], like: torch.Tensor) -> torch.Tensor:
    """Which image each vision token is of, for images of so many."""
    sizes = torch.tensor(counts, dtype=torch.int64, device=like.device)
    images = torch.arange(len(counts), device=like.device)
    return images.repeat_interleave(sizes, output_size=sum(counts))


def _check_device(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
    """Refuse an input on another device than the weights it meets first."""
    if hasattr(module, "_hf_hook"):
        return  # accelerate moves inputs, and may keep the weights elsewhere
    device = next(module.parameters()).device
    if tensor.device != device:
        raise ValueError(f"{name} must be on the model's device, {device}, got {tensor.device}")


def _in_words(grids: list[Grid]) -> str:
    sides = (
        str(height * width) if height == width else f"{height} x {width}" for height, width in grids
    )
    return ", ".join(sides)


def placeholder_rows(
    input_ids: torch.Tensor, counts: list[int], image_token_id: int
) -> torch.Tensor:
    """The rows of the flattened ``input_ids`` that hold placeholders, once they fit ``counts``.

    Totals alone would let two images of swapped counts through, so images must also end where runs
    of placeholders end; a run may hold several (the tiles of one). Reads ``input_ids`` back from
    the device, once a prompt.

    Raises:
        ValueError: a run of placeholders does not end where an image's vision tokens end; the
            message names row and image, placeholders and vision tokens.
    """
    rows = (input_ids.reshape(-1) == image_token_id).nonzero().squeeze(1)
    ends = [0, *accumulate(counts)]
    length = input_ids.shape[-1]
    # A run ends before a placeholder that is not the next token, or is the first of a row.
    starts_run = (rows[1:] != rows[:-1] + 1) | (rows[1:] % length == 0)
    run_ends = [*(starts_run.nonzero().squeeze(1) + 1).tolist(), *[len(rows)] * bool(len(rows))]
    boundaries = set(ends)
    problem = ""
    if wrong := [end for end in run_ends if end not in boundaries]:
        row, image = int(rows[wrong[0] - 1]) // length, bisect_right(ends, wrong[0]) - 1
        seen = wrong[0] - ends[image]
        if image < len(counts):
            problem = (
                f"row {row} of input_ids ends a run of placeholders inside image {image}, after "
                f"{seen} of its {counts[image]} vision tokens"
            )
        else:
            problem = f"row {row} of input_ids holds {seen} placeholders after the last image"
    elif len(rows) != ends[-1]:
        image = bisect_right(ends, len(rows)) - 1
        problem = f"no row of input_ids holds image {image} of {counts[image]} vision tokens"
    if problem:
        raise ValueError(
            f"{problem}: input_ids hold {len(rows)} image placeholders (per row "
            f"{(input_ids == image_token_id).sum(-1).tolist()}), but num_image_tokens gives "
            f"{ends[-1]} vision tokens (per image {counts})"
        )
    return rows


AutoModel.register(TokenFlexConfig, TokenFlexModel)
AutoModelForImageTextToText.register(TokenFlexConfig, TokenFlexForConditionalGeneration)
