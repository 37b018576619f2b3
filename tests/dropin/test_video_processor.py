"""Videos in converted models, through each family's own processor."""

from __future__ import annotations

import functools
import inspect
import io
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from tests.dropin.clips import (
    MODELS,
    NAMES,
    PROCESSOR_OF,
    clip,
    processor_with_videos,
    video_text,
)
from tests.dropin.configs import MROPE
from tests.dropin.configs.common import VIDEO, VISION_WIDTH
from tests.dropin.processors import image_text, picture
from tests.dropin.test_model import CUTS_IMAGES, TOLERANCE, logits, projector_of
from tests.dropin.tiny import stock_model
from tokenflex import TokenCounts, from_pretrained, replace_projector
from tokenflex.answers import answer_at_counts
from tokenflex.cli import main
from tokenflex.dropin import ImageTextCollator, pack_inputs
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import flat_grids
from tokenflex.dropin.mrope import rope_positions
from tokenflex.models.video_inputs import NamedVideo
from tokenflex.videos import FrameSampling, load_video

KINDS = ("glm4v", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm")
"""A family for each layout of clips; the tests of the others are for releases."""
if not is_torchvision_available():
    # `make test` runs all of them beside torchvision, where video processors are transformers' own.
    KINDS = ("llava_onevision", "qwen3_vl")
by_name = pytest.mark.parametrize(
    "name",
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.release)
        for name in sorted(NAMES)
    ],
)
BATCH = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


