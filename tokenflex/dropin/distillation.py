"""Training of a new projector towards the stock model's own answers, at drawn counts.

A conversion in place keeps the stock projector. With it the model first answers all prompts, and
the likeliest tokens of each step of its answers are kept. Then the new projector is trained, at a
count drawn for each sample, so that the model gives each step of the same answer the same
distribution: KL(stock || converted), as in Hinton, Vinyals & Dean, 2015 (arXiv 1503.02531), at
temperature 1. The vision encoder does not change, so it runs once a sample.

At few tokens much of the divergence cannot be helped, while at the stock model's own count it is
almost 0. The plain mean over samples would trade the latter for the former. So each count's
divergence is divided by its own size (:class:`_Balance`), and a change that halves one and doubles
another gains nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from tokenflex.counts import TokenCount, TokenCounts, token_grid, tokens_of
from tokenflex.dropin.features import (
    Patches,
    default_count,
    encode_patches,
    image_input_names,
    project_patches,
)
from tokenflex.dropin.model import as_stock, stock_projector_of
from tokenflex.dropin.packing import is_per_token
from tokenflex.dropin.processor import convert_processor, restore_processor
from tokenflex.dropin.samples import encode_samples, images_of_sample
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex_kernels.checks import check_count

KEPT_TOKENS = 64  # likeliest tokens of a step; all others together are one more
CACHED_BYTES = 2**31  # patch features that are kept; samples beyond are encoded again
_HELD_OUT_SHARE, _MOST_HELD_OUT = 8, 256
_WARM_UP_SHARE = 0.1
_MEMORY = 20  # steps over which the size of a count's divergence is averaged
_NEGLIGIBLE = 1e-3  # nats, a divergence that need not become smaller


@dataclass(frozen=True)
class Agreement:
    """Agreement of a converted model with the stock model's answers, given their beginnings.

    Attributes:
        divergence: KL(stock || converted) of a token of an answer, in nats, on average.
        tokens: Share of the tokens of answers that are the converted model's likeliest, too.
        answers: Share of the answers of which all tokens are.
    """

    divergence: float
    tokens: float
    answers: float


@dataclass(frozen=True)
class DistillationReport:
    """The result of :func:`distill`.

    Attributes:
        before: Agreement on the held-out samples before training, by count.
        after: Agreement on them afterwards.
        trained_on: Samples that were trained on.
        held_out: Samples that were not.
        answer_tokens: Tokens of all of the stock model's answers.
    """

    before: dict[TokenCount, Agreement]
    after: dict[TokenCount, Agreement]
    trained_on: int
    held_out: int
    answer_tokens: int


def distill(
    model: Any,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    counts: TokenCounts | None = None,
    steps: int = 1000,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    max_new_tokens: int = 64,
    seed: int = 0,
    on_progress: Callable[[str, int, int], object] = lambda work, done, total: None,
) -> DistillationReport:
    """Train the projector of a model that was converted in place towards the stock model's answers.

    Of a PEFT model everything that PEFT trains is trained, adapters too; ``modules_to_save`` must
    hold the projector (:func:`tokenflex.dropin.projector_name`). Of other models only the projector
    is trained. One sample of eight, 256 at most, is held out for the report. Parameters of less
    than 32 bits are trained in float32 and rounded at the end. The counts are kept in
    ``config.trained_num_image_tokens``.

    Args:
        model: Converted by :func:`tokenflex.replace_projector`, which kept the stock projector.
        processor: Its converted processor.
        samples: Dicts with ``messages``, a conversation, images inside or beside it, of which a
            last answer is left out; or with ``text`` and ``images``, a prompt with placeholders and
            its images. At least two, each with an image. They are read one by one, the stock
            model's answers first.
        counts: Counts to draw for each sample at each step; by default the model's default count, 9
            sixteenths and a quarter of it at odds 5:3:2, as in the paper, as far as sides divide.
        steps: Optimiser steps, with a linear warm-up over a tenth of them and a cosine to zero.
        batch_size: Samples a step.
        learning_rate: The highest learning rate, of AdamW.
        max_new_tokens: The longest answer of the stock model.
        seed: Seed of the order of samples.
        on_progress: Called with "answers", "agreement" (before and after training) or "steps", the
            number done, and their total.

    Returns:
        The agreement with the stock model at each count, before and after.

    Raises:
        TypeError: ``counts`` is no TokenCounts, or a sample is no dict.
        ValueError: The model was not converted in place or the processor not at all, samples are
            too few or without images, a PEFT model does not train the projector, or a number is out
            of its range.
    """
    inner = unwrapped(model)
    if not is_converted(inner) or stock_projector_of(inner) is None:
        raise ValueError(
            "model must be converted in place by replace_projector: the stock projector, whose "
            "answers are to be learned, is not there"
        )
    if not hasattr(processor, "_tokenflex"):
        raise ValueError(
            "processor must be converted: give it to replace_projector with the model, got a stock "
            f"{type(processor).__name__}"
        )
    if model is not inner and not _trains_projector(inner):
        raise ValueError(
            "a PEFT model must train the projector: give modules_to_save=[projector_name(model)] "
            "to its configuration"
        )
    counts = counts_around(default_count(inner.config)) if counts is None else counts
    if not isinstance(counts, TokenCounts):
        raise TypeError(f"counts must be a TokenCounts, got {counts!r}")
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_count("max_new_tokens", max_new_tokens)
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if len(samples) < 2:
        raise ValueError(f"samples must be at least 2, one of them held out, got {len(samples)}")
    modes = {module: module.training for module in inner.modules()}
    model.eval()
    try:
        answers = stock_answers(inner, processor, samples, batch_size, max_new_tokens, on_progress)
        held_out = min(max(1, len(samples) // _HELD_OUT_SHARE), _MOST_HELD_OUT)
        split = len(samples) - held_out
        student = _Student(model, processor, samples, answers)
        held = range(split, len(samples))
        before = student.agreements(held, counts.counts, batch_size, on_progress)
        schedule = _Schedule(counts, steps, batch_size, learning_rate, seed)
        with _trained(model, inner) as parameters:
            _train(student, parameters, split, schedule, on_progress)
        after = student.agreements(held, counts.counts, batch_size, on_progress)
    finally:
        for module, training in modes.items():
            module.training = training
    drawn = [count for count, odds in zip(counts.counts, counts.weights, strict=True) if odds]
    inner.config.trained_num_image_tokens = sorted(drawn, key=tokens_of)
    tokens = sum(len(answer) for answer in answers)
    return DistillationReport(before, after, split, held_out, tokens)


def counts_around(count: TokenCount) -> TokenCounts:
    """Return a count with 9/16 and 1/4 of it at odds 5:3:2, as far as its sides divide."""
    height, width = token_grid(count)
    chosen: dict[TokenCount, float] = {}
    for quarters, odds in ((2, 2.0), (3, 3.0), (4, 5.0)):
        if not height * quarters % 4 and not width * quarters % 4:
            h, w = height * quarters // 4, width * quarters // 4
            chosen[h * w if h == w else (h, w)] = odds
    return TokenCounts(tuple(chosen), tuple(chosen.values()))


# ---- the stock model's answers


@dataclass(frozen=True)
class StockAnswer:
    """An answer of the stock model, and what it found likely at each step.

    Attributes:
        ids: int64 [A], the tokens of the answer, its end included.
        likeliest: int64 [A, K], the likeliest tokens of each step.
        log_probs: float32 [A, K], the logarithms of their probabilities.
    """

    ids: torch.Tensor
    likeliest: torch.Tensor
    log_probs: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def stock_answers(
    model: Any,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[str, int, int], object],
) -> list[StockAnswer]:
    """Return the greedy answers of the stock model inside a conversion, at its own count."""
    family = type(model.base_model)._tokenflex_family
    device, end = model.device, _end_tokens(model)
    projector = model.base_model.get_submodule(family.projector)
    reference = next(projector.parameters())
    # The kept projector missed all changes of device and dtype.
    stock: Any = stock_projector_of(model)
    stock.to(reference.device, reference.dtype)
    answers: list[StockAnswer] = []
    with as_stock(model), _stock_processor(model, processor), _greedy(model, max_new_tokens):
        for start in range(0, len(samples), batch_size):
            stop = min(start + batch_size, len(samples))
            inputs = encode_samples(
                processor,
                [_question(samples, i) for i in range(start, stop)],
                family=family,
                chat_options={"add_generation_prompt": True},
                padding=True,
                padding_side="left",
            )
            # Not every stock model casts its pixels.
            output = model.generate(**inputs.to(device, model.dtype))
            new = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
            log_probs = torch.stack(output.logits, 1).float().log_softmax(-1)
            kept = log_probs.topk(min(KEPT_TOKENS, log_probs.shape[-1]))
            for row, ids in enumerate(new):
                ends = torch.isin(ids, end).nonzero()
                length = int(ends[0]) + 1 if len(ends) else len(ids)
                answers.append(
                    StockAnswer(
                        ids[:length],
                        kept.indices[row, :length].cpu(),
                        kept.values[row, :length].cpu(),
                    )
                )
            on_progress("answers", len(answers), len(samples))
    return answers


def _question(samples: Sequence[Mapping[str, Any]], index: int) -> Mapping[str, Any]:
    """Return a sample without a last answer."""
    sample = samples[index]
    if not isinstance(sample, Mapping):
        raise TypeError(f"samples[{index}] must be a dict, got {type(sample).__name__}")
    if "messages" in sample:
        messages = list(sample["messages"])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        sample = {**sample, "messages": messages}
    if not images_of_sample(sample):
        raise ValueError(f"samples must have an image each, but sample {index} has none")
    return sample


@contextmanager
def _greedy(model: Any, max_new_tokens: int) -> Iterator[None]:
    """Make ``generate`` a plain greedy search that never gives an image's placeholder."""
    own = model.generation_config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    # In place of the model's own: transformers takes from those what a call leaves open.
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name) for name in tokens},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        suppress_tokens=[model.config.image_token_id],
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: Any) -> torch.Tensor:
    end = model.generation_config.eos_token_id
    return torch.tensor([] if end is None else end, dtype=torch.int64).reshape(-1)


