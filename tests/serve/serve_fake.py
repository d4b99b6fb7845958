"""Runs `octavo serve` in its own process with the scripted engine as engine. Arguments: engine fields as JSON, then flags."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any


def main() -> int:
    sys.modules["fake_engine"] = types.ModuleType("fake_engine")  # dataclasses look their module up
    fake_engine = runpy.run_path(str(Path(__file__).with_name("fake_engine.py")), run_name="fake_engine")
    fields = json.loads(sys.argv[1])

    def launch_engine(config: Any, *, logs: Any) -> Any:
        if "start_failure" in fields:
            raise RuntimeError(fields["start_failure"])
        if "start_hangs" in fields:
            print("loading", flush=True)
            time.sleep(60)
        return fake_engine["FakeEngine"](**fields)

    process = types.ModuleType("octavo.runtime.process")
    process.launch_engine = launch_engine  # type: ignore[attr-defined]
    sys.modules[process.__name__] = process
    from octavo.serve import cli

    real = cli.options_of

    def impatient(namespace: Any) -> Any:
        config, options = real(namespace)
        return config, dataclasses.replace(options, dead_engine_linger_s=1.0)

    cli.options_of = impatient
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
