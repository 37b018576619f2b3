"""The command line: ``tokenflex info | train | evaluate | generate | convert | plot``.

Every command's imports are its own, so that ``tokenflex info`` works with the core alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for anything the user can mend."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the impatient: we are on our way out
        return _fail("interrupted" + _how_to_continue(options))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "").startswith("tokenflex"):
            raise
        extra = "train" if options.command in ("train", "evaluate", "plot") else "hf"
        return _fail(f"{options.command} needs {error.name}; pip install 'tokenflex[{extra}]'")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        return _fail(" ".join(str(error).split()))


def _fail(message: str) -> int:
    print(f"tokenflex: {message}", file=sys.stderr)
    return USER_ERROR


def _how_to_continue(options: argparse.Namespace) -> str:
    output = getattr(options, "running_output", None)
    if output is None or not (output / "state.pt").exists():
        return ""
    return f"; {output / 'state.pt'} is whole: the same command continues from it"


# ---------------------------------------------------------------------- commands


def _info(options: argparse.Namespace) -> int:
    from tokenflex_kernels import info

    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    extension = facts["extension"]
    if not extension["built"]:
        built = "not built"
    elif extension["cuda"]:
        built = f"built with CUDA for {', '.join(extension['cuda_architectures'])}"
    else:
        built = "built without CUDA"
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [
        ("extension", built),
        ("device", f"{facts['device']['type']} ({facts['device']['name']})"),
        ("TOKENFLEX_BACKEND", facts["backend"]),
    ]
    for name, value in rows:
        print(f"{name:<20}{value}")
    print("\nop                  backend")
    for op, backend in facts["ops"].items():
        print(f"{op:<20}{backend}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from tokenflex.training.config import load_config

    config = load_config(options.config)
    if options.output is not None:
        config = config.model_copy(update={"output": options.output})
    options.running_output = config.output
    _quiet_libraries()
    if options.dry_run:
        from tokenflex.training.plan import format_plan, plan_run

        print(format_plan(plan_run(config, options.processes)))
        return 0
    from tokenflex.training.loop import Trainer

    trainer = Trainer(config, fresh=options.fresh)
    report = trainer.run()
    if not trainer.is_main:
        return 0
    if "accuracy" in report:
        from tokenflex.plots import plot_accuracy

        plot_accuracy(report, config.output / "accuracy.png")
        _print_accuracy(report)
    print(f"{report['seconds']:.0f} s of training; everything is in {config.output}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tqdm import tqdm

    from tokenflex.evaluation import evaluate
    from tokenflex.models.loading import check_length, load_checkpoint
    from tokenflex.training.build import build_dataset
    from tokenflex.training.checkpoint import write_json
    from tokenflex.training.config import DataConfig

    if options.data == "digits":
        data = DataConfig(name="digits", split="test", size=options.size or 1024)
    else:
        data = DataConfig(name="messages", path=options.data)
    dataset = build_dataset(data)
    if options.output is not None:  # before the work, not after it
        options.output.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(options.model)
    check_length(model.config, max(options.counts))
    model.to(_device())
    batches = -(len(dataset) // -options.batch_size) * len(options.counts)
    with tqdm(total=batches, desc="evaluation", unit="batch", dynamic_ncols=True) as bar:
        report = evaluate(
            model,
            processor,
            dataset,
            options.counts,
            batch_size=options.batch_size,
            on_batch=bar.update,
        )
    _print_accuracy(report)
    if options.output is not None:
        write_json(options.output, report)
    return 0


def _generate(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.answers import answer_at_counts
    from tokenflex.data.encoding import ConversationEncoder
    from tokenflex.data.messages import open_image
    from tokenflex.data.samples import Conversation, Turn
    from tokenflex.models.loading import check_length, load_checkpoint

    images = [open_image(path) for path in options.image]
    model, processor = load_checkpoint(options.model)
    model.to(_device())
    conversation = Conversation((Turn("user", options.prompt),))
    encoder = ConversationEncoder(processor.tokenizer, processor.image_prompt)
    prompt = encoder.prompt(conversation, len(images))
    counts = options.tokens or [processor.num_image_tokens]
    for count in counts:
        tokens = processor.image_tokens(images, count, max_tiles=options.max_tiles)
        check_length(model.config, sum(tokens))
    answers = answer_at_counts(
        model,
        processor,
        images,
        prompt,
        counts,
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
    )
    print(f"{'tokens':>7}  {'first_s':>7}  {'total_s':>7}  answer")
    for answer in answers:
        print(
            f"{answer.vision_tokens:>7}  {answer.first_token_seconds:>7.3f}  "
            f"{answer.seconds:>7.3f}  {answer.text}",
            flush=True,
        )
    return 0


def _convert(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.models.conversion import convert

    layout = convert(options.source, options.target, system_message=options.system_message)
    print(f"{options.target} holds the checkpoint in the layout of {layout}")
    return 0


def _plot(options: argparse.Namespace) -> int:
    from tokenflex.plots import plot_accuracy

    path = options.run_folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"report file {path} does not exist")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"report file {path} is not JSON: {error}") from error
    plot_accuracy(report, options.run_folder / "accuracy.png")
    print(options.run_folder / "accuracy.png")
    return 0


# ---------------------------------------------------------------------- helpers


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet_libraries() -> None:
    """Keep other libraries' bars and notices out of ours, and warnings to one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_accuracy(report: dict[str, Any]) -> None:
    counts = list(report["accuracy"])
    print(f"{'vision tokens':<16}" + "".join(f"{count:>8}" for count in counts))
    for kind, row in report["accuracy_by_kind"].items():
        print(f"{kind or 'all':<16}" + "".join(f"{row[count]:>8.3f}" for count in counts))
    print(f"{'mean':<16}" + "".join(f"{report['accuracy'][count]:>8.3f}" for count in counts))


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected counts like 64,144,256, got {text!r}") from None
    return _checked_counts(counts)


