"""The `octavo` command: finds the subcommand and hands it the rest of the line. Knows no flag of theirs."""

from __future__ import annotations

import difflib
import sys

from . import __version__
from .serve.exit_code import exit_code_of

_COMMANDS = {
    "serve": "serve a model over an OpenAI-compatible API",
    "bench": "measure a running server",
    "eval": "perplexity of a model, and how far it is from another",
    "kernels": "compile GPU kernels ahead, on a machine without a GPU, and what they are made of",
    "doctor": "what this machine has, which kernels it gets, whether they compute right",
}
_USAGE = "\n".join(
    [
        "usage: octavo COMMAND [options]     octavo COMMAND --help explains a command",
        "",
        *(f"  {name:<8} {text}" for name, text in _COMMANDS.items()),
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
    match command:
        case "serve":
            from .serve.cli import main as run_serve

            return run_serve(rest)
        case "bench":
            from .benchmarks.cli import main as run_bench

            return run_bench(rest)
        case "eval":
            from .calibration.eval_cli import main as run_eval

            return run_eval(rest)
        case "kernels":
            from .serve.kernels_cli import main as run_kernels

            return run_kernels(rest)
        case "doctor":
            from .serve.doctor_cli import main as run_doctor

            return run_doctor(rest)
    return _answer(command)


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
    """The bare `serve` command."""
    return main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
