"""Conversations to prompts in vLLM: the text that our processor writes for the same messages.

vLLM's own renderer hands a template for plain language models strings with all images first. Ours
lets :meth:`TokenFlexProcessor.apply_chat_template` write the prompt. It also sees what each image
asks for, which vLLM drops: ``detail`` and ``num_image_tokens`` of an ``image_url``; and prompts
without images, which vLLM gives to no processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers.utils.chat_template_utils import _get_template_variables
from vllm.inputs import TokensPrompt
from vllm.renderers.base import DictPrompt
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from tokenflex.models.conversations import template_source
from tokenflex.serving.vllm.info import TokenFlexProcessingInfo, load_processor, user_errors
from tokenflex.serving.vllm.wishes import PER_IMAGE, image_wishes

_OPTIONS = (
    "chat_template",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
)
"""Options of a conversation that any template may use. vLLM adds others, of single models."""


class TokenFlexRenderer(HfRenderer):
    """Write conversations as the processor does, and keep what each image asks for."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._write_async = make_async(self._write, executor=self._executor)

    def render_messages(self, messages: Any, params: ChatParams) -> tuple[Any, DictPrompt]:
        """Return the conversation as vLLM reads it, and its prompt with its images."""
        wishes = _wishes(messages)
        conversation, images, uuids = parse_chat_messages(
            messages, self.model_config, "openai", params.media_io_kwargs
        )
        return conversation, _prompt(self._write(conversation, params), images, uuids, wishes)

    async def render_messages_async(
        self, messages: Any, params: ChatParams
    ) -> tuple[Any, DictPrompt]:
        """Do the same without blocking: pictures are fetched and templates run in threads."""
        wishes = _wishes(messages)
        conversation, images, uuids = await parse_chat_messages_async(
            messages, self.model_config, "openai", params.media_io_kwargs
        )
        text = await self._render_with_timeout(self._write_async(conversation, params))
        return conversation, _prompt(text, images, uuids, wishes)

    def _write(self, conversation: Any, params: ChatParams) -> str:
        given = params.get_apply_chat_template_kwargs()
        processor = load_processor(str(self.model_config.model), self.model_config.revision)
        template = template_source(processor.chat_template, given.get("chat_template"))
        known = {*_OPTIONS, *_get_template_variables(template or "")}
        options = {name: value for name, value in given.items() if name in known}
        with user_errors("messages"):
            text: str = processor.apply_chat_template(conversation, **options)
            return text

    def _process_tokens(self, prompt: TokensPrompt, **options: Any) -> Any:
        self._check_without_images(prompt)
        return super()._process_tokens(prompt, **options)

    async def _process_tokens_async(self, prompt: TokensPrompt, **options: Any) -> Any:
        self._check_without_images(prompt)
        return await super()._process_tokens_async(prompt, **options)

    def _check_without_images(self, prompt: TokensPrompt) -> None:
        """Refuse placeholders without images; where there are images our processor counts them."""
        if not prompt.get("multi_modal_data"):
            info = cast(TokenFlexProcessingInfo, self.get_mm_processor().info)
            info.check_placeholders(prompt["prompt_token_ids"], 0)

    def _apply_prompt_extras(
        self, prompts: Sequence[Any], prompt_extras: dict[str, Any] | None
    ) -> None:
        """Add the request's options to those of its images; vLLM would replace them."""
        own = [prompt.get("mm_processor_kwargs") or {} for prompt in prompts]
        super()._apply_prompt_extras(prompts, prompt_extras)
        for prompt, kwargs in zip(prompts, own, strict=True):
            if kwargs:
                prompt["mm_processor_kwargs"] = {
                    **(prompt.get("mm_processor_kwargs") or {}),
                    **kwargs,
                }


def _wishes(messages: Any) -> list[Any]:
    with user_errors("messages"):
        return image_wishes(messages)


def _prompt(text: str, images: Any, uuids: Any, wishes: Sequence[Any]) -> DictPrompt:
    prompt: Any = parse_dec_only_prompt(text)
    if images is not None:
        prompt["multi_modal_data"] = images
    if uuids is not None:
        prompt["multi_modal_uuids"] = uuids
    if any(wish is not None for wish in wishes):
        prompt["mm_processor_kwargs"] = {PER_IMAGE: list(wishes)}
    return prompt
