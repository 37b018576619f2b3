"""The parser of the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tokenflex.version import __version__

USER_ERROR = 2


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Python colours help texts from 3.14 on
_WORD = re.compile(r"\[?--?[\w-]+ (?:'[^']*'|[^-\s|\]]\S*)|'[^']*'|\S+")
"""An option with its value, or another word."""


class HelpText(argparse.HelpFormatter):
    """Help texts in the width of the terminal; an example continues after a backslash."""

    def _format_usage(self, *arguments: Any, **named: Any) -> str:
        # argparse indents the options by the command's name, whatever room that leaves.
        usage = super()._format_usage(*arguments, **named)
        plain = _COLOUR.sub("", usage)
        if max(map(len, plain.splitlines())) <= self._width:
            return usage
        return _wrapped(plain, self._width, indent=7) + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        title, newline, command = text.partition("\n")
        if not newline:
            return super()._fill_text(text, width, indent)
        return f"{title}\n  " + _wrapped(command, width - 2, indent=6, mark=" \\")


def _wrapped(text: str, width: int, *, indent: int, mark: str = "") -> str:
    """Break a command line between its options, with ``mark`` before each break."""
    lines = [""]
    for word in _WORD.findall(text):
        if lines[-1] and len(lines[-1]) + 1 + len(word) + len(mark) > width:
            lines.append(" " * indent)
        lines[-1] += f" {word}" if lines[-1].strip() else word
    return f"{mark}\n".join(lines)


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
            formatter_class=HelpText,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, extra=extra)
        return command