def pair(name: str) -> tuple[Any, Any]:
    processor = processor_with_videos(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = replace_projector(stock_model(name), processor, num_image_tokens=16)
    return model, processor


@functools.cache
def shared(name: str) -> tuple[Any, Any]:
    """Return a converted model and its processor for tests that leave them as they are."""
    return pair(name)


def frames(name: str, pictures: int) -> int:
    """Return the number of frames that a family's model sees of some pictures."""
    joined = getattr(shared(name)[1].video_processor, "temporal_patch_size", None) or 1
    return -(-pictures // joined)


def takes_mixture(name: str) -> bool:
    return not family_of(stock_model(name).config).no_mixture


def mixed(name: str, rows: tuple[int, ...] = (0, 1)) -> Any:
    """Return a batch of a long clip beside an image, and two clips, each at counts of its own."""
    image, video = image_text(PROCESSOR_OF.get(name, name)), video_text(name)
    both = takes_mixture(name)
    texts = [f"what {video} is {image if both else 'w20'} this", f"a {video} cat {video} is"]
    videos = [[clip(1, 6)], [clip(2, 2), clip(3, 4)]]
    counts = [
        [[25, 4, 9, 16, 1, 4][: frames(name, 6)], *([9] if both else [])],
        [[1, 4][: frames(name, 2)], [(2, 3), 1, 9, 4][: frames(name, 4)]],
    ]
    images = {"images": [[picture(7)]]} if 0 in rows and both else {}
    return shared(name)[1](
        text=[texts[row] for row in rows],
        videos=[videos[row] for row in rows],
        num_image_tokens=[count for row in rows for count in counts[row]],
        **images,
        **BATCH,
    )


@by_name
def test_each_prompt_of_a_mixed_batch_is_as_if_alone(name):
    model, _ = shared(name)
    together = logits(model, mixed(name))
    for row in (0, 1):
        alone = logits(model, mixed(name, (row,)))[0]
        assert float((together[row, -len(alone) :] - alone).abs().max()) < 3 * TOLERANCE


@by_name
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_of_a_mixed_batch_is_that_of_each_prompt(name, options):
    model, _ = shared(name)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(**mixed(name), **options).unflatten(0, (2, -1))
    for row in (0, 1):
        alone = model.generate(**mixed(name, (row,)), **options)
        assert torch.equal(together[row, :, -3:], alone[:, -3:])


@by_name
def test_every_frame_is_seen(name):
    model, processor = shared(name)
    pictures = clip(1, 4)
    text = f"what {video_text(name)} is"
    before = logits(model, processor(text=text, videos=[pictures], num_image_tokens=4, **BATCH))
    for i in (0, 3):
        changed = [*pictures]
        changed[i] = picture(50 + i)
        inputs = processor(text=text, videos=[changed], num_image_tokens=4, **BATCH)
        assert float((logits(model, inputs)[:, -1] - before[:, -1]).abs().max()) > 1e-4


@by_name
def test_a_clip_trains_every_projector_parameter(name):
    model, processor = pair(name)
    text = f"what {video_text(name)} is"
    inputs = processor(text=text, videos=[clip(1, 4)], num_image_tokens=9, **BATCH)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter, value in projector_of(model).named_parameters():
        assert value.grad is not None, parameter
        assert float(value.grad.abs().max()) > 0, parameter


def gif(pictures: list, milliseconds: int | list[int]) -> bytes:
    file = io.BytesIO()
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
    )
    return file.getvalue()


NATIVE = 16
"""Tokens of a frame of 64 x 64 pixels in each stock model."""


@torch.no_grad()
@by_name
def test_at_the_native_count_a_model_reads_what_the_stock_one_does(name):
    """Placeholders, time stamps and positions; and the features that the projector is given."""
    if name == "video_llava":
        pytest.skip("a frame of the stock model has a class token, too, which is in no grid")
    model, processor = shared(name)
    stock = stock_model(name)
    content, text = gif(clip(1, 9), 250), f"what {video_text(name)} is"
    shown = load_video(content, sampling=FrameSampling(4))
    assert shown.indices != [0, 1, 2, 3]
    array = torch.from_numpy(np.stack([np.asarray(frame) for frame in shown.frames]))
    metadata = VideoMetadata(
        total_num_frames=9, fps=4.0, duration=2.25, frames_indices=[*shown.indices]
    )
    options = {"return_text_replacement_offsets": True, "return_tensors": "pt"}
    expected = processor_with_videos(name)(
        text=text,
        videos=[array.permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        **options,
    )
    actual = processor(
        text=text, videos=[content], max_frames=4, num_image_tokens=NATIVE, **options
    )
    written = actual.pop("text_replacement_offsets")  # the tokenizer knows no times
    assert written == expected.pop("text_replacement_offsets")
    assert {*actual} - {*expected} == {COUNTS.get(name, "num_video_tokens")}
    for key in expected:
        assert torch.equal(torch.as_tensor(actual[key]), torch.as_tensor(expected[key])), key
    if name in MROPE:
        for inputs in (actual, expected):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        positions = rope_positions(model.base_model, actual, actual["attention_mask"])
        of_stock = rope_positions(stock.base_model, expected, expected["attention_mask"])
        assert torch.equal(positions, of_stock)

    caught = []
    family = family_of(model.config)
    projector = stock.base_model.get_submodule(family.stock_projector)
    projector.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, -2)))
    stock(**expected)
    rows = {key: expected[key] for key in expected if "pixel" in key or "grid" in key}
    if family.videos is None:
        grids = family.patch_grids(model.base_model, **rows)
    else:
        if "video_grid_thw" not in rows:
            rows["pixel_values_videos"] = [*rows["pixel_values_videos"]]
        grids = family.videos(model.base_model, **rows).grids
    if name == "llava_next_video":  # the stock model makes means of 2 x 2 patches before
        grids = grids.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
    # Patches of a merged cell are not in the order of the projector's input.
    width = model.config.tokenflex["vision_width"]
    width = VISION_WIDTH if width % VISION_WIDTH == 0 else width
    of_model = flat_grids(grids)[0].reshape(-1, width)
    of_stock = torch.cat(caught).reshape(-1, width)
    order, stock_order = of_model[:, 0].argsort(), of_stock[:, 0].argsort()
    assert torch.allclose(of_model[order], of_stock[stock_order], atol=1e-6)


COUNTS = dict.fromkeys(("internvl", "smolvlm"), "num_image_tokens")
"""The name of frames' counts where frames are images."""


