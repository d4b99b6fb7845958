"""What the engine process tells of a start that fails: whose fault it is, in one line and without a stack trace."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from octavo.quant.self_check import KernelFault
from octavo.runtime import worker
from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import Failed, FromEngine, encode_config


@pytest.mark.parametrize(("error", "is_user_error"), [(ValueError("no such model"), True), (KernelFault("is off by 0.3"), False)])
def test_a_failed_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, is_user_error: bool
) -> None:
    def failing(config: EngineConfig, **_: object) -> None:
        raise error

    sent: list[FromEngine] = []
    monkeypatch.setattr(worker, "load_core", failing)
    process = worker._Worker(str(tmp_path))
    monkeypatch.setattr(process, "send", sent.append)
    with caplog.at_level(logging.INFO):
        assert process.run(encode_config(EngineConfig())) == 1
    assert sent == [Failed(str(error), is_user_error)]
    assert caplog.records == []