def _counts_or_grids(text: str) -> list[int | tuple[int, int]]:
    counts: list[int | tuple[int, int]] = []
    for part in text.split(","):
        try:
            sides = [int(side) for side in part.split("x")]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2):
            raise argparse.ArgumentTypeError(
                f"expected counts like 64,144,256 or grids of height x width like 2x3, got {text!r}"
            )
        counts.append(sides[0] if len(sides) == 1 else (sides[0], sides[1]))
    return _checked_counts(counts)


def _checked_counts(counts: list[Any]) -> list[Any]:
    from tokenflex.counts import token_grid

    for count in counts:
        try:
            token_grid(count, name="a count")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return counts


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


class _OneLineParser(argparse.ArgumentParser):
    """Errors in one line, like all others; ``--help`` has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="tokenflex",
        description="Vision-language models whose vision-token count is chosen per image.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    info = command(
        "info", _info, "what is installed and which backend each op uses", "tokenflex info"
    )
    info.add_argument("--json", action="store_true", help="print as JSON")

    train = command(
        "train",
        _train,
        "train as a configuration says; a run that was stopped continues",
        "tokenflex train configs/demo.yaml",
    )
    train.add_argument("config", type=Path, help="YAML file, see configs/")
    train.add_argument("--output", type=Path, help="folder to write to, in place of the config's")
    train.add_argument("--fresh", action="store_true", help="begin anew even if a state is there")

    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each stage trains and costs, from configurations alone, and stop",
    )
    train.add_argument(
        "--processes", type=_positive, default=1, help="of the dry run's memory, 1 by default"
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "accuracy of a checkpoint at every count",
        "tokenflex evaluate --model runs/demo/checkpoint --data digits --counts 4,9,16",
    )
    evaluate.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    evaluate.add_argument("--data", required=True, help="'digits', or a JSONL file of messages")
    evaluate.add_argument("--counts", type=_counts, required=True, help="for example 64,144,256")
    evaluate.add_argument("--size", type=_positive, help="canvases, with --data digits")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="samples a forward pass")
    evaluate.add_argument("--output", type=Path, help="write the report to this JSON file")

    generate = command(
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
        type=_counts_or_grids,
        help="per image: counts, or grids of height x width, for example 64,144,12x16",
    )
    generate.add_argument("--max-tiles", type=_positive, help="cut images into at most so many")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, help="longest answer")

    convert = command(
        "convert",
        _convert,
        "write a released Ristretto checkpoint as a TokenFLEX one, or the reverse",
        "tokenflex convert models/Ristretto-3B models/ristretto-tokenflex",
    )
    convert.add_argument("source", type=Path, help="checkpoint folder; its config says the layout")
    convert.add_argument("target", type=Path, help="folder to write, which must not exist")
    convert.add_argument("--system-message", help="what conversations begin with, from Ristretto")

    plot = command("plot", _plot, "draw a run's report again", "tokenflex plot runs/demo")
    plot.add_argument("run_folder", type=Path, metavar="RUN", help="folder with a report.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