@by_name
def test_precomputed_tokens_in_the_stock_model_give_the_same_logits(name):
    """Oracle: only the video features, and the grids that M-RoPE positions are made of, change."""
    model, processor = shared(name)
    if COUNTS.get(name):
        pytest.skip("its frames are images to the model")
    inputs = processor(
        text=[f"what {video_text(name)} is", f"a {video_text(name)}"],
        videos=[gif(clip(1, 4), 250), gif(clip(2, 4), 500)],
        num_image_tokens=[9, 4],
        **BATCH,
    )
    base, text = model.base_model, dict(inputs)
    names = [*inspect.signature(base.get_video_features).parameters]
    video = {key: text.pop(key) for key in names if key in text}
    with torch.no_grad():
        outputs = base.get_video_features(**video, return_dict=True)
    given = BaseModelOutputWithPooling(
        pooler_output=family_of(model.config).merge_frames(outputs.pooler_output)
    )
    if getattr(outputs, "deepstack_features", None):
        given["deepstack_features"] = outputs.deepstack_features
    if name in MROPE:
        merge = model.config.vision_config.spatial_merge_size
        sizes = [[2, 3 * merge, 3 * merge], [2, 2 * merge, 2 * merge]]
        text["video_grid_thw"] = torch.tensor(sizes)
    expected = logits(stock_model(name), {**text, "mm_encoder_outputs": {"video": given}})
    assert float((logits(model, inputs) - expected).abs().max()) < TOLERANCE


@by_name
def test_packed_clips_are_as_in_their_batch(name):
    model, _ = shared(name)
    inputs = mixed(name)
    expected = logits(model, inputs)[inputs["attention_mask"].bool()]
    if family_of(model.config).no_packing:
        with pytest.raises(ValueError, match="cannot be packed"):
            pack_inputs(model, inputs)
        return
    packed = pack_inputs(model, inputs)
    assert float((logits(model, packed)[0] - expected).abs().max()) < TOLERANCE


@by_name
def test_a_saved_conversion_takes_videos(name, tmp_path):
    model, _ = shared(name)
    model.save_pretrained(tmp_path)
    loaded, _ = from_pretrained(tmp_path, processor=processor_with_videos(name))
    inputs = mixed(name)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@by_name
@CUTS_IMAGES
def test_a_prompt_in_chunks_is_answered_as_a_whole_one(name):
    model, _ = shared(name)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if family_of(model.config).frames_share_placeholder:
        with pytest.raises(ValueError, match="prefill_chunk_size must be None for videos"):
            model.generate(**mixed(name), **options, prefill_chunk_size=7)
        return
    whole = model.generate(**mixed(name), **options)
    in_chunks = model.generate(**mixed(name), **options, prefill_chunk_size=7)
    assert torch.equal(in_chunks, whole)


@by_name
def test_a_chat_shows_a_video_as_a_prompt_does(name):
    _, processor = shared(name)
    pictures, image = clip(1, 4), picture(7)
    video = {"type": "video", "video": pictures}
    parts = [{"type": "text", "text": "a"}, video, {"type": "text", "text": "what"}]
    messages = [{"role": "user", "content": parts}]
    counts = {"num_image_tokens": [4], "max_frames": 2}
    images = {}
    text = f"user a {video_text(name)} what "
    if takes_mixture(name):
        parts[0] = {"type": "image", "image": image}
        images, counts["num_image_tokens"] = {"images": [[image]]}, [9, 4]
        text = text.replace("a", image_text(PROCESSOR_OF.get(name, name)), 1)
    rendered = processor.apply_chat_template(messages)
    if name == "smolvlm":  # its processor brings a chat template of its own for videos
        text = rendered
    assert rendered == text
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options, **counts)
    expected = processor(text=text, videos=[pictures], return_tensors="pt", **images, **counts)
    assert {*inputs} == {*expected}
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(value)), key
    parts[1] = {"type": "video"}
    beside = processor.apply_chat_template(messages, **options, videos=[pictures], **counts)
    assert torch.equal(beside["input_ids"], inputs["input_ids"])


# ---- what is the same in all families


def test_every_family_that_takes_videos_is_tested():
    assert NAMES == MODELS


def counted(inputs: Any) -> list:
    return inputs["num_video_tokens"]


def ask(processor: Any, text: str, videos: Any, **options: Any) -> Any:
    return processor(text=text.replace("V", video_text("qwen2_vl")), videos=videos, **options)


def test_a_budget_is_spread_over_a_clip_and_images_keep_their_counts():
    _, processor = shared("qwen2_vl")
    image = image_text("qwen2_vl")
    inputs = ask(
        processor, f"V {image} is V", [clip(1, 8), clip(2, 4)], budget=24, images=[[picture(1)]]
    )
    assert counted(inputs) == [[9, 4, 4, 4], [9, 9]]
    assert inputs["num_image_tokens"] == [16]
    inputs = ask(processor, "V", [clip(1, 4)], budget=24, num_image_tokens=1)
    assert counted(inputs) == [[9, 9]]


