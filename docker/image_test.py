"""Builds an image without a Docker engine and runs it, as `make image-test` does. Needs root and Debian's buildah and debootstrap.

    python docker/image_test.py [--model FILE.gguf] [--work DIR] [--built]
    python docker/image_test.py --arch sm90 [--families llama-3-8b]

The CPU image is run as its user, asked a question, and stopped in the middle of a stream; in one for GPUs, which needs none for this, the
compiled kernels are looked for, by the program that would otherwise compile them. Prints what it sees; ends with 1 at the first thing that
is not as it should be. pip's settings of this machine are used for the build, with the folders that they name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
BASE = "localhost/octavo-base"
ARCHS = ("cpu", "sm80", "sm89", "sm90", "sm100")
PORT = 31900
MOST_BYTES = {"cpu": 1.6e9}  # unpacked
MOST_BYTES_OF_GPUS = 8e9
KERNELS = "usr/local/octavo/kernels"
START_S, DRAIN_S = 180, 30
_OF_BUILDAH = re.compile(r"exit(ed with)? status")  # its own lines about a command that failed
ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs", "BUILDAH_FORMAT": "docker"}


def buildah(*words: str | Path) -> str:
    """Run it; gives what it prints. Ends the program where it fails."""
    done = subprocess.run(["buildah", *map(str, words)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"buildah {words[0]} ended with {done.returncode}")
    return done.stdout.strip()


def check(holds: bool, what: str) -> None:
    print(f"{'ok' if holds else 'WRONG':<6}{what}", flush=True)
    if not holds:
        raise SystemExit(1)


def policy_of(work: Path) -> Path:
    """A policy that takes images of this machine's own making."""
    file = work / "policy.json"
    file.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    return file


def make_base(work: Path) -> None:
    """A slim Debian with Python, where there is none yet."""
    if BASE in buildah("images", "--format", "{{.Name}}").splitlines():
        return
    root = work / "base"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
    container = buildah("from", "scratch")
    buildah("copy", "--quiet", container, f"{root}/", "/")
    buildah("config", "--cmd", "/bin/bash", container)
    buildah("commit", "--quiet", "--rm", "--signature-policy", policy_of(work), container, BASE)
    shutil.rmtree(root)


def image_of(arch: str) -> str:
    return f"localhost/octavo:{arch}"


