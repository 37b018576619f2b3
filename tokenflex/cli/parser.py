"""The parser of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tokenflex.version import __version__

USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line; ``--help`` prints the usage.

    Attributes:
        passed_on: Name of the option that receives the words after the first ``--`` unchanged. If
            None, argparse takes them for positional arguments.
    """

    passed_on: str | None = None

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse the arguments; those after ``--`` are passed on unparsed."""
        if self.passed_on is None:
            return super().parse_known_args(args, namespace)
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        options, unknown = super().parse_known_args(words[:end], namespace)
        setattr(options, self.passed_on, words[end + 1 :])
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


class CommandLine:
    """``tokenflex`` and its commands.

    Attributes:
        parser: The parser of all commands. Its result holds ``command``, ``run``, ``extra`` and
            ``debug`` besides the arguments of a command.
    """

    def __init__(self) -> None:
        self.parser = OneLineParser(
            prog="tokenflex",
            description="Vision-language models whose vision-token count is chosen per image.",
        )
        self.parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self._commands = self.parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )

    @property
    def names(self) -> list[str]:
        """Names of the commands."""
        return [*self._commands.choices]

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        summary: str,
        example: str,
        *,
        extra: str = "hf",
    ) -> OneLineParser:
        """Add a command without arguments.

        Args:
            name: Name of the command.
            run: Function that runs the command with the parsed arguments and returns the exit code.
            summary: One line for the help text.
            example: A call of the command.
            extra: Extra of the distribution with the packages that the command needs.

        Returns:
            The parser that takes the command's arguments.
        """
        command = self._commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, extra=extra)
        return command