def test_counts_are_those_of_our_own_processor():
    _, processor = shared("qwen2_vl")
    two = [clip(1, 4), clip(2, 2)]
    assert counted(ask(processor, "V V", two)) == [[16, 16], [16]]
    assert counted(ask(processor, "V V", two, num_image_tokens=(2, 3))) == [[(2, 3)] * 2, [(2, 3)]]
    assert counted(ask(processor, "V V", two, num_image_tokens=[4, 9])) == [[4, 4], [9]]
    assert counted(ask(processor, "V V", two, num_image_tokens=[4, 1, 9])) == [[4, 1], [9]]
    assert counted(ask(processor, "V V", two, num_image_tokens=[[4, 1], 9])) == [[4, 1], [9]]
    assert counted(ask(processor, "V", [clip(1, 9)], max_frames=4)) == [[16, 16]]
    assert counted(ask(processor, "V", [gif(clip(1, 8), 250)], fps=1)) == [[16]]
    assert counted(ask(processor, "V", [gif(clip(1, 8), 250)], videos_kwargs={"fps": 1})) == [[16]]


def test_drawn_counts_are_shared_by_all_that_a_prompt_shows():
    _, processor = pair("qwen2_vl")
    processor.image_token_counts = TokenCounts((4, 9, 25), (1, 1, 1), seed=1)
    text = ["V V".replace("V", video_text("qwen2_vl")), video_text("qwen2_vl")] * 4
    videos = [[clip(1, 4), clip(2, 2)], [clip(3, 2)]] * 4
    inputs = processor(text=text, videos=videos)
    of_clips = counted(inputs)
    for first, second in zip(of_clips[::3], of_clips[1::3], strict=True):
        assert len({*first, *second}) == 1
    assert len({count for of_clip in of_clips for count in of_clip}) > 1


def test_times_of_a_gif_with_uneven_frames_reach_the_family():
    """Its mean rate is that of transformers, and each frame has its own time."""
    _, processor = shared("qwen2_5_vl")
    inputs = processor(
        text=video_text("qwen2_5_vl"), videos=[gif(clip(1, 4), [100, 300, 100, 500])]
    )
    assert inputs["second_per_grid_ts"] == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("name", "times"),
    [("qwen3_vl", [0.5, 6.5]), ("glm4v", [0, 6]), ("glm46v", [0, 6])],  # means, or of the first
)
def test_time_stamps_of_a_gif_with_uneven_frames_are_its_own(name, times):
    _, processor = shared(name)
    inputs = processor(
        text=video_text(name),
        videos=[gif(clip(1, 4), [1000, 5000, 1000, 3000])],
        num_image_tokens=4,
        return_text_replacement_offsets=True,
    )
    ((offsets,),) = inputs["text_replacement_offsets"]
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"<\|[^|]*\|>", " ", str(offsets["replacement"])))
    assert [float(number) for number in numbers] == times


@by_name
def test_a_clip_of_one_picture_is_one_frame(name):
    """As one of two equal pictures, where a family joins two."""
    model, processor = shared(name)
    text, (one,) = f"what {video_text(name)} is", clip(1, 1)
    options = {"num_image_tokens": 4, **BATCH}
    inputs = processor(text=text, videos=[[one]], **options)
    assert torch.isfinite(logits(model, inputs)).all()
    first = processor(text=text, videos=[clip(1, 3)], max_frames=1, **options)
    assert torch.equal(first["input_ids"], inputs["input_ids"])
    if frames(name, 2) == 1:
        twice = processor(text=text, videos=[[one, one]], **options)
        for key in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(inputs[key], twice[key])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_frame_has_the_position_of_its_time_whatever_the_counts_of_others(name):
    model, _ = shared(name)

    def positions(counts):
        grids = [(n, n) for n in counts]
        ids = torch.tensor([[3, *[VIDEO] * sum(n * n for n in counts), 4]])
        found, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == VIDEO).long() * 2,
            video_grid_thw=torch.tensor([[len(counts), 8, 8]]),
            num_video_tokens=[grids],
            **({"second_per_grid_ts": [0.8]} if name == "qwen2_5_vl" else {}),
        )
        return found[:, 0, 1:-1].split([n * n for n in counts], dim=1), found[:, 0, -1]

    of_mixed, after = positions([2, 4, 1, 3])
    for i, side in enumerate([2, 4, 1, 3]):
        assert torch.equal(of_mixed[i], positions([side] * 4)[0][i])
    assert torch.equal(after, positions([4] * 4)[1])


