"""benchmarks/gpu/run.py under the interpreter: the whole command on the CPU, what it finds, and that a bare checkout is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.benchmarks.gpu import attention_timings, checks, clock, command, correctness, sweep, timings
from octavo.benchmarks.gpu.attention_timings import Step
from octavo.benchmarks.gpu.cases import DequantizeCase, GroupedCase, LinearCase, RowsCase, ScaledCase, all_cases
from octavo.benchmarks.gpu.checks import Place, check
from octavo.benchmarks.gpu.command import main
from octavo.benchmarks.gpu.contenders import Shape
from octavo.benchmarks.gpu.guarded import Guarded
from octavo.kernels.gpu import grouped_linear, scaled_linear
from octavo.kernels.gpu.config import Tile, entries, operations
from octavo.kernels.gpu.device import DEVICES
from octavo.kernels.gpu.launch import Launch

from ..kernels.gpu.interpreter import mend, torch_scales_rows

mend()
H100 = Place(torch.device("cpu"), DEVICES[90])
TINY = Shape("tiny", 64, 256)
RUN = Path(timings.__file__).with_name("run.py")
FEW = (
    ScaledCase("fp8", 3, 40, 200),
    GroupedCase("w4a16", 3, 40, 256, 64),
    DequantizeCase(4, 40, 256, 64),
    RowsCase("norm", "fp8", 2, 100),
    LinearCase("triton_fp8", "fp8", 8, 3, 40, 200, inputs="token"),
    LinearCase("torch_int4pack", "integer", 4, 3, 40, 256, 64),
)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "cases_of", lambda arch, *, quick: [case for case in FEW if arch > 80 or "fp8" not in case.name])


def run(*arguments: str, out: Path) -> int:
    steps = (Step(2, 1, 40), Step(1, 20, 20), Step(1, 5, 40))
    return main([*arguments, "--out", str(out)], place=H100, shapes=(TINY,), rows=(1,), steps=steps, variants=(), asked=())


@pytest.mark.usefixtures("few_cases")
def test_the_whole_command_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--formats", "fp8", "w4a16", out=tmp_path) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert "5 right, 0 wrong, 1 refused, 0 not run yet" in told
    assert (tmp_path / "fp8.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "README.md").read_text()
    assert "| tiny 64x256 | 1 |" in page
    assert "octavo w4a8" in page
    assert "untimed" in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["timings"]) == {"fp8 tiny 64x256", "w4a16 tiny 64x256"}
    refused = set() if torch_scales_rows() else {"_scaled_mm", "_scaled_mm alone"}  # by an older torch, on the CPU
    assert {name for timing in results["timings"].values() for name in timing["faults"]} == refused
    for module, name in ((correctness, "check"), (timings, "time_shape"), (clock, "ceilings")):
        monkeypatch.setattr(module, name, None)  # nothing is done twice
    assert run("--formats", "fp8", "w4a16", out=tmp_path) == 0
    assert main(["report", "--out", str(tmp_path)]) == 0
    results["sources"] = "others"
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(TypeError):
        run("--formats", "fp8", out=tmp_path)
    assert "beginning anew" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 90])
def test_small_cases_are_right(arch: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quick"], place=Place(torch.device("cpu"), DEVICES[arch])) == 0, capsys.readouterr().out


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_entry_of_every_table_has_a_case(arch: int) -> None:
    cases = all_cases(arch)
    for op in operations(arch):
        least = 1
        for most, tile in entries(arch, op):
            found = [case for case in cases if getattr(case, "op", None) == op and least <= case.m <= (most or case.m)]
            assert found or tile.route == "dense", (op, most)
            least = (most or 0) + 1


def test_attention_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timings, "FORMATS", {})
    assert run("timings", "report", out=tmp_path) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["attention"]
    assert list(found) == ["decode 2 x 40", "prefill 1 x 20", "prefill 1 x 40, 5 new"]
    for step in found.values():
        assert set(step["us"]) == {"bf16", "fp8_e4m3", "int8", "sdpa"}
    assert "| decode 2 x 40 |" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(attention_timings, "_sdpa", lambda q, k, v, step: torch.zeros(1, 32, len(q), 128))
    assert run("timings", "--fresh", out=tmp_path) == 1
    assert "WRONG decode 2 x 40" in capsys.readouterr().out


def _forgets_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = scaled_linear.pack

    def wrong(weight: Any) -> Any:
        packed = pack(weight)
        packed.codes.view(torch.uint8)[1, 7] ^= 0x80
        return packed

    monkeypatch.setattr(scaled_linear, "pack", wrong)


def _leaves_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = scaled_linear._launch

    def short(tile: Tile, x: Any, x_scale: Any, x_group: int, weight: Any, bias: Any, out: Any, **options: Any) -> Launch:
        return launch(tile, x[:-1], x_scale[:-1], x_group, weight, bias, out[:-1], **options)

    monkeypatch.setattr(scaled_linear, "_launch", short)


def _stores_one_row_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = scaled_linear._launch

    def long(*args: Any, **options: Any) -> Launch:
        made = launch(*args, **options)
        changed = list(made.args)
        changed[9] += 1  # n
        return Launch(made.kernel, made.grid, tuple(changed), made.options)

    monkeypatch.setattr(scaled_linear, "_launch", long)


def _forgets_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = scaled_linear._launch

    def counted(*args: Any, **options: Any) -> Launch:
        options["workspace"].arrived[3] = 1
        return launch(*args, **options)

    monkeypatch.setattr(scaled_linear, "_launch", counted)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_forgets_a_code, "times what is allowed"),
        (_leaves_the_last_row, "times what is allowed"),
        (_stores_one_row_too_many, "between the rows"),
        (_forgets_the_counters, "counters"),
    ],
)
def test_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        check(FEW[0], H100)


@pytest.mark.usefixtures("few_cases")
def test_a_wrong_kernel_ends_with_1_and_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _forgets_a_code(monkeypatch)
    monkeypatch.setattr(timings, "_BOUNDS", {True: 6e-2, False: 2e-2})
    assert run("correctness", out=tmp_path) == 1
    assert "WRONG scaled fp8 m=3 n=40 k=200" in capsys.readouterr().out
    multiply = grouped_linear.launch
    monkeypatch.setattr(grouped_linear, "launch", lambda x, *args, **options: multiply(2 * x, *args, **options))
    assert run("timings", "--formats", "w8a16_fp8", out=tmp_path) == 1
    timing = json.loads((tmp_path / "results.json").read_text())["timings"]["w8a16_fp8 tiny 64x256"]
    assert set(timing["faults"]) == {"octavo"}
    assert set(timing["rows"]["1"]) == {"bf16"}


def test_errors_are_measured_in_what_is_allowed() -> None:
    exact = torch.ones(1, 2, dtype=torch.float64)
    halfway = torch.tensor([[1.0, 1.0 + 2.0**-8]], dtype=torch.float64)
    assert checks._judge(halfway.bfloat16(), halfway, halfway, (0.0, 1.0)) == pytest.approx(1 / 1.01, rel=1e-2)
    with pytest.raises(AssertionError, match=r"\[0, 1\] is 1.02"):
        checks._judge(torch.tensor([[1.0, 1.02]]).bfloat16(), exact, exact, (0.0, 1.0))
    with pytest.raises(AssertionError, match="nan"):
        checks._judge(torch.tensor([[1.0, float("nan")]]), exact, exact, (1.0, 1.0))


def test_guards() -> None:
    inside = Guarded((2, 4), torch.bfloat16, stride=6)
    inside.tensor.zero_()
    inside.check()
    for index in (-1, 4):
        outside = Guarded((2, 4), torch.bfloat16, stride=6)
        torch.as_strided(outside.tensor, (1,), (1,), outside.tensor.storage_offset() + index).fill_(0)
        with pytest.raises(AssertionError, match="fell"):
            outside.check()


def test_a_device_that_fails_ends_the_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it is told by an error or found out behind a part that told its own; an error of another kind is raised."""
    gpu: Any = SimpleNamespace(is_gpu=True)
    done: list[str] = []

    def fails() -> None:
        done.append("fails")
        raise RuntimeError("an illegal memory access")

    ways = [lambda: done.append("first"), fails, lambda: done.append("never")]
    monkeypatch.setattr(correctness, "device_answers", lambda: True)
    with pytest.raises(RuntimeError, match="illegal"):
        command._answers_after(ways, gpu)
    monkeypatch.setattr(correctness, "device_answers", lambda: "fails" not in done[2:])
    assert not command._answers_after(ways, gpu)
    assert done == ["first", "fails"] * 2
    assert "run the same command again, it goes on from here. RuntimeError: an illegal memory access" in capsys.readouterr().out
    assert not command._answers_after([lambda: done.append("told"), fails], gpu)
    assert done[4:] == ["told"]


