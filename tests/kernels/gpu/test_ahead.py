"""Kernels compiled for GPUs that are not here: every entry of every table, the folder that a server finds them in, what is refused.

Kernels of this process are interpreted, so those that are compiled are compiled in others, one for an architecture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import ahead
from octavo.kernels.gpu.ahead import CannotCompile, target
from octavo.kernels.gpu.config import entries, operations, table_architectures
from octavo.kernels.gpu.device import DEVICES
from octavo.kernels.gpu.inspection import Expected, KernelReport, faults
from octavo.kernels.gpu.launch import Launch, collecting

HAS_C_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
# Architectures with a table, and those that the nearest table below serves.
ARCHITECTURES = sorted({*table_architectures(), *DEVICES})
# What the short run compiles of them. All of it takes a quarter of an hour on two cores.
SHORT = {
    80: ("int8", "w4a16", "w8a16_fp8"),
    89: ("fp8",),
    90: ("fp8", "fp8_grouped", "int8", "w4a16", "w8a16_fp8", "w4a8"),
    100: ("fp8",),
}


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "0", **variables}


def run_python(code: str, **variables: str) -> Any:
    """What `code` prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Every entry of every table


def _ops(arch: int, *, is_long: bool) -> tuple[str, ...]:
    return tuple(op for op in operations(arch) if (op not in SHORT.get(arch, ())) == is_long)


def _cases() -> Iterator[Any]:
    for arch in ARCHITECTURES:
        for is_long in (False, True):
            for op in _ops(arch, is_long=is_long):
                for most, tile in entries(arch, op):
                    marks = [pytest.mark.long] if is_long else []
                    yield pytest.param(arch, is_long, op, most, id=f"sm_{arch}-{op}-{most or 'more'}-{tile.route}", marks=marks)


