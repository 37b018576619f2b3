"""A projector learns the stock model's own answers, at drawn counts."""

from __future__ import annotations

import pytest
import torch

from tests.dropin.processors import picture, stock_processor
from tests.dropin.table import image_inputs
from tests.dropin.test_fitting import CLASSES, pictures_of, questions
from tests.dropin.test_model import projector_of
from tests.dropin.tiny import stock_model
from tokenflex import TokenCounts, from_pretrained, replace_projector, restore_projector
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.dropin import distill, distillation, fit_projector, projector_name
from tokenflex.dropin.distillation import counts_around, stock_answers
from tokenflex.dropin.features import ImageOutputs
from tokenflex.dropin.model import as_stock
from tokenflex.dropin.samples import PromptsOf, encode_samples
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex.routing.ladder import trained_counts

# One of each kind: layers of features, M-RoPE, token types of an image and of a suffix, tiles.
NAMES = ("gemma3", "idefics3", "internvl", "llava", "paligemma", "qwen2_vl", "qwen3_vl")
FEW = {"steps": 2, "batch_size": 2, "max_new_tokens": 3}
COUNTS = TokenCounts((4, 16), (1, 1))


def sample(seed: int, text: str = "what is this") -> dict:
    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}]}


def samples_of(number: int) -> list[dict]:
    return [sample(seed) for seed in range(number)]


def converted(name: str, *, eos: int | None = None):
    model, processor = stock_model(name), stock_processor(name)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(1)
        replace_projector(model, processor, num_image_tokens=16)
    return model, processor


def answers_of(model, processor, samples):
    return stock_answers(model, processor, samples, 2, 3, lambda *_: None)


@pytest.mark.parametrize("name", NAMES)
def test_kept_answers_are_those_of_the_stock_model(name):
    model, processor = stock_model(name), stock_processor(name)
    samples = samples_of(3)
    chat = {"chat_options": {"add_generation_prompt": True}}
    expected = []
    for one in samples:
        inputs = encode_samples(processor, [one], **chat)
        options = {"output_logits": True, "return_dict_in_generate": True}
        output = model.generate(**inputs, do_sample=False, max_new_tokens=3, **options)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        expected.append((new, torch.stack(output.logits, 1)[0].log_softmax(-1)))
    model, processor = converted(name)
    for answer, (ids, log_probs) in zip(
        answers_of(model, processor, samples), expected, strict=True
    ):
        assert answer.ids.tolist() == ids.tolist()
        kept = log_probs.gather(1, answer.likeliest)
        torch.testing.assert_close(answer.log_probs, kept, atol=1e-4, rtol=1e-4)
    assert is_converted(model)
    inputs = encode_samples(processor, [samples[0]], num_image_tokens=4)
    assert set(inputs["num_image_tokens"]) == {4}


@pytest.mark.parametrize("name", NAMES)
def test_stock_tokens_diverge_from_no_answer(name, monkeypatch):
    """The prompts, positions and steps that are compared are those of the stock model's answers."""
    model, processor = converted(name)
    base, samples = model.base_model, samples_of(3)
    answers = answers_of(model, processor, samples)
    # Of different lengths, so that both sides are padded.
    answers[1] = distillation.StockAnswer(
        *(getattr(answers[1], name)[:2] for name in ("ids", "likeliest", "log_probs"))
    )
    student = distillation._Student(model, processor, samples, answers)
    stock = {}
    for i in range(3):
        inputs = encode_samples(processor, samples[i : i + 1], num_image_tokens=16)
        images = {name: inputs[name] for name in student._image_names if name in inputs}
        with as_stock(model), torch.no_grad():
            outputs = base.get_image_features(**images, return_dict=True)
        features = outputs.pooler_output
        rows = [row.reshape(-1, row.shape[-1]) for row in features]
        layers = getattr(outputs, "deepstack_features", None)
        stock[i] = torch.cat(rows), layers, len(inputs["num_image_tokens"])
    tokens, _, tiles = stock[0]
    side = round((len(tokens) / tiles) ** 0.5)
    assert side * side * tiles == len(tokens)

    def stock_tokens(_base, _patches, counts):
        parts = [part for i in (0, 1, 2) for part in stock[i][0].chunk(stock[i][2])]
        layers = stock[0][1] and [
            [maps for i in (0, 1, 2) for maps in stock[i][1][layer]]
            for layer in range(len(stock[0][1]))
        ]
        return ImageOutputs(pooler_output=parts, deepstack_features=layers)

    monkeypatch.setattr(distillation, "project_patches", stock_tokens)
    with torch.no_grad():
        divergence, is_likeliest = student.divergence([0, 1, 2], [side * side] * 3)
    assert divergence.shape == (8,)
    assert float(divergence.abs().max()) < 1e-4
    assert bool(is_likeliest.all())