@contextmanager
def _stock_processor(model: Any, processor: Any) -> Iterator[None]:
    """Restore a converted processor within a ``with`` block."""
    state = processor._tokenflex
    restore_processor(processor)
    try:
        yield
    finally:
        convert_processor(processor, model.config, default_count(model.config))
        processor._tokenflex = state


# ---- the converted model


@dataclass(frozen=True)
class _Prompt:
    """A prompt with its encoded images, for any count.

    Attributes:
        text: ``input_ids`` [L] and what belongs to them, at the model's default count.
        positions: Image inputs from which the positions of M-RoPE follow.
        tiles: Inputs of the vision encoder.
        patches: Their features.
    """

    text: dict[str, torch.Tensor]
    positions: dict[str, torch.Tensor]
    tiles: int
    patches: Patches

    def at(self, count: TokenCount, config: Any) -> dict[str, torch.Tensor]:
        """Return ``text`` with ``count`` placeholders for each tile."""
        is_image = self.text["input_ids"] == config.image_token_id
        of_default = tokens_of(default_count(config))
        # The first placeholder of each tile stands for all of it.
        is_first = is_image & ((is_image.cumsum(0) - 1) % of_default == 0)
        repeats = torch.where(is_first, tokens_of(count), (~is_image).long())
        return {name: row.repeat_interleave(repeats) for name, row in self.text.items()}


