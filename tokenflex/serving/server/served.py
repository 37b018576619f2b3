"""The model that is served: requests to prompts, and a batch of prompts to one ``generate``.

A request passes through :meth:`ServedModel.prepare` in any thread (text and pictures), through
:meth:`ServedModel.read` (counts, and the encoder where its features are not kept) and, together
with others, through :meth:`ServedModel.generate`, both in the one thread that runs the model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from tokenflex.checkpoints import load_model
from tokenflex.counts import AUTO, Grid, TokenCount, token_grid, tokens_of
from tokenflex.evaluation.generation import special_tokens
from tokenflex.hub import local_checkpoint
from tokenflex.images import load_image
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.vision import EncodedImages, on_device
from tokenflex.prompts import expand_placeholders, left_padded, runs_of, tokens_of_runs
from tokenflex.routing.ladder import known_counts, trained_counts
from tokenflex.routing.storage import has_router, load_router
from tokenflex.serving.feature_cache import FeatureCache
from tokenflex.serving.passes import encode_in_passes
from tokenflex.serving.server.chat_request import ChatRequest, Limits, RequestError, Sampling
from tokenflex.serving.server.rows import Row, RowMonitor, RowSampler

CHARACTERS_PER_TOKEN = 128
"""Longest text of a token that a prompt may average: more is refused before it is tokenized."""

TILES_AT_ONCE = 32
"""The most inputs of the encoder in one pass."""


@contextmanager
def callers_mistake(param: str | None) -> Iterator[None]:
    """Turn an error of the package about its arguments into a :class:`RequestError`."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OSError, TemplateError) as error:
        message = " ".join(str(error).split())[:1000]
        raise RequestError(message or type(error).__name__, param) from error


@dataclass
class Prompt:
    """A request as the model will read it.

    Attributes:
        ids: int64 [length], with one placeholder per vision token. Before :meth:`ServedModel.read`
            with one per image where counts are to be chosen.
        inputs: pixels and the like, as the encoder of the model takes them.
        counts: of each image; ``"auto"`` until it is chosen.
        tiles: inputs of the encoder that each image became.
        budget: the most vision tokens of all images together.
        max_tokens: of each answer; None until :meth:`ServedModel.read`.
        encoded: features of each image, where images are encoded one by one.
        features: of the images, after :meth:`ServedModel.read`.
        encoder_passes: images that the encoder read for this prompt.
    """

    ids: torch.Tensor
    inputs: Any
    counts: list[Any]
    tiles: list[int]
    budget: int | None
    max_tokens: int | None
    encoded: list[EncodedImages] = field(default_factory=list)
    features: Any = None
    encoder_passes: int = 0

    @property
    def image_tokens(self) -> list[int]:
        """Vision tokens of each image in all of its tiles, once the counts are chosen."""
        return [tokens_of(n) * tiles for n, tiles in zip(self.counts, self.tiles, strict=True)]

    @property
    def fixed_tokens(self) -> int:
        """Vision tokens of the images whose counts need not be chosen."""
        pairs = zip(self.counts, self.tiles, strict=True)
        return sum(tokens_of(count) * tiles for count, tiles in pairs if count != AUTO)

    @property
    def tile_counts(self) -> list[TokenCount]:
        """The count of each tile."""
        return [n for n, tiles in zip(self.counts, self.tiles, strict=True) for _ in range(tiles)]


