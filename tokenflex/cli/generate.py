"""``tokenflex generate``: prompts about some images, answered at several counts."""

from __future__ import annotations

import argparse
from pathlib import Path

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
        "--model", type=Path, required=True, help="folder of a checkpoint or a conversion"
    )
    generate.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
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
        help="per image: counts, grids of height x width, or auto, for example 64,144,12x16,auto",
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
        help="with auto: vision tokens for all images together at most; needs no router",
    )
    choice.add_argument(
        "--confidence",
        type=probability,
        help="with auto: answer with few tokens, and again with more while the least certain token "
        "of the answer has a probability below this, for example 0.9; needs no router. The table "
        "then also shows the vision tokens of all tries",
    )
    generate.add_argument("--max-tiles", type=positive, help="the most tiles of an image")
    generate.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer")


def _generate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from jinja2 import TemplateError

    from tokenflex.answers import answer_at_counts
    from tokenflex.checkpoints import load_model
    from tokenflex.images import open_image
    from tokenflex.models.chat import parts_of

    images = [open_image(path) for path in options.image]
    model, processor = load_model(options.model)
    model.to(device())
    counts = options.tokens or [processor.num_image_tokens]
    chooses = any(isinstance(count, str) for count in counts)
    for name in ("penalty", "budget", "confidence"):
        if not chooses and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --tokens auto, got it with --tokens {counts}")
    conversations = []
    for prompt in options.prompt:
        image, content = {"type": "image"}, parts_of(prompt)
        if image not in content:
            content = [image] * len(images) + content if images else prompt
        conversations.append([{"role": "user", "content": content}])
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
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
        penalty=options.penalty,
        budget=options.budget,
        confidence=options.confidence,
    )
    # The table has one column more for a cascade, whose discarded answers read images too, and one
    # for the number of the prompt.
    all_tries, several = options.confidence is not None, len(prompts) > 1
    for i, answer in enumerate(answers):
        if i == 0:  # after the first answer, so that an error prints no table
            names = [*["prompt"] * several, "tokens", *["all"] * all_tries, "first_s", "total_s"]
            print("  ".join([*(f"{name:>7}" for name in names), "answer"]))
        numbers = [*[i % len(prompts) + 1] * several, answer.vision_tokens]
        numbers += [answer.read_vision_tokens] * all_tries
        columns = [f"{number:>7}" for number in numbers]
        columns += [f"{answer.first_token_seconds:>7.3f}", f"{answer.seconds:>7.3f}"]
        print("  ".join([*columns, answer.text]), flush=True)
    return 0
