"""`python -m octavo.serve.healthcheck`: exit code 0 while the server of this container is healthy, for Docker. Loads nothing large."""

from __future__ import annotations

import os
import sys
import urllib.request

_TIMEOUT_S = 4.0


def main() -> int:
    """Ask /health at the port that OCTAVO_PORT or PORT names, as the server itself reads them, else 30000."""
    port = os.environ.get("OCTAVO_PORT") or os.environ.get("PORT") or "30000"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{int(port)}/health", timeout=_TIMEOUT_S):
            return 0
    except (OSError, ValueError) as error:  # an error status is an OSError too
        print(f"/health at port {port}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