@dataclass
class _Student:
    """The converted model on prompts that are followed by the stock model's answers."""

    model: Any
    processor: Any
    samples: Sequence[Mapping[str, Any]]
    answers: Sequence[StockAnswer]
    _prompts: dict[int, _Prompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inner = unwrapped(self.model)
        self.base = self.inner.base_model
        self._family = type(self.base)._tokenflex_family
        self._image_names = image_input_names(type(self.base)._tokenflex_stock_class)
        self._cached_bytes = 0

    def divergence(
        self, samples: Sequence[int], counts: Sequence[TokenCount]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return KL(stock || converted) of each token of each answer, and which are the likeliest.

        Returns:
            float32 [tokens of the answers], with gradients, and bool [tokens of the answers].
        """
        logits = self._logits(samples, counts)
        answers = [self.answers[i] for i in samples]
        steps = [logits[row, : len(answer)] for row, answer in enumerate(answers)]
        log_probs = torch.cat(steps).float().log_softmax(-1)
        ids, likeliest, expected = (
            torch.cat([getattr(answer, name) for answer in answers]).to(log_probs.device)
            for name in ("ids", "likeliest", "log_probs")
        )
        given = log_probs.gather(1, likeliest)
        # Models give tokens that do not exist a probability of 0, whose product would be NaN.
        possible = expected.isfinite()
        kl = torch.where(possible, expected.exp() * (expected - given), 0.0).sum(1)
        if likeliest.shape[1] < log_probs.shape[1]:  # all other tokens are one class
            rest, given_rest = (_log_of_rest(kept) for kept in (expected, given))
            kl = kl + rest.exp() * (rest - given_rest)
        return kl, log_probs.argmax(-1) == ids

    @torch.no_grad()
    def agreements(
        self,
        samples: Sequence[int],
        counts: Sequence[TokenCount],
        batch_size: int,
        on_progress: Callable[[str, int, int], object],
    ) -> dict[TokenCount, Agreement]:
        """Return the agreement with the stock model on some samples, at each count."""
        report = {}
        for i, count in enumerate(counts):
            kl, right = [], []
            for start in range(0, len(samples), batch_size):
                batch = samples[start : start + batch_size]
                divergence, equal = self.divergence(batch, [count] * len(batch))
                kl.append(divergence)
                right += equal.split([len(self.answers[sample]) for sample in batch])
                done = i * len(samples) + start + len(batch)
                on_progress("agreement", done, len(counts) * len(samples))
            whole = [bool(answer.all()) for answer in right]
            report[count] = Agreement(
                divergence=float(torch.cat(kl).mean()),
                tokens=float(torch.cat(right).float().mean()),
                answers=sum(whole) / len(whole),
            )
        return report

    def _logits(self, samples: Sequence[int], counts: Sequence[TokenCount]) -> torch.Tensor:
        """Return the logits before each token of the answers: [B, longest answer, vocabulary]."""
        prompts = [self._prompt(i) for i in samples]
        patches = Patches.joined([prompt.patches for prompt in prompts]).to(self.base.device)
        pairs = list(zip(prompts, counts, strict=True))
        per_tile = [count for prompt, count in pairs for _ in range(prompt.tiles)]
        texts = [prompt.at(count, self.inner.config) for prompt, count in pairs]
        answers = [self.answers[i].ids for i in samples]
        inputs = _padded(texts, answers, self._pad_id())
        is_answer = torch.arange(inputs["input_ids"].shape[1]) >= _longest(texts)
        inputs |= self.inner.prefix_types(is_answer.expand_as(inputs["input_ids"]))
        for name in prompts[0].positions:
            inputs[name] = torch.cat([prompt.positions[name] for prompt in prompts])
        longest = max(map(len, answers))
        keeps = "logits_to_keep" in inspect.signature(self.inner.forward).parameters
        logits = self.model(
            **{name: tensor.to(self.base.device) for name, tensor in inputs.items()},
            num_image_tokens=per_tile,
            mm_encoder_outputs={"image": project_patches(self.base, patches, per_tile)},
            use_cache=False,
            **({"logits_to_keep": longest + 1} if keeps else {}),
        ).logits
        kept: torch.Tensor = logits[:, -longest - 1 : -1]
        return kept

    def _prompt(self, sample: int) -> _Prompt:
        """Return a sample's prompt, which is processed, and its images encoded, only once.

        Beyond ``CACHED_BYTES`` of features, images are encoded at each use.
        """
        if sample in self._prompts:
            return self._prompts[sample]
        inputs = encode_samples(
            self.processor,
            [_question(self.samples, sample)],
            family=self._family,
            chat_options={"add_generation_prompt": True},
            num_image_tokens=default_count(self.inner.config),
        )
        prompt = _Prompt(
            text={
                name: inputs[name][0] for name in inputs if is_per_token(name) and name != "labels"
            },
            positions={name: inputs[name] for name in self._position_names() if name in inputs},
            tiles=len(inputs["num_image_tokens"]),
            patches=self._encoded(inputs),
        )
        if self._cached_bytes + prompt.patches.nbytes <= CACHED_BYTES:
            self._cached_bytes += prompt.patches.nbytes
            self._prompts[sample] = prompt
        return prompt

    @torch.no_grad()
    def _encoded(self, inputs: Mapping[str, Any]) -> Patches:
        names = [name for name in self._image_names if name in inputs]
        images = {name: _moved(inputs[name], self.base.device) for name in names}
        return encode_patches(self.base, images).to("cpu")

    def _position_names(self) -> list[str]:
        """Return the names of the image inputs from which the positions of M-RoPE follow."""
        if not hasattr(self.base, "get_rope_index"):
            return []
        stock = type(self.base)._tokenflex_stock_class
        names = inspect.signature(stock.get_rope_index).parameters
        return [name for name in self._image_names if name in names]

    def _pad_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return 0 if pad is None else pad


def _log_of_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of 1 minus the sum of probabilities: [A, K] -> [A]."""
    rest = 1 - log_probs.exp().sum(1)
    return rest.clamp_min(torch.finfo(rest.dtype).eps).log()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _longest(texts: Sequence[Mapping[str, Any]]) -> int:
    return max(len(text["input_ids"]) for text in texts)


def _padded(
    texts: Sequence[Mapping[str, Any]],
    answers: Sequence[torch.Tensor],
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """Return prompts, padded on the left, and their answers, padded on the right: [B, P + A]."""
    prompt = _longest(texts)
    longest = max(map(len, answers))
    fill = {"input_ids": pad_id}
    padded = {}
    for name in texts[0]:
        rows = torch.full((len(texts), prompt + longest), fill.get(name, 0))
        for row, text, answer in zip(rows, texts, answers, strict=True):
            row[prompt - len(text[name]) : prompt] = text[name]
            if name == "input_ids":
                row[prompt : prompt + len(answer)] = answer
            elif name == "attention_mask":
                row[prompt : prompt + len(answer)] = 1
        padded[name] = rows
    return padded


# ---- training


def _trains_projector(inner: Any) -> bool:
    projector = inner.base_model.get_submodule(type(inner.base_model)._tokenflex_family.projector)
    return any(p.requires_grad for p in projector.parameters())


@contextmanager
def _trained(model: Any, inner: Any) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters to train, in float32; others get no gradients within the block."""
    projector = inner.base_model.get_submodule(type(inner.base_model)._tokenflex_family.projector)
    if model is inner:
        chosen = list(projector.parameters())
    else:  # adapters are a part of the model's own parameters
        chosen = [p for p in inner.parameters() if p.requires_grad]
    wanted = {p: p.requires_grad for p in inner.parameters()}
    dtypes = {p: p.dtype for p in chosen}
    inner.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
        p.data = p.data.float()
    try:
        yield chosen
    finally:
        for p, dtype in dtypes.items():
            p.data = p.data.to(dtype)
            p.grad = None
        for p, requires_grad in wanted.items():
            p.requires_grad_(requires_grad)


@dataclass(frozen=True)
class _Schedule:
    """The arguments of :func:`distill` of the same names."""

    counts: TokenCounts
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def batches(self, num_samples: int) -> Iterator[tuple[list[int], list[TokenCount]]]:
        """Yield the samples of each step and their counts; each epoch has an order of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        epoch = -1
        for _ in range(self.steps):
            samples: list[int] = []
            drawn: list[TokenCount] = []
            while len(samples) < min(self.batch_size, num_samples):
                if not order:
                    order = torch.randperm(num_samples, generator=generator).tolist()
                    epoch += 1
                samples.append(order.pop())
                drawn.append(self.counts.draw(samples[-1], epoch))
            yield samples, drawn

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm_up = max(1, round(_WARM_UP_SHARE * self.steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(1, (step + 1) / warm_up) * cosine


class _Balance:
    """The loss of a step, in which the divergence of each count is relative to its own size.

    Its gradient is that of the sum of the logarithms of the counts' divergences, in proportion to
    how often they are drawn; sizes are running means over :data:`_MEMORY` steps. The geometric
    mean of losses that differ in size is that of arXiv 1904.08492.
    """

    def __init__(self) -> None:
        self._sizes: dict[TokenCount, float] = {}

    def loss(
        self, divergence: torch.Tensor, lengths: Sequence[int], counts: Sequence[TokenCount]
    ) -> torch.Tensor:
        """Return the loss of a batch.

        Args:
            divergence: float32 [tokens of all answers].
            lengths: Tokens of each answer.
            counts: Count of each sample.
        """
        parts: dict[TokenCount, list[torch.Tensor]] = {}
        for part, count in zip(divergence.split([*lengths]), counts, strict=True):
            parts.setdefault(count, []).append(part)
        losses = []
        for count, answers in parts.items():
            of_count = torch.cat(answers)
            mean = float(of_count.detach().mean())
            size = self._sizes.get(count, mean)
            self._sizes[count] = size = size + (mean - size) / _MEMORY
            losses.append(of_count.sum() / (size + _NEGLIGIBLE))
        return torch.stack(losses).sum() / len(divergence)


def _train(
    student: _Student,
    parameters: list[nn.Parameter],
    num_samples: int,
    schedule: _Schedule,
    on_progress: Callable[[str, int, int], object],
) -> None:
    """Train on the first ``num_samples`` samples."""
    optimizer = torch.optim.AdamW(parameters, schedule.learning_rate, weight_decay=0.0)
    device, dtype = student.inner.device, student.inner.dtype
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    balance = _Balance()
    for step, (samples, drawn) in enumerate(schedule.batches(num_samples)):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        with mixed:
            divergence, _ = student.divergence(samples, drawn)
        lengths = [len(student.answers[i]) for i in samples]
        balance.loss(divergence, lengths, drawn).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_progress("steps", step + 1, schedule.steps)
