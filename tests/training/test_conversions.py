"""Training of converted stock models with our own loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.distillation.stock import new_model_and_processor
from tests.dropin.processors import image_text, picture, stock_processor
from tests.dropin.tiny import stock_model
from tests.training.processes import end_of, start_two
from tests.training.runs import metrics, own_data, untimed, write_config
from tokenflex import TokenCounts, replace_projector
from tokenflex.answers import answer_at_counts
from tokenflex.checkpoints import load_model
from tokenflex.cli import main
from tokenflex.data.order import StepSampler
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.data.steps import StepPacker
from tokenflex.dropin import ImageTextCollator
from tokenflex.dropin.samples import _messages
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.conversions import ConvertedKind
from tokenflex.training.converted_data import ConvertedCollator
from tokenflex.training.engine import build_accelerator, optimize, prepare
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import format_plan, plan_run
from tokenflex.training.stages import build_optimizer

COUNTS = TokenCounts((4, 9, 16), (2, 3, 5))
ALL = {"vision": 1e-3, "projector": 2e-3, "text": 1e-3}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_TEXT {% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ c['text'] }} {% endgeneration %}{% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def talk(*turns: str) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    return Conversation(tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False)))


def samples() -> list[Sample]:
    """One picture; several turns about two; text alone; two conversations about one picture."""
    return [
        Sample("one", (picture(1),), (talk("what is", "cat a"),)),
        Sample(
            "two",
            (picture(2, 40, 70), picture(3)),
            (talk("a <image> is <image> what", "a cat is", "this", "this this a what"),),
        ),
        Sample("text", (), (talk("what this is", "a"),)),
        Sample("twice", (picture(4),), (talk("what", "is a"), talk("this is", "what a cat this"))),
    ]


def pair(name: str) -> tuple[Any, Any]:
    model, processor = stock_model(name), stock_processor(name)
    processor.chat_template = _TEMPLATE.replace("IMAGE_TEXT", image_text(name))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return replace_projector(model, processor, num_image_tokens=16), processor


def stage(**changes: Any) -> dict[str, Any]:
    values = {"name": "all", "steps": 1, "batch_size": 4, "learning_rate": ALL}
    values |= {"counts": [4, 9, 16], "weights": [2, 3, 5], "max_grad_norm": 1e9}
    return {**values, **changes}


def config_of(stages: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    values = {"output": "unused", "model": {"start": "absent"}, "data": {"name": "digits"}}
    return TrainConfig.model_validate({**values, "stages": stages, **changes})


def step_of(kind: ConvertedKind, data: list[Sample], **bounds: Any) -> Any:
    """The bins of a step of all samples in order."""
    packer = StepPacker(data, kind.collator(COUNTS), **bounds)
    return packer([(0, index) for index in range(len(data))])


def gradients_of(kind: ConvertedKind, packed: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step of the loop."""
    stage, gradients = kind.config.stages[0], {}
    optimizer = build_optimizer(kind, stage)
    accelerator = build_accelerator(kind.config)
    prepared, optimizer = prepare(accelerator, kind.step_module, optimizer)

    def record() -> None:
        for name, parameter in kind.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    optimizer.step = record
    return optimize(accelerator, prepared, optimizer, packed, stage).loss, gradients


def expected_gradients(
    model: Any, processor: Any, data: list[Sample], loss: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Those of each conversation alone, with the ids and labels that Trainer would have."""
    model.zero_grad()
    terms, weights = [], []
    for index, sample in enumerate(data):
        collate = ImageTextCollator(processor, COUNTS.draw(index), assistant_only=True)
        for conversation in sample.conversations:
            inputs = dict(collate([{"messages": _messages(conversation, sample.images)}]))
            labels = inputs.pop("labels")[:, 1:].flatten()
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            learned = labels != -100
            losses = F.cross_entropy(logits[learned], labels[learned], reduction="none")
            # Of an answer: the turns of a conversation count as one.
            weight = len(losses) ** -0.5 if loss == "square" else 1.0
            terms.append(losses.sum() * weight)
            weights.append(len(losses) * weight)
    total = sum(terms) / sum(weights)
    total.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(total.detach()), named


def cosine(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    names = sorted(first)
    assert names == sorted(second)
    a, b = (torch.cat([one[name].double().flatten() for name in names]) for one in (first, second))
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-4, atol=0)
    return float(F.cosine_similarity(a, b, dim=0))


# ---- a step


@pytest.mark.parametrize("loss", ["token", "square"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3", "qwen3_vl"])
def test_a_step_has_the_loss_and_gradients_of_its_samples_alone(name, loss):
    """LLaVA's rope, M-RoPE, tiles with texts around them, padded rows, deepstack."""
    if loss == "square" and name not in ("llava", "gemma3"):
        pytest.skip("weights of targets are the same in all families")
    model, processor = pair(name)
    data = samples()
    loss_alone, alone = expected_gradients(model, processor, data, loss)
    kind = ConvertedKind(config_of([stage(loss=loss)]), model, processor)
    packed = step_of(kind, data, max_tokens=max(60, 40 if name != "idefics3" else 400))
    assert packed.broken == []
    assert kind.packs == (name != "gemma3")
    assert (packed.rows > packed.tokens) == (name == "gemma3")
    loss_of_step, of_step = gradients_of(kind, packed)
    assert loss_of_step == pytest.approx(loss_alone, rel=1e-5)
    assert cosine(of_step, alone) >= 0.99999
