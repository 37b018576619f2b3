"""The parser that commands add themselves to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, like all others; ``--help`` has the usage.

    Attributes:
        passed_on: name of the option that holds what follows the first ``--``, word for word; None
            leaves ``--`` to argparse, which takes what follows for positional arguments.
    """

    passed_on: str | None = None

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Read the arguments; those after ``--`` are not looked at where they are passed on."""
        if self.passed_on is None:
            return super().parse_known_args(args, namespace)
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        options, unknown = super().parse_known_args(words[:end], namespace)
        setattr(options, self.passed_on, words[end + 1 :])
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


class CommandLine:
    """``tokenflex`` and its commands.

    Attributes:
        parser: of all of them; what it reads has ``command``, ``run`` and ``debug`` besides a
            command's own arguments.
    """

    def __init__(self) -> None:
        self.parser = OneLineParser(
            prog="tokenflex",
            description="Vision-language models whose vision-token count is chosen per image.",
        )
        self._commands = self.parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        summary: str,
        example: str,
    ) -> OneLineParser:
        """A command without arguments.

        Args:
            name: of the command.
            run: what it does, once all arguments are read; returns the exit code.
            summary: what it does, in a line.
            example: a call of it.

        Returns:
            Where its arguments go.
        """
        command = self._commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command
