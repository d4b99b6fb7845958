"""The `octavo` command: finds the subcommand and hands it the rest of the line. Knows no flag of theirs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import __version__
from .serve.exit_code import exit_code_of


class _Command(NamedTuple):
    module: str  # of its `main`
    about: str


_COMMANDS = {
    "serve": _Command(".serve.cli", "serve a model over an OpenAI-compatible API"),
    "bench": _Command(".benchmarks.cli", "measure a running server"),
    "quantize": _Command(".calibration.quantize_cli", "make a quantized checkpoint of a model, and measure what that cost"),
    "eval": _Command(".calibration.eval_cli", "perplexity of a model, and how far it is from another"),
    "kernels": _Command(".serve.kernels_cli", "compile GPU kernels ahead, on a machine without a GPU, and what they are made of"),
    "doctor": _Command(".serve.doctor_cli", "what this machine has, which kernels it gets, whether they compute right"),
}
_OF_RAY_SERVE = ("start", "deploy", "run", "config", "status", "shutdown", "controller-health", "build")
_USAGE = "\n".join(
    [
        "usage: octavo COMMAND [options]     octavo COMMAND --help explains a command",
        "",
        *(f"  {name:<8} {command.about}" for name, command in _COMMANDS.items()),
        "",
        "  --version, --help",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (None: the process's own); gives the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in _COMMANDS:
        return _answer(command)
    run: Callable[[list[str]], int] = importlib.import_module(_COMMANDS[command].module, __package__).main
    return run(rest)


def _answer(word: str) -> int:
    """What a word that is no command gets: the version, the usage, or an error."""
    if word in ("-V", "--version", "-h", "--help"):
        print(f"octavo {__version__}" if word in ("-V", "--version") else _USAGE)
        return 0
    near = difflib.get_close_matches(word, _COMMANDS, n=1)
    told = f"octavo: {word!r} is no command" if word else "octavo: no command given"
    print(told + (f"; did you mean {near[0]}?" if near else "") + f"\n\n{_USAGE}", file=sys.stderr)
    return 2


def serve() -> int:
    """The bare `serve` command. Ray Serve's has the same name: where Ray is installed, what only that one knows is for it."""
    if sys.argv[1:2] and sys.argv[1] in _OF_RAY_SERVE and importlib.util.find_spec("ray") is not None:
        importlib.import_module("ray.serve.scripts").cli()  # ends the process
    return main(["serve", *sys.argv[1:]])


def quantize() -> int:
    """The bare `quantize` command."""
    return main(["quantize", *sys.argv[1:]])


def container() -> int:
    """`octavo-container`, the entry point of images: `serve` with flags from the environment, or the command that its arguments name."""
    return exit_code_of(lambda: _contained(sys.argv[1:], os.environ))


def _contained(arguments: list[str], environ: Mapping[str, str]) -> int:
    word = arguments[0] if arguments else ""
    is_mistyped = bool(difflib.get_close_matches(word, _COMMANDS, n=1)) and not os.path.exists(word)  # what exists is a model's folder
    if word != "serve" and (word in _COMMANDS or word in ("-V", "--version") or is_mistyped):
        return _run(arguments)
    from .serve.environment import flags_from

    words = arguments[1:] if arguments[:1] == ["serve"] else arguments
    try:
        return _run(["serve", *flags_from(environ, words), *words])
    except ValueError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