def pip_settings(names: tuple[str, ...]) -> list[str]:
    """Build arguments and volumes that give the build this machine's pip settings of these names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'")
    words, places = [], set()
    for name in names:
        if name in found:
            words += ["--build-arg", f"PIP_{name.upper().replace('-', '_')}={found[name]}"]
            places |= {part.removeprefix("file://").removesuffix("/simple") for part in found[name].split()}
    for place in sorted(places):
        if place.startswith("/") and Path(place).exists():
            words += ["--volume", f"{place}:{place}:ro"]
    return [*words, "--build-arg", "TORCH_INDEX=default"] if words else []


def build(work: Path, arch: str, families: str) -> None:
    words: list[str | Path] = ["--build-arg", f"BASE={BASE}", "--build-arg", f"ARCH={arch}", "--build-arg", f"MODELS={families}"]
    words += ["--signature-policy", policy_of(work)]
    # This machine's own wheels may be of torch without CUDA; and layers of gigabytes are not kept.
    pip = ("index-url", "extra-index-url", "find-links", "cert") if arch == "cpu" else ("index-url", "cert")
    words += ["--layers" if arch == "cpu" else "--layers=false", *pip_settings(pip)]
    buildah("bud", "--quiet", "-t", image_of(arch), "-f", ROOT / "docker" / "Dockerfile", *words, ROOT)


def refuse_unknown_arch(work: Path) -> None:
    words: list[str | Path] = ["--build-arg", f"BASE={BASE}", "--build-arg", "ARCH=sm70", "--signature-policy", policy_of(work)]
    command = ["buildah", "bud", "--quiet", "-f", ROOT / "docker" / "Dockerfile", *words, ROOT]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    told = "ARCH=sm70 is not known: give cpu, sm80, sm89, sm90 or sm100"
    check(done.returncode != 0 and told in done.stderr.splitlines(), f"an unknown ARCH: {told}")


def read_config(image: str) -> Any:
    return json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]


@contextmanager
def container(work: Path, arch: str) -> Iterator[tuple[str, Path]]:
    """A container of the image, and its root folder."""
    name = buildah("from", "--signature-policy", policy_of(work), image_of(arch))
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)


def run_in(name: str, *words: str, env: dict[str, str] | None = None, volumes: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The image's entry point with arguments, as its user."""
    flags = [f"--env={key}={value}" for key, value in (env or {}).items()] + [f"--volume={volume}" for volume in volumes]
    command = ["buildah", "run", *flags, name, "--", "octavo-container", *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def refused(name: str, what: str, told: str, *words: str, env: dict[str, str] | None = None, volumes: tuple[str, ...] = ()) -> None:
    process = run_in(name, *words, env=env, volumes=volumes)
    printed = process.communicate(timeout=120)[0]
    lines = [line for line in printed.splitlines() if line and not _OF_BUILDAH.search(line) and " INFO " not in line]
    check(process.returncode != 0 and len(lines) == 1 and told in lines[0], f"{what}: {lines}")


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The server itself, behind buildah's own processes."""
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if any("octavo-container" in word for word in words[:3]) and "buildah" not in Path(words[0]).name:
            return child
    raise SystemExit("the server's process is not found")


def serve(name: str, root: Path, model: Path) -> None:
    """Start, ask, and stop in the middle of a stream."""
    before = time.time()
    env = {"MODEL_PATH": "/models/model.gguf", "PORT": str(PORT), "OCTAVO_SHUTDOWN_TIMEOUT": str(DRAIN_S), "HF_HUB_OFFLINE": "1"}
    process = run_in(name, env=env, volumes=(f"{model}:/models/model.gguf:ro",))
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    url, started = f"http://127.0.0.1:{PORT}", time.monotonic()
    while True:
        if process.poll() is not None or time.monotonic() - started > START_S:
            raise SystemExit("the server did not start:\n" + "".join(lines))
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    print(f"      ready after {time.monotonic() - started:.0f} s")
    server = server_of(process)
    check(server.uids().real == 10001, "the server runs as user 10001")
    healthy = subprocess.run(
        ["buildah", "run", f"--env=PORT={PORT}", name, "--", "python3", "-m", "octavo.serve.healthcheck"], env=ENVIRONMENT, check=False
    )
    check(healthy.returncode == 0, "the health check says that it is healthy")
    body: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    check("Paris" in answer["choices"][0]["text"], f"it answers: {answer['choices'][0]['text']!r}")
    events = []
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**body, "max_tokens": 64, "ignore_eos": True, "stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            events += [line] if line else []
            if len(events) == 4:
                server.send_signal(signal.SIGTERM)
    check(
        events[-1] == "data: [DONE]" and '"length"' in events[-2], f"a stream ends whole after SIGTERM: {len(events)} events, {events[-2]}"
    )
    code = process.wait(DRAIN_S + 10)
    reader.join(5)
    check(code == 0, f"exit code {code} after SIGTERM in the middle of a stream")
    written = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and path.stat().st_mtime > before
        and path.relative_to(root).parts[0] not in ("cache", "models", "tmp", "proc", "sys", "dev", "run", "etc")
    ]
    check(not written, f"nothing is written outside of /cache and /tmp: {written[:4]}")


