"""The small C modules with which Triton starts kernels, built ahead for machines without a C compiler. Needs no GPU and no CUDA.

Triton compiles them at first use: `cuda_utils` once, and up to 3.6 a launcher for each signature of a kernel. They call the CUDA driver,
libcuda.so.1, which is there when they are loaded and need not be when they are built: a hollow library of that name does for the linker.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .ahead import Compiled

_LINKAGES = ("ELF", "")  # what platform.architecture() says where there is the command `file`, and where there is not
_CALLS = re.compile(r"\bcu[A-Z]\w+(?=\()")


class CannotBuild(RuntimeError):
    """Launchers cannot be built here; the text has the remedy."""


def build_launchers(kernels: Iterable[Compiled]) -> int:
    """Build what starting `kernels` takes, into the folder that TRITON_CACHE_DIR names; gives how many modules that is.

    What lies there already takes no compiler. Triton 3.9 finds its module only where libcuda.so.1 lies in a usual folder, or in
    TRITON_LIBCUDA_PATH both here and there.
    Raises CannotBuild.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    try:
        return _build_all(kernels, compiler)
    except RuntimeError as error:
        if compiler is not None:
            raise
        raise CannotBuild("there is no C compiler: install gcc, or name one in CC") from error
    except (subprocess.CalledProcessError, OSError) as error:
        raise CannotBuild(f"the C compiler failed ({error}): does it have Python's headers?") from error


def _build_all(kernels: Iterable[Compiled], compiler: str | None) -> int:
    from triton.backends.nvidia import driver
    from triton.runtime import build

    shared = Path(driver.dirname, "driver.c").read_text(encoding="utf-8")
    has_own = hasattr(driver, "make_launcher")
    sources = {_launcher_source(driver, kernel.binary): "__triton_launcher" for kernel in kernels} if has_own else {}
    is_keyed_by_folder = hasattr(build, "compile_so_from_file")
    if not is_keyed_by_folder:
        sources[shared] = "cuda_utils"
    with contextlib.nullcontext() if compiler is None else _hollow_libcuda(compiler, [shared, *sources]):
        folders = _driver_folders() if is_keyed_by_folder else []
        for linkage in _LINKAGES:
            with _keyed_by(linkage):
                for source, name in sources.items():
                    _build(driver, source, name)
                for folder in folders:
                    _build_in(driver, folder)
    return len(sources) + len(folders)


@contextlib.contextmanager
def _keyed_by(linkage: str) -> Iterator[None]:
    """Inside, modules get the key that they have on a machine with this linkage: it is a part of Triton's."""
    from triton.runtime import build

    key = build.platform_key
    build.platform_key = lambda: ",".join([platform.machine(), platform.system(), platform.architecture()[0], linkage])
    try:
        yield
    finally:
        build.platform_key = key


@contextlib.contextmanager
def _hollow_libcuda(compiler: str, sources: Iterable[str]) -> Iterator[None]:
    """A libcuda.so.1 of functions that do nothing, where the linker looks after all folders that it is given.

    It has those that `sources` call: many linkers leave out a library that nothing is found in.
    """
    names = sorted({name for source in sources for name in _CALLS.findall(source)})
    before = os.environ.get("LIBRARY_PATH")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        functions = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
        command = [compiler, "-x", "c", "-", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        subprocess.run(command, input=functions, check=True, capture_output=True, text=True)
        os.environ["LIBRARY_PATH"] = folder if before is None else os.pathsep.join((folder, before))
        try:
            yield
        finally:
            del os.environ["LIBRARY_PATH"]
            if before is not None:
                os.environ["LIBRARY_PATH"] = before


def _launcher_source(driver: Any, binary: Any) -> str:
    source = binary.src
    constants = {(source.fn.arg_names.index(name),) if isinstance(name, str) else name: value for name, value in source.constants.items()}
    text: str = driver.make_launcher(constants, dict(source.signature), getattr(binary.metadata, "tensordesc_meta", None))
    return text


def _build(driver: Any, source: str, name: str) -> None:
    """As Triton up to 3.7 builds a module, but for loading it, which would need the CUDA driver."""
    from triton.runtime import build

    load, build._load_module_from_path = build._load_module_from_path, lambda name, path: None
    try:
        build.compile_module_from_src(src=source, name=name, include_dirs=driver.include_dirs, libraries=driver.libraries)
    finally:
        build._load_module_from_path = load


def _build_in(driver: Any, folder: str) -> None:
    """As Triton 3.9 builds its module where libcuda.so.1 lies in `folder`."""
    from triton.runtime import build

    build.compile_so_from_file(
        src_path=str(Path(driver.dirname, "driver.c")),
        name="cuda_utils",
        library_dirs=[driver.libdevice_dir, folder],
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
    )


def _driver_folders() -> list[str]:
    """Where libcuda.so.1 may lie where kernels will run: Triton 3.9 has that in the key of what it built."""
    named = os.environ.get("TRITON_LIBCUDA_PATH")
    if named:
        return [named]
    machine = platform.machine()
    return [f"/lib/{machine}-linux-gnu", f"/usr/lib/{machine}-linux-gnu", "/lib64", "/usr/lib64"]
