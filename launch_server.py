"""`python -m octavo.launch_server`: takes the place of `python -m sglang.launch_server`. The same as `octavo serve`."""

from __future__ import annotations

import sys

from .serve.cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], prog="python -m octavo.launch_server"))
