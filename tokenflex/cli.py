"""The command line: ``tokenflex info``, ``train``, ``evaluate``, ``ablate``, ``route`` and others.

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
        trains = ("train", "evaluate", "ablate", "route", "plot")
        extra = "train" if options.command in trains else "hf"
        return _fail(f"{options.command} needs {error.name}; pip install 'tokenflex[{extra}]'")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        return _fail(" ".join(str(error).split()))


def _fail(message: str) -> int:
    print(f"tokenflex: {message}", file=sys.stderr)
    return USER_ERROR


def _how_to_continue(options: argparse.Namespace) -> str:
    if options.command == "ablate":
        return f"; the same command continues from what is in {options.output}"
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
    from tokenflex.training.curves import plot_curves

    plot_curves(config.output)
    if "accuracy" in report:
        from tokenflex.evaluation.report import format_table
        from tokenflex.plots import plot_accuracy

        plot_accuracy(report, config.output / "accuracy.png")
        print(format_table(report))
    print(f"{report['seconds']:.0f} s of training; everything is in {config.output}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tqdm import tqdm

    from tokenflex.counts import AUTO, tokens_of
    from tokenflex.evaluation import evaluate
    from tokenflex.evaluation.counts import resolve_count
    from tokenflex.evaluation.report import format_table, write_report
    from tokenflex.evaluation.scoring import SCORES
    from tokenflex.models.loading import check_length, load_checkpoint
    from tokenflex.training.build import build_dataset
    from tokenflex.training.checkpoint import write_json

    if options.score not in SCORES:
        raise ValueError(f"--score must be one of {', '.join(SCORES)}, got {options.score!r}")
    folder = _checkpoint_of(options)
    if options.penalty is not None and AUTO not in options.counts:
        raise ValueError(f"--penalty is for the count auto, got it with {options.counts}")
    counts = [resolve_count(count, folder, options.penalty) for count in options.counts]
    dataset = build_dataset(_evaluation_data(options))
    output, alone = options.output, options.output is not None and options.output.suffix == ".json"
    if output is not None:  # before the work, not after it
        (output.parent if alone else output).mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(folder)
    for count in options.counts:
        if not isinstance(count, str):
            check_length(model.config, tokens_of(count))
    model.to(_device())
    batches = -(len(dataset) // -options.batch_size) * len(counts)
    with tqdm(total=batches, desc="evaluation", unit="batch", dynamic_ncols=True) as bar:
        report = evaluate(
            model,
            processor,
            dataset,
            counts,
            score=options.score,
            batch_size=options.batch_size,
            workers=options.workers,
            max_tiles=options.max_tiles,
            max_new_tokens=options.max_new_tokens,
            on_batch=bar.update,
        )
    print(format_table(report))
    title = f"{folder.resolve().name} on {Path(options.data).name}"
    if options.penalty is not None:
        report["penalty"] = options.penalty
        title += f", auto at a penalty of {options.penalty:g}"
    if output is not None and alone:
        write_json(output, report)
    elif output is not None:
        write_report(output, report, title)
    return 0


def _checkpoint_of(options: argparse.Namespace) -> Path:
    if (options.model is None) == (options.model_option is None):
        given = "none" if options.model is None else "both"
        raise ValueError(f"give one checkpoint folder, as MODEL or with --model, got {given}")
    return options.model or options.model_option


def _evaluation_data(options: argparse.Namespace) -> Any:
    """The data set that the options name; one that they do not fit is refused."""
    from typing import get_args

    from tokenflex.data.formats import detect_format
    from tokenflex.training.data_config import DataConfig

    known = [*get_args(DataConfig.model_fields["name"].annotation)]
    known.remove("mixture")
    name = options.format
    if name is None:
        name = "digits" if options.data == "digits" else detect_format(options.data)
    if name not in known:
        raise ValueError(f"--format must be one of {', '.join(known)}, got {name!r}")
    values: dict[str, Any] = {"name": name}
    if name == "digits":
        values |= {"size": options.size or 1024}
    else:
        values |= {"path": Path(options.data)}
    if name in ("digits", "huggingface"):
        values |= {"split": options.split or "test"}
    if name == "llava":
        values |= {"image_folder": options.image_folder}
    for option in ("size", "split", "image_folder"):
        if getattr(options, option) is not None and option not in values:
            raise ValueError(f"--{option.replace('_', '-')} does not fit data of format {name}")
    if options.split is not None and name == "digits":
        _check_digits_split(options.split)
    return DataConfig(**values)


def _check_digits_split(split: str) -> None:
    from tokenflex.training.data_config import DIGITS_SPLITS

    if split not in DIGITS_SPLITS:
        raise ValueError(f"--split must be one of {', '.join(DIGITS_SPLITS)}, got {split!r}")


def _harness(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.harnesses.driver import HARNESSES, run_lmms_eval, run_vlmevalkit
    from tokenflex.training.checkpoint import write_atomically, write_json

    benchmarks = options.benchmarks.split(",")
    common = (options.model, options.counts, benchmarks)
    if options.harness not in HARNESSES:
        raise ValueError(f"HARNESS must be one of {', '.join(HARNESSES)}, got {options.harness!r}")
    if (options.harness == "vlmevalkit") != (options.run_py is not None):
        raise ValueError("--run-py must be given with vlmevalkit, and only there")
    if not options.model.is_dir():
        raise FileNotFoundError(f"checkpoint folder {options.model} does not exist")
    options.output.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    if options.harness == "lmms-eval":
        table = run_lmms_eval(
            *common,
            max_tiles=options.max_tiles,
            batch_size=options.batch_size,
            limit=options.limit,
        )
    else:
        table = run_vlmevalkit(
            *common,
            run_py=options.run_py,
            work_dir=options.output / "vlmevalkit",
            max_tiles=options.max_tiles,
            arguments=options.arguments,
        )
    page = table.markdown()
    print(page, end="")
    write_atomically(
        options.output / "table.md", lambda path: path.write_text(page, encoding="utf-8")
    )
    write_json(options.output / "table.json", table.as_json())
    if table.missing:
        raise RuntimeError(
            f"{len(table.missing)} scores are missing, the first of "
            f"{' '.join(table.missing[0])}: the harness's own messages say why"
        )
    return 0


def _route(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from dataclasses import asdict

    from tqdm import tqdm

    from tokenflex.models.loading import check_length, load_checkpoint
    from tokenflex.selection.curve import as_rows, format_curve, selection_curve
    from tokenflex.selection.grading import grade
    from tokenflex.selection.router import check_counts
    from tokenflex.selection.storage import save_router
    from tokenflex.selection.training import train_router

    counts = check_counts(options.counts)
    measured = options.measure_on or ("digits" if options.data == "digits" else None)
    asked = _dataset(options.data, "validation", options.size)
    others = None if measured is None else _dataset(measured, "test", options.size)
    model, processor = load_checkpoint(options.model)
    check_length(model.config, max(counts))
    model.to(_device())
    samples = len(asked) + (0 if others is None else len(others))
    with tqdm(total=samples, desc="asking", unit="sample", dynamic_ncols=True) as bar:
        router, report = train_router(
            model,
            processor,
            asked,
            counts,
            max_drop=options.max_drop,
            batch_size=options.batch_size,
            on_samples=bar.update,
        )
        grades = None
        if others is not None:
            grades = grade(
                model,
                processor,
                others,
                counts,
                batch_size=options.batch_size,
                on_samples=bar.update,
            )
    summary: dict[str, Any] = {"counts": list(router.counts), **asdict(report)}
    if grades is not None:
        points = selection_curve(grades, router)
        summary["curve"] = as_rows(points)
    folder = save_router(router, options.model, summary)
    if grades is not None:
        from tokenflex.plots import plot_selection

        plot_selection(points, folder / "curve.png")
        print(format_curve(points))
    print(
        f"{report.parameters} parameters, {report.grading_seconds:.0f} s of asking and "
        f"{report.fitting_seconds:.0f} s of fitting; held out, auto costs "
        f"{report.largest_accuracy - report.accuracy:.3f} of accuracy at "
        f"{report.tokens / report.largest_tokens:.0%} of the tokens"
    )
    print(f"the router is in {folder}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.answers import answer_at_counts
    from tokenflex.counts import AUTO
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
    from tokenflex.selection.choice import known_counts, trained_counts
    from tokenflex.selection.storage import router_of

    if options.confidence is not None:
        return trained_counts(model)[-1]
    if options.budget is not None:
        return known_counts(model)[-1]
    return router_of(model).counts[-1]


def _convert(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.models.conversion import convert

    layout = convert(options.source, options.target, system_message=options.system_message)
    print(f"{options.target} holds the checkpoint in the layout of {layout}")
    return 0


def _ablate(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from tokenflex.ablation.checks import quick_checks
    from tokenflex.ablation.run import ablate
    from tokenflex.ablation.scales import SCALES
    from tokenflex.ablation.tables import accuracy_table

    if options.output is None:
        options.output = (
            Path("runs/ablate")
            if options.scale == "small"
            else (Path(f"runs/ablate-{options.scale}"))
        )
    if options.scale == "quick" and options.suite != "paper":
        raise ValueError(f"--quick is of the suite paper, got it with --suite {options.suite}")
    report = ablate(
        SCALES[options.scale],
        options.output,
        suite=options.suite,
        seeds=options.seeds,
        at_once=options.jobs,
    )
    print(accuracy_table(report))
    page = "report.md" if options.suite == "paper" else f"{options.suite}.md"
    print(f"\nthe whole report is {options.output / page}")
    failed = False
    if options.scale == "quick":
        for check in quick_checks(report):
            print(check, file=sys.stdout if check.holds else sys.stderr)
            failed = failed or not check.holds
    return 1 if failed else 0


def _plot(options: argparse.Namespace) -> int:
    from tokenflex.plots import plot_accuracy
    from tokenflex.training.curves import plot_curves

    path = options.run_folder / "report.json"
    if (options.run_folder / "metrics.jsonl").is_file():
        print(plot_curves(options.run_folder))
        if not path.is_file():  # a run that is still going, or evaluates nothing
            return 0
    if not path.is_file():
        raise FileNotFoundError(f"report file {path} does not exist, nor metrics.jsonl beside it")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"report file {path} is not JSON: {error}") from error
    plot_accuracy(report, options.run_folder / "accuracy.png")
    print(options.run_folder / "accuracy.png")
    return 0


# ---------------------------------------------------------------------- helpers


def _dataset(data: str, digits_split: str, size: int) -> Any:
    """'digits' in a split and size, or what evaluation reads, too."""
    from tokenflex.data.formats import detect_format
    from tokenflex.training.build import build_dataset
    from tokenflex.training.data_config import DataConfig

    if data == "digits":
        return build_dataset(DataConfig(name="digits", split=digits_split, size=size))
    found: dict[str, Any] = {"name": detect_format(data), "path": Path(data)}
    return build_dataset(DataConfig(**found))


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


def _counts_or_grids(text: str, *words: str) -> list[Any]:
    """Counts and grids, and ``words`` as they are."""
    from tokenflex.counts import parse_count

    try:
        return [part if part in words else parse_count(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}") from None


def _counts_grids_or_auto(text: str) -> list[Any]:
    from tokenflex.counts import AUTO

    return _counts_or_grids(text, AUTO)


def _words(text: str) -> list[str]:
    return text.split(",")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
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
        "accuracy of a checkpoint at every count: a table, and with --output a page and a plot",
        "tokenflex evaluate runs/demo/checkpoint --data digits --counts 4,9,2x6,16",
    )
    evaluate.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="checkpoint folder")
    evaluate.add_argument("--model", type=Path, dest="model_option", help="the same, by name")
    evaluate.add_argument(
        "--data",
        required=True,
        help="'digits', a JSONL file of messages, a LLaVA JSON file or a Hugging Face folder",
    )
    evaluate.add_argument("--format", help="the data's, where its content does not tell")
    evaluate.add_argument(
        "--counts",
        type=_counts_grids_or_auto,
        required=True,
        help="counts, grids of height x width, or auto (chosen per question): 64,144,12x16,auto",
    )
    evaluate.add_argument(
        "--penalty",
        type=float,
        help="of auto: share of right answers given up to save all tokens; the router's own if "
        "left out",
    )
    evaluate.add_argument(
        "--score",
        default="forced",
        help="forced (the exact answer, without generating), or of a generated answer: exact "
        "(up to case and punctuation), choice (its option letter) or contains",
    )
    evaluate.add_argument("--split", help="of digits or a Hugging Face data set; test if left out")
    evaluate.add_argument("--image-folder", type=Path, help="what LLaVA's paths are relative to")
    evaluate.add_argument("--size", type=_positive, help="canvases, with --data digits")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="samples a forward pass")
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read images")
    evaluate.add_argument("--max-tiles", type=_positive, help="cut images into at most so many")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=64, help="longest answer")
    evaluate.add_argument(
        "--output", type=Path, help="folder for report.json, report.md and accuracy.png"
    )

    harness = command(
        "harness",
        _harness,
        "a public harness's benchmarks at every count, in one table",
        "tokenflex harness lmms-eval runs/demo/checkpoint --benchmarks mmstar --counts 4,9,16 "
        "--output runs/mmstar",
    )
    harness.add_argument("harness", metavar="HARNESS", help="lmms-eval or vlmevalkit")
    harness.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    harness.add_argument("--benchmarks", required=True, help="the harness's names, with commas")
    harness.add_argument(
        "--counts", type=_words, required=True, help="as of evaluate: 64,144,12x16,auto"
    )
    harness.add_argument("--output", type=Path, required=True, help="folder for table.md and .json")
    harness.add_argument("--max-tiles", type=_positive, help="cut images into at most so many")
    harness.add_argument("--batch-size", type=_positive, default=1, help="questions, of lmms-eval")
    harness.add_argument("--limit", type=_positive, help="questions a benchmark, of lmms-eval")
    harness.add_argument("--run-py", type=Path, help="the script in a copy of VLMEvalKit")
    harness.add_argument(
        "arguments", nargs="*", metavar="-- ARGUMENT", help="more for VLMEvalKit's script"
    )

    route = command(
        "route",
        _route,
        "make a checkpoint choose its own counts: train its router, and measure it on other data",
        "tokenflex route --model runs/demo/checkpoint --data digits --counts 4,9,16",
    )
    route.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    route.add_argument(
        "--data",
        required=True,
        help="'digits' (validation split), or data as evaluate takes it, unseen by the model",
    )
    route.add_argument(
        "--counts", type=_counts_or_grids, required=True, help="for example 64,144,256"
    )
    route.add_argument(
        "--measure-on",
        help="'digits' (test split), or other data; for digits, digits if not given",
    )
    route.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        help="share of right answers that auto may cost where no penalty is named (0.01)",
    )
    route.add_argument("--size", type=_positive, default=1024, help="canvases of digits (1024)")
    route.add_argument("--batch-size", type=_positive, default=64, help="samples a pass")

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
        type=_counts_grids_or_auto,
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
        type=_positive,
        help="with auto: vision tokens for all images together at most; needs no router",
    )
    choice.add_argument(
        "--confidence",
        type=_probability,
        help="with auto: answer with few tokens, and again with more while the least certain token "
        "of the answer has a probability below this, for example 0.9; needs no router. The table "
        "then also shows the vision tokens of all tries",
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

    ablate = command(
        "ablate",
        _ablate,
        "train fixed and stochastic models on one budget, ask each at every count, write a report; "
        "continues where it stopped",
        "tokenflex ablate --output runs/ablate",
    )
    scale = ablate.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale",
        choices=("small", "large"),
        default="small",
        help="small: 32 px canvases, counts 4, 9, 16, on two CPU cores (the default); "
        "large: 64 px canvases, counts 16, 36, 64, for a GPU",
    )
    scale.add_argument(
        "--quick",
        action="store_const",
        dest="scale",
        const="quick",
        help="one seed of two regimes, and exit status 1 if they do not show what they must",
    )
    ablate.add_argument(
        "--suite",
        default="paper",
        help="paper: fixed counts, stochastic ones, ways to mix them (the default); gap: what "
        "brings one model up to the specialists; unseen: what makes it answer at other counts",
    )
    ablate.add_argument("--seeds", type=_positive, help="how many; small 3, large 1, quick 1")
    ablate.add_argument("--output", type=Path, help="folder (default: runs/ablate, -large, -quick)")
    ablate.add_argument(
        "--jobs", type=_positive, help="runs at a time (default: one a core; one on a GPU)"
    )

    plot = command(
        "plot",
        _plot,
        "draw a run's curves, finished or still going, and its report if there is one",
        "tokenflex plot runs/demo",
    )
    plot.add_argument("run_folder", type=Path, metavar="RUN", help="the output folder of a run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