class ServedModel(ABC):
    """A model, its processor and its feature cache.

    Args:
        model: in evaluation mode, on its device.
        processor: its processor.
        limits: bounds of requests.
        cache_bytes: the most bytes of encoder features to keep.

    Attributes:
        encoded_images: pictures that the encoder has read so far.
        defaults: what answers are written with where a request does not say.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits, cache_bytes: int) -> None:
        self.model, self.processor, self.limits = model, processor, limits
        self.cache: FeatureCache[EncodedImages] = FeatureCache(cache_bytes)
        self.encoded_images = 0
        text_config = model.config.get_text_config()
        self.positions = getattr(text_config, "max_position_embeddings", None) or 2**31
        self.max_prompt_tokens = min(limits.max_prompt_tokens or self.positions, self.positions)
        settings = model.generation_config
        self.defaults = Sampling()
        if settings.do_sample:
            self.defaults = Sampling(
                temperature=settings.temperature or 1.0, top_p=settings.top_p or 1.0
            )
        self.special_tokens = special_tokens(model, processor.tokenizer)
        ends = self.special_tokens["eos_token_id"]
        self._ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        # A tokenizer is changed by the padding of a call: one call at a time, and another one
        # for the thread that decodes.
        self._text_lock = Lock()
        self._decoder = copy.deepcopy(processor.tokenizer)

    # ---- a request to a prompt, in any thread

    @abstractmethod
    def prepare(self, request: ChatRequest) -> Prompt:
        """Read the pictures of a request, and tokenize its messages.

        Raises:
            RequestError: a picture cannot be read, or messages and model do not fit together.
        """

    def _new_prompt(self, request: ChatRequest, inputs: Any, tiles: list[int]) -> Prompt:
        """Return the prompt of a request, whose text is still to be read."""
        counts = self.counts_of(request)
        self._check_text(request)
        limit = request.sampling.max_tokens
        prompt = Prompt(torch.empty(0), inputs, counts, tiles, request.budget, limit)
        self._check_vision_tokens(request, prompt)
        return prompt

    def _read_text(self, request: ChatRequest, prompt: Prompt) -> None:
        """Tokenize the messages of a request."""
        # Placeholders are repeated at once only where all counts are known.
        known = AUTO if AUTO in prompt.counts else prompt.counts
        with self._text_lock, callers_mistake("messages"):
            text = self.processor.apply_chat_template(request.messages, add_generation_prompt=True)
            encoded = self.processor.encode_text(
                [text],
                prompt.tiles,
                num_image_tokens=known or None,
                add_special_tokens=self.processor.adds_special_tokens(text),
            )
        prompt.ids = encoded["input_ids"][0].long()
        if not len(prompt.ids):
            raise RequestError("messages must hold a text or an image, got neither", "messages")

    @property
    def default_count(self) -> TokenCount:
        """The count of images where neither a request nor a router names one."""
        count: TokenCount = self.processor.num_image_tokens
        return count

    @property
    def chooses(self) -> bool:
        """True if a router can choose counts."""
        return has_router(self.model)

    def trained_counts(self) -> tuple[TokenCount, ...] | None:
        """Return the counts of the model's training, rising; None where its config has none."""
        if not getattr(self.model.config, "trained_num_image_tokens", None):
            return None
        return trained_counts(self.model)

    def counts_of(self, request: ChatRequest) -> list[TokenCount | str]:
        """Return the count of each image, ``"auto"`` where it is to be chosen.

        Raises:
            RequestError: this model cannot do what a request wishes.
        """
        counts: list[TokenCount | str] = []
        for image in request.images:
            wish = image.wish
            if wish in ("low", "high"):
                known = self.trained_counts()
                if known is None:
                    raise RequestError(
                        f"{image.name}.detail must be 'auto' for this model, whose config names no "
                        f"counts of its training, got {wish!r}; the server's --counts names them",
                        f"{image.name}.detail",
                    )
                counts.append(known[0 if wish == "low" else -1])
            elif wish == AUTO and request.budget is None and not self.chooses:
                raise RequestError(
                    "num_image_tokens must be a count, as the model has no router to choose one "
                    "and the request no budget to spread, got 'auto'",
                    "num_image_tokens",
                )
            elif wish == AUTO or (wish == "default" and (request.budget or self.chooses)):
                counts.append(AUTO)
            else:
                counts.append(self.default_count if wish == "default" else cast(TokenCount, wish))
        return counts

    def _check_text(self, request: ChatRequest) -> None:
        characters = 0
        for message in request.messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            characters += sum(len(part.get("text", "")) for part in parts)
        most = self.max_prompt_tokens * CHARACTERS_PER_TOKEN
        if characters > most:
            raise RequestError(
                f"messages must be of at most {self.max_prompt_tokens} tokens together, got "
                f"{characters} characters",
                "messages",
                code="context_length_exceeded",
            )

    def _check_vision_tokens(self, request: ChatRequest, prompt: Prompt) -> None:
        """Refuse too many vision tokens of fixed counts, before anything of their size is made."""
        fixed = prompt.fixed_tokens
        if fixed > self.max_prompt_tokens:
            raise RequestError(
                f"num_image_tokens must give at most {self.max_prompt_tokens} vision tokens "
                f"together, got {fixed}",
                "num_image_tokens",
                code="context_length_exceeded",
            )
        if request.budget is not None and fixed > request.budget:
            raise RequestError(
                f"budget must be at least {fixed}, the vision tokens that num_image_tokens "
                f"and detail give to images, got {request.budget}",
                "budget",
            )

    def _check_grids(self, counts: Sequence[TokenCount], grids: Sequence[Grid]) -> None:
        for count, (height, width) in zip(counts, grids, strict=True):
            grid = token_grid(count)
            if grid[0] > height or grid[1] > width:
                raise RequestError(
                    f"num_image_tokens must be at most the {height} x {width} cells of the "
                    f"image's grid, got {grid[0]} x {grid[1]}",
                    "num_image_tokens",
                )

    def _read_picture(self, url: str, name: str) -> Image.Image:
        with callers_mistake(f"{name}.url"):
            return load_image(url, f"{name}.url", max_download=self.limits.max_image_bytes)

    # ---- prompts to answers, in the model's thread

    def encode_ahead(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Encode new pictures of several prompts together, where the model can."""

    @torch.no_grad()
    def read(self, prompt: Prompt) -> None:
        """Encode the images of a prompt, unless their features are kept, and choose counts.

        Raises:
            RequestError: counts are beyond the images' grids, or the prompt is too long.
        """
        if prompt.tiles:
            self._read_images(prompt)
        length = len(prompt.ids)
        left = self.positions - length
        if length > self.max_prompt_tokens or left < (prompt.max_tokens or 1):
            asked = f" and {prompt.max_tokens} of the answer" if prompt.max_tokens else ""
            raise RequestError(
                f"messages must be of at most {self.max_prompt_tokens} tokens, and of at most "
                f"{self.positions} with the answer, got {length} (of them "
                f"{sum(prompt.image_tokens)} vision tokens){asked}",
                "messages",
                code="context_length_exceeded",
            )
        if prompt.max_tokens is None:
            prompt.max_tokens = min(self.limits.max_tokens, left)

    @abstractmethod
    def _encode_images(self, prompt: Prompt) -> list[EncodedImages]:
        """Return the features of each image of a prompt, kept ones or new ones."""

    def _read_images(self, prompt: Prompt) -> None:
        encoded = self._encode_images(prompt)
        prompt.inputs = None
        prompt.features = type(encoded[0]).joined(encoded)
        if AUTO in prompt.counts:
            chosen = self._choose(prompt, encoded)
            prompt.counts = [next(chosen) if n == AUTO else n for n in prompt.counts]
            self._check_grids(prompt.tile_counts, prompt.features.grids)
            runs = tokens_of_runs(prompt.tiles, prompt.image_tokens)
            prompt.ids = expand_placeholders(prompt.ids, runs, self.model.config.image_token_id)
        else:
            self._check_grids(prompt.tile_counts, prompt.features.grids)

    def _choose(self, prompt: Prompt, encoded: Sequence[EncodedImages]) -> Iterator[TokenCount]:
        """Return the counts of the images that are to be chosen.

        Images of fixed counts are left out of the prompt, and taken off the budget.
        """
        is_open = [count == AUTO for count in prompt.counts]
        ids, image_token_id = prompt.ids, self.model.config.image_token_id
        places = (ids == image_token_id).nonzero().flatten()
        keep = torch.ones_like(ids, dtype=torch.bool)
        of_runs = [
            free
            for free, tiles in zip(is_open, prompt.tiles, strict=True)
            for _ in range(runs_of(tiles))
        ]
        keep[places[~torch.tensor(of_runs)]] = False
        tiles = [tiles for tiles, free in zip(prompt.tiles, is_open, strict=True) if free]
        images = [image for image, free in zip(encoded, is_open, strict=True) if free]
        budget = None
        if prompt.budget is not None:
            with callers_mistake("budget"):
                each = tokens_of(known_counts(self.model)[0])
            fewest = prompt.fixed_tokens + sum(tiles) * each
            if prompt.budget < fewest:
                raise RequestError(
                    f"budget must be at least {fewest}, the fewest vision tokens that the images "
                    f"of the request can have, got {prompt.budget}",
                    "budget",
                )
            budget = prompt.budget - prompt.fixed_tokens
        with callers_mistake("num_image_tokens" if budget is None else "budget"):
            chosen = self.model.choose_counts(
                ids[keep][None],
                num_image_tokens=AUTO,
                budget=budget,
                encoded_images=type(images[0]).joined(images),
                tiles_per_image=tiles,
            )
        first_tiles = accumulate(tiles[:-1], initial=0)
        return iter([chosen["num_image_tokens"][tile] for tile in first_tiles])

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without special ones. For the model's thread alone."""
        text: str = self._decoder.decode(ids, skip_special_tokens=True)
        return text

    def row(self, sampling: Sampling, prompt: Prompt, index: int, **options: Any) -> Row:
        """Return the answer ``index`` of a request, to be written by :meth:`generate`."""
        assert prompt.max_tokens is not None
        return Row(
            self.decode,
            self._ends,
            prompt.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed + index,
            stops=sampling.stops,
            **options,
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], rows: Sequence[Row], monitor: RowMonitor) -> None:
        """Write the answers of a batch, one row per entry of ``prompts``; they may be repeated."""
        ids, mask = left_padded([p.ids for p in prompts], self.special_tokens["pad_token_id"] or 0)
        device = self.model.device
        self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **self._image_arguments(prompts),
            **self.special_tokens,
            do_sample=False,
            num_beams=1,
            max_length=None,
            max_new_tokens=max(row.max_tokens for row in rows),
            logits_processor=LogitsProcessorList([RowSampler(rows)]),
            stopping_criteria=StoppingCriteriaList([monitor]),
        )

    def _image_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        images = [prompt.features for prompt in prompts if prompt.tiles]
        if not images:
            return {}
        counts = [count for prompt in prompts for count in prompt.tile_counts]
        return {"encoded_images": type(images[0]).joined(images), "num_image_tokens": counts}


