"""A video in a prompt or chat is its frames as images: the same inputs, and any count per frame."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import picture, tiny_model
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.models.video_inputs import spread_evenly

A, B, C, D = (picture(seed) for seed in range(4))
CLIP = [A, B, C]


@pytest.fixture(scope="module")
def model():
    return tiny_model(trained_num_image_tokens=[1, 4, 9, 16, (2, 3)])


@pytest.fixture
def processor():
    return digits_processor(16)


def same(inputs, expected) -> bool:
    return (
        inputs["num_image_tokens"] == expected["num_image_tokens"]
        and torch.equal(inputs["pixel_values"], expected["pixel_values"])
        and torch.equal(inputs["input_ids"], expected["input_ids"])
    )


def gif(frames=CLIP) -> bytes:
    """Frames of flat colour, which GIF keeps."""
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def flat(number: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (20 * number,) * 3)


def test_a_video_is_its_frames_as_images(processor, model):
    inputs = processor(text="<video> odd <image>", images=D, videos=[CLIP], num_image_tokens=4)
    text = "<image><image><image> odd <image>"
    expected = processor(text=text, images=[*CLIP, D], num_image_tokens=4)
    assert same(inputs, expected)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=3), model.generate(**expected, max_new_tokens=3)
    )


def test_images_and_videos_stand_in_the_order_of_their_marks(processor):
    texts = ["<image> odd <video>", "majority", "<video><image><video>"]
    inputs = processor(
        text=texts,
        images=[[D], [], [A]],
        videos=[[CLIP], [], [[B], [C, D]]],
        num_image_tokens=[4, [4, 9, 16], 1, 9, (2, 3)],
    )
    assert inputs["num_image_tokens"] == [4, 4, 9, 16, 1, 9, (2, 3), (2, 3)]
    shown = processor.process_images([D, *CLIP, B, A, C, D])[0]["pixel_values"]
    assert torch.equal(inputs["pixel_values"], shown)
    per_row = (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()
    assert per_row == [4 + 4 + 9 + 16, 0, 1 + 9 + 6 + 6]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (9, [9] * 4),
        ((2, 3), [(2, 3)] * 4),
        ([4, 9, 16, 1], [4, 9, 16, 1]),
        ([4, 9], [4, 4, 4, 9]),
        ([[4, 9, (1, 2)], 1], [4, 9, (1, 2), 1]),
        ([(2, 3), 1], [(2, 3)] * 3 + [1]),
        (torch.tensor([4, 9, 16, 1]), [4, 9, 16, 1]),
        (np.array([4, 9]), [4, 4, 4, 9]),
        (None, [16] * 4),
        ("auto", "auto"),
    ],
)
def test_counts_of_frames(processor, counts, expected):
    inputs = processor(text="<video> <image>", images=D, videos=[CLIP], num_image_tokens=counts)
    assert inputs["num_image_tokens"] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_image_tokens": [4] * 3}, "one entry per image or frame, 4, or one per image or vid"),
        ({"num_image_tokens": [[4, 9], 4]}, r"num_image_tokens\[0\].*got 2 for the 3 frames"),
        ({"num_image_tokens": 5}, "perfect square"),
        ({"budget": 2}, "budget must be at least 3, a vision token for each frame.*got 2"),
        ({"budget": 12, "num_image_tokens": [4, 4]}, "one entry per image beside a budget.*got 2"),
        ({"budget": 12, "num_image_tokens": "auto"}, "must be the counts of the images"),
        ({"max_frames": 0}, "max_frames must be"),
        ({"fps": -1}, "fps must be a number above 0"),
        ({"fps": 2}, "needs a clip with times"),
        ({"num_frames": 2}, "num_frames cannot be given: max_frames"),
        ({"videos_kwargs": {"num_frames": 2}}, "num_frames cannot be given"),
        ({"text": "<image>"}, r"number of <video> tokens.*got 0 \(per prompt \[0\]\) for 1 videos"),
        ({"text": "<video><video><image>"}, "got 2 .*for 1 videos"),
        ({"text": "<video>"}, "number of <image> tokens.*got 0 .*for 1 images"),
        ({"videos": [[CLIP, CLIP]], "text": ["<video><image>"]}, r"got \[1\] for \[2\] videos"),
    ],
)
def test_what_does_not_fit_names_the_mark_and_the_numbers(processor, options, words):
    call = {"text": "<video> <image>", "images": D, "videos": [CLIP], **options}
    with pytest.raises(ValueError, match=words):
        processor(**call)


def test_a_budget_is_spread_over_frames(processor):
    for budget, frames in ((24, 4), (16, 16), (100, 7), (9, 1), (255, 16), (64, 32)):
        counts = spread_evenly(budget, frames)
        assert len(counts) == frames
        assert budget - max(counts) < sum(counts) <= budget or {*counts} == {max(counts)}
        assert {round(count**0.5) ** 2 - count for count in counts} == {0}
        assert max(counts) <= (min(counts) ** 0.5 + 1) ** 2
        # Upgraded frames lie evenly: no half of the clip has more than one more than the other.
        half = frames // 2
        high = [count == max(counts) for count in counts]
        assert abs(sum(high[:half]) - sum(high[frames - half :])) <= 1
    inputs = processor(
        text="<video> <image>", images=D, videos=[CLIP], budget=20, num_image_tokens=9
    )
    assert inputs["num_image_tokens"] == [9, 4, 4, 9]
    inputs = processor(text="<video>", videos=[CLIP], videos_kwargs={"budget": 3})
    assert inputs["num_image_tokens"] == [1, 1, 1]


def test_frames_are_chosen_by_the_call_or_the_processor(processor, tmp_path):
    clip = gif([flat(i) for i in range(12)])

    def levels(**options) -> list[int]:
        inputs = processor(text="<video>", videos=clip, num_image_tokens=1, **options)
        return ((inputs["pixel_values"][:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()

    assert levels() == [*range(12)]
    assert levels(max_frames=3) == levels(videos_kwargs={"max_frames": 3}) == [0, 6, 11]
    assert levels(fps=5) == [0, 2, 4, 6, 8, 10]
    assert levels(fps=5, max_frames=2) == [0, 10]
    with pytest.raises(ValueError, match="fps must be given once"):
        levels(fps=5, videos_kwargs={"fps": 2})
    made = TokenFlexProcessor(processor.image_processor, processor.tokenizer, max_frames=4, fps=2.5)
    made.save_pretrained(tmp_path)
    processor = TokenFlexProcessor.from_pretrained(tmp_path)
    assert (processor.max_frames, processor.fps) == (4, 2.5)
    assert levels() == [0, 4, 8]
    assert levels(max_frames=2) == [0, 8]


def test_a_frame_is_one_tile_beside_images_of_several(processor):
    tiled = TokenFlexProcessor(
        processor.image_processor, processor.tokenizer, num_image_tokens=4, max_tiles=4
    )
    wide = A.resize((64, 32))
    inputs = tiled(text="<video> <image>", images=wide, videos=[[wide, wide]])
    assert inputs["num_image_tokens"] == [4] * (2 + 2)
    alone = tiled.process_images([wide, wide], max_tiles=1)[0]["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:2], alone)
    assert tiled.image_tokens([wide, wide, wide], max_tiles=[1, None, 1]) == [4, 8, 4]
    with pytest.raises(ValueError, match="max_tiles must have one entry for each of 2 images"):
        tiled.process_images([wide, wide], max_tiles=[1])


def test_prompts_share_a_video(processor, model):
    options = {"num_image_tokens": [[4, 9, 1], 16]}
    shared = processor(
        text=[["<video> odd", "<video> majority"], ["<image> odd"]],
        images=[[], [D]],
        videos=[[CLIP], []],
        **options,
    )
    assert shared["pixel_values"].shape[0] == 4
    assert shared["image_index"] == [0, 1, 2, 0, 1, 2, 3]
    apart = processor(
        text=["<video> odd", "<video> majority", "<image> odd"],
        images=[[], [], [D]],
        videos=[[CLIP], [CLIP], []],
        num_image_tokens=[[4, 9, 1], [4, 9, 1], 16],
    )
    assert torch.equal(
        model.generate(**shared, max_new_tokens=2), model.generate(**apart, max_new_tokens=2)
    )
    with pytest.raises(
        ValueError, match="share their images must each hold one <image> or <video>"
    ):
        processor(text=[["<video> odd", "odd"]], videos=[[CLIP]])


def test_without_videos_the_mark_is_text(processor):
    inputs = processor(text="<video> <image>", images=A, num_image_tokens=1)
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words == ["<unk>", "<image>"]


def test_the_mark_is_text_in_a_prompt_of_a_batch_without_videos(processor):
    words = {"type": "text", "text": "what is <video> here"}
    mine, others = chat(VIDEO, TEXT), [chat(words), chat(IMAGE, words)]
    options = {"tokenize": True, "return_dict": True, "num_image_tokens": 4}
    inputs = processor.apply_chat_template([mine, *others], **options)
    alone = [processor.apply_chat_template(messages, **options) for messages in (mine, *others)]
    for ids, mask, expected in zip(
        inputs["input_ids"], inputs["attention_mask"], alone, strict=True
    ):
        assert ids[mask.bool()].tolist() == expected["input_ids"][0].tolist()
    assert inputs["num_image_tokens"] == [4] * 4
    processor(text=["<video>", "<video>"], videos=[[CLIP], None])
    # An empty list says that there are none, and a forgotten video is no text.
    for videos in ([[CLIP], []], [[CLIP], [CLIP]]):
        with pytest.raises(ValueError, match=r"got \[1, 2\] for \[1, [01]\] videos"):
            processor(text=["<video>", "<video><video>"], videos=videos)


def test_an_empty_path_is_no_clip(processor, tmp_path, monkeypatch):
    """The path of the current folder is empty, too."""
    A.save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    words = "must be an existing file, a URL or base64 text, got an empty text"
    with pytest.raises(ValueError, match=words):
        processor(text="<video> odd", videos=[""])
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(
            chat({"type": "video", "video": ""}, TEXT), tokenize=True, return_dict=True
        )
    assert processor(text="<video>", videos=["."], num_image_tokens=4)["num_image_tokens"] == [4]


def test_counts_of_frames_are_chosen_by_a_budget_of_generate(processor, model):
    inputs = processor(text="<video> odd", videos=[CLIP], num_image_tokens="auto")
    assert inputs["tiles_per_image"] == [1, 1, 1]
    chosen = model.choose_counts(**inputs, budget=24)
    assert len(chosen["num_image_tokens"]) == 3
    placeholders = int((chosen["input_ids"] == processor.image_token_id).sum())
    assert 3 <= placeholders <= 24


def test_text_replacements_tell_where_videos_stand(processor):
    prompt = "odd <video> <image>"
    inputs = processor(
        text=prompt,
        images=D,
        videos=[CLIP],
        num_image_tokens=1,
        return_text_replacement_offsets=True,
    )
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["video", "image"]
    assert [prompt[slice(*entry["span"])] for entry in offsets] == ["<video>", "<image>"]
    assert offsets[0]["replacement"] == "<image>" * 3
    start, end = offsets[1]["new_span"]
    assert ("odd " + "<image>" * 3 + " <image>")[start:end] == "<image>"


# ---------------------------------------------------------------------- chats


def chat(*content):
    return [{"role": "user", "content": list(content)}]


VIDEO = {"type": "video", "video": CLIP}
TEXT = {"type": "text", "text": " odd"}
IMAGE = {"type": "image", "image": D}
PARTS = (  # iterates parts and writes its own text around images
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}read <image> odd "
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, PARTS])
def test_a_chat_with_videos_is_the_prompt_with_their_marks(processor, template):
    messages = chat(IMAGE, VIDEO, TEXT)
    text = processor.apply_chat_template(messages, chat_template=template)
    assert (text.count("<image>"), text.count("<video>")) == (1, 1)
    options = {"num_image_tokens": [9, [1, 4, 1]], "add_special_tokens": False}
    expected = processor(text=text, images=D, videos=[CLIP], **options)
    inputs = processor.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        num_image_tokens=[9, [1, 4, 1]],
    )
    assert same(inputs, expected)


def test_a_chat_takes_videos_from_files_and_beside_it(processor, tmp_path):
    clip = [flat(i) for i in range(3)]
    (tmp_path / "a.gif").write_bytes(gif(clip))
    expected = processor(text="<video> odd ", videos=[clip], max_frames=2)
    options = {"tokenize": True, "return_dict": True, "max_frames": 2}
    path = str(tmp_path / "a.gif")
    for part in (
        {"type": "video", "path": path},
        {"type": "video", "url": tmp_path / "a.gif"},
        {"type": "video_url", "video_url": {"url": path}},
        {"type": "video", "video": gif(clip)},
    ):
        assert same(processor.apply_chat_template(chat(part, TEXT), **options), expected)
    beside = {"processor_kwargs": {"videos": [path]}}
    for messages in (chat({"type": "video"}, TEXT), [{"role": "user", "content": "<video> odd"}]):
        assert same(processor.apply_chat_template(messages, **options, **beside), expected)
    with pytest.raises(ValueError, match="in the messages or beside them, got both"):
        processor.apply_chat_template(chat(VIDEO, TEXT), **options, **beside)
    with pytest.raises(ValueError, match="holds '<video>' in its text, which stands for a video"):
        processor.apply_chat_template(chat(VIDEO, {"type": "text", "text": "<video> odd"}))


def test_masks_of_answers_are_right_behind_videos(processor):
    """The mark of a video is shorter than an image's text in the place of which it stands."""
    processor = TokenFlexProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_start="read read read ",
        image_end=" majority",
    )
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    messages = [*chat(VIDEO, IMAGE, TEXT), {"role": "assistant", "content": "3 red"}]
    inputs = processor.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        num_image_tokens=4,
    )
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    mask = inputs["assistant_masks"][0].tolist()
    assert [word for word, kept in zip(words, mask, strict=True) if kept] == ["3", "red"]


def test_chats_of_a_group_share_a_video(processor):
    groups = [[chat(VIDEO, TEXT), chat(VIDEO, TEXT)], [chat(IMAGE, TEXT)]]
    inputs = processor.apply_chat_template(
        groups, tokenize=True, return_dict=True, num_image_tokens=1
    )
    assert inputs["image_index"] == [0, 1, 2, 0, 1, 2, 3]
    other = {"type": "video", "video": [A]}
    with pytest.raises(ValueError, match="must show the images of"):
        processor.apply_chat_template(
            [[chat(VIDEO, TEXT), chat(other, TEXT)]], tokenize=True, return_dict=True
        )