def sizes(root: Path) -> None:
    """What weighs most in the image."""
    packages = next((root / "usr/local/octavo/lib").glob("python3*/site-packages"))
    found = {path.name: path for path in packages.iterdir() if path.is_dir()}
    found |= {f"nvidia/{path.name}": path for path in (packages / "nvidia").glob("*") if path.is_dir()}
    found.pop("nvidia", None)
    found |= {"kernels": root / KERNELS, "Debian, Python": root / "usr/lib"}
    weights = {name: size_of(path) for name, path in found.items()}
    for name, size in sorted(weights.items(), key=lambda item: -item[1])[:16]:
        print(f"      {name:<24}{size / 2**20:8,.0f} MiB")


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def check_kernels(name: str, root: Path, arch: str, families: str) -> None:
    """What would compile a family's kernels finds them all, without a C compiler."""
    binaries = list((root / KERNELS).rglob("*.cubin"))
    check(bool(binaries), f"{len(binaries)} compiled kernels, {size_of(root / KERNELS) / 2**20:.0f} MiB")
    family = families.split(maxsplit=1)[0] if families else "llama-3-8b"
    words = ["kernels", "compile", "--arch", arch.replace("sm", "sm_"), "--load-format", "dummy", "--model", "/family"]
    for folder in (root / KERNELS, *(path for path in (root / KERNELS).rglob("*") if path.is_dir())):
        folder.chmod(0o777)  # the command wants to write
    started = time.monotonic()
    process = run_in(name, *words, "--cache-dir", f"/{KERNELS}", volumes=(f"{ROOT / 'docker' / 'families' / family}:/family:ro",))
    printed = process.communicate(timeout=600)[0]
    told = next((line for line in printed.splitlines() if line.startswith("Compiled for ")), printed[-300:])
    check(process.returncode == 0, f"the kernels of {family} are all there, looked up in {time.monotonic() - started:.0f} s: {told}")
    check("no launchers" not in printed, "and so are Triton's launchers")
    check(len(list((root / KERNELS).rglob("*.cubin"))) == len(binaries), "none was compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file to serve (default: the embedded one)")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/octavo-image"), help="for what is made on the way")
    parser.add_argument("--arch", choices=ARCHS, default="cpu")
    parser.add_argument("--families", default="", help="of docker/families, whose kernels are compiled (default: all)")
    parser.add_argument("--built", action="store_true", help="take the image that was built before")
    given = parser.parse_args()
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed: apt install buildah debootstrap")
    given.work.mkdir(parents=True, exist_ok=True)
    from octavo.quant.checkpoint.resolve import resolve_model

    model = given.model or resolve_model(None).gguf_file
    if model is None:
        raise SystemExit("there is no embedded model: give --model FILE.gguf")
    make_base(given.work)
    if not given.built:
        started = time.monotonic()
        build(given.work, given.arch, given.families)
        print(f"      built in {time.monotonic() - started:.0f} s")
        refuse_unknown_arch(given.work)
    config = read_config(image_of(given.arch))
    check(config["User"] == "10001:10001", "the image has a user of its own")
    check(config["Entrypoint"] == ["octavo-container"] and bool(config.get("Healthcheck")), "entry point and health check")
    check("org.opencontainers.image.licenses" in config["Labels"], "labels")
    with container(given.work, given.arch) as (name, root):
        size = size_of(root)
        sizes(root)
        check(size < MOST_BYTES.get(given.arch, MOST_BYTES_OF_GPUS), f"{size / 1e9:.2f} GB unpacked")
        for path, least in (("usr/local/octavo", 0), ("usr/local/octavo/sbom.cdx.json", 1000)):
            check((root / path).exists() and (root / path).stat().st_size > least, f"/{path} is there")
        found = [
            tool
            for tool in ("gcc", "cc", "g++", "clang", "tcc")
            for folder in ("usr/bin", "usr/local/bin")
            if (root / folder / tool).exists()
        ]
        check(not found, f"no compiler: {found}")
        doctor = run_in(name, "doctor")
        printed = doctor.communicate(timeout=300)[0]
        check("Serving works here." in printed and doctor.returncode == 0, "doctor works")
        if given.arch != "cpu":
            check_kernels(name, root, given.arch, given.families)
            return
        refused(name, "no model", "set MODEL_PATH")
        refused(name, "an unreadable model folder", "/nowhere", env={"MODEL_PATH": "/nowhere"})
        refused(name, "an unknown variable", "OCTAVO_PORT", env={"OCTAVO_PRT": "1", "MODEL_PATH": "/models"})
        of_model = {"MODEL_PATH": "/models/model.gguf"}
        mounted = f"{model}:/models/model.gguf:ro"
        refused(name, "ranks that the model cannot be cut for", "--tp-size 4", env={**of_model, "TP_SIZE": "4"}, volumes=(mounted,))
        refused(name, "GPUs that are not there", "--device cuda", env={**of_model, "OCTAVO_DEVICE": "cuda"}, volumes=(mounted,))
        closed = given.work / "closed"
        closed.mkdir(mode=0o755, exist_ok=True)
        refused(name, "a cache folder that is read-only", "/cache", env=of_model, volumes=(mounted, f"{closed}:/cache:ro"))
        with socket.create_server(("0.0.0.0", PORT)):
            refused(name, "an occupied port", f"{PORT}", env={**of_model, "PORT": f"{PORT}"}, volumes=(mounted,))
        serve(name, root, model)


if __name__ == "__main__":
    main()