def test_a_sweep_names_the_fastest_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = (Tile("split", 16, 64, 128, 8, 2), Tile("split", 16, 64, 128, 8, 3))
    monkeypatch.setattr(sweep, "candidates", lambda op, present, m: tiles)
    started: list[int] = []

    def in_turn(calls: dict[str, list[Any]], device: torch.device, *, rounds: int) -> tuple[dict[str, clock.Timing], dict[str, str]]:
        started.append(len(calls))
        return {name: clock.Timing(10.0 if index == 1 else 20.0, 10.0, 0.0) for index, name in enumerate(calls)}, {}

    monkeypatch.setattr(clock, "time_in_turn", in_turn)
    assert run("sweep", "--op", "w4a16", out=tmp_path) == 0
    told = capsys.readouterr().out
    assert '{"max_m": 16, "route": "split", "block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 8, "num_stages": 2' in told
    assert started == [3] * 4
    swept = json.loads((tmp_path / "results.json").read_text())["sweeps"]["w4a16"]
    assert [one["max_m"] for one in swept] == [16, 32, 64, 512]


def test_candidates_hold_what_compiles_and_what_does_not() -> None:
    """Compiled ahead in a process of its own, as the sweep does it on the machine with the GPU."""
    script = (
        "import runpy, sys; sys.argv=['run.py', '--help']\n"
        f"runpy.run_path({str(RUN)!r}, run_name='loaded')\n"
        "from octavo.benchmarks.gpu.sweep import compile_fault\n"
        "from octavo.benchmarks.gpu.contenders import Shape\n"
        "from octavo.kernels.gpu.config import Tile\n"
        "print(compile_fault('fp8', 16, 90, Tile('split', 16, 128, 128, 4, 6), Shape('some', 4096, 4096)))\n"
        "print(compile_fault('fp8', 16, 90, Tile('split', 16, 128, 256, 4, 12), Shape('some', 4096, 4096)))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "None"
    assert "bytes of shared memory" in done.stdout.splitlines()[1]


_BARE = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "pydantic", "zmq", "msgspec", "gguf", "uvicorn", "httptools"}:
            raise ModuleNotFoundError(name)
        if name == "octavo":
            raise ModuleNotFoundError("not installed here")
