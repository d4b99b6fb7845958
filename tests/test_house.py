"""The house rules a machine can check: which way imports run, what lies where, what import costs. Each check proves that it bites."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from .house import ROOT, files_of, module_of, python_files, write_tree

PUBLIC_NAMES = ["Engine", "EvalResult", "QuantizeResult", "Recipe", "SamplingParams", "__version__", "evaluate", "quantize"]
ROOT_FILES = {"__init__.py", "__main__.py", "launch_server.py"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "quant": {"kernels"},
    "runtime": {"quant", "kernels"},
    "serve": {"runtime"},
    "calibration": {"quant", "kernels"},
    "benchmarks": {"kernels", "quant", "runtime", "serve", "calibration"},
}
FOLDERS = {*MAY_IMPORT, "tests"}


# Which way imports run


def imported_names(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, wherever in it: relative ones resolved, import_module(literal) too."""
    package = module_of(root, path)[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def wrong_imports(root: Path) -> list[str]:
    """Every import against the law, as `file:line: what`."""
    found = []
    for path in python_files(root):
        place = path.relative_to(root)
        for line, name in imported_names(root, path):
            fault = _fault(place, name)
            if fault:
                found.append(f"{place}:{line}: {fault}")
    return found


def _fault(place: Path, name: str) -> str | None:
    own, target = place.parts[0] if len(place.parts) > 1 else "", name.split(".")
    if target[0] in FOLDERS:
        return f"bare `{name}` would load a second copy: import octavo.{name}, inside the package relatively"
    if target[0] != "octavo" or own not in {"", *MAY_IMPORT}:
        return None
    part = target[1] if len(target) > 1 else ""
    if part not in FOLDERS:  # the root itself: version and public names
        if own == "calibration" or (own != "kernels" and part == "__version__") or own in {"", "benchmarks"}:
            return None
        return f"{own} must not import {name}"
    if own == "":
        allowed = part not in {"benchmarks", "tests"} or (str(place) == "__main__.py" and name.startswith("octavo.benchmarks.cli"))
        return None if allowed else f"only the bench command in __main__.py imports benchmarks, and nothing imports tests: {name}"
    return None if part == own or part in MAY_IMPORT[own] else f"{own} must not import {name}"


def test_imports_run_one_way() -> None:
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("kernels/a.py", "from ..quant import schemes"),
        ("kernels/cpu/a.py", "from ... import __version__"),
        ("kernels/a.py", "import octavo.quant.schemes"),
        ("quant/schemes/a.py", "from ...runtime.engine import Engine"),
        ("quant/__init__.py", "from ..runtime import engine"),
        ("runtime/a.py", "def f():\n    from ..serve.app import app"),
        ("runtime/a.py", "import importlib\nimportlib.import_module('octavo.serve.app')"),
        ("serve/a.py", "from ..quant.checkpoint import reader"),
        ("serve/a.py", "from octavo import Engine"),
        ("serve/a.py", "from octavo import quant"),
        ("calibration/a.py", "from ..runtime.engine import Engine"),
        ("runtime/a.py", "from ..benchmarks import cli"),
        ("launch_server.py", "from .benchmarks.cli import main"),
        ("__main__.py", "from .benchmarks.serving import run_load"),
        ("__main__.py", "from .tests import x"),
        ("tests/a.py", "import quant"),
        ("runtime/a.py", "from kernels.cpu import attention"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, place: str, source: str) -> None:
    assert len(wrong_imports(write_tree(tmp_path, {place: source}))) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("kernels/cpu/a.py", "from ..attention import attention\nimport torch"),
        ("quant/schemes/a.py", "from ...kernels.linear import linear\nfrom . import b"),
        ("runtime/a.py", "from ..quant import schemes\nfrom .. import __version__"),
        ("serve/a.py", "from ..runtime.client import EngineClient"),
        ("calibration/a.py", "from octavo import Engine\nfrom ..quant.checkpoint import reader"),
        ("benchmarks/a.py", "from ..serve.app import app"),
        ("__main__.py", "from .benchmarks.cli import main\nfrom .serve.cli import main as serve"),
        ("tests/a.py", "import octavo.runtime.engine\nfrom octavo.quant import schemes"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, place: str, source: str) -> None:
    assert wrong_imports(write_tree(tmp_path, {place: source})) == []


# What lies where


def misplaced(root: Path) -> list[str]:
    """Files and folders that the layout does not allow."""
    files = [path.relative_to(root) for path in files_of(root)]
    faults = [f"{path}: the root holds {sorted(ROOT_FILES)} alone; it would land in the wheel" for path in files if _is_stray(path)]
    faults += [f"{path}: breaks transformers next to Hugging Face's kernels package" for path in files if _is_kernels_init(path)]
    homeless = {folder for path in files for folder in path.parents if folder.name in {"utils", "util", "common", "helpers"}}
    return faults + [f"{folder}: a helper lives with its owner" for folder in sorted(homeless)]


def _is_stray(path: Path) -> bool:
    return len(path.parts) == 1 and path.suffix == ".py" and path.name not in ROOT_FILES


def _is_kernels_init(path: Path) -> bool:
    return path.parts[0] == "kernels" and path.name == "__init__.py"


def package_list_faults(root: Path) -> list[str]:
    """Where `packages` in pyproject.toml differs from the folders that hold modules or data. Micro-benchmarks do not ship."""
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(setup["packages"])
    elsewhere = {folder: name for name, folder in setup.get("package-dir", {}).items()}  # a folder that is installed under another name
    relative = [path.relative_to(root) for path in files_of(root) if path.suffix != ".md"]
    folders = {path.parent for path in relative if path.parts[0] in MAY_IMPORT}
    shipped = {folder for folder in folders if folder.parts[0] != "benchmarks" or len(folder.parts) == 1}
    actual = {"octavo", *(elsewhere.get(folder.as_posix()) or ".".join(["octavo", *folder.parts]) for folder in shipped)}
    return sorted([f"{name}: not listed" for name in actual - listed] + [f"{name}: listed, but empty" for name in listed - actual])


def test_everything_lies_in_its_place() -> None:
    assert misplaced(ROOT) == []


@pytest.mark.parametrize("place", ["stray.py", "kernels/__init__.py", "kernels/cpu/__init__.py", "runtime/utils/a.py", "common/a.py"])
def test_a_misplaced_file_is_found(tmp_path: Path, place: str) -> None:
    assert len(misplaced(write_tree(tmp_path, {place: "", "runtime/engine.py": "", "__main__.py": ""}))) == 1


def test_the_package_list_is_the_tree() -> None:
    assert package_list_faults(ROOT) == []


def test_a_wrong_package_list_is_found(tmp_path: Path) -> None:
    listed = '[tool.setuptools]\npackages = ["octavo", "octavo.quant", "octavo.serve"]\n'
    files = {"pyproject.toml": listed, "quant/a.py": "", "kernels/configs/a.json": "{}", "benchmarks/kernels/bench_a.py": ""}
    assert package_list_faults(write_tree(tmp_path, files)) == ["octavo.kernels.configs: not listed", "octavo.serve: listed, but empty"]


# What could run somebody else's code


_RUNS_CODE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
_RUNS_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "np.load"}
_RUNS_METHODS = {"recv_pyobj", "send_pyobj"}


