"""Proves that a start knows whether its CPU kernels have been compiled before, so that it announces the wait only where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.runtime import start


def test_an_empty_cache_folder_has_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not-made-yet"):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
        assert not start._has_compiled_kernels()


def test_compiled_kernels_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu_1234").mkdir()
    (tmp_path / "cpu_1234" / "linear.multiply-12.py311.1.nbc").touch()
    assert start._has_compiled_kernels()
