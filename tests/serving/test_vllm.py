"""TokenFLEX checkpoints in vLLM's engine: the answers are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import picture
from tests.serving.checkpoints import save_checkpoint
from tests.serving.vllm_tools import (
    NEW_TOKENS,
    WIDE,
    A,
    B,
    Served,
    answer,
    check,
    check_same,
    check_text_beside_an_image,
    check_tiles,
)

pytest.importorskip("vllm", reason="vllm is not installed; make test-vllm installs it")

from vllm.exceptions import VLLMValidationError


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        folder = tmp_path_factory.mktemp("served") / "model"
        yield Served(save_checkpoint(folder, max_tiles=4))


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
    check_tiles(served)


def test_prompts_without_images_in_the_same_batch(served):
    check_text_beside_an_image(served)


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
