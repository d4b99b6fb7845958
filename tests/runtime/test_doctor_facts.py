"""What `octavo doctor` reads of the machine and the packages, from files and versions that other machines have."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.runtime import doctor, doctor_machine, doctor_packages


def test_the_containers_share_of_the_cpu(tmp_path: Path) -> None:
    assert doctor_machine._cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor_machine._cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert doctor_machine._cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert doctor_machine._cpu_quota(tmp_path) == 2.5


def test_names_out_of_proc(tmp_path: Path) -> None:
    assert doctor_machine._model_name(tmp_path / "none") is None
    assert doctor_machine._driver_version(tmp_path / "none") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Intel(R) Xeon(R) 6962P\n")
    assert doctor_machine._model_name(tmp_path / "cpuinfo") == "Intel(R) Xeon(R) 6962P"
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue",
        "NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  R",
    ):
        (tmp_path / "version").write_text(text)
        assert doctor_machine._driver_version(tmp_path / "version") == "550.54.15"


def test_missing_and_old_requirements_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_packages.requirement_faults() == []
    monkeypatch.setattr(doctor_packages, "_requirements", lambda: [("no-such-package", "1.2"), ("numpy", "99.0"), ("torch", "2.11")])
    missing, old = doctor_packages.requirement_faults()
    assert missing == "no-such-package is not installed: pip install 'no-such-package>=1.2'"
    assert old.startswith("numpy ")
    assert "is too old: pip install 'numpy>=99.0'" in old


def test_requirements_are_those_of_the_project_without_extras() -> None:
    names = dict(doctor_packages._requirements())
    assert names["torch"] == "2.11"
    assert {"numba", "fastapi", "pyzmq"} <= set(names)
    assert "pytest" not in names


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("print()", None),
        ("print('is off by 1')", "is off by 1"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "x fails: ImportError: undefined symbol: _ZN3c10"),
        ("import os; os._exit(3)", "x fails: exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "x fails: signal 11"),
    ],
)
def test_a_package_may_fail_in_any_way(code: str, fault: str | None) -> None:
    assert doctor_packages._fault_of(code, "x") == fault


def test_where_kernels_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "k.nbc").touch()
    assert doctor._cache(tmp_path) == doctor.KernelCache(str(tmp_path), True, 1)
    assert doctor._cache(tmp_path / "later" / "made") == doctor.KernelCache(str(tmp_path / "later" / "made"), True, 0)
    assert not (tmp_path / "later").exists()
    (tmp_path / "file").touch()
    assert not doctor._cache(tmp_path / "file" / "below").is_writable


def test_a_kernel_that_fails_is_a_problem_with_its_reason() -> None:
    trial = doctor.Trial("cpu_int8", "int8 per channel, inputs int8", 1.0, "KernelFault: off")
    choice = doctor.Choice("fp8", None, False, (("cpu_int8", "takes int8"),))
    device = doctor.DeviceKernels("cpu", "cpu", ("cpu_int8",), (choice,), (trial,))
    cache = doctor.KernelCache("cache", True, 0)
    assert doctor._problems(device, cache) == [
        "kernel cpu_int8 fails on int8 per channel, inputs int8: KernelFault: off",
        "no kernel takes fp8 on cpu",
    ]
    assert doctor._problems(doctor.DeviceKernels("cuda", "sm_75", (), (), (), "no linear kernels for sm_75"), cache) == [
        "no linear kernels for sm_75: serve with --device cpu"
    ]
    (told,) = doctor._problems(device, doctor.KernelCache("cache", False, 0))
    assert told == "compiled CPU kernels cannot be kept in cache: set OCTAVO_CACHE_DIR to a folder that can be written to"
