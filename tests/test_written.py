"""The house rules on what is written: no path of one machine, no test that returns early, no documented command that does not exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .house import ROOT, files_of, python_files, write_tree

# Absolute paths of somebody's machine. They never help another reader.
MACHINE_PATH = re.compile(r"(?<![\w.}-])/(?:root|home/\w+|Users/\w+|work|opt)(?![\w-])")


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
            subcommand = tuple(words[: 2 if words[0] in ("bench", "kernels") else 1])
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
