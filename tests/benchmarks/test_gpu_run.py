"""benchmarks/gpu/run.py under the interpreter: the whole command on the CPU, what it finds, and that a bare checkout is enough."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from octavo.benchmarks.gpu import attention_timings, checks, clock, correctness, model_timings, sweep, timings
from octavo.benchmarks.gpu.attention_timings import Step
from octavo.benchmarks.gpu.cases import DequantizeCase, GroupedCase, LinearCase, RowsCase, ScaledCase, all_cases
from octavo.benchmarks.gpu.checks import Place, check
from octavo.benchmarks.gpu.command import main
from octavo.benchmarks.gpu.contenders import Shape
from octavo.benchmarks.gpu.goals import verdicts
from octavo.benchmarks.gpu.guarded import Guarded
from octavo.benchmarks.gpu.model_timings import LLAMA_8B, PEER, Load, Variant, idle_share, time_peer
from octavo.benchmarks.gpu.record import Budget
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


@pytest.mark.skipif(not torch_scales_rows(), reason="this torch's _scaled_mm takes one scale for all rows on the CPU")
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
    assert not any(timing["faults"] for timing in results["timings"].values())
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


def _timing(kind: str, us: dict[str, float], m: int = 16) -> dict[str, Any]:
    rows = {str(m): {name: {"us": value} for name, value in us.items()}}
    weights = dict.fromkeys(us, 100_000_000)
    return {"format": kind, "shape": "some", "n": 10_000, "k": 10_000, "rows": rows, "faults": {}, "weight_bytes": weights}


def test_goals() -> None:
    """100 MB at 2 TB/s are 50 us, and the rows 0.32."""
    ceilings = {"read_bytes": 2e12, "copy_bytes": 2e12, "bf16_flops": 8e14, "fp8_flops": 1.6e15, "int8_flops": None}
    found = {
        "a": _timing("fp8", {"octavo": 55.0, "bf16": 110.0}),
        "b": _timing("fp8", {"octavo": 70.0, "bf16": 110.0}, m=64),
        "c": _timing("w4a16", {"octavo": 60.0, "octavo fp16": 50.0, "marlin": 60.0, "bf16": 110.0}),
        "d": _timing("fp8", {"octavo": 400.0, "_scaled_mm": 440.0}, m=4096),
    }
    by_text = {verdict.goal.text: verdict for verdict in verdicts(found, ceilings)}
    fp8 = next(verdict for text, verdict in by_text.items() if "50 MB" in text)
    assert (fp8.word, fp8.where, fp8.num_values) == ("missed", "some, 64 rows", 2)
    assert fp8.worst == pytest.approx((1e8 + 2 * 64 * 20_000) / 2e12 * 1e6 / 70)
    marlin = next(verdict for text, verdict in by_text.items() if "Marlin" in text)
    assert (marlin.word, marlin.worst) == ("met", pytest.approx(1.2))
    datasheet = next(verdict for text, verdict in by_text.items() if "1,979" in text)
    assert datasheet.worst == pytest.approx(2 * 4096 * 1e8 / 400e-6 / 1979e12)
    assert next(verdict for text, verdict in by_text.items() if text.startswith("W8A16")).word == "untimed"
    assert {verdict.word for verdict in verdicts({}, None)} == {"untimed"}


def test_goals_of_attention() -> None:
    ceilings = {"read_bytes": 3e12, "copy_bytes": 3e12, "bf16_flops": 8e14, "fp8_flops": None, "int8_flops": None}
    decode, prompt = Step(64, 1, 2048), Step(1, 8192, 8192)
    bf16 = decode.bytes_read(torch.bfloat16)
    assert bf16 == 2 * 64 * 2048 * 8 * 128 * 2
    assert prompt.flops == pytest.approx(4 * 32 * 128 * 8192 * 8193 / 2)
    found = {
        "decode": {**vars(decode), "bytes": {"bf16": bf16}, "us": {"bf16": bf16 / 2.7e12 * 1e6, "fp8_e4m3": bf16 / 3.6e12 * 1e6}},
        "prompt": {**vars(prompt), "flops": prompt.flops, "us": {"bf16": prompt.flops / 5e14 * 1e6}},
    }
    bandwidth, rate, fp8 = [verdict for verdict in verdicts({}, ceilings, found) if verdict.goal.of == "attention"]
    assert (bandwidth.word, bandwidth.worst) == ("met", pytest.approx(0.9))
    assert (rate.word, rate.worst) == ("met", pytest.approx(500))
    assert (fp8.word, fp8.worst) == ("missed", pytest.approx(4 / 3))


@pytest.mark.long
def test_models_are_timed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine on the interpreted GPU with a model of one layer, and transformers beside it."""
    config = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 200, "max_position_embeddings": 256}
    options = {"max_total_tokens": 512, "chunked_prefill_size": 64}
    broken = Variant("broken", {**config, "num_attention_heads": 0}, options)
    load = Load(decode=((2, 20),), prefill=(40,), offline=((3, 5, 2),), steps=2)
    out = ["model", "report", "--out", str(tmp_path)]
    assert main(out, place=H100, variants=(Variant("tiny", config, options), broken), load=load) == 1
    assert "broken: " in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["model"]
    assert found["tiny"]["fault"] is None
    assert found["tiny"]["decode"]["2 x 20"]["tokens_s"] == pytest.approx(2 / found["tiny"]["decode"]["2 x 20"]["step_ms"] * 1e3)
    assert 0 < found["tiny"]["decode"]["2 x 20"]["host_ms"] <= found["tiny"]["decode"]["2 x 20"]["step_ms"]
    assert set(found["tiny"]["offline"]) == set(found[PEER]["offline"]) == {"5/2"}
    page = (tmp_path / "README.md").read_text()
    assert "| tiny | decode 2 x 20 |" in page
    assert "| tiny | prefill 40 |" in page
    assert f"| {PEER} | offline 5/2 |" in page
    assert "| broken | " in page
    before = (tmp_path / "results.json").read_text()
    assert main(out, place=H100, variants=(Variant("tiny", config, options), broken), load=load) == 1
    assert json.loads((tmp_path / "results.json").read_text())["model"] == json.loads(before)["model"], "what is known is not timed again"


