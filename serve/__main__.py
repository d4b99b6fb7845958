"""`python -m octavo.serve`: the same as `octavo serve`, for where another program is called serve."""

from __future__ import annotations

import sys

from .exit_code import exit_code_of


def _serve() -> int:
    from .cli import main  # takes a moment, which Ctrl-C may cut

    return main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(exit_code_of(_serve))