class Reports:
    """`octavo kernels report`, once for an architecture, two at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._found: dict[tuple[int, bool], Future[list[dict[str, Any]]]] = {}

    def of(self, arch: int, *, is_long: bool) -> list[dict[str, Any]]:
        if (arch, is_long) not in self._found:
            ops = {other: _ops(other, is_long=is_long) for other in ARCHITECTURES}
            for other in sorted(filter(ops.get, ops), key=lambda other: -len(ops[other])):
                self._found[other, is_long] = self._pool.submit(self._report, other, ops[other])
        return self._found[arch, is_long].result()

    @staticmethod
    def _report(arch: int, ops: tuple[str, ...]) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "octavo", "kernels", "report", "--json", "--arch", f"sm_{arch}"]
        command += [word for op in ops for word in ("--op", op)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr[-3000:]
        assert done.stdout, done.stderr[-3000:]
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def reports() -> Iterator[Reports]:
    found = Reports()
    yield found
    found.close()


@pytest.mark.parametrize(("arch", "is_long", "op", "most"), list(_cases()))
def test_every_entry_of_the_tables_is_sound(reports: Reports, arch: int, is_long: bool, op: str, most: int | None) -> None:
    rows = [row for row in reports.of(arch, is_long=is_long) if (row["op"], row["max_m"]) == (op, most)]
    assert rows
    assert [fault for row in rows for fault in row["faults"]] == []


ATTENTION = """
    import json
    import torch
    from octavo.kernels.gpu import attention_plan, inspection, paged_attention, rope_store
    from octavo.kernels.gpu.ahead import target
    from octavo.kernels.gpu.device import nearest
    from octavo.kernels.gpu.workspace import Workspace
    from octavo.kernels.pages import row_width, split_rows, storage_dtype

    meta, device = torch.device("meta"), nearest(ARCH)
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=meta)
    found = {}
    for dim, heads in SIZES:
        for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            with target(ARCH) as compiler:
                pages = empty(100, 8, 16, row_width(dim, kind), dtype=storage_dtype(kind))
                pages = paged_attention.pages_of(pages, pages, kind)
                starts, contexts, table = (empty(*shape, dtype=torch.int32) for shape in ((65,), (64,), (64, 99)))
                plan = paged_attention.plan_step(
                    starts, contexts, num_tokens=80, num_heads=8 * heads, num_kv_heads=8, head_dim=dim, kv_dtype=kind
                )
                q = empty(80, 8 * heads, dim)
                for items, shape, own in (
                    (plan.splits, plan.split_shape, False), (plan.tiles, plan.tile_shape, False), (plan.tiles, plan.tile_shape, True)
                ):
                    paged_attention.launch(
                        q, pages, starts, contexts, table, items, shape, scale=0.1, out=q, device=device, workspace=Workspace(meta),
                        deterministic=own,
                    )()
                qkv, ids = empty(80, (8 * heads + 16) * dim), empty(80, dtype=torch.int64)
                rope_store.launch(qkv, ids, ids, empty(999, 2, dim // 2, dtype=torch.float32), pages, num_heads=8 * heads)()
            for compiled in compiler.compiled.values():
                report = inspection.inspect(compiled)
                expected = inspection.Expected(wide_loads=report.name != "plan")
                told = list(inspection.faults(report, expected))
                units = [name.partition(".")[0] for name in report.matrix_instructions]
                own = compiled.options.get("OWN_SCALES")
                found[f"{dim} {heads} {kind} {report.name} {own} {report.tile}"] = (told, units)
    print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        (90, ((128, 8),)),
        pytest.param(80, ((128, 4),), marks=pytest.mark.long),
        pytest.param(80, ((64, 3), (96, 1), (256, 2)), marks=pytest.mark.long),
        pytest.param(89, ((64, 1), (128, 4), (256, 2)), marks=pytest.mark.long),
        pytest.param(90, ((64, 3), (80, 4), (96, 1), (256, 2)), marks=pytest.mark.long),
        pytest.param(100, ((64, 1), (128, 4), (256, 2)), marks=pytest.mark.long),
    ],
)
def test_attention_is_sound(arch: int, sizes: tuple[tuple[int, int], ...]) -> None:
    """No spills, 16-byte loads, and for prompts the units of warp groups where there are some."""
    found = run_python(ATTENTION.replace("ARCH", str(arch)).replace("SIZES", repr(sizes)))
    assert {name: faults for name, (faults, _) in found.items() if faults} == {}
    attends = {name: units for name, (_, units) in found.items() if " attend " in name}
    assert len(attends) == 3 * 3 * len(sizes)
    for name, units in attends.items():
        is_prompt = int(name.split()[-1].partition("x")[0]) >= 64
        assert units, name
        if arch == 90:
            assert units[0] == ("HGMMA" if is_prompt else "HMMA"), (name, units)