def test_divergence_is_that_of_the_likeliest_tokens_and_all_others():
    model, processor = converted("llava")
    samples = samples_of(2)
    answers = answers_of(model, processor, samples)
    student = distillation._Student(model, processor, samples, answers)
    with torch.no_grad():
        divergence, _ = student.divergence([0, 1], [16, 4])
        logits = student._logits([0, 1], [16, 4])
    for row, answer in enumerate(answers):
        given = logits[row, :3].double().softmax(-1)
        expected = answer.log_probs.double().exp()
        kept = given.gather(1, answer.likeliest)
        groups = torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
        expected = torch.cat([expected, 1 - expected.sum(1, keepdim=True)], 1)
        by_hand = (expected * (expected / groups).log()).sum(1)
        torch.testing.assert_close(
            divergence[3 * row :][:3].double(), by_hand, atol=1e-5, rtol=1e-3
        )
    assert len(answers[0].likeliest[0]) < logits.shape[-1]


def test_tokens_that_cannot_be_do_not_matter():
    model, processor = converted("llava")
    hook = model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.arange(60, 100), float("-inf"))
    )
    samples = samples_of(3)
    report = distill(model, processor, samples, counts=COUNTS, **FEW)
    hook.remove()
    assert all(agreement.divergence < float("inf") for agreement in report.after.values())
    assert bool(projector_of(model).down.weight.isfinite().all())


