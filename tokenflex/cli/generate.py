"""``tokenflex generate``: prompts about some images, answered at several counts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import counts_grids_or_auto, positive, probability
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    generate = commands.add(
        "generate",
        _generate,
        "answer prompts about images, once per count, with seconds to the first token and in all",
        "tokenflex generate --model runs/demo/checkpoint --image examples/digits.png "
        "--prompt 'read r1c1' --tokens 4,9,16",
    )
    generate.add_argument(
        "--model",
        type=Path,
        required=True,
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    generate.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    generate.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        help="a GIF, a WebP, a folder of frames or a video file; may be repeated. It stands where "
        "a prompt has <video>, or before it; each frame has a count",
    )
    generate.add_argument(
        "--frames",
        type=positive,
        help="the most frames of a video, evenly from its first to its last (default: the "
        "processor's)",
    )
    generate.add_argument(
        "--fps", type=float, help="frames per second of a video (default: the processor's)"
    )
    generate.add_argument(
        "--prompt",
        required=True,
        action="append",
        help="the question; may be repeated: the images are encoded once for all, and the seconds "
        "are those of all answers at a count",
    )
    generate.add_argument(
        "--tokens",
        type=counts_grids_or_auto,
        help="per image or frame: counts, grids of height x width, or auto, for example "
        "64,144,12x16,auto",
    )
    choice = generate.add_mutually_exclusive_group()
    choice.add_argument(
        "--penalty",
        type=float,
        help="with auto: share of right answers given up to save all tokens, for example 0.05",
    )
    choice.add_argument(
        "--budget",
        type=positive,
        help="with auto: vision tokens for all images and frames together at most; needs no router "
        "(for videos of a conversion, without auto: vision tokens of each video at most)",
    )
    choice.add_argument(
        "--confidence",
        type=probability,
        help="with auto: answer with few tokens, and again with more while the confidence in the "
        "answer is below this, for example 0.9: the probability that it is right, by the router's "
        "calibration, or without a router that of its least certain token. The table then also "
        "shows the vision tokens of all tries",
    )
    generate.add_argument("--max-tiles", type=positive, help="the most tiles of an image")
    generate.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer")


def _generate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from jinja2 import TemplateError

    from tokenflex.answers import answer_at_counts
    from tokenflex.checkpoints import load_model
    from tokenflex.images import open_image
    from tokenflex.terminal import say, watched

    for name in ("frames", "fps"):
        if not options.video and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --video, got it without one")
    images = [open_image(path) for path in options.image]
    model, processor = load_model(options.model)
    videos = _read_videos(options, processor)
    model.to(device())
    counts = options.tokens or [processor.num_image_tokens]
    chooses = any(isinstance(count, str) for count in counts)
    of_clips = bool(videos) and not hasattr(processor, "show_frames")
    if of_clips:
        _check_counts_of_clips(options, chooses)
    for name in ("penalty", "confidence", *([] if of_clips else ["budget"])):
        if not chooses and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --tokens auto, got it with --tokens {counts}")
    conversations = [
        [{"role": "user", "content": _parts(prompt, len(images), len(videos))}]
        for prompt in options.prompt
    ]
    try:
        prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"chat_template cannot be rendered: {error}") from error
    answers = answer_at_counts(
        model,
        processor,
        images,
        prompts,
        counts,
        videos=videos,
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
        penalty=options.penalty,
        budget=options.budget,
        confidence=options.confidence,
    )
    # The table has one column more for a cascade, whose discarded answers read images too, and one
    # for the number of the prompt.
    all_tries, several = options.confidence is not None, len(prompts) > 1
    number = len(counts) * len(prompts)
    for i, answer in enumerate(watched(answers, "answering", number, unit="answer", delay=0)):
        if i == 0:  # after the first answer, so that an error prints no table
            names = [*["prompt"] * several, "tokens", *["all"] * all_tries, "first_s", "total_s"]
            say("  ".join([*(f"{name:>7}" for name in names), "answer"]))
        numbers = [*[i % len(prompts) + 1] * several, answer.vision_tokens]
        numbers += [answer.read_vision_tokens] * all_tries
        columns = [f"{number:>7}" for number in numbers]
        columns += [f"{answer.first_token_seconds:>7.3f}", f"{answer.seconds:>7.3f}"]
        say("  ".join([*columns, answer.text]))
    return 0


def _check_counts_of_clips(options: argparse.Namespace, chooses: bool) -> None:
    """Check how the tokens of a converted model's videos are given."""
    if chooses:
        raise ValueError(
            "--tokens auto is for images alone with a conversion: beside --video give counts, or "
            "--budget without --tokens"
        )
    if options.budget is not None and options.tokens and not options.image:
        raise ValueError(
            "--tokens and --budget cannot both be given for videos alone of a conversion, got "
            f"--tokens {options.tokens} and --budget {options.budget}"
        )


def _read_videos(options: argparse.Namespace, processor: Any) -> list[Any]:
    """Return the frames of each video; for a converted model also their times."""
    from tokenflex.models.video_inputs import NamedVideo
    from tokenflex.videos import FrameSampling, load_video

    if not options.video:
        return []
    takes_frames = hasattr(processor, "show_frames")
    if not takes_frames:
        try:
            processor.check_takes_videos()
        except NotImplementedError as error:
            raise ValueError(f"--video cannot be given: {error}") from None
    sampling = FrameSampling(
        processor.max_frames if options.frames is None else options.frames,
        processor.fps if options.fps is None else options.fps,
    )
    clips = [load_video(path, sampling=sampling) for path in options.video]
    if takes_frames:
        return [clip.frames for clip in clips]
    return [
        NamedVideo(clip, f"video {path}") for clip, path in zip(clips, options.video, strict=True)
    ]


def _parts(prompt: str, num_images: int, num_videos: int) -> Any:
    """Return the content of a message: images and videos at their marks, or before the prompt."""
    from tokenflex.models.chat import parts_of

    content = parts_of(prompt, with_videos=num_videos > 0)
    for kind, number in (("video", num_videos), ("image", num_images)):
        if {"type": kind} not in content:
            content = [{"type": kind}] * number + content
    return content if num_images or num_videos or {"type": "image"} in content else prompt
