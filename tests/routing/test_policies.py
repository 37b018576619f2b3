"""The registry of count policies: one file each, found by its name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from tests.models.tiny import picture, tiny_model
from tests.routing.planted import COUNTS, FixedRouter
from tokenflex.answers import answer_at_counts
from tokenflex.cli.options import counts_grids_or_auto
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation import evaluate
from tokenflex.routing import policies
from tokenflex.routing.choice import choose_counts
from tokenflex.routing.policies import find_policy, policy_names
from tokenflex.routing.selector import PolicySelector, resolve_count
from tokenflex.routing.storage import save_router

ALTERNATING = """
def load(checkpoint, penalty):
    return lambda model: None

def largest(model, budget):
    return 9

def choose(model, prompts, encoded, *, penalty, budget):
    return [(4, 9)[i % 2] for i in range(len(prompts.tiles))]
"""


@pytest.fixture
def alternating(tmp_path, monkeypatch):
    """A policy that a file of another folder adds: 4 and 9 in turn."""
    (tmp_path / "alternating.py").write_text(ALTERNATING)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    yield "alternating"
    sys.modules.pop("tokenflex.routing.policies.alternating", None)


def test_the_policies_are_the_modules_of_the_folder():
    assert "auto" in policy_names()
    assert isinstance(find_policy("auto"), ModuleType)
    for name in ("best", "../auto", "", None, 4):
        with pytest.raises(ValueError, match=r"must be .*'auto'.* where counts .* got"):
            find_policy(name)


def test_a_policy_is_one_file(alternating, tmp_path):
    """The command line's options, the model's inputs and evaluation find it by its name."""
    assert {"alternating", "auto"} <= {*policy_names()}
    assert counts_grids_or_auto("4,alternating,2x3") == [4, alternating, (2, 3)]
    model, processor = tiny_model(), digits_processor()
    inputs = processor(
        images=[[picture(1), picture(2)]], text=["<image> <image> odd"], num_image_tokens="auto"
    )
    inputs["num_image_tokens"] = alternating
    assert choose_counts(model, **inputs)["num_image_tokens"] == [4, 9]
    talk = Conversation((Turn("user", "<image> odd <image>"), Turn("assistant", "3")))
    samples = [Sample("two", (picture(1), picture(2)), (talk,))]
    counts = [4, resolve_count(alternating, tmp_path), 9]
    (answer,) = answer_at_counts(
        model, processor, list(samples[0].images), "<image> odd <image>", [alternating]
    )
    assert answer.vision_tokens == 13
    report = evaluate(model, processor, samples, counts)
    assert report["vision_tokens_per_question"] == {"4": 8.0, alternating: 13.0, "9": 18.0}


def test_counts_that_are_no_policy_stay(tmp_path):
    assert [resolve_count(count, tmp_path) for count in (4, (2, 3))] == [4, (2, 3)]


def test_a_penalty_and_a_router_are_checked_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no router"):
        resolve_count("auto", tmp_path)
    router = FixedRouter([0, 1, 0])
    save_router(router, tmp_path, {})
    with pytest.raises(ValueError, match="penalty must be finite and at least 0"):
        resolve_count("auto", tmp_path, -1.0)
    selector = resolve_count("auto", tmp_path)
    assert isinstance(selector, PolicySelector)
    assert selector.label == "auto"


def test_prompts_without_images_get_no_counts(tmp_path):
    save_router(FixedRouter([0, 1, 0], counts=COUNTS), tmp_path, {})
    selector = PolicySelector("auto", tmp_path)
    prompts = [torch.tensor([5, 6]), torch.tensor([7])]
    assert selector.select(None, None, (), prompts) == [[], []]


def test_each_prompt_gets_a_count_per_image_whatever_its_tiles(alternating, tmp_path):
    """Two images of two tiles and one, shown by three prompts."""
    model = tiny_model()
    images = model.encode_images(torch.randn(3, 3, 32, 32))
    image = model.config.image_token_id
    prompts = [torch.tensor([image, 5, image, *[6] * length]) for length in range(3)]
    selector = PolicySelector(alternating, tmp_path)
    assert selector.select(model, images, (2, 1), prompts) == [[4, 9]] * 3
