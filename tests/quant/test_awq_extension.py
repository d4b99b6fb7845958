"""The probe of AutoAWQ's CUDA extension, on the CPU with stand-ins for it: right, wrong, not loadable."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from octavo.quant.awq_extension import _differs, extension_fault

CPU = torch.device("cpu")


def dequantize(qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor, *_: object) -> torch.Tensor:
    """What dequantize_weights_cuda computes, a nibble at a time: column 8 * c + ORDER[i] is nibble i of word c."""
    k, n = qweight.shape[0], scales.shape[1]
    size = k // scales.shape[0]
    out = torch.empty(k, n, dtype=torch.float16)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes, zeros = ((words >> (4 * nibble)) & 15 for words in (qweight, qzeros))
        out[:, column::8] = ((codes - zeros.repeat_interleave(size, 0)) * scales[:, column::8].repeat_interleave(size, 0)).half()
    return out


def test_the_right_numbers_pass_and_others_do_not() -> None:
    assert _differs(dequantize, CPU) is None
    assert "is off by" in (_differs(lambda qweight, *rest: dequantize(qweight.roll(1, 0), *rest), CPU) or "")
    assert "is off by" in (_differs(lambda *args: dequantize(*args) * 1.01, CPU) or "")
    assert "gives (128, 127)" in (_differs(lambda *args: dequantize(*args)[:, 1:], CPU) or "")


def test_nan_does_not_pass() -> None:
    assert _differs(lambda *args: dequantize(*args) * torch.nan, CPU) is not None


def test_an_extension_that_cannot_be_loaded_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awq_ext", None)
    fault = extension_fault()
    assert fault is not None
    assert fault.startswith("import awq_ext fails: ModuleNotFoundError")
    assert "\n" not in fault


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awq_ext", types.ModuleType("awq_ext"))
    assert extension_fault() == "awq_ext computes on CUDA devices alone, and torch sees none"
