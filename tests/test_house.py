"""The house rules a machine can check: which way imports run, what lies where, what import costs. Each check proves that it bites."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_NAMES = ["Engine", "SamplingParams", "__version__"]
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
SKIPPED = {"build", "dist", "__pycache__", "node_modules"}
# Absolute paths of somebody's machine. They never help another reader.
MACHINE_PATH = re.compile(r"(?<![\w.}-])/(?:root|home/\w+|Users/\w+|work|opt)(?![\w-])")


# What is there


def files_of(root: Path) -> list[Path]:
    """Every file that belongs to the project: what git tracks or would; in an unpacked archive, all but builds and hidden folders."""
    git = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(git, capture_output=True, check=False) if (root / ".git").exists() and shutil.which("git") else None
    if listed is not None and listed.returncode == 0:
        paths = [root / name for name in listed.stdout.decode().split("\0") if name]
    else:
        paths = list(root.rglob("*"))
    own = (path for path in paths if not any(_is_foreign(part) for part in path.relative_to(root).parts[:-1]))
    return sorted(path for path in own if path.is_file() and not path.is_symlink())


def _is_foreign(folder: str) -> bool:
    return folder in SKIPPED or folder.endswith(".egg-info") or (folder.startswith(".") and folder not in {".ci", ".github"})


def python_files(root: Path) -> list[Path]:
    return [path for path in files_of(root) if path.suffix == ".py"]


def module_of(root: Path, path: Path) -> list[str]:
    """`quant/schemes/__init__.py` is octavo.quant.schemes; the parts of that name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ["octavo", *(parts[:-1] if parts[-1] == "__init__" else parts)]


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


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


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
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    relative = [path.relative_to(root) for path in files_of(root) if path.suffix != ".md"]
    folders = {path.parent for path in relative if path.parts[0] in MAY_IMPORT}
    shipped = {folder for folder in folders if folder.parts[0] != "benchmarks" or len(folder.parts) == 1}
    actual = {"octavo", *(".".join(["octavo", *folder.parts]) for folder in shipped)}
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


@pytest.mark.parametrize("module", ["serve.cli", "benchmarks.cli"])
def test_commands_answer_help_without_loading_torch(tmp_path: Path, module: str) -> None:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    assert loaded_by(f"import octavo.{module}", {"torch", "transformers", "numba"}, tmp_path) == []


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
    """All modules but the ones that run when imported and those that need a GPU's compiler."""
    modules = (module_of(ROOT, path) for path in python_files(ROOT) if path.relative_to(ROOT).parts[0] in MAY_IMPORT)
    return [
        ".".join(name) for name in modules if name[-1] != "__main__" and name[1:3] not in (["kernels", "gpu"], ["benchmarks", "kernels"])
    ]


def test_imports_probe_no_device_and_say_nothing(tmp_path: Path) -> None:
    assert probes_at_import(importable_modules(), tmp_path) == []


def test_a_probe_at_import_is_found(tmp_path: Path) -> None:
    write_tree(tmp_path, {"probing.py": "import torch\nHAS_GPU = torch.cuda.is_available()"})
    assert len(probes_at_import(["probing"], tmp_path)) == 1


# What is written


@cache
def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def machine_paths(root: Path) -> list[str]:
    found = []
    for path in files_of(root):
        for number, line in enumerate(text_of(path).splitlines(), 1):
            found += [f"{path.relative_to(root)}:{number}: {match.group()}" for match in MACHINE_PATH.finditer(line)]
    return found


def test_no_file_names_a_path_of_one_machine() -> None:
    assert machine_paths(ROOT) == []


def test_a_path_of_one_machine_is_found(tmp_path: Path) -> None:
    slash = "/"
    wrong = f"cd {slash}home{slash}ann{slash}x\nPATH={slash}opt{slash}bin\n"
    text = f"{wrong}https:{slash}{slash}example.org{slash}work\n{slash}rooted and{slash}or {slash}options\n"
    assert len(machine_paths(write_tree(tmp_path, {"docs/a.md": text}))) == 2


def early_returns(root: Path) -> list[str]:
    """Where a test function returns before it has asserted anything: such a test passes without testing. Skip with a reason instead."""
    found = []
    for path in python_files(root):
        if path.name.startswith("test_"):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                    found += [f"{path.relative_to(root)}:{line}" for line in _returns_before_asserts(node)]
    return found


