"""All tokens of an image at one text position in vLLM: the answers are those of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.tiny import picture
from tests.serving.checkpoints import save_checkpoint
from tests.serving.vllm_tools import (
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

SHARED = {"projector_position": "normalized", "image_positions": "shared"}
BLOCK = 32
ENGINES = {
    "whole prompts": {"enable_prefix_caching": False},
    # Steps of few tokens end within images, and so do blocks of the cache.
    "chunks and cached prefixes": {
        "enable_prefix_caching": True,
        "block_size": BLOCK,
        "max_num_batched_tokens": 24,
    },
}


@pytest.fixture(scope="module", params=ENGINES)
def served(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        folder = tmp_path_factory.mktemp("positions") / "model"
        yield Served(save_checkpoint(folder, max_tiles=4, **SHARED), **ENGINES[request.param])


def test_mixed_counts_in_one_batch(served):
    counts = (1, 4, 9, 16, 25, 64, (2, 3), (3, 2), (1, 6))
    check(served, *(("odd <image> majority", [A], count) for count in counts), max_tiles=1)


def test_several_images_side_by_side_and_between_text(served):
    check(
        served,
        ("<image> odd <image> where", [A, B], [4, 16]),
        ("<image> odd <image> where", [A, B], [16, 4]),
        ("read <image> <image> <image>", [A, A, B], [4, (2, 3), 9]),
        ("read <image> <image> <image>", [A, A, B], [(2, 3), 4, 9]),
        ("majority <image>", [B], 4),
        max_tiles=1,
    )


def test_each_tile_of_an_image_has_a_position_of_its_own(served):
    check_tiles(served)


def test_prompts_without_images_in_the_same_batch(served):
    check_text_beside_an_image(served)


def test_a_question_about_a_prompt_of_before_reads_its_images_from_the_caches(served):
    new = [picture(30), picture(31)]
    text = "odd <image> where <image> "
    served.ask((text + "red", new, [9, 64]), max_tiles=1)
    before = served.passes
    requests = [(text + "blue", new, [9, 64]), (text + "red", new, [64, 9])]
    outputs = served.outputs(*requests, max_tiles=1)
    check_same([*map(answer, outputs)], [served.expected(*r, max_tiles=1) for r in requests])
    assert served.passes == before  # no encoder for another count
    if served.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        # The same counts again: blocks up to the middle of the second image. Another count: none.
        assert [output.num_cached_tokens for output in outputs] == [2 * BLOCK, 0]


def test_positions_are_what_the_answers_depend_on(served):
    request = ("odd <image> where <image>", [A, B], [16, 9])
    expected = served.expected(*request, max_tiles=1)
    served.model.config.image_positions = "sequential"
    try:
        sequential = served.expected(*request, max_tiles=1)
    finally:
        served.model.config.image_positions = "shared"
    difference = torch.tensor(expected.logprobs) - torch.tensor(sequential.logprobs)
    assert float(difference.abs().max()) > 1e-2


# ---- without an engine


def image(offset: int, grid: tuple[int, int], tiles: int = 1) -> Any:
    """Return vLLM's description of an image in a prompt."""
    place = SimpleNamespace(offset=offset, length=tiles * grid[0] * grid[1])
    data = {"token_grids": SimpleNamespace(data=torch.tensor(grid))}
    return SimpleNamespace(mm_position=place, data=data)


@pytest.mark.parametrize(
    ("positions", "images", "expected"),
    [
        ("shared", [], [*range(18)]),
        # Two tiles, a word, an image, and text: the answer's first tokens may be part of it.
        ("shared", [(1, (2, 2), 2), (10, (2, 3))], [0, *[4] * 4, *[8] * 4, 9, *[15] * 6, 16, 17]),
        ("shared", [(10, (2, 3)), (1, (3, 3))], [0, *[9] * 9, *[15] * 6, 16, 17]),
        ("shared", [(0, (3, 3)), (9, (3, 3))], [*[8] * 9, *[17] * 9]),
        ("sequential", [(1, (2, 2), 2), (10, (2, 3))], [*range(18)]),
    ],
)
def test_positions_of_a_prompt(positions, images, expected):
    from tokenflex.serving.vllm.model import TokenFlexForVLLM

    model = SimpleNamespace(config=SimpleNamespace(image_positions=positions))
    features = [image(*one) for one in images]
    rows, delta = TokenFlexForVLLM.get_mrope_input_positions(model, [5] * 18, features)
    assert rows.tolist() == [expected] * 3
    assert delta == 0