class TokenFlexServed(ServedModel):
    """A TokenFLEX checkpoint. Each picture is encoded, and kept, on its own."""

    def prepare(self, request: ChatRequest) -> Prompt:
        pixels, tiles = [], []
        for image in request.images:  # one at a time, as a picture is larger than its pixels here
            picture = self._read_picture(image.url, image.name)
            with callers_mistake(image.name):
                data, (number,) = self.processor.process_images([picture])
            pixels.append(data)
            tiles.append(number)
        prompt = self._new_prompt(request, pixels, tiles)
        self._read_text(request, prompt)
        return prompt

    @torch.no_grad()
    def encode_ahead(self, prompts: Sequence[Prompt]) -> None:
        owners = [prompt for prompt in prompts for _ in prompt.inputs]
        inputs = [data for prompt in prompts for data in prompt.inputs]
        pixels = [data["pixel_values"] for data in inputs]
        grids = [data.get("grids") or () for data in inputs]

        def encode(missing: list[int]) -> list[EncodedImages]:
            encoded = encode_in_passes(
                [pixels[i] for i in missing],
                lambda tiles, batch: self.model.encode_images(
                    tiles.to(self.model.device),
                    [grid for j in batch for grid in grids[missing[j]]] or None,
                ),
                lambda _: TILES_AT_ONCE,
            )
            for i in missing:
                owners[i].encoder_passes += 1
            self.encoded_images += len(missing)
            return encoded

        features = self.cache.features_of(pixels, encode, grids)
        for prompt, image in zip(owners, features, strict=True):
            prompt.encoded.append(image)

    def _encode_images(self, prompt: Prompt) -> list[EncodedImages]:
        if not prompt.encoded:
            self.encode_ahead([prompt])
        encoded, prompt.encoded = prompt.encoded, []
        return encoded


