"""The table of linears and kernels: what it shows, what it leaves out, how wide it is."""

from __future__ import annotations

import json
import logging

import pytest

from octavo.runtime.linear_report import WIDTH, LinearGroup, LinearReport, Refusal, check_backend_name

LONG = "float-quantized fp8, blocks of 128x128, activations fp8_e4m3 per group of 128, dynamic"
OTHER = Refusal("cpu_packed_panels", "takes dense weights, not int8", made_for_it=False)
OWN = Refusal("cpu_int8", "takes one symmetric scale a row of weights, and here is a reason that is much longer than a line " * 2, True)


def group(layers: str, scheme: str = "gguf Q4_1", *, refused: tuple[Refusal, ...] = (), count: int = 30) -> LinearGroup:
    return LinearGroup(layers, count, 4096, 14336, scheme, "cpu_packed_panels", 3 << 20, refused)


def test_a_line_a_group_and_a_total() -> None:
    report = LinearReport("gguf", (group("model.embed_tokens", "gguf Q8_0", count=1), group("model.layers.*.mlp.down_proj")))
    assert report.table().splitlines() == [
        "Quantization: gguf",
        "",
        "linears                       count      out x in  MiB  kernel             stored as",
        "model.embed_tokens                1  14336 x 4096  3.0  cpu_packed_panels  gguf Q8_0",
        "model.layers.*.mlp.down_proj     30  14336 x 4096  3.0  cpu_packed_panels  gguf Q4_1",
        "total                            31                6.0",
    ]
    assert LinearReport(None, ()).table().startswith("Quantization: none (dense)\n")


def test_refusals_of_kernels_made_for_such_weights_are_shown_and_others_on_request() -> None:
    report = LinearReport("int8", (group("a", refused=(OTHER, OWN)),))
    assert "not cpu_int8: takes one symmetric scale" in report.table()
    assert "not cpu_packed_panels" not in report.table()
    assert "    not cpu_packed_panels: takes dense weights, not int8\n" in report.table(every_refusal=True)


def test_no_line_is_too_wide_and_nothing_is_cut() -> None:
    names = [f"model.layers.*.self_attn.qkv_proj[{start}:{start + 4096}]" for start in (0, 4096)]
    table = LinearReport("fp8", tuple(group(name, LONG, refused=(OWN,)) for name in names)).table()
    assert max(map(len, table.splitlines())) <= WIDTH == 110
    assert f"(1) {LONG}" in table
    assert " ".join(table.split()).count(" ".join(OWN.reason.split())) == 2


def test_server_info_gets_every_refusal() -> None:
    told = json.loads(json.dumps(LinearReport("int8", (group("a", refused=(OTHER, OWN)),)).to_dict()))
    assert told["method"] == "int8"
    assert told["layers"][0]["refused"][0] == {"kernel": OTHER.kernel, "reason": OTHER.reason, "made_for_it": False}


def test_the_table_is_logged_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "octavo.runtime"):
        LinearReport.of([], "awq")
    assert caplog.text == ""
    with caplog.at_level(logging.DEBUG, "octavo.runtime"):
        LinearReport.of([], "awq")
    assert "Quantization: awq" in caplog.text


def test_backends_are_known_by_name() -> None:
    check_backend_name("cpu_grouped")
    with pytest.raises(ValueError, match=r"--linear-backend 'fast' is not valid: give one of .*cpu_grouped.*reference"):
        check_backend_name("fast")


def test_a_dense_model_on_the_cpu_is_told_what_quantizing_would_hold() -> None:
    mib = 1 << 20
    embedding = LinearGroup("model.embed_tokens", 1, 1024, 4096, "dense", "cpu_packed_panels", 8 * mib, ())
    for bytes_each in (2, 4):  # whatever the dense dtype is
        layers = LinearGroup("model.layers.*.mlp.down_proj", 10, 1024, 2048, "dense", "cpu_packed_panels", 20 * mib * bytes_each, ())
        report = LinearReport(None, (embedding, layers))
        told = report.advice("cpu")
        assert told is not None
        assert f"{8 + 20 * bytes_each} MiB of weights" in told
        assert "int8 would hold 28 MiB" in told
        assert "int4 about 19 MiB" in told
        assert report.advice("cuda") is None
    assert LinearReport("awq", (layers,)).advice("cpu") is None
