"""A picture of several tiles costs its count in each, in answers, budgets and refusals."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.models.tiny import picture
from tests.serving.server_tools import QUESTION, chat, data_url, image_part, running, tiny_served
from tokenflex import TokenFlexProcessor


def wide() -> Image.Image:
    """A picture that is cut into two tiles."""
    image = Image.new("RGB", (64, 32))
    image.paste(picture(1), (0, 0))
    image.paste(picture(2), (32, 0))
    return image


def tall() -> Image.Image:
    return wide().rotate(90, expand=True)


def part(image: Image.Image, **settings):
    return image_part(data_url(image), **settings)


@pytest.fixture(scope="module", params=["sequential", "shared"])
def served(request):
    served = tiny_served(projector_position="normalized", image_positions=request.param)
    base = served.processor
    served.processor = TokenFlexProcessor(
        base.image_processor,
        base.tokenizer,
        chat_template=base.chat_template,
        num_image_tokens=9,
        max_tiles=4,
    )
    return served


@pytest.fixture(scope="module")
def client(served):
    with running(served) as client:
        yield client


def expected(served, images, counts) -> str:
    content = [{"type": "image", "image": image} for image in images]
    inputs = served.processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"num_image_tokens": counts},
    )
    output = served.model.generate(
        **inputs, **served.special_tokens, do_sample=False, max_new_tokens=6
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return served.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_a_count_is_for_each_tile(client, served):
    answer = client.post(chat(part(wide()), part(picture(3)), num_image_tokens=[4, 9]))
    assert answer.usage["image_tokens"] == [8, 9]
    assert answer.usage["encoder_passes"] == 2
    assert answer.text == expected(served, [wide(), picture(3)], [4, 9])
    again = client.post(chat(part(picture(3)), part(wide()), num_image_tokens=[16, 9]))
    assert again.usage["image_tokens"] == [16, 18]
    assert again.usage["encoder_passes"] == 0
    assert again.text == expected(served, [picture(3), wide()], [16, 9])


@pytest.mark.parametrize(
    ("budget", "tokens", "counts"),
    [(12, [8, 4], [4, 4]), (18, [8, 9], [4, 9]), (25, [8, 16], [4, 16]), (48, [32, 16], [16, 16])],
)
def test_a_budget_pays_for_every_tile(client, served, budget, tokens, counts):
    """The upgrade of two tiles costs twice as much."""
    answer = client.post(chat(part(wide()), part(picture(3)), budget=budget))
    assert answer.usage["image_tokens"] == tokens
    assert answer.text == expected(served, [wide(), picture(3)], counts)


def test_tiles_of_a_fixed_count_are_taken_off_the_budget(client, served):
    images = [wide(), picture(3), tall()]

    def ask(budget: int):
        fixed = part(wide(), num_image_tokens=4)
        return client.post(chat(fixed, part(picture(3)), part(tall()), budget=budget))

    for budget, tokens, counts in (
        (20, [8, 4, 8], [4, 4, 4]),
        (40, [8, 16, 8], [4, 16, 4]),
        (56, [8, 16, 32], [4, 16, 16]),
    ):
        answer = ask(budget)
        assert answer.usage["image_tokens"] == tokens
        assert answer.text == expected(served, images, counts)
    refused = ask(19)
    assert refused.status == 400
    assert "at least 20" in refused.error["message"]
    fixed = client.post(chat(part(wide()), num_image_tokens=16, budget=31))
    assert "at least 32" in fixed.error["message"]
    small = client.post(chat(part(wide()), part(picture(3)), budget=11))
    assert "at least 12" in small.error["message"]