def test_the_learned_token_of_a_clip_is_its_last_one():
    model, processor = shared("llava_onevision")
    inputs = processor(text="<video> <video>", videos=[clip(1, 3), clip(2, 2)], **BATCH)
    names = ("pixel_values_videos", "num_video_tokens")
    outputs = model.model.get_video_features(**{name: inputs[name] for name in names})
    assert [*map(len, outputs.pooler_output)] == [16, 16, 17, 16, 17]
    for frame in (2, 4):
        assert torch.equal(outputs.pooler_output[frame][-1], model.model.image_newline)


def test_numbers_of_tokens_of_videos_and_images():
    _, processor = shared("llava_onevision")
    numbers = processor._get_num_multimodal_tokens
    data = numbers([(64, 64)], video_sizes=[(3, 64, 64)], num_image_tokens=4)
    assert data.num_video_tokens == [13]
    assert data.num_image_tokens == numbers([(64, 64)], num_image_tokens=4).num_image_tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_image_tokens": [4, 4, 4]}, "one per image or video, 1, got 3 entries"),
        ({"num_image_tokens": [[4, 4, 4]]}, r"\[0\] must have one count per frame"),
        ({"num_image_tokens": "auto"}, "must be counts or a budget beside videos"),
        ({"num_image_tokens": 5}, "nearest squares"),
        ({"budget": 1}, "budget must be at least 2"),
        ({"max_frames": 0}, "max_frames"),
        ({"fps": 2}, "fps=2 needs a clip with times"),
        ({"num_frames": 2}, "num_frames cannot be given"),
        ({"video_metadata": [{"fps": 2}]}, "video_metadata cannot be given"),
        ({"fps": 2, "videos_kwargs": {"fps": 2}}, "fps must be given once"),
        ({"text": ["V V"]}, r"once per video, got it \[2\] times in the prompts for 1 videos"),
        ({"text": [["V"], ["V"]]}, "got inner lists"),
        ({"videos": [[clip(1, 2)], []], "text": ["", "V"]}, r"got it \[0, 1\] times"),
        (
            {"videos": [[*clip(1, 1), picture(1, 32, 32)]]},
            "frames must be of one size, got 32 x 32",
        ),
        ({"videos": ["none.gif"]}, "none.gif"),
        ({"truncation": True, "max_length": 4}, "truncation"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    _, processor = shared("qwen2_vl")
    given = {"text": ["V"], "videos": [clip(1, 4)], **options}
    given["text"] = json.loads(json.dumps(given["text"]).replace("V", video_text("qwen2_vl")))
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        processor(**given)


def test_a_collator_draws_a_count_for_what_a_sample_shows():
    model, processor = shared("qwen2_5_vl")
    counts = TokenCounts((4, 9, 25), (1, 1, 1), seed=3)
    video = {"type": "video"}
    content = [{"type": "image"}, video, {"type": "text", "text": "what"}, video]
    messages = [{"role": "user", "content": content}]
    sample = {"messages": messages, "images": [picture(1)], "videos": [clip(1, 4), clip(2, 8)]}
    samples = [{**sample, "index": i} for i in range(4)]
    batch = ImageTextCollator(processor, counts, max_frames=4)(samples)
    drawn = [counts.draw(i, 0) for i in range(4)]
    assert batch["num_image_tokens"] == drawn
    assert batch["num_video_tokens"] == [[n, n] for n in drawn for _ in range(2)]
    assert not torch.isin(batch["labels"], torch.tensor(processor.placeholder_ids)).any()
    assert torch.isfinite(model(**batch).loss)
    text = "what V is V".replace("V", video_text("qwen2_5_vl"))
    of_text = [{"text": text, "videos": sample["videos"], "index": 0}]
    batch = ImageTextCollator(processor, counts, budget=20)(of_text)
    assert batch["num_video_tokens"] == [[9, 9], [4, 4, 4, 4]]


def test_a_collator_puts_videos_before_the_first_question_where_none_are_marked():
    _, processor = shared("qwen2_5_vl")
    messages = [{"role": "user", "content": "what"}]
    batch = ImageTextCollator(processor, 4)([{"messages": messages, "videos": [clip(1, 2)]}])
    marked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what"}]}]
    other = ImageTextCollator(processor, 4)([{"messages": marked, "videos": [clip(1, 2)]}])
    assert torch.equal(batch["input_ids"], other["input_ids"])
    with pytest.raises(ValueError, match="one video for each of the 1 places"):
        ImageTextCollator(processor, 4)([{"messages": marked, "videos": [clip(1, 2)] * 2}])


def test_answers_about_a_video_at_several_counts():
    model, processor = shared("llava_onevision")
    prompts = ["<video> what <image>", "what <image> <video>"]
    read = NamedVideo(load_video(gif(clip(1, 4), 250), sampling=FrameSampling(2)), "video")
    answers = [
        *answer_at_counts(
            model, processor, [picture(1)], prompts, [4, 9], videos=[read], max_new_tokens=3
        )
    ]
    assert [answer.vision_tokens for answer in answers] == [
        2 * n + 1 + tiles * n for n in (4, 9) for tiles in (2, 2)
    ]
    inputs = processor(
        text=prompts, images=[[picture(1)]] * 2, videos=[[read]] * 2, num_image_tokens=9, **BATCH
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    new = processor.tokenizer.batch_decode(output[:, -3:], skip_special_tokens=True)
    assert [answer.text for answer in answers[2:]] == [text.strip() for text in new]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (["--budget", "20"], [2 * 9 + 1]),
        (["--tokens", "4,9"], [2 * 4 + 1, 2 * 9 + 1]),
        (["--image", "IMAGE", "--tokens", "4,9", "--budget", "20"], [19 + 2 * 4, 19 + 2 * 9]),
        (["--tokens", "auto", "--budget", "20"], "beside --video give counts, or --budget without"),
        (["--tokens", "4", "--budget", "20"], "--tokens and --budget cannot both be given"),
        (["--penalty", "0.1"], "--penalty is for --tokens auto"),
        (["--budget", "1"], "budget must be at least"),
    ],
)
def test_generate_takes_counts_or_a_budget_for_videos(
    options, tokens, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tokenflex.checkpoints.load_model", lambda _: shared("llava_onevision"))
    (tmp_path / "clip.gif").write_bytes(gif(clip(1, 4), 250))
    picture(1).save(tmp_path / "image.png")
    options = [str(tmp_path / "image.png") if word == "IMAGE" else word for word in options]
    words = ["--model", "m", "--video", str(tmp_path / "clip.gif"), "--frames", "2"]
    code = main(["generate", *words, "--prompt", "what", "--max-new-tokens", "1", *options])
    output = capsys.readouterr()
    if isinstance(tokens, str):
        assert code == 2
        assert tokens in output.err
    else:
        assert code == 0, output.err
        assert [int(line.split()[0]) for line in output.out.splitlines()[1:]] == tokens


def test_embeddings_of_prompts_with_videos_are_refused():
    model, processor = shared("llava_onevision")
    inputs = processor(text="<video>", videos=[clip(1, 2)], **BATCH)
    with pytest.raises(ValueError, match="pixel_values_videos must be None"):
        model.merged_embeddings(**inputs)


def test_images_beside_videos_are_refused_where_a_model_cannot_tell_them():
    _, processor = shared("glm4v")
    with pytest.raises(ValueError, match="images must be None beside videos of glm4v"):
        processor(
            text=f"this {video_text('glm4v')} <|image|>", videos=[clip(1, 2)], images=[picture(1)]
        )


def test_a_budget_without_videos_is_refused():
    _, processor = shared("qwen2_vl")
    with pytest.raises(ValueError, match="budget is for videos"):
        processor(text="what", budget=9)


def test_counts_of_a_model_must_fit_its_clips():
    model, _ = shared("qwen2_vl")
    inputs = mixed("qwen2_vl", (1,))
    with pytest.raises(ValueError, match="num_video_tokens"):
        model(**{**inputs, "num_video_tokens": [4, 4, 4, 4, 4, 4, 4]})
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "num_video_tokens": 4})
    with pytest.raises(ValueError, match="'auto' is for images alone"):
        model.generate(**{**inputs, "num_image_tokens": "auto"}, budget=20)
