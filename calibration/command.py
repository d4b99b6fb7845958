"""What the commands of this folder share: a parser that says what is wrong, exit codes. Knows no command."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def fail(prog: str, text: str, code: int) -> int:
    """Tell what went wrong on stderr; gives `code`."""
    print(f"{prog}: {text}", file=sys.stderr)
    return code


class CommandParser(argparse.ArgumentParser):
    """Tells what is wrong in one line, an unknown flag before one that is missing."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags in `argv` (None: the process's own); ends the process where they are wrong."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            flags = {flag.strip("-"): flag for flag in self._option_string_actions}
            what = "unknown flag" if name.startswith("-") else "unexpected argument"
            self.error(f"{what} {name}; {self._advice(name, flags)}")
        return args

    def _advice(self, name: str, flags: Mapping[str, str]) -> str:
        if not name.startswith("-") and "model-path" in flags and ("/" in name or Path(name).exists()):
            return f"did you mean --model-path {name}?"
        near = difflib.get_close_matches(name.strip("-"), flags, n=1)  # without dashes, which all flags share
        return f"did you mean {flags[near[0]]}?" if near else "--help lists the flags"

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message.removeprefix('argument ')}\n")


def at_least(low: int) -> Callable[[str], int]:
    """A parser of whole numbers, for argparse, that refuses those below `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is not valid: give at least {low}")
        return value

    return parse
