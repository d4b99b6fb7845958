"""What is printed once a server is ready: what it serves, where, and a command to paste. Knows no engine."""

from __future__ import annotations

import json
import logging
import shlex

from .options import ServerOptions

logger = logging.getLogger("octavo.serve")


def url_of(host: str, port: int) -> str:
    """Where clients of this machine reach a server that listens at an address: http://127.0.0.1:30000/v1."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}/v1"


def announce(url: str, model: str, options: ServerOptions, *, has_template: bool) -> None:
    """Print it, and log what the operator should know. `has_template`: the command asks with messages; else with a prompt."""
    has_key = bool(options.api_keys)
    lines = [
        "",
        "Octavo is ready.",
        f"  model    {model}",
        f"  URL      {url}" + ("  (API key required)" if has_key else ""),
        "  try it   " + _curl(url, has_template=has_template, has_key=has_key),
        "",
    ]
    print("\n".join(lines), flush=True)
    if not has_key and options.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("everybody who reaches %s may ask, flush the cache and abort requests: --api-key closes it", options.host)


def _curl(url: str, *, has_template: bool, has_key: bool) -> str:
    body: dict[str, object] = {"model": "default", "max_tokens": 64}
    if has_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello! Who are you?"}]
    else:
        path, body["prompt"] = "completions", "The capital of France is"
    key = ' -H "Authorization: Bearer $API_KEY"' if has_key else ""
    return f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