def code_runners(root: Path) -> list[str]:
    """Where the package unpickles or evaluates: data from a socket, a checkpoint or a request must stay data."""
    found = []
    for path in python_files(root):
        if path.relative_to(root).parts[0] == "tests":
            continue
        for line, name in imported_names(root, path):
            if name.split(".")[0] in _RUNS_CODE:
                found.append(f"{path.relative_to(root)}:{line}: {name}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in _RUNS_CALLS or called.rsplit(".", 1)[-1] in _RUNS_METHODS:
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {called}")
    return found


def test_nothing_runs_code_out_of_data() -> None:
    assert code_runners(ROOT) == []


@pytest.mark.parametrize("source", ["import pickle", "from marshal import loads", "eval('1')", "torch.load(f)", "sock.recv_pyobj()"])
def test_what_would_run_code_is_found(tmp_path: Path, source: str) -> None:
    assert len(code_runners(write_tree(tmp_path, {"serve/a.py": source, "tests/a.py": source, "serve/b.py": "model.eval()"}))) == 1


# What import costs


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def loaded_by(statement: str, names: Iterable[str], folder: Path) -> list[str]:
    """Which of `names` are in sys.modules after `statement`, in a fresh process."""
    done = run_python(f"{statement}\nimport sys\nprint(*(name for name in {sorted(names)!r} if name in sys.modules))", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_octavo_is_light(tmp_path: Path) -> None:
    assert loaded_by("import octavo", {"torch", "numpy", "transformers", "numba", "octavo.runtime", "octavo.serve"}, tmp_path) == []


@pytest.mark.parametrize(
    "module", ["serve.cli", "serve.kernels_cli", "benchmarks.cli", "calibration.eval_cli", "calibration.quantize_flags"]
)
def test_commands_answer_help_without_loading_torch(tmp_path: Path, module: str) -> None:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    assert loaded_by(f"import octavo.{module}", {"torch", "transformers", "numba", "triton"}, tmp_path) == []


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    assert loaded_by("import octavo, numpy", {"torch", "numpy"}, tmp_path) == ["numpy"]


def test_public_names(tmp_path: Path) -> None:
    done = run_python("import octavo\nprint(octavo.__all__)\nfor name in octavo.__all__: getattr(octavo, name)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == PUBLIC_NAMES


# Imports every module given, and names those whose own code asked torch about CUDA meanwhile. Callers inside torch do not count.
PROBE = """
import importlib, sys, torch
def watch(owner, name):
    def asked(*args, **options):
        frame = sys._getframe(1)
        while frame and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame and frame.f_globals.get("__name__", "").split(".")[0] in {"octavo", "probing"}:
            print(f"{frame.f_code.co_filename}:{frame.f_lineno}: torch.cuda.{name}")
        return original(*args, **options)
    original = getattr(owner, name)
    setattr(owner, name, asked)
for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties", "init"):
    watch(torch.cuda, name)
for module in MODULES:
    importlib.import_module(module)
"""


def probes_at_import(modules: list[str], folder: Path) -> list[str]:
    done = run_python(f"MODULES = {modules!r}\n{PROBE}", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "imports are silent"
    return done.stdout.splitlines()


def importable_modules() -> list[str]:
    """All modules but the ones that run when imported and those that need a GPU's compiler, or Ray, which few have."""
    modules = (module_of(ROOT, path) for path in python_files(ROOT) if path.relative_to(ROOT).parts[0] in MAY_IMPORT)
    return [
        ".".join(name)
        for name in modules
        if not name[-1].startswith(("__main__", "ray_")) and name[1:3] not in (["kernels", "gpu"], ["benchmarks", "kernels"])
    ]


def test_imports_probe_no_device_and_say_nothing(tmp_path: Path) -> None:
    assert probes_at_import(importable_modules(), tmp_path) == []


def test_a_probe_at_import_is_found(tmp_path: Path) -> None:
    write_tree(tmp_path, {"probing.py": "import torch\nHAS_GPU = torch.cuda.is_available()"})
    assert len(probes_at_import(["probing"], tmp_path)) == 1