sys.meta_path.insert(0, Missing())
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path(RUN, run_name="__main__")
"""


def bare(*arguments: str, cwd: Path, missing: str = "fastapi") -> subprocess.CompletedProcess[str]:
    """As on a machine with torch, triton and numpy, and without the package and what only its server needs."""
    script = _BARE.replace("RUN", repr(str(RUN))).replace("fastapi", missing)
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    done = bare(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "torch sees no CUDA device" in done.stderr
    done = bare("report", "--out", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere has no results.json" in done.stderr
    assert "compute-sanitizer" in bare("--help", cwd=tmp_path).stdout
    done = bare(cwd=tmp_path, missing="torch")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "run.py: torch. It wants torch for CUDA" in done.stderr


def test_whole_models_want_none_of_the_servers_packages(tmp_path: Path) -> None:
    """The parts answers and model: what a machine for GPU programs usually lacks is not asked of it."""
    script = _BARE.replace("RUN", repr(str(RUN))).replace('"gguf", ', "").replace('run_name="__main__"', 'run_name="loaded"')
    script += (
        "import octavo.calibration.quantize_run, octavo.runtime.core, octavo.runtime.model_runner, octavo.runtime.tokenizer\nprint('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep"], "--op go together"),
        (["timings", "--op", "fp8"], "--op go together"),
        (["sweep", "--op", "w9a9"], "no tiles for w9a9: the tables have fp8,"),
        (["timings", "--peers", "/no/such"], "/no/such is no folder"),
        (["timings", "--model", "."], "--model . is for the part answers"),
        (["--minutes", "-1"], "--minutes -1 and"),
        (["timing"], "timing: the parts are correctness,"),
    ],
)
def test_what_cannot_be_done_is_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, place=H100) == 2
    assert says in capsys.readouterr().err
