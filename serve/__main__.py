"""`python -m octavo.serve`: the same as `octavo serve`, for where another program is called serve."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