SAMPLING = """
    import json
    import torch
    from octavo.kernels.gpu import inspection, sampling
    from octavo.kernels.gpu.ahead import target
    from octavo.kernels.gpu.workspace import Workspace

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")
    found = {}
    logits, floats, ints = empty(64, 128256), empty(64), empty(64, dtype=torch.int32)
    tokens, workspace = empty(64, dtype=torch.int64), Workspace(torch.device("meta"))
    with target(ARCH) as compiler:
        for heat, k, p in ((None, None, None), (floats, None, None), (floats, ints, floats)):
            for launch in sampling.launches(logits, heat, k, p, floats, empty(64, dtype=torch.float64), tokens, workspace):
                launch()
        sampling.penalise(logits, empty(9, 128256, dtype=torch.int32), ints, ints, empty(64, 3))()
    for compiled in compiler.compiled.values():
        report = inspection.inspect(compiled)
        found[f"{report.name} {sorted(compiled.options.items())}"] = list(inspection.faults(report, inspection.Expected(wide_loads=True)))
    print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.long), pytest.param(120, marks=pytest.mark.long)])
def test_sampling_is_sound(arch: int) -> None:
    found = run_python(SAMPLING.replace("ARCH", str(arch)))
    assert len(found) == 13
    assert {name: faults for name, faults in found.items() if faults} == {}


# What is wrong with a kernel is found


def report(**changes: Any) -> KernelReport:
    sound = {
        "name": "split", "arch": 90, "tile": "", "registers": 66, "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0,
        "shared_bytes": 1024, "tensor_memory_columns": 0, "num_warps": 4, "num_instructions": 9,
        "instructions": Counter({"QGMMA.64x16x32.F32.E4M3.E4M3": 4, "LDGSTS.128": 4, "F2FP": 1}),
    }  # fmt: skip
    return KernelReport(**{**sound, **changes})


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        (report(spill_store_bytes=16), Expected(), "spills registers: 16 bytes stored, 0 loaded"),
        (report(shared_bytes=232_449), Expected(), "takes 232449 bytes of shared memory, sm_90 has 232448"),
        (report(arch=89, shared_bytes=110_000), Expected(), "sm_89 has 101376"),
        (report(tensor_memory_columns=1024), Expected(), "columns of tensor memory"),
        (report(), Expected(("HGMMA", "HMMA")), "multiplies by QGMMA.64x16x32.F32.E4M3.E4M3, not by HGMMA or HMMA"),
        (report(instructions=Counter({"LDG.128": 1})), Expected(("QGMMA",)), "multiplies by no matrix instruction"),
        (report(), Expected(never=("I2F", "F2FP")), "has 1 F2FP"),
        (report(instructions=Counter({"LDG.32": 4})), Expected(wide_loads=True), "loads nothing 16 bytes wide"),
    ],
)
def test_faults_are_told(found: KernelReport, expected: Expected, words: str) -> None:
    (fault,) = faults(found, expected)
    assert words in fault


def test_a_sound_kernel_has_no_fault() -> None:
    assert faults(report(), Expected(("UTCQMMA", "QGMMA"), ("HGMMA", "F2F"), wide_loads=True)) == ()
    assert faults(report(instructions=Counter({"UTMALDG": 1})), Expected(wide_loads=True)) == ()


# Where launches go, and what cannot be compiled


def test_launches_are_collected_and_not_run() -> None:
    launch, taken = Launch(None, (1,), (), {}), []
    with collecting(taken.append):
        launch()
    assert taken == [launch]
    with pytest.raises(TypeError):
        launch()


def test_interpreted_kernels_cannot_be_compiled() -> None:
    with pytest.raises(CannotCompile, match=r"TRITON_INTERPRET=1 .* unset it"), target(90):
        pass


def test_a_missing_triton_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotCompile, match="pip install triton"), target(90):
        pass


def test_an_old_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_70 is older than sm_80"), target(70):
        pass


_A_LAUNCH = """
import json, sys, torch, triton
from octavo.kernels.gpu import ahead, inspection, scaled_linear
from octavo.kernels.gpu.config import Tile
from octavo.kernels.gpu.device import nearest
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.scaled_linear import ScaledWeight

