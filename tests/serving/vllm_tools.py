"""An engine of vLLM beside the same checkpoint in transformers, for tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.models.tiny import picture
from tokenflex.models.loading import load_checkpoint

A, B, WIDE = picture(1), picture(2), picture(3, (32, 96))
NEW_TOKENS = 6
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 1}


class Answer(NamedTuple):
    """New tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


class Served:
    """An engine in this process, and the same checkpoint in transformers.

    Args:
        folder: the checkpoint.
        options: of the engine, beside those of all tests.
    """

    def __init__(self, folder: Any, **options: Any) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=768,
            max_num_seqs=8,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 3},
            **options,
        )
        self.greedy = SamplingParams(**GREEDY)
        self.vllm_model = self.llm.apply_model(lambda model: model)[0]
        self.model, self.processor = load_checkpoint(folder)

    @property
    def passes(self) -> int:
        return self.vllm_model.feature_cache.passes

    def ask(self, *requests: tuple[str, list[Any], Any], **kwargs: Any) -> list[Answer]:
        """Return the answers to prompts with images and counts, all in one batch."""
        return [*map(answer, self.outputs(*requests, **kwargs))]

    def outputs(self, *requests: tuple[str, list[Any], Any], **kwargs: Any) -> list[Any]:
        """Return vLLM's outputs for prompts with images and counts, all in one batch."""
        prompts = [
            {
                "prompt": text,
                "multi_modal_data": {"image": images},
                "mm_processor_kwargs": {"num_image_tokens": counts, **kwargs},
            }
            for text, images, counts in requests
        ]
        outputs: list[Any] = self.llm.generate(prompts, self.greedy, use_tqdm=False)
        return outputs

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


def check(served: Served, *requests: tuple[str, list[Any], Any], **kwargs: Any) -> None:
    expected = [served.expected(*request, **kwargs) for request in requests]
    check_same(served.ask(*requests, **kwargs), expected)
    # A count that went to another image would be seen.
    assert len({round(wanted.logprobs[0], 3) for wanted in expected}) == len(expected)


def check_tiles(served: Served) -> None:
    """Check answers about pictures of several tiles, which share their picture's count."""
    check(
        served,
        ("<image> odd", [WIDE], 4),
        ("<image> odd", [WIDE], (1, 3)),
        ("<image> odd <image>", [WIDE, A], [9, 4]),
    )


def check_text_beside_an_image(served: Served) -> None:
    """Check the answer to a prompt without images, in one batch with one that has an image."""
    tokens = served.processor.tokenizer("odd majority", return_tensors="pt")
    image = {"prompt": "<image> odd", "multi_modal_data": {"image": [B]}}
    outputs = served.llm.generate(["odd majority", image], served.greedy, use_tqdm=False)
    expected = [served.generated(tokens), served.expected("<image> odd", [B], 16)]
    check_same([*map(answer, outputs)], expected)
