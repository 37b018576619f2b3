"""``tokenflex generate``: one prompt, answered at several counts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import counts_grids_or_auto, positive, probability
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """The command and its arguments."""
    generate = commands.add(
        "generate",
        _generate,
        "answer a prompt about images, once per count, with seconds to the first token and in all",
        "tokenflex generate --model runs/demo/checkpoint --image examples/digits.png "
        "--prompt 'read r1c1' --tokens 4,9,16",
    )
    generate.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    generate.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    generate.add_argument("--prompt", required=True, help="what to ask")
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
    generate.add_argument("--max-tiles", type=positive, help="cut images into at most so many")
    generate.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer")


def _generate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.answers import answer_at_counts
    from tokenflex.counts import AUTO
    from tokenflex.data.encoding import ConversationEncoder
    from tokenflex.data.samples import Conversation, Turn
    from tokenflex.images import open_image
    from tokenflex.models.loading import check_length, load_checkpoint

    images = [open_image(path) for path in options.image]
    model, processor = load_checkpoint(options.model)
    model.to(device())
    conversation = Conversation((Turn("user", options.prompt),))
    encoder = ConversationEncoder(
        processor.tokenizer, processor.image_prompt, processor.image_token
    )
    prompt = encoder.prompt(conversation, len(images))
    counts = options.tokens or [processor.num_image_tokens]
    for knob in ("penalty", "budget", "confidence"):
        if AUTO not in counts and getattr(options, knob) is not None:
            raise ValueError(f"--{knob} is for --tokens auto, got it with --tokens {counts}")
    for count in counts:
        most = _largest_count(model, options) if count == AUTO else count
        tokens = sum(processor.image_tokens(images, most, max_tiles=options.max_tiles))
        if count == AUTO and options.budget is not None:
            tokens = min(tokens, options.budget)
        check_length(model.config, tokens)
    answers = answer_at_counts(
        model,
        processor,
        images,
        prompt,
        counts,
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
        penalty=options.penalty,
        budget=options.budget,
        confidence=options.confidence,
    )
    cascade = options.confidence is not None
    for place, answer in enumerate(answers):
        if place == 0:  # what cannot be answered prints nothing
            all_tries = f"{'all':>7}  " * cascade
            print(f"{'tokens':>7}  {all_tries}{'first_s':>7}  {'total_s':>7}  answer")
        all_tries = f"{answer.read_vision_tokens:>7}  " * cascade
        print(
            f"{answer.vision_tokens:>7}  {all_tries}{answer.first_token_seconds:>7.3f}  "
            f"{answer.seconds:>7.3f}  {answer.text}",
            flush=True,
        )
    return 0


def _largest_count(model: Any, options: argparse.Namespace) -> Any:
    """Of those that auto may choose."""
    from tokenflex.routing.ladder import known_counts, trained_counts
    from tokenflex.routing.storage import router_of

    if options.confidence is not None:
        return trained_counts(model)[-1]
    if options.budget is not None:
        return known_counts(model)[-1]
    return router_of(model).counts[-1]