def launch(arch, tile, *, device="meta", m=16, n=1024, k=4096):
    codes = torch.zeros(n, k, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    weight = scaled_linear.pack(ScaledWeight(codes, torch.zeros(n, 1, device=device), 1, k))
    x, scale = torch.zeros(m, k, dtype=torch.uint8, device=device).view(codes.dtype), torch.zeros(m, 1, device=device)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    return scaled_linear._launch(tile, x, scale, k, weight, None, out, device=nearest(arch), workspace=Workspace(torch.device(device)))

SOUND, LARGE = Tile("split", 16, 128, 128, 4, 4), Tile("split", 128, 256, 64, 4, 3)
"""


def test_a_process_compiles_for_one_architecture(tmp_path: Path) -> None:
    told = run_python(
        _A_LAUNCH
        + """
from triton.runtime import driver
faults = {}
with ahead.target(80) as compiler:
    try:
        launch(80, SOUND)()
    except ahead.CannotCompile as error:
        faults["fp8"] = str(error)
try:
    with ahead.target(90):
        pass
except ahead.CannotCompile as error:
    faults["second"] = str(error)
print(json.dumps({**faults, "compiled": len(compiler.compiled), "driver": str(driver._active)}))
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert re.search(r"split with .*BLOCK_M=16.* does not compile for sm_80: .*fp8e4nv", told["fp8"])
    assert told["second"] == "this process has compiled for sm_80: compile for sm_90 in another one"
    assert (told["compiled"], told["driver"]) == (0, "None")


def test_spills_and_instructions_are_read_from_the_binary(tmp_path: Path) -> None:
    told = run_python(
        _A_LAUNCH
        + """
from dataclasses import replace
with ahead.target(90) as compiler:
    for tile in (SOUND, LARGE, SOUND):
        launch(90, tile, m=128)()
kernels = list(compiler.compiled.values())
cached = [replace(kernel, log="") for kernel in kernels]  # as from the cache, where ptxas did not run
print(json.dumps([[r.tile, r.registers, r.stack_bytes, r.spill_store_bytes, r.count("QGMMA"), r.count("STL"), r.num_instructions,
                   r.shared_bytes, r.num_warps, r.wide_loads] for r in map(inspection.inspect, (*kernels, *cached))]))
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    sound, large = told[:2]
    assert sound[0] == "16x128x128"
    assert sound[3:6] == [0, 8, 0]
    assert large[1] == 255
    assert min(large[2:6]) > 0
    assert all(16 < numbers[1] < 256 and numbers[6] > 100 and numbers[7] > 0 and numbers[8] == 4 and numbers[9] > 0 for numbers in told)
    assert told[2:] == [sound, large]


# The folder that a server finds its kernels in


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def hollow_libcuda(folder: Path) -> Path:
    """A CUDA driver that can be loaded and does nothing."""
    from triton.backends.nvidia import driver

    text = "".join(Path(driver.dirname, name).read_text() for name in ("driver.c", "driver.py"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", text)))
    (folder / "libcuda.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "libcuda.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.mark.skipif(not HAS_C_COMPILER, reason="launchers are C modules, and there is no C compiler here")
def test_a_server_finds_what_was_compiled_ahead_and_compiles_nothing(tmp_path: Path) -> None:
    libcuda, cache = hollow_libcuda(tmp_path), tmp_path / "cache"
    variables = {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(libcuda)}
    code = (
        _A_LAUNCH
        + """
from octavo.kernels.gpu.launchers import build_launchers
with ahead.target(90) as compiler:
    launch(90, SOUND)()
    launch(90, Tile("stream", 128, 128, 128, 8, 3), m=2048)()
    print(json.dumps([list(compiler.compiled), build_launchers(compiler.compiled.values())]))
"""
    )
    compiled = run_python(code, **variables)
    hashes, num_launchers = compiled
    assert len(hashes) == 2
    assert num_launchers >= 1
    before = tree(cache)
    assert run_python(code, **variables, PATH=str(tmp_path)) == compiled  # again, where there is no compiler
    assert tree(cache) == before
    for path in (cache, *cache.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    # Triton's own driver now, which answers three questions without a GPU; tensors with addresses; no C compiler.
    found = run_python(
        _A_LAUNCH
        + """
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
hits = []
knobs.compilation.listener = lambda *, cache_hit, **told: hits.append(cache_hit)
driver = CudaDriver()
driver.get_current_device, driver.get_current_stream = lambda: 0, lambda index: 0
driver.get_device_capability = lambda index: (9, 0)
triton.runtime.driver.set_active(driver)
kernels = [launch(90, SOUND, device="cpu").compile(), launch(90, Tile("stream", 128, 128, 128, 8, 3), device="cpu", m=2048).compile()]
for kernel in kernels:
    driver.launcher_cls(kernel.src, kernel.metadata)
print(json.dumps([[kernel.hash for kernel in kernels], hits]))
""",
        LD_LIBRARY_PATH=str(libcuda),
        CC="false",
        **variables,
    )
    assert found == [hashes, [True, True]]
    assert tree(cache) == before


def test_catalogue_builds_on_nothing() -> None:
    """The catalogue's launches hold no data, however large."""
    from octavo.kernels.gpu.catalogue import table_entries
    from octavo.kernels.gpu.device import nearest

    entry = next(iter(table_entries(90, ("fp8",))))
    for launch in entry.launches(nearest(90)):
        assert {arg.device.type for arg in launch.args if isinstance(arg, torch.Tensor)} == {"meta"}
