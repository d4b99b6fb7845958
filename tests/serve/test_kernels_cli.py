"""`octavo kernels`: a tiny model compiled for a GPU that is not here, by a kernel that a plugin brings; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from octavo.__main__ import main as octavo
from octavo.runtime.config import EngineConfig
from octavo.runtime.kernels_ahead import ReportRow, most_rows
from octavo.serve.kernels_cli import _table, main

from ..kernels.gpu.test_ahead import report
from ..quant import writers
from ..runtime.test_quantized_loading import make

PLUGIN = """
import torch
from octavo.kernels.gpu.device import device_of
from octavo.kernels.gpu.workspace import workspace_of
from octavo.kernels.scaled_linear import ScaledWeight
from octavo.quant.linear import LinearKernel
from octavo.quant.platforms import register_kernel

class Fp8(LinearKernel):
    name = "fake_fp8"

    @staticmethod
    def takes(form):
        return form.kind == "fp8"

    @staticmethod
    def refuses(spec):
        if device_of(spec.device).arch < 90:
            return "needs sm_90"
        return None if Fp8.takes(spec.form) else "takes fp8"

    def __init__(self, spec, weights):
        from octavo.kernels.gpu import scaled_linear
        weight = weights.to(spec.device).weight
        assert weight.codes.is_meta
        self.device, self.gemm = device_of(spec.device), scaled_linear
        self.weight = scaled_linear.pack(ScaledWeight(weight.codes, weight.scale.float(), 1, weight.group_size))

    def __call__(self, x, *, out):
        codes = torch.empty(x.shape[0], self.weight.codes.shape[1], dtype=self.weight.codes.dtype, device=x.device)
        scale = torch.empty(x.shape[0], 1, device=x.device)
        self.gemm.launch(
            codes, scale, x.shape[1], self.weight, None, out, device=self.device, workspace=workspace_of(x.device)
        )()
        return out

    def rows(self, indices):
        raise AssertionError("embeddings are dense")

    @property
    def weight_bytes(self):
        return self.weight.nbytes

def register():
    register_kernel("sm_90", Fp8)
