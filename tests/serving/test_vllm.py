"""TokenFLEX checkpoints in vLLM's engine: the answers are those of transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.models.tiny import picture
from tests.serving.checkpoints import save_checkpoint
from tokenflex.models.loading import load_checkpoint

pytest.importorskip("vllm", reason="vllm is not installed; make test-vllm installs it")

from vllm.exceptions import VLLMValidationError

NEW_TOKENS = 6
A, B, WIDE = picture(1), picture(2), picture(3, (32, 96))
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 1}


class Answer(NamedTuple):
    """New tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


class Served:
    """An engine in this process, and the same checkpoint in transformers."""

    def __init__(self, folder: Any) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=768,
            max_num_seqs=8,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 3},
        )
        self.greedy = SamplingParams(**GREEDY)
        self.vllm_model = self.llm.apply_model(lambda model: model)[0]
        self.model, self.processor = load_checkpoint(folder)

    @property
    def passes(self) -> int:
        return self.vllm_model.feature_cache.passes

    def ask(self, *requests: tuple[str, list[Any], Any], **kwargs: Any) -> list[Answer]:
        """Return the answers to prompts with images and counts, all in one batch."""
        prompts = [
            {
                "prompt": text,
                "multi_modal_data": {"image": images},
                "mm_processor_kwargs": {"num_image_tokens": counts, **kwargs},
            }
            for text, images, counts in requests
        ]
        return [*map(answer, self.llm.generate(prompts, self.greedy, use_tqdm=False))]

    def expected(self, text: str, images: list[Any], counts: Any, **kwargs: Any) -> Answer:
        """Return what transformers generates."""
        return self.generated(
            self.processor(images=images, text=text, num_image_tokens=counts, **kwargs)
        )

    def generated(self, inputs: Any) -> Answer:
        """Return what transformers generates from a model's inputs."""
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, -NEW_TOKENS:]
        logprobs = torch.cat(output.scores).log_softmax(-1)
        return Answer(tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist())


def answer(output: Any) -> Answer:
    """Return the answer in an output of vLLM."""
    tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    return Answer(tokens, [step[token].logprob for token, step in zip(tokens, steps, strict=True)])


def check_same(answers: list[Answer], expected: list[Answer]) -> None:
    assert [given.tokens for given in answers] == [wanted.tokens for wanted in expected]
    for given, wanted in zip(answers, expected, strict=True):
        assert given.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        folder = tmp_path_factory.mktemp("served") / "model"
        yield Served(save_checkpoint(folder, max_tiles=4))


def check(served: Served, *requests: tuple[str, list[Any], Any], **kwargs: Any) -> None:
    expected = [served.expected(*request, **kwargs) for request in requests]
    check_same(served.ask(*requests, **kwargs), expected)
    # A count that went to another image would be seen.
    assert len({round(wanted.logprobs[0], 3) for wanted in expected}) == len(expected)


def test_mixed_counts_in_one_batch(served):
    counts = (1, 4, 9, 16, 25, (2, 3), (3, 2), (1, 6))
    check(served, *(("<image> odd", [A], count) for count in counts), max_tiles=1)


def test_several_images_with_counts_of_their_own(served):
    check(
        served,
        ("<image> odd <image> where", [A, B], [4, 16]),
        ("<image> odd <image> where", [A, B], [16, 4]),
        ("<image> odd <image> where", [B, A], [16, 4]),
        ("<image> read <image> <image>", [A, A, A], [4, (2, 3), 9]),
        ("majority <image>", [B], 4),
        max_tiles=1,
    )


def test_tiles_share_their_images_count(served):
    check(
        served,
        ("<image> odd", [WIDE], 4),
        ("<image> odd", [WIDE], (1, 3)),
        ("<image> odd <image>", [WIDE, A], [9, 4]),
    )


def test_prompts_without_images_in_the_same_batch(served):
    tokens = served.processor.tokenizer("odd majority", return_tensors="pt")
    image = {"prompt": "<image> odd", "multi_modal_data": {"image": [B]}}
    outputs = served.llm.generate(["odd majority", image], served.greedy, use_tqdm=False)
    expected = [served.generated(tokens), served.expected("<image> odd", [B], 16)]
    check_same([*map(answer, outputs)], expected)


def test_another_count_of_a_picture_runs_no_encoder(served):
    new = picture(11)
    before = served.passes
    requests = [("<image> odd", [new], count) for count in (4, 9, (2, 3))]
    answers = [served.ask(request)[0] for request in requests]
    assert served.passes == before + 1
    check_same(answers, [served.expected(*request) for request in requests])
    served.ask(("<image> odd <image>", [new, new], [16, 25]))
    assert served.passes == before + 1
    served.ask(("<image> odd", [picture(12)], 4))
    assert served.passes == before + 2


def test_pictures_in_a_batch_are_encoded_once_each(served):
    new, before = picture(13), served.passes
    served.ask(*(("<image> odd", [new], count) for count in (1, 4, 9, 16)))
    assert served.passes == before + 1


