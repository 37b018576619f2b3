"""Training of converted stock models with our own loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit

from experiments.distillation.stock import new_model_and_processor
from tests.dropin.processors import image_text, picture, stock_processor
from tests.dropin.tiny import stock_model
from tests.training.processes import end_of, start_two
from tests.training.runs import metrics, own_data, run_until_killed, untimed, write_config
from tokenflex import TokenCounts, replace_projector
from tokenflex.checkpoints import load_model
from tokenflex.cli import main
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.data.steps import StepPacker
from tokenflex.dropin import ImageTextCollator
from tokenflex.dropin.samples import _messages
from tokenflex.packing import vision_cost
from tokenflex.training.checkpoint import check_checkpoint_folder
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.conversions import ConvertedKind
from tokenflex.training.converted_data import check_conversations
from tokenflex.training.engine import build_accelerator, optimize, prepare
from tokenflex.training.layers import adapted_layers, layers_of
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


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("llava", "token"),
        ("llava", "square"),
        ("qwen2_vl", "token"),  # M-RoPE
        ("qwen3_vl", "token"),  # deepstack
        ("idefics3", "token"),  # tiles, with texts around them
        ("gemma3", "square"),  # padded rows
    ],
)
def test_a_step_has_the_loss_and_gradients_of_its_samples_alone(name, loss):
    model, processor = pair(name)
    data = samples()
    loss_alone, alone = expected_gradients(model, processor, data, loss)
    kind = ConvertedKind(config_of([stage(loss=loss)]), model, processor)
    packed = step_of(kind, data, max_tokens=250 if name == "idefics3" else 50)
    assert packed.broken == []
    assert len(packed.bins) > 1
    assert kind.packs == (name != "gemma3")
    assert (packed.rows > packed.tokens) == (name == "gemma3")
    loss_of_step, of_step = gradients_of(kind, packed)
    assert loss_of_step == pytest.approx(loss_alone, rel=1e-5)
    assert cosine(of_step, alone) >= 0.99999


def test_the_plan_of_a_step_is_what_its_batches_have():
    model, processor = pair("idefics3")
    kind = ConvertedKind(config_of([stage()]), model, processor)
    packed = step_of(kind, samples())
    (batch,) = packed.bins
    assert packed.tokens == batch.num_rows == packed.rank_tokens
    assert packed.targets == len(batch.targets) == sum(number for _, number in batch.answers)
    assert packed.tiles == len(batch.inputs["num_image_tokens"])
    # Two conversations show the last picture, which is encoded once.
    shown = (batch.inputs["input_ids"] == model.config.image_token_id).sum()
    once = sum(batch.inputs["num_image_tokens"])
    assert (packed.vision_tokens, shown - once) == (once, COUNTS.draw(3) * packed_tiles(kind, 3))


def packed_tiles(kind: ConvertedKind, index: int) -> int:
    """The tiles of a sample's pictures."""
    return sum(kind.collator(COUNTS).encoded(samples()[index])[1])


def test_texts_are_tokenised_whole_as_trainer_does():
    """A tokenizer may join the end of a question and the beginning of its answer."""
    model, processor = pair("llava")
    joined = processor.tokenizer.backend_tokenizer
    joined.pre_tokenizer = Sequence([Split("cat a", "isolated"), WhitespaceSplit()])
    template = processor.chat_template.replace("assistant {% endif %}", "assistant cat {% endif %}")
    processor.chat_template = template.replace("{% generation %}", "cat {% generation %}")
    joined.add_tokens(["cat a"])
    model.resize_token_embeddings(len(processor.tokenizer) + 60)
    sample = Sample("one", (picture(1),), (talk("what is", "a this"),))
    alone = ImageTextCollator(processor, COUNTS.draw(0), assistant_only=True)(
        [{"messages": _messages(sample.conversations[0], sample.images)}]
    )
    assert joined.token_to_id("cat a") in alone["input_ids"]
    (batch,) = step_of(ConvertedKind(config_of([stage()]), model, processor), [sample]).bins
    assert torch.equal(batch.inputs["input_ids"], alone["input_ids"])
    assert batch.targets.tolist() == [i for i in alone["labels"].flatten().tolist() if i != -100]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_text_alone_has_a_zero_gradient_where_only_the_projector_learns(name):
    """Without one, backward fails, and processes wait for each other's gradients."""
    model, processor = pair(name)
    kind = ConvertedKind(config_of([stage(learning_rate={"projector": 1.0})]), model, processor)
    _, gradients = gradients_of(kind, step_of(kind, [samples()[2]]))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {*gradients} == learned == {name for name in gradients if "projector" in name}
    assert all(not gradient.any() for gradient in gradients.values())