"""


SAMPLING = {"peaks", "search", "kept", "penalise", "count"}


def write_plugin(folder: Path) -> Path:
    info = folder / "fake_kernels-1.dist-info"
    info.mkdir(parents=True)
    (folder / "fake_kernels.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-kernels\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[octavo.quant]\nfake = fake_kernels:register\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    plugin = write_plugin(tmp_path / "plugin")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(plugin)}
        command = [sys.executable, "-m", "octavo", "kernels", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.long
def test_a_model_is_compiled_for_all_rows_and_found_again(tmp_path, run):
    model = make(tmp_path, lambda n, k, seed: writers.fp8(n, k, "channel", seed=seed)).folder
    cache = tmp_path / "cache"
    words = ["--arch", "sm_90", "--model", str(model), "--dtype", "bfloat16", "--max-rows", "3", "--cache-dir", str(cache)]
    done = run("compile", *words, "--tp-size", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (o_proj,) = (line.split() for line in lines if line.startswith("model.layers.*.self_attn.o_proj"))
    assert o_proj[1:5] == ["2", "128", "x", "64"], "the first of two ranks has half of the inputs"
    assert "fake_fp8" in o_proj
    (told,) = (line for line in lines if line.startswith("Compiled for sm_90, 1 to 3 rows: "))
    assert " launcher" in told
    assert told.endswith(str(cache))
    assert any("split: " in line and "of 16x128x128" in line for line in lines)
    number = int(told.split(": ")[1].split()[0])
    binaries = sorted(cache.glob("*/*.cubin"))
    assert number == len(binaries) >= 2

    told = run("report", *words, "--tp-size", "2", "--json")
    assert told.returncode == 0, told.stderr
    assert sorted(cache.glob("*/*.cubin")) == binaries, "nothing was compiled again"
    rows = json.loads(told.stdout)
    assert len(rows) == number
    assert {row["name"] for row in rows} == {"split", "plan", "attend", "rope_store", "rms_norm", "silu_mul", *SAMPLING}
    assert [row["faults"] for row in rows if row["faults"]] == []
    assert all(row["matrix_instructions"][0].startswith("QGMMA") for row in rows if row["name"] == "split")


@pytest.mark.long
@pytest.mark.parametrize(
    "write",
    [lambda n, k, seed: writers.fp8(n, k, "channel", seed=seed), lambda n, k, seed: writers.awq(n, k, group_size=32, seed=seed)],
    ids=["fp8", "awq"],
)
def test_a_config_alone_gives_the_kernels_of_its_model(tmp_path, run, write):
    model = make(tmp_path, write).folder
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((model / "config.json").read_text())
    words = ["--arch", "sm_90", "--dtype", "bfloat16", "--max-rows", "2", "--cache-dir", str(tmp_path / "cache")]
    first = run("compile", *words, "--model", str(model))
    assert first.returncode == 0, first.stderr
    binaries = sorted((tmp_path / "cache").glob("*/*.cubin"))
    assert binaries
    again = run("compile", *words, "--model", str(alone), "--load-format", "dummy")
    assert again.returncode == 0, again.stderr
    assert sorted((tmp_path / "cache").glob("*/*.cubin")) == binaries
    assert again.stdout.split(" in ")[0] == first.stdout.split(" in ")[0]  # the same linears, kernels and numbers


@pytest.mark.parametrize(
    ("dtype", "told"), [("float32", "nothing was compiled"), pytest.param("bfloat16", "  attend: ", marks=pytest.mark.long)]
)
def test_of_a_dense_model_attention_is_compiled_and_in_float32_nothing(tmp_path, run, dtype, told):
    model = make(tmp_path, lambda n, k, seed: writers.dense(n, k, seed=seed)).folder
    words = ["--arch", "sm_90", "--model", str(model), "--max-rows", "2", "--cache-dir", str(tmp_path / "cache"), "--dtype", dtype]
    done = run("compile", *words)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def test_what_no_kernel_takes_is_left_to_the_reference_and_said(tmp_path, run):
    model = make(tmp_path, lambda n, k, seed: writers.fp8(n, k, "channel", seed=seed)).folder
    words = ["--arch", "sm_90", "--model", str(model), "--dtype", "bfloat16", "--max-rows", "2", "--cache-dir", str(tmp_path / "cache")]
    done = run("compile", *words, "--linear-backend", "reference")
    assert done.returncode == 0, done.stderr
    assert "sm_90 runs no Triton kernel for these linears: nothing was compiled" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command given"),
        (["complie"], "did you mean compile?"),
        (["compile"], "--arch is missing: give one or several, such as --arch sm_90"),
        (["compile", "--arch", "sm_90", "--cache-dir", ""], "--cache-dir is empty"),
        (["compile", "--arch", "sm_90", "--max-rows", "70000"], "--max-rows 70000 is not valid"),
        (["report", "--arch", "sm_90", "--arch", "sm_80", "--op", "fp8"], "--op 'fp8' is not valid: the table for sm_80 has"),
        (["compile", "--arch", "h100"], "--arch 'h100' is not valid: give one of sm_80,"),
        (["compile", "--arch", "sm_70"], "--arch 'sm_70' is not valid: give one of sm_80,"),
        (["compile", "--arch", "sm_90", "--cache-dir", "/dev/null/kernels"], "/dev/null/kernels"),
        (["compile", "--arch", "sm_90", "--max-rows", "0"], "--max-rows 0 is not valid: give a whole number of at least 1"),
        (["compile", "--arch", "sm_90", "--tp-size", "two"], "--tp-size 'two' is not valid"),
        (["compile", "--arch", "sm_90", "--dtype", "int8"], "--dtype 'int8' is not valid: give auto,"),
        (["compile", "--arhc", "sm_90"], "unknown flag --arhc; did you mean --arch?"),
        (["report", "--arch", "sm_90", "--table", "--model", "m"], "--model and --table contradict each other"),
        (["report", "--arch", "sm_90", "--max-rows", "8"], "--max-rows belongs to a model, and the tables have none: give --model too"),
        (["report", "--arch", "sm_90", "--op", "fp8", "--model", "m"], "--model and --op contradict each other"),
    ],
)
def test_bad_command_lines_end_with_two(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_what_the_other_process_refuses_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["report", "--arch", "sm_90", "--op", "fp8", "--cache-dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("octavo kernels report: TRITON_INTERPRET=1")
    assert told.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["report", "--arch", "sm_90", "--op", "fp7", "--cache-dir", str(tmp_path)]) == 2
    assert "--op 'fp7' is not valid: the table for sm_90 has fp8, " in capsys.readouterr().err


def test_the_table_tells_faults_below_their_kernel():
    rows = [ReportRow(report(), (), "fp8", 16), ReportRow(report(registers=255), ("spills registers",), "fp8", None)]
    head, first, second, fault, *rest = "\n".join(_table(rows)).splitlines()
    assert head.split()[:6] == ["arch", "op", "rows", "kernel", "tile", "regs"]
    assert first.split() == ["sm_90", "fp8", "to", "16", "split", "66", "0", "1024", "4", "QGMMA.64x16x32.F32.E4M3.E4M3"]
    assert second.split()[2:6] == ["more", "split", "255", "0"]
    assert fault == "    spills registers"
    assert rest == ["", "2 kernels, 1 not as they should be"]


def test_rows_are_those_of_the_greatest_step():
    assert most_rows(EngineConfig()) == 2048 + 256
    assert most_rows(EngineConfig(chunked_prefill_size=512, max_running_requests=8)) == 520


def test_help(capsys):
    assert octavo(["kernels", "--help"]) == 0
    assert "compile" in capsys.readouterr().out
    for command in ("compile", "report"):
        assert octavo(["kernels", command, "--help"]) == 0
        assert "--cache-dir" in capsys.readouterr().out


def test_a_backend_that_computes_nothing_is_refused_as_by_serve(tmp_path, run):
    model = make(tmp_path, lambda n, k, seed: writers.fp8(n, k, "channel", seed=seed)).folder
    words = ["--arch", "sm_90", "--model", str(model), "--max-rows", "1", "--cache-dir", str(tmp_path / "cache")]
    done = run("compile", *words, "--linear-backend", "bogus")
    assert done.returncode == 2
    assert "--linear-backend 'bogus' is not valid: give one of" in done.stderr
    assert not list((tmp_path / "cache").rglob("*.cubin"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_compiler_ends_with_a_command_that_is_killed(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "octavo", "kernels", "report", "--arch", "sm_90", "--cache-dir", str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    workers = []
    while not any("spawn_main" in " ".join(worker.cmdline()) for worker in workers) or not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.2)
        workers = parent.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