def test_new_pictures_of_a_batch_share_passes_of_the_encoder(served, monkeypatch):
    tiles = []
    noting = served.vllm_model.vision_model.register_forward_hook(
        lambda module, given, output: tiles.append(len(output.last_hidden_state))
    )
    try:
        new = [picture(seed) for seed in range(20, 25)]
        check(served, *(("<image> odd", [image], 4) for image in new), max_tiles=1)
        assert tiles == [5]
        # No more patches than vLLM has set memory aside for: here two tiles of 64.
        monkeypatch.setattr(served.vllm_model, "_patches_per_pass", 130)
        new = [picture(seed) for seed in range(25, 28)]
        wide = picture(28, (32, 96))  # four tiles, which belong together
        requests = [("<image> odd", [image], 4) for image in (new[0], wide, new[1], new[2])]
        check(served, *requests)
        assert sorted(tiles[1:]) == [1, 2, 4]
    finally:
        noting.remove()


def test_the_projector_is_fused_and_runs_once_for_a_batch(served, monkeypatch):
    from tokenflex import projector

    calls = []

    def noting(rows, plan, **options):
        calls.append(plan)
        return project_tokens(rows, plan, **options)

    project_tokens = projector.project_tokens
    monkeypatch.setattr(projector, "project_tokens", noting)
    served.ask(("<image> odd <image> <image>", [picture(14), picture(15), WIDE], [4, 9, 16]))
    assert len(calls) == 1
    assert served.vllm_model.projector._is_plain()


def test_automatic_counts_answer_what_the_chosen_counts_answer(served):
    questions = ("odd", "majority red", "where 3", "read r2c3")
    prompts = set()
    for question in questions:
        text = f"<image> {question} <image>"
        inputs = served.processor(images=[A, B], text=text, num_image_tokens="auto", max_tiles=1)
        chosen = served.model.choose_counts(**inputs)
        answers = served.ask((text, [A, B], "auto"), max_tiles=1)
        check_same(answers, [served.generated(chosen)])
        prompts.add(tuple(chosen["num_image_tokens"]))
    assert len(prompts) > 1


def test_automatic_counts_keep_to_a_budget(served):
    prompt = {
        "prompt": "<image> odd <image>",
        "multi_modal_data": {"image": [A, B]},
        "mm_processor_kwargs": {"num_image_tokens": "auto", "budget": 20, "max_tiles": 1},
    }
    (output,) = served.llm.generate(prompt, served.greedy, use_tqdm=False)
    vision_tokens = output.prompt_token_ids.count(served.processor.image_token_id)
    assert 8 <= vision_tokens <= 20


def test_the_placeholder_is_never_an_answer(served):
    from vllm import SamplingParams

    placeholder = served.processor.image_token_id
    wanted = SamplingParams(temperature=0, max_tokens=3, logit_bias={placeholder: 100.0})
    prompt = {"prompt": "<image> odd", "multi_modal_data": {"image": [A]}}
    (output,) = served.llm.generate(prompt, wanted, use_tqdm=False)
    assert placeholder not in output.outputs[0].token_ids
    anything = SamplingParams(temperature=2.0, max_tokens=64, ignore_eos=True, seed=0, n=8)
    (output,) = served.llm.generate(prompt, anything, use_tqdm=False)
    tokens = {token for sample in output.outputs for token in sample.token_ids}
    assert placeholder not in tokens
    assert len(tokens) > 36  # of the other 71


@pytest.mark.parametrize("count", [5, 0, -4, 100, "many", [4, 9, 16], 2.5, None])
def test_the_engine_outlives_a_bad_count(served, count):
    before = served.ask(("<image> odd", [A], 4))
    if count is not None:  # no count is the default one
        with pytest.raises(VLLMValidationError, match="num_image_tokens"):
            served.ask(("<image> odd", [A], 9), ("<image> odd", [A], count))
    check_same(served.ask(("<image> odd", [A], 4), ("<image> odd", [A], 4)), before * 2)


def chat(*parts: Any) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_pil", "image_pil": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def test_conversations_are_written_as_our_processor_writes_them(served):
    """With images between texts; vLLM puts them first for a template of plain texts."""
    conversation = chat("odd ", A, " where ", B, " red")
    expected = served.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "odd "},
                    {"type": "image"},
                    {"type": "text", "text": " where "},
                    {"type": "image"},
                    {"type": "text", "text": " red"},
                ],
            }
        ],
        add_generation_prompt=True,
    )
    (output,) = served.llm.chat(
        conversation,
        served.greedy,
        use_tqdm=False,
        mm_processor_kwargs={"num_image_tokens": [4, 9]},
    )
    assert output.prompt == expected
    check_same([answer(output)], [served.expected(expected, [A, B], [4, 9])])


def test_a_placeholder_in_a_text_is_refused(served):
    with pytest.raises(VLLMValidationError, match="<image>"):
        served.llm.chat(chat(A, " <image> odd"), served.greedy, use_tqdm=False)


@pytest.mark.parametrize("images", [{}, {"multi_modal_data": {"image": []}}])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_placeholder_without_an_image_is_refused(served, images, as_ids):
    ids = served.processor.tokenizer("odd <image> majority").input_ids
    given = {"prompt_token_ids": ids} if as_ids else {"prompt": "odd <image> majority"}
    with pytest.raises(VLLMValidationError, match="'<image>' once per image, got 1 for 0 images"):
        served.llm.generate({**given, **images}, served.greedy, use_tqdm=False)
    (output,) = served.llm.generate("odd majority", served.greedy, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == NEW_TOKENS


def test_weights_are_all_loaded(served):
    theirs = dict(served.vllm_model.named_parameters())
    for name, ours in served.model.model.projector.named_parameters():
        assert torch.equal(theirs[f"projector.{name}"], ours)
    for name, ours in served.model.model.vision_model.named_parameters():
        assert torch.equal(theirs[f"vision_model.{name}"], ours)
