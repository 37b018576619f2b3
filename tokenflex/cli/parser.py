"""The parser that commands add themselves to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, like all others; ``--help`` has the usage."""

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
    ) -> argparse.ArgumentParser:
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
