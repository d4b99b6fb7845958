"""What the tests of the house rules share: which files are the project's, and how to write a small tree that breaks a rule."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"build", "dist", "__pycache__", "node_modules"}


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


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root