def _returns_before_asserts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[int]:
    nodes = list(_own_nodes(function))
    first_assert = min((node.lineno for node in nodes if isinstance(node, ast.Assert)), default=sys.maxsize)
    return [node.lineno for node in nodes if isinstance(node, ast.Return) and node.lineno < first_assert]


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def test_no_test_returns_early() -> None:
    assert early_returns(ROOT) == []


def test_an_early_return_is_found(tmp_path: Path) -> None:
    source = """
        def test_a():
            return
        async def test_b(x):
            if x:
                return
            assert x
        def test_c():
            def helper():
                return 1
            assert helper()
            return
    """
    assert early_returns(write_tree(tmp_path, {"tests/test_a.py": source})) == ["tests/test_a.py:3", "tests/test_a.py:6"]


# What the documents tell people to type


def documented_commands(root: Path) -> Iterator[tuple[Path, str]]:
    """Lines of fenced blocks that run make, octavo or serve, with continuation lines joined and prompts and comments cut."""
    for path in files_of(root):
        if path.suffix == ".md":
            for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text_of(path), re.MULTILINE | re.DOTALL):
                for line in block.replace("\\\n", " ").splitlines():
                    command = re.sub(r"\s#\s.*", "", line).strip().removeprefix("$ ")
                    if re.match(r"(?:\.venv/bin/)?(?:make|octavo|serve)\s", command):
                        yield path, command.removeprefix(".venv/bin/")


def wrong_commands(root: Path) -> list[str]:
    """Documented commands whose make target, subcommand or flag does not exist."""
    faults = []
    for path, command in documented_commands(root):
        if command.startswith("make "):
            targets = set(re.findall(r"^([\w.-]+):(?!=)", text_of(root / "Makefile"), re.MULTILINE))
            words = [word for word in re.sub(r"\w+=(\"[^\"]*\"|\S*)", "", command).split()[1:] if not word.startswith("-")]
            faults += [f"{path.relative_to(root)}: make has no target {word}" for word in words if word not in targets]
            serve_options = re.search(r"ARGS=\"([^\"]*)\"", command)
            if serve_options and "serve" in words:
                faults += _wrong_flags(path.relative_to(root), ("serve",), serve_options[1].split())
        else:
            words = command.split()[1:] if command.startswith("octavo") else command.split()
            subcommand = tuple(words[: 2 if words[0] == "bench" else 1])
            faults += _wrong_flags(path.relative_to(root), subcommand, words[len(subcommand) :])
    return faults


def _wrong_flags(path: Path, subcommand: tuple[str, ...], words: list[str]) -> list[str]:
    code, known = help_of(subcommand)
    if code != 0:
        return [f"{path}: `octavo {' '.join(subcommand)} --help` fails: {known}"]
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    return [
        f"{path}: `octavo {' '.join(subcommand)}` has no flag {flag}" for flag in sorted(flags - set(re.findall(r"--[a-z][\w-]*", known)))
    ]


@cache
def help_of(subcommand: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and text of the subcommand's --help, for bare `octavo --help` or `octavo --version` that of octavo itself."""
    words = [word for word in subcommand if not word.startswith("-")]
    done = subprocess.run([sys.executable, "-m", "octavo", *words, "--help"], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_documented_commands_exist() -> None:
    assert {command.split()[0] for _, command in documented_commands(ROOT)} >= {"make", "octavo"}
    assert wrong_commands(ROOT) == []


def test_wrong_commands_are_found(tmp_path: Path) -> None:
    document = """
        ```sh
        make serve
        make lunch   # no such thing
        make serve ARGS="--port 1 --prot 2"
        octavo bench serving \\
            --concurrency 4 --no-such-flag
        octavo cook --slowly
        octavo --version
        pip install anything
        ```
    """
    faults = wrong_commands(write_tree(tmp_path, {"README.md": document, "Makefile": "serve:\n\techo\n"}))
    assert [fault.split(": ", 1)[1].split(" fails")[0] for fault in faults] == [
        "make has no target lunch",
        "`octavo serve` has no flag --prot",
        "`octavo bench serving` has no flag --no-such-flag",
        "`octavo cook --help`",
    ]