def test_every_parameter_belongs_to_one_name_of_learning_rate():
    for name in ("llava", "qwen2_vl", "idefics3", "gemma3", "janus", "glm4v", "qwen3_vl", "ovis2"):
        model = replace_projector(stock_model(name), num_image_tokens=16)
        modules = ConvertedKind(config_of([stage()]), model).modules
        sets = {n: {p for m in of for p in m.parameters()} for n, of in modules.items()}
        assert sum(map(len, sets.values())) == len(set().union(*sets.values()))
        missing = {n for n, p in model.named_parameters() if p not in set().union(*sets.values())}
        assert not {n for n in missing if "newline" not in n}, name
        assert {*model.projector.parameters()} == sets["projector"]
        assert model.get_output_embeddings().weight in sets["text"]


def test_recomputed_layers_change_no_gradient():
    model, processor = pair("qwen3_vl")
    kind = ConvertedKind(config_of([stage()], gradient_checkpointing=True), model, processor)
    packed = step_of(kind, samples())
    loss, gradients = gradients_of(kind, packed)
    assert len(layers_of(kind.parts.text)) == model.config.text_config.num_hidden_layers
    assert layers_of(kind.parts.vision)
    with adapted_layers(kind.parts, kind.config, ALL):
        assert gradients_of(kind, packed)[0] == pytest.approx(loss)
        assert cosine(gradients_of(kind, packed)[1], gradients) >= 0.9999999


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])
def test_long_conversations_are_cut_after_an_answer_that_fits(name):
    model, processor = pair(name)
    kind = ConvertedKind(config_of([stage()]), model, processor)
    counts = TokenCounts((4,), (1,))
    sample = Sample(
        "long",
        (picture(1), picture(2)),
        (talk("<image> what", "a cat is", "<image> this", "this is what"),),
    )
    whole = StepPacker([sample], kind.collator(counts))([(0, 0)])
    cut = StepPacker([sample], kind.collator(counts, max_length=whole.tokens - 1))([(0, 0)])
    (batch,), (long,) = cut.bins, whole.bins
    assert cut.targets == whole.targets - 1
    assert cut.tokens == batch.num_rows == whole.tokens - 1
    short = StepPacker([sample], kind.collator(counts, max_length=whole.tokens // 2 + 2))([(0, 0)])
    (first,) = short.bins
    assert 0 < short.targets <= 4
    assert 2 * short.tiles == whole.tiles
    assert len(first.inputs["num_image_tokens"]) == short.tiles
    for batch in (first, long):
        weights = torch.ones(len(batch.targets))
        inputs = batch.model_inputs()
        output = kind.step_module(**inputs, targets=batch.targets, target_weights=weights)
        assert output.loss.isfinite()


def test_samples_that_cannot_be_learned_are_left_out_and_named():
    model, processor = pair("llava")
    kind = ConvertedKind(config_of([stage()]), model, processor)
    packed = step_of(kind, [samples()[0], Sample("dumb", (picture(1),), (talk("what"),))])
    (broken,) = packed.broken
    assert broken.index == 1
    assert "sample dumb: it holds no answer to learn" in broken.reason


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_frames_of_a_video_are_learned_as_images(name):
    model, processor = pair(name)
    kind = ConvertedKind(config_of([stage()]), model, processor)
    film = tuple(picture(10 + i) for i in range(3))
    batches = []
    for mark in ("<video:3>", "<image><image><image>"):
        asked = talk(f"<image> {mark} what", "a cat", "is", "this")
        data = [Sample("film", (picture(1), *film), (asked,)), samples()[0]]
        packed = step_of(kind, data)
        assert not packed.broken
        (batch,) = packed.bins
        batches.append((packed.tokens, packed.tiles, packed.targets, batch))
    assert batches[0][:3] == batches[1][:3]
    (*_, of_frames), (*_, of_images) = batches
    assert torch.equal(of_frames.targets, of_images.targets)
    assert torch.equal(of_frames.target_rows, of_images.target_rows)
    assert {*of_frames.inputs} == {*of_images.inputs}
    for key, value in of_images.inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(of_frames.inputs[key], value), key
        else:
            assert of_frames.inputs[key] == value, key


def test_a_processor_that_writes_more_than_its_template_is_refused():
    _, processor = pair("paligemma")
    with pytest.raises(ValueError, match="paligemma are not what its chat template writes"):
        check_conversations(processor)
    _, processor = pair("llava")
    check_conversations(processor)
    processor.chat_template = None
    with pytest.raises(ValueError, match="must have a chat_template"):
        check_conversations(processor)


# ---- a run


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A tiny conversion that reads the digits task."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    model, processor = new_model_and_processor(seed=0)
    replace_projector(model, processor, num_image_tokens=16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_values(output: Path, start: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "output": str(output),
        "model": {"start": str(start)},
        "data": {"name": "digits", "split": "train", "size": 40, "questions": 2},
        "stages": [
            stage(name="projector", steps=3, batch_size=4, learning_rate={"projector": 0.002}),
            stage(steps=5, batch_size=4, max_tokens=60, loss="square", max_grad_norm=1.0),
        ],
        "evaluation": {
            "data": {"name": "digits", "split": "test", "size": 4, "questions": 2},
            "counts": [4, 9],
            "every": 4,
        },
        "threads": 1,
        "workers": 0,
        "log_every": 1,
        "save_every": 3,
    }
    return {**values, **changes}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(converted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "run.yaml", run_values(folder / "run", converted))
    AcceleratorState._reset_state(reset_partial_state=True)
    TrainingRun(load_config(config)).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


def test_a_run_writes_a_conversion_that_every_command_takes(finished, converted, capsys):
    checkpoint = finished / "checkpoint"
    check_checkpoint_folder(checkpoint)  # which a run with --fresh replaces
    before, after = (json.loads((f / "config.json").read_text()) for f in (converted, checkpoint))
    assert after.pop("trained_num_image_tokens") == [4, 9, 16]
    for part in ("vision_config", "text_config"):
        after[part].pop("dtype")
    assert after == before
    assert {path.name for path in checkpoint.iterdir()} == {p.name for p in converted.iterdir()}
    report = json.loads((finished / "report.json").read_text())
    assert [*report["accuracy"]] == ["4", "9"]
    assert len(untimed(finished / "evaluations.jsonl")) == 1
    data = own_data(finished.parent, 3, broken=())["path"]
    picture = finished.parent / "0.png"
    asked = ["--image", str(picture), "--prompt", "odd", "--tokens", "4,9,16"]
    assert main(["generate", "--model", str(checkpoint), *asked]) == 0
    answered = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert answered == ["4", "9", "16"]
    assert main(["evaluate", str(checkpoint), "--data", data, "--counts", "4,16"]) == 0
    assert "3 questions about 3 samples" in capsys.readouterr().out


def test_a_stage_changes_what_learns_and_nothing_else(converted, tmp_path):
    values = run_values(tmp_path / "run", converted, evaluation=None)
    for learns in ("vision", "projector", "text"):
        stages = [stage(steps=2, learning_rate={learns: 0.01})]
        config = write_config(
            tmp_path / learns / "run.yaml",
            {**values, "stages": stages, "output": str(tmp_path / learns / "run")},
        )
        training = TrainingRun(load_config(config))
        names = {p: name for name, p in training.model.named_parameters()}
        own = {names[p] for m in training.setup.kind.modules[learns] for p in m.parameters()}
        training.run()
        before, after = (
            load_model(folder)[0].state_dict()
            for folder in (converted, tmp_path / learns / "run" / "checkpoint")
        )
        assert {*before} == {*after}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert changed & {*names.values()} <= own
        tied = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
        assert changed - {*names.values()} <= (tied if learns == "text" else set())
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_that_was_stopped_continues_to_the_bit(finished, converted, tmp_path, monkeypatch):
    values = run_values(tmp_path / "run", converted)
    config = load_config(write_config(tmp_path / "run.yaml", values))
    run_until_killed(config, 5)
    TrainingRun(config).run()
    assert metrics(tmp_path / "run") == metrics(finished)
    written = weights_of(tmp_path / "run" / "checkpoint")
    expected = weights_of(finished / "checkpoint")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.release
def test_two_processes_learn_what_one_does(finished, converted, tmp_path):
    values = run_values(tmp_path / "run", converted)
    ranks = start_two(write_config(tmp_path / "run.yaml", values))
    assert [end_of(rank)[0] for rank in ranks] == [0, 0]
    alone, together = metrics(finished), metrics(tmp_path / "run")
    for line, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-3)
        assert [other[k] for k in ("tokens", "counts")] == [line[k] for k in ("tokens", "counts")]
    written = weights_of(tmp_path / "run" / "checkpoint")
    for name, weight in weights_of(finished / "checkpoint").items():
        torch.testing.assert_close(written[name], weight, rtol=0, atol=2e-3)


def test_a_tiny_task_is_learned(converted, tmp_path):
    rates = {"vision": 2e-3, "projector": 4e-3, "text": 4e-3}
    stages = [stage(steps=60, batch_size=8, learning_rate=rates, max_grad_norm=1.0)]
    values = run_values(tmp_path / "run", converted, stages=stages, evaluation=None)
    TrainingRun(load_config(write_config(tmp_path / "run.yaml", values))).run()
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# ---- what is refused, and the plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sharding": "full"}, "sharding must be none"),
        ({"compile": True}, "compile must be false"),
        ({"encoder_warm_up": {"steps": 1}}, "encoder_warm_up must not be given"),
        ({"stages": [stage(distillation=1.0)]}, "distillation of stage 'all' must be 0"),
        ({"model": {"start": "CONVERTED", "max_tiles": 4}}, "model.max_tiles is no known key"),
        ({"model": {"start": "CONVERTED", "num_image_tokens": 5}}, "must be a perfect square"),
        ({"model": {"start": "CONVERTED", "text": {"path": "a"}}}, "model.vision is missing"),
        (
            {
                "model": {
                    "start": "CONVERTED",
                    "vision": {"path": "a"},
                    "text": {"path": "b"},
                }
            },
            "vision and text must not be given with start of a converted stock model",
        ),
        ({"model": {"start": "STOCK"}}, "must be a conversion made by `tokenflex convert`"),
        ({"stages": [stage(counts=[1024], weights=[1])]}, "must not exceed the language model's"),
    ],
)
def test_what_a_conversion_cannot_be_trained_with_is_one_line(
    converted, tmp_path, capsys, changes, words
):
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text('{"model_type": "llava"}')
    text = json.dumps({**run_values(tmp_path / "run", converted), **changes})
    text = text.replace("CONVERTED", str(converted)).replace("STOCK", str(tmp_path / "stock"))
    config = write_config(tmp_path / "run.yaml", json.loads(text))
    assert main(["train", str(config)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert words in errors[-1]
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_is_known(converted, tmp_path):
    config = load_config(
        write_config(tmp_path / "run.yaml", run_values(tmp_path / "run", converted))
    )
    first, second = plan_run(config)
    model, _ = load_model(converted)
    size = sum(p.numel() for p in model.projector.parameters())
    assert first.trained_parameters == {"projector": size}
    assert sum(second.trained_parameters.values()) == model.num_parameters()
    assert (first.flops, first.activation_bytes) == (None, None)
    assert second.state_bytes == 4 * 4 * model.num_parameters()
    assert second.tokens > second.vision_tokens > 0
    assert second.tile_cost > 0
    text = format_plan([first, replace(second, notes=("rows are padded",))])
    assert "rows are padded" in text
    assert "operations of converted stock models are not known" in text


@pytest.mark.parametrize(
    ("learning", "share"),
    # Forward 1, inputs' gradients 1, weights' gradients 1: of the encoder, over the language model.
    [
        ("projector", 1 / 2),
        ("projector text", 1 / 3),
        ("vision projector text", 1),
        ("vision", 3 / 2),
    ],
)
def test_the_cost_of_an_image_is_that_of_the_passes_that_a_stage_needs(learning, share):
    model, processor = pair("llava")
    kind = ConvertedKind(
        config_of([stage(learning_rate=dict.fromkeys(learning.split(), 1e-3))]), model, processor
    )
    units = (model.config.vision_config.image_size / 16) ** 2
    expected = units * vision_cost(model) * share
    assert kind.tile_cost(kind.config.stages[0]) == pytest.approx(expected)


def test_rows_that_would_mix_are_padded_and_the_plan_says_why():
    model, processor = pair("gemma3")
    (note,) = ConvertedKind(config_of([stage()]), model, processor).notes()
    assert note.startswith("rows of gemma3 are padded, not packed: ")
    assert "bidirectional" in note


def test_rows_of_a_language_model_that_nobody_compared_are_padded(monkeypatch):
    monkeypatch.setattr("tokenflex.packing.attention.has_tested_text", lambda base: False)
    model, processor = pair("llava")
    kind = ConvertedKind(config_of([stage()]), model, processor)
    assert not kind.packs
    assert kind.notes()[0].endswith("is known only by comparison")
    (batch,) = step_of(kind, samples()[:2]).bins
    assert batch.inputs["input_ids"].shape[0] == batch.inputs["attention_mask"].shape[0] == 2