class ConvertedServed(ServedModel):
    """A stock model with a token-adaptive projector. A request's pictures are encoded together."""

    def prepare(self, request: ChatRequest) -> Prompt:
        prompt = self._new_prompt(request, {}, [1] * len(request.images))
        pictures = [self._read_picture(image.url, image.name) for image in request.images]
        if pictures:
            with self._text_lock, callers_mistake("messages"):
                prompt.inputs, prompt.tiles = self.processor.process_images([pictures])
            self._check_vision_tokens(request, prompt)
        self._read_text(request, prompt)
        return prompt

    def _encode_images(self, prompt: Prompt) -> list[EncodedImages]:
        inputs = on_device(prompt.inputs, self.model.device)
        tensors = [value for value in prompt.inputs.values() if isinstance(value, torch.Tensor)]

        def encode(_: torch.Tensor) -> EncodedImages:
            prompt.encoder_passes = len(prompt.tiles)
            self.encoded_images += len(prompt.tiles)
            images: EncodedImages = self.model.encode_images(**inputs)
            return images

        # All inputs tell pictures apart: sizes and masks as well as pixels.
        shapes = torch.tensor([size for tensor in tensors for size in (-1, *tensor.shape)])
        key = torch.cat([tensor.flatten().double() for tensor in [shapes, *tensors]])
        features = self.cache.features(key, encode)
        rest = iter(range(len(features)))
        return [features.select([next(rest) for _ in range(tiles)]) for tiles in prompt.tiles]


def load_served(
    path: str | Path,
    *,
    device: str = "cpu",
    limits: Limits | None = None,
    cache_bytes: int = 2**28,
    counts: Sequence[TokenCount] | None = None,
) -> ServedModel:
    """Load a TokenFLEX checkpoint, a released Ristretto, or a saved conversion of a stock model.

    Args:
        path: The folder, or ``org/name`` on the Hugging Face Hub.
        device: Where the model runs.
        limits: Bounds of requests.
        cache_bytes: The most bytes of encoder features to keep.
        counts: The counts between which ``detail`` and budgets choose, in place of those that the
            model's config names.

    Raises:
        FileNotFoundError: The folder or one of its files does not exist.
        ValueError: The folder holds no model that can be served; the message says why.
    """
    checkpoint = local_checkpoint(path)
    model, processor = load_model(checkpoint)
    served: type[ServedModel] = ConvertedServed
    if isinstance(model, TokenFlexForConditionalGeneration):
        served = TokenFlexServed
    if has_router(model):
        load_router(checkpoint)  # a broken one is told before the first request
    if counts is not None:
        model.config.trained_num_image_tokens = list(counts)
    model.to(device).eval()
    return served(model, processor, limits or Limits(), cache_bytes)