@pytest.mark.slow
def test_distilled_model_answers_as_the_stock_model_at_every_count():
    """After a model has learned to tell eight kinds of pictures, with a random projector."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = stock_model("llava-siglip").train(), stock_processor("llava-siglip")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(80):
            model(**questions(16, 64, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        replace_projector(model, processor, num_image_tokens=64)
        images = (pictures_of(torch.arange(48) % CLASSES, seed=7) / 8 + 0.5).clamp(0, 1)
        processor.image_processor.image_std = [1 / 8] * 3  # so that they are normalised as above
        samples = [
            {"text": "<s> <image> </s> what", "images": [image], "id": i}
            for i, image in enumerate(images)
        ]
        report = distill(
            model,
            processor,
            samples,
            counts=TokenCounts((4, 16, 64), (1, 1, 1)),
            steps=60,
            batch_size=8,
            learning_rate=3e-3,
            max_new_tokens=1,
        )
    for count in (4, 16, 64):
        before, after = report.before[count], report.after[count]
        assert after.divergence < 0.3 * before.divergence, count
    assert (report.trained_on, report.held_out, report.answer_tokens) == (42, 6, 48)


def test_only_the_projector_changes():
    model, processor = converted("llava")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.get_input_embeddings().requires_grad_(False)
    model.train()
    distill(model, processor, samples_of(4), counts=COUNTS, **FEW)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert model.training
    assert [p.requires_grad for p in model.get_input_embeddings().parameters()] == [False]
    assert all(p.requires_grad for p in projector_of(model).parameters())
    assert all(p.grad is None for p in model.parameters())


def test_adapters_of_peft_learn_too():
    peft = pytest.importorskip("peft")
    model, processor = converted("llava")
    lora = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q|v)_proj",
        modules_to_save=[projector_name(model)],
        init_lora_weights=True,
    )
    wrapped = peft.get_peft_model(model, lora)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    distill(wrapped, processor, samples_of(4), counts=COUNTS, **FEW)
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_B" in name for name in changed)
    assert any("modules_to_save" in name for name in changed)
    assert not any("base_layer" in name or "vision_tower" in name for name in changed)
    assert is_converted(unwrapped(wrapped))
    alone = peft.get_peft_model(
        converted("llava")[0], peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    )
    with pytest.raises(ValueError, match="modules_to_save"):
        distill(alone, processor, samples_of(4), counts=COUNTS, **FEW)


def test_weights_of_less_than_32_bits_are_trained_in_float32():
    model, processor = converted("llava")
    model.bfloat16()
    before = projector_of(model).down.weight.detach().clone()
    distill(model, processor, samples_of(4), counts=COUNTS, learning_rate=1e-2, **FEW)
    weight = projector_of(model).down.weight
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before)


def test_features_that_are_not_kept_give_the_same_projector(monkeypatch):
    weights = []
    for kept in (2**31, 0):
        monkeypatch.setattr(distillation, "CACHED_BYTES", kept)
        model, processor = converted("llava")
        distill(model, processor, samples_of(4), counts=COUNTS, **FEW)
        weights.append(projector_of(model).down.weight)
    assert torch.equal(*weights)


def test_a_last_answer_is_left_out_of_the_prompt():
    model, processor = converted("llava")
    samples = samples_of(3)
    answered = [
        {"messages": [*s["messages"], {"role": "assistant", "content": "a cat"}]} for s in samples
    ]
    plain, left_out = (answers_of(model, processor, some) for some in (samples, answered))
    assert [a.ids.tolist() for a in plain] == [a.ids.tolist() for a in left_out]


def test_the_search_is_greedy_whatever_the_model_s_own_options_are():
    model, processor = converted("llava")
    expected = [a.ids.tolist() for a in answers_of(model, processor, samples_of(2))]
    model.generation_config.update(
        do_sample=True, num_beams=3, num_return_sequences=2, repetition_penalty=9.0, max_length=2
    )
    assert [a.ids.tolist() for a in answers_of(model, processor, samples_of(2))] == expected


def test_a_schedule_draws_anew_in_each_epoch_and_repeats_by_its_seed():
    counts = TokenCounts((4, 16), (1, 1))
    schedule = distillation._Schedule(counts, 12, 3, 2e-3, seed=1)
    steps = [*schedule.batches(9)]
    for epoch in range(4):
        of_epoch = steps[3 * epoch : 3 * epoch + 3]
        assert sorted(i for samples, _ in of_epoch for i in samples) == [*range(9)]
    drawn = [dict(zip(s, c, strict=True)) for s, c in steps]
    by_epoch = [{**drawn[3 * e], **drawn[3 * e + 1], **drawn[3 * e + 2]} for e in range(4)]
    assert any(by_epoch[0] != other for other in by_epoch[1:])
    assert steps == [*schedule.batches(9)]
    assert steps != [*distillation._Schedule(counts, 12, 3, 2e-3, seed=2).batches(9)]
    rates = [schedule.rate(step) for step in range(12)]
    assert max(rates) == rates[0] == pytest.approx(2e-3)  # a tenth of 12 steps is one
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]
    assert distillation._Schedule(counts, 100, 3, 1.0, 0).rate(0) == pytest.approx(0.1)


def gradient_of(balance, divergence, lengths, counts) -> list[float]:
    leaf = torch.tensor(divergence, requires_grad=True)
    balance.loss(leaf, lengths, counts).backward()
    return leaf.grad.tolist()


def test_each_count_s_divergence_is_relative_to_its_own_size():
    balance = distillation._Balance()
    # 2 tokens of an answer at 4, 1 at 16, 1 at 4; the mean at 4 is 6.
    gradient = gradient_of(balance, [3.0, 6.0, 0.05, 9.0], [2, 1, 1], [4, 16, 4])
    expected = [1 / 6, 1 / 6, 1 / 0.05, 1 / 6]
    assert gradient == pytest.approx([g / 4 for g in expected], rel=0.03)
    # The size at 4 moves by a twentieth of the way to 26, and that at 16 stays.
    gradient = gradient_of(balance, [26.0], [1], [4])
    assert gradient == pytest.approx([1 / 7], rel=0.01)
    gradient = gradient_of(balance, [0.05], [1], [16])
    assert gradient == pytest.approx([1 / 0.051])


def test_a_negligible_divergence_has_no_larger_weight():
    gradient = gradient_of(distillation._Balance(), [0.0, 1e-6], [1, 1], [4, 16])
    assert gradient == pytest.approx([500.0, 500.0], rel=0.01)


def test_training_balances_the_counts(monkeypatch):
    model, processor = converted("llava")
    given = []
    original = distillation._Balance.loss

    def loss(self, divergence, lengths, counts):
        given.append((id(self), len(divergence), lengths, counts))
        return original(self, divergence, lengths, counts)

    monkeypatch.setattr(distillation._Balance, "loss", loss)
    distill(model, processor, samples_of(5), counts=COUNTS, **FEW)
    assert len({balance for balance, *_ in given}) == 1
    assert [number for _, number, *_ in given] == [6, 6]
    assert all(lengths == [3, 3] and {*counts} <= {4, 16} for *_, lengths, counts in given)


def test_held_out_samples_are_not_trained_on(monkeypatch):
    model, processor = converted("llava")
    seen = set()
    original = distillation._Student.divergence

    def divergence(self, samples, counts):
        if torch.is_grad_enabled():
            seen.update(samples)
        return original(self, samples, counts)

    monkeypatch.setattr(distillation._Student, "divergence", divergence)
    report = distill(model, processor, samples_of(9), counts=COUNTS, **{**FEW, "steps": 8})
    assert (report.trained_on, report.held_out) == (8, 1)
    assert seen == {*range(8)}


def test_gradients_are_clipped_to_a_norm_of_1(monkeypatch):
    model, processor = converted("llava")
    original, step = distillation._Balance.loss, torch.optim.AdamW.step
    norms = []

    def loss(self, *args):
        return 1e4 * original(self, *args)

    def recorded(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(distillation._Balance, "loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    distill(model, processor, samples_of(4), counts=COUNTS, **FEW)
    assert norms == pytest.approx([1.0] * FEW["steps"], abs=1e-3)


def test_prompts_of_a_data_set_are_read_one_by_one():
    class Data:
        read: list[int] = []

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Sample:
            self.read.append(index)
            return self._sample(index, picture(index))

        def outline(self, index: int) -> Sample:
            return self._sample(index, (8, 8))

        @staticmethod
        def _sample(index: int, image) -> Sample:
            turns = [Turn("user", "what"), Turn("assistant", "a"), Turn("user", "and")]
            marked = [Turn("user", "see <video:1> this"), Turn("assistant", "b")]
            talks = (Conversation((*turns, Turn("assistant", "c"))), Conversation((*marked,)))
            return Sample(str(index), (image,), talks)

    prompts = PromptsOf(Data(), 7)
    assert (len(prompts), Data.read) == (7, [])
    kinds = [[part["type"] for part in m["content"]] for m in prompts[1]["messages"]]
    assert kinds == [["image", "text"], ["text"], ["text"]]
    assert [part.get("text") for part in prompts[2]["messages"][0]["content"]] == [
        "see ",
        None,
        " this",
    ]
    assert Data.read == [0, 0]
    assert len(prompts[-2:]) == 2


def test_answers_end_with_the_model_s_end():
    model, processor = converted("llava")
    (answer, *_) = answers_of(model, processor, samples_of(2))
    end = int(answer.ids[1])
    model.generation_config.eos_token_id = [2, end]
    first = answer.ids.tolist().index(end)
    (shorter, *_) = answers_of(model, processor, samples_of(2))
    assert shorter.ids.tolist() == answer.ids[: first + 1].tolist()
    assert len(shorter.likeliest) == first + 1


def test_counts_around_a_default_have_the_paper_s_odds():
    assert counts_around(256) == TokenCounts((64, 144, 256), (2.0, 3.0, 5.0))
    assert counts_around((4, 8)).counts == ((2, 4), (3, 6), (4, 8))
    assert counts_around(9) == TokenCounts((9,), (5.0,))


def test_counts_go_with_the_projector_and_come_back_as_they_were(tmp_path):
    model, processor = converted("llava")
    counts = TokenCounts((4, (2, 8)), (1, 1))
    distill(model, processor, samples_of(3), counts=counts, **FEW)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert trained_counts(from_pretrained(tmp_path)[0]) == (4, (2, 8))
    restore_projector(model, processor)
    assert not hasattr(model.config, "trained_num_image_tokens")


@pytest.mark.parametrize("name", ["got_ocr2", "fast_vlm", "lfm3_vl"])
def test_stock_models_of_half_precision_that_do_not_cast_are_fitted(name):
    model = stock_model(name).bfloat16()
    replace_projector(model, num_image_tokens=16)
    report = fit_projector(model, image_inputs(name, range(4)), counts=[16])
    assert report.after < 1


def test_failure_leaves_the_conversion_as_it_was():
    model, processor = converted("llava")
    samples = samples_of(4)
    samples[2]["messages"][0]["content"][0]["image"] = torch.zeros(2)
    before = projector_of(model).down.weight.detach().clone()
    with pytest.raises(ValueError, match="image"):
        distill(model, processor, samples, counts=COUNTS, **FEW)
    assert is_converted(model)
    assert processor.image_token_counts == 16
    assert torch.equal(projector_of(model).down.weight, before)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": []}, "samples must be at least 2"),
        ({"samples": ["one", "two"]}, r"samples\[0\] must be a dict"),
        ({"samples": [sample(0), {"messages": [{"role": "user", "content": "no"}]}]}, "sample 1"),
        ({"counts": 16}, "counts must be a TokenCounts"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ],
)
def test_wrong_arguments_are_named(change, error):
    model, processor = converted("llava")
    arguments = {"samples": samples_of(2), "counts": COUNTS, **FEW, **change}
    with pytest.raises((TypeError, ValueError), match=error):
        distill(model, processor, **arguments)


def test_loaded_conversion_has_no_stock_model_to_learn_from():
    with pytest.raises(ValueError, match="converted in place"):
        distill(stock_model("llava"), stock_processor("llava"), samples_of(2))
