"""How command lines are read: nothing abbreviated, a config file behind the flags, errors that name flag and remedy. Knows no flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .config_file import NOT, flags_in, flags_of_mapping

_NEAR = 0.7  # how alike an unknown flag and the one it is taken for are, of 1
_LEAST_PREFIX = 4  # characters of an unknown flag that may be the beginning of one, with its dashes
_UNSET = argparse.SUPPRESS  # a flag not given leaves no trace, so that each default lives in its dataclass alone


class Parser(argparse.ArgumentParser):
    """An argument parser that abbreviates nothing and, for an unknown flag, says which one may have been meant.

    What is wrong with a flag is told as the option objects tell it: flag, value, remedy.
    """

    def __init__(self, *, alone: Mapping[str, str] | None = None, **options: Any) -> None:
        """`alone`: what flags are, given alone, whose value needs "=": a word that follows is not one, but may be the model."""
        super().__init__(allow_abbrev=False, argument_default=_UNSET, exit_on_error=False, **options)
        self._alone = alone or {}

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; exits with code 2 and a message on stderr when it is not valid."""
        namespace = self.parse_words(argv)
        file = vars(namespace).pop("config_file", None)
        if file is None:
            return namespace
        try:
            from_file = flags_in(file)
        except ValueError as error:
            self.error(str(error))
        in_file = self.parse_words(self._checked(from_file, f"{file}"), where=f"in {file}: ")
        if hasattr(namespace, "model") and hasattr(in_file, "model_path"):
            from_file = [word for word in from_file if not word.startswith(("--model-path=", "--model="))]
        namespace = self.parse_words([*self._checked(from_file, f"{file}"), *argv])  # what comes later holds
        del namespace.config_file
        return namespace

    def parse_mapping(self, content: Mapping[str, Any], where: str) -> argparse.Namespace:
        """Parse flags that a mapping holds as a config file does. Raises ValueError, `where` in its text."""
        self.error = _raise  # type: ignore[method-assign]
        return self.parse_words(self._checked(flags_of_mapping(content, where), where), where=f"in {where}: ")

    def _checked(self, words: Sequence[str], where: str) -> list[str]:
        """Flags of a config file: `--no-x` for what was false there. Refuses a value that would be lost."""
        kept, seen = [], set()
        for word in words:
            flag = word.split("=", 1)[0]
            action = self._option_string_actions.get(flag)
            if flag.startswith(NOT):
                name = flag.removeprefix(NOT)
                twin = f"--disable-{name.removeprefix('enable-')}"
                if name.startswith("enable-") and twin in self._option_string_actions:
                    kept.append(twin)
                elif self._option_string_actions.get(f"--{name}") is None:
                    kept.append(f"--{name}")  # which is told as unknown
                continue
            if action is not None and flag in seen and type(action).__name__ == "_StoreAction":
                self.error(f"in {where}: {flag} has several values: give one")
            seen.add(flag)
            kept.append(word)
        return kept

    def parse_words(self, argv: Sequence[str], where: str = "") -> argparse.Namespace:
        """Parse `argv` alone, a config file that it names left unread; exits as `parse_all` does, `where` before the message."""
        try:
            namespace, unknown = self.parse_known_args([self._alone.get(word, word) for word in argv])
        except argparse.ArgumentError as error:
            self.error(where + _in_our_words(error))
        if unknown:
            self.error(where + self._unknown(unknown[0]))
        return namespace

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        name = argument.split("=", maxsplit=1)[0]
        flags = {flag.strip("-"): flag for flag in self._option_string_actions}
        near = difflib.get_close_matches(name.strip("-"), flags, n=1, cutoff=_NEAR)  # without dashes, which all flags share
        near = near or [flag for flag in flags if len(name) > _LEAST_PREFIX and flag.startswith(name.strip("-"))]
        return f"unknown flag {name}" + (f"; did you mean {flags[near[0]]}?" if near else "; --help lists the flags")

    def print_help(self, file: Any = None) -> None:
        """argparse's own swallows that nobody reads."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _in_our_words(error: argparse.ArgumentError) -> str:
    flag = (error.argument_name or "the command line").split("/")[0]
    if error.message.startswith("expected one argument"):
        return f"{flag} has no value: give one"
    if error.message.startswith("ignored explicit argument"):
        return f"{flag} takes no value: give it alone"
    return f"{flag} {error.message}"
