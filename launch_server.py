"""`python -m octavo.launch_server`: takes the place of `python -m sglang.launch_server`. The same as `octavo serve`."""

from __future__ import annotations

import sys

from .serve.exit_code import exit_code_of


def _serve() -> int:
    from .serve.cli import main  # takes a moment, which Ctrl-C may cut

    return main(sys.argv[1:], prog="python -m octavo.launch_server")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(_serve))