def test_the_peer_may_write_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps in a thread of its own, where what was made in inference mode cannot be written: transformers 5.17 did that."""
    asked: list[bool] = []

    @contextlib.contextmanager
    def batching(self: Any, **options: Any) -> Iterator[Any]:
        asked.append(torch.is_inference_mode_enabled() or next(self.parameters()).is_inference())
        one = SimpleNamespace(is_finished=lambda: True, generated_tokens=[1, 2])
        yield SimpleNamespace(add_requests=lambda **options: None, get_result=lambda timeout: one)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "continuous_batching_context_manager", batching)
    config = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 200}
    with torch.inference_mode():  # as the parts are run
        *_, found = time_peer(Variant("tiny", config), H100, Load(offline=((3, 5, 2), (2, 5, 2))), Budget(1.0))
    assert (found["fault"], found["unfinished"], set(found["offline"])) == (None, False, {"5/2"})
    assert asked == [False, False]


def test_a_model_that_time_cut_off_is_timed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it had is kept until then, and is no fault; nor is the fault of somebody else's engine ours."""
    ends = [True, False]

    def timed(variant: Variant, *args: Any) -> Iterator[dict[str, Any]]:
        found = {"fault": None, "unfinished": True, "weight_bytes": 1, "decode": {}, "prefill": {"9": {"tokens_s": 2.0}}, "offline": {}}
        yield found
        if not ends.pop():
            return
        found["unfinished"] = False
        yield found

    def fails(*args: Any) -> Iterator[dict[str, Any]]:
        raise RuntimeError("not ours")
        yield

    monkeypatch.setattr(model_timings, "time_variant", timed)
    monkeypatch.setattr(model_timings, "time_peer", fails)
    arguments: dict[str, Any] = {"place": H100, "variants": (Variant("tiny", {}),)}
    assert main(["model", "report", "--out", str(tmp_path)], **arguments) == 0
    assert "timed tiny, not to its end" in capsys.readouterr().out
    page = (tmp_path / "README.md").read_text()
    assert "| tiny | prefill 9 | 2 |" in page
    assert "| tiny | not to its end: run the same command again |" in page
    assert main(["model", "--out", str(tmp_path)], **arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["model"]
    assert (found["tiny"]["unfinished"], found[PEER]["fault"], ends) == (False, "RuntimeError: not ours", [])


def test_what_an_offline_load_will_take() -> None:
    rates = {"prefill": {"1": {"tokens_s": 100.0}, "2": {"tokens_s": 50.0}}, "decode": {"1": {"tokens_s": 10.0}}, "offline": {}}
    assert model_timings._offline_s(rates, 4, 200, 30) == pytest.approx(1.1 * 4 * (2 + 3))
    assert model_timings._offline_s({"prefill": {}, "decode": {}}, 4, 200, 30) == 0


def test_the_idle_share_is_what_no_kernel_covers() -> None:
    assert idle_share([]) == 1.0
    assert idle_share([(0, 4), (1, 2), (5, 8), (7, 10)]) == pytest.approx(0.1)
    assert idle_share([(3, 7)]) == 0.0


def test_goals_of_models() -> None:
    step = {"tokens_s": 310.0, "step_ms": 3.2, "host_ms": 0.4, "idle": 0.02}
    model = {
        "8B fp8": {"fault": None, "decode": {"1 x 512": step, "64 x 2048": {**step, "tokens_s": 1000.0, "idle": 0.05}}, "offline": {}},
        "8B fp8, fp8 KV": {"fault": None, "decode": {"64 x 2048": {**step, "tokens_s": 1400.0}}},
        "8B w4": {"fault": "OutOfMemoryError"},
    }
    found = {verdict.goal.text: verdict for verdict in verdicts({}, None, None, model)}
    words = {text.split(":")[0]: verdict.word for text, verdict in found.items() if verdict.goal.of == "model"}
    assert words["8B fp8, one stream"] == "met"
    assert words["8B w4, one stream"] == "missed"
    assert words["8B fp8, 1000 in and 1000 out"] == "untimed"
    assert words["decoding"] == "missed"
    assert words["decoding over fp8 KV, 64 x 2k"] == "met"


def test_a_70b_is_held_against_what_its_parts_took() -> None:
    """80 layers of 4 x 100 us and 50 us, and 2.1 GB of head at 3 TB/s: 36.7 ms."""
    ceilings = {"read_bytes": 3e12, "copy_bytes": 3e12, "bf16_flops": 8e14, "fp8_flops": None, "int8_flops": None}
    linears = {name: {**_timing("w4a16", {"octavo": 100.0}), "shape": f"70B {name}"} for name in ("qkv", "o", "gate_up", "down")}
    attention = {"decode 16 x 2048": {**vars(Step(16, 1, 2048)), "us": {"bf16": 50.0}, "bytes": {"bf16": 1e9}}}
    step = {"tokens_s": 1.0, "step_ms": 40.0, "host_ms": 0.4, "idle": None}
    model = {"70B w4": {"fault": None, "decode": {"16 x 2048": step, "1 x 512": step}}}
    (verdict,) = [verdict for verdict in verdicts(linears, ceilings, attention, model) if verdict.goal.of == "all"]
    assert (verdict.word, verdict.where, verdict.num_values) == ("met", "16 x 2048", 1)
    assert verdict.worst == pytest.approx((80 * 450 + 2 * 128_256 * 8192 / 3e12 * 1e6) / 40_000)


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
