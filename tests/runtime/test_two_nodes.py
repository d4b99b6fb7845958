"""One model on two machines, for real: two network namespaces, joined by a link that can fail, over Ray and by address."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import octavo

from .network import ADDRESSES, Network, reason_against
from .tiny_models import llama, make_model, save_model, save_tokenizer

AGAINST = reason_against()
pytestmark = [pytest.mark.long, pytest.mark.skipif(AGAINST is not None, reason=f"{AGAINST}")]
READY_S, PORT = 240, 30000
COMMON = ("--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--max-total-tokens", "4096", "--port", str(PORT))
PROMPTS = [[(11 * number + 3 * place) % 131 for place in range(10 + 7 * number)] for number in range(6)]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model(llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=128)), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with octavo.Engine(str(folder), device="cpu", dtype="float32", num_threads=1, max_total_tokens=4096, show_progress=False) as engine:
        answers = engine.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": 24, "temperature": 0, "ignore_eos": True})
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[None]:
    """A Ray cluster of both machines, which the user has started; eight ranks may run on each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'octavo[ray]'")
    ray = str(Path(sys.executable).parent / "ray")
    usual = ["--num-cpus", "8", "--object-store-memory", "100000000", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as place:
        head = [ray, "start", "--head", "--node-ip-address", ADDRESSES[0], "--port", "6379", "--temp-dir", place, *usual]
        other = [ray, "start", "--address", f"{ADDRESSES[0]}:6379", "--node-ip-address", ADDRESSES[1], *usual]
        for machine, command in enumerate(([*head, "--include-dashboard", "false"], other)):
            assert network.start(machine, command, env=ENVIRONMENT, stdout=subprocess.DEVNULL).wait(READY_S) == 0
        yield
        subprocess.run([ray, "stop", "--force"], capture_output=True, check=False)


@dataclass
class Served:
    """A server on machine 0, and perhaps what was started on machine 1."""

    network: Network
    process: subprocess.Popen[bytes]
    other: subprocess.Popen[bytes] | None
    told: Path
    ranks: list[psutil.Process] = field(default_factory=list)

    def ask(self, path: str, **body: Any) -> httpx.Response:
        url = f"http://127.0.0.1:{PORT}{path}"
        call = (lambda: httpx.post(url, json=body, timeout=120)) if body else (lambda: httpx.get(url, timeout=10))
        response: httpx.Response = self.network.inside(0, call)
        return response

    def answers(self) -> list[list[int]]:
        sampling = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
        found = self.ask("/generate", input_ids=PROMPTS, sampling_params=sampling)
        assert found.status_code == 200, found.text
        return [answer["output_ids"] for answer in found.json()]

    @property
    def text(self) -> str:
        return self.told.read_text(errors="replace")


@contextlib.contextmanager
def served(network: Network, folder: Path, place: Path, words: str, how: str) -> Iterator[Served]:
    told = place / "told"
    command = [sys.executable, "-m", "octavo", "serve", "--model-path", str(folder), *words.split(), *COMMON]
    met = ["--dist-init-addr", f"{ADDRESSES[0]}:5000"] if how == "address" else []
    ranks_before = set(rank_processes())
    other = None
    with told.open("wb") as file, (place / "other").open("wb") as others:
        if met:
            other = network.start(1, [*command, *met, "--node-rank", "1"], stdout=others, stderr=others, env=ENVIRONMENT)
        own = [*met, "--node-rank", "0"] if met else []
        process = network.start(0, [*command, *own], stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        served = Served(network, process, other, told)
        try:
            until = time.monotonic() + READY_S
            while "Octavo is ready." not in served.text:
                assert process.poll() is None, served.text
                assert time.monotonic() < until, served.text
                time.sleep(0.2)
            served.ranks = [rank for rank in rank_processes() if rank not in ranks_before]
            yield served
        finally:
            network.disturb()
            for started in (process, other):
                if started is not None and started.poll() is None:
                    started.send_signal(signal.SIGTERM)
            for started in (process, other):
                if started is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        started.wait(40)
                    started.kill()


def rank_processes() -> list[psutil.Process]:
    """Those that are here of engines on these two machines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "octavo.runtime.rank_worker" in command and json.loads(command[-1])["store"].startswith(ADDRESSES[0]):
                found.append(process)
    return found


def rank_number(process: psutil.Process) -> int:
    return int(json.loads(process.cmdline()[-1])["rank"])


def test_the_guides_commands(network: Network, cluster: None, folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    with served(network, folder, tmp_path, "--tp 8 --num-nodes 2", "ray") as two:
        assert two.answers() == expected
        assert (
            "16 ranks (processes of 1 thread): every layer cut across 8 (1 attention and 1 key-value heads each), layers in 2 stages"
            in two.text
        )
        assert f"rank 0   {ADDRESSES[0]} cpu" in two.text.replace("rank 0  ", "rank 0   ")
        assert f"Rank 15 of 16 on {ADDRESSES[1]} cpu" in two.text
        assert len(two.ranks) == 15
        two.process.send_signal(signal.SIGTERM)
        assert two.process.wait(60) == 0
    assert psutil.wait_procs(two.ranks, timeout=20)[1] == []


@pytest.mark.parametrize("words", ["--tp 1 --nnodes 2", "--tp 2 --nnodes 2", "--tp 2 --pp 1 --nnodes 2"])
@pytest.mark.parametrize("how", ["ray", "address"])
def test_answers_are_those_of_one_rank(
    request: pytest.FixtureRequest, network: Network, folder: Path, expected: list[list[int]], tmp_path: Path, how: str, words: str
) -> None:
    if how == "ray":
        request.getfixturevalue("cluster")
    with served(network, folder, tmp_path, words, how) as two:
        assert two.answers() == expected
        two.process.send_signal(signal.SIGTERM)
        assert two.process.wait(60) == 0
        if two.other is not None:
            assert two.other.wait(20) == 0
    assert psutil.wait_procs(two.ranks, timeout=20)[1] == []


@pytest.mark.parametrize("how", ["ray", "address"])
@pytest.mark.parametrize("words", ["--tp 1 --nnodes 2", "--tp 2 --pp 1 --nnodes 2"])
@pytest.mark.parametrize("link", [{"delay_s": 0.05}, {"loss": 0.05}], ids=["slow", "losing"])
def test_a_bad_link_only_takes_longer(
    request: pytest.FixtureRequest, network: Network, folder: Path, expected: list[list[int]], tmp_path: Path, how: str, words: str,
    link: dict[str, float],
) -> None:  # fmt: skip
    if how == "ray":
        request.getfixturevalue("cluster")
    with served(network, folder, tmp_path, words, how) as two:
        network.disturb(**link)
        assert two.answers() == expected
        assert two.ask("/health").status_code == 200


def kill_a_rank(two: Served) -> None:
    next(rank for rank in two.ranks if rank_number(rank) == len(two.ranks)).kill()


def stop_a_rank(two: Served) -> None:
    next(rank for rank in two.ranks if rank_number(rank) == len(two.ranks)).suspend()


def cut_the_link(two: Served) -> None:
    two.network.disturb(loss=1.0)


@pytest.mark.parametrize("how", ["address", "ray"])
@pytest.mark.parametrize("words", ["--tp 1 --nnodes 2", "--tp 2 --pp 1 --nnodes 2", "--tp 2 --nnodes 2"])
@pytest.mark.parametrize(
    ("harm", "told", "within_s"),
    [
        (kill_a_rank, r"was ended by signal 9", 10),
        (stop_a_rank, "has given no sign of life for 10 s", 30),
        (cut_the_link, "has given no sign of life for 10 s", 40),
    ],
    ids=["killed", "stopped", "cut off"],
)
def test_what_is_lost_ends_the_engine(
    request: pytest.FixtureRequest, network: Network, folder: Path, tmp_path: Path, how: str, words: str,
    harm: Callable[[Served], None], told: str, within_s: float,
) -> None:  # fmt: skip
    if how == "ray":
        request.getfixturevalue("cluster")
    with served(network, folder, tmp_path, words, how) as two:
        found: list[str] = []

        def ask() -> None:
            body = {"prompt": PROMPTS[1], "max_tokens": 480, "temperature": 0, "ignore_eos": True}
            try:
                while not found:
                    answer = two.ask("/v1/completions", **body)
                    if answer.status_code != 200:
                        found.append(answer.text)
            except httpx.HTTPError as error:
                found.append(f"{error!r}")

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1.0)
        began = time.monotonic()
        harm(two)
        assert two.process.wait(within_s + 10) == 1
        assert time.monotonic() - began < within_s
        asking.join(10)
        rank = r"\d" if harm is cut_the_link else str(len(two.ranks))  # whichever of the machine's is missed first
        assert re.search(rf"rank {rank} of {len(two.ranks) + 1} on {ADDRESSES[1]}:? {told}", found[0]), found
        assert "Traceback" not in two.text
        assert psutil.wait_procs(two.ranks, timeout=30)[1] == []
        if two.other is not None:
            assert two.other.wait(30) == 1


def test_a_machine_that_was_told_to_stop(network: Network, folder: Path, tmp_path: Path) -> None:
    with served(network, folder, tmp_path, "--nnodes 2", "address") as two:
        assert two.other is not None
        two.other.send_signal(signal.SIGTERM)
        assert two.other.wait(20) == 0
        assert two.process.wait(20) == 1
        assert f"rank 1 of 2 on {ADDRESSES[1]}: ends, as its machine was told to stop" in two.text


def test_what_cannot_be_is_told(network: Network, folder: Path) -> None:
    command = [sys.executable, "-m", "octavo", "serve", "--model-path", str(folder), *COMMON, "--nnodes", "2"]
    met = ["--dist-init-addr", f"{ADDRESSES[0]}:5000", "--node-rank"]

    def start(machine: int, *words: str) -> subprocess.Popen[str]:
        return network.start(machine, [*command, *words], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def last_line(process: subprocess.Popen[str]) -> str:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1, err
        return err.strip().splitlines()[-1]

    first, other = start(0, *met, "0"), start(1, *met, "1", "--page-size", "32")
    for process in (first, other):
        told = "machine 1 was started with other options than the first: --page-size is 16 on the first and 32 on machine 1"
        assert told in last_line(process)
    elsewhere = start(1, *met, "0")
    assert f"{ADDRESSES[0]} is no address of this machine, which is --node-rank 0" in last_line(elsewhere)


def test_a_cluster_that_lacks_machines(network: Network, cluster: None, folder: Path) -> None:
    script = (
        "import sys, octavo, octavo.runtime.ray_hosts as r; r.WAIT_S = 2.0\n"
        "try: octavo.Engine(sys.argv[1], device='cpu', nnodes=int(sys.argv[2]), tp_size=int(sys.argv[3]), pp_size=int(sys.argv[4]))\n"
        "except ValueError as error: print(error)"
    )
    for sizes, told in (
        (
            ("3", "1", "3"),
            "--nnodes 3 wants machines of the Ray cluster, this one among them, with 1 CPU each: 10.77.0.1 has 8 CPU; 10.77.0.2",
        ),
        (("2", "8", "4"), "with 16 CPU each"),
    ):
        process = network.start(0, [sys.executable, "-c", script, str(folder), *sizes], stdout=subprocess.PIPE, env=ENVIRONMENT)
        out = process.communicate(timeout=120)[0].decode()
        assert told in out, out
        assert "Gave up after 2 s" in out


def test_no_cluster(network: Network, folder: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'octavo[ray]'")
    command = [sys.executable, "-m", "octavo", "serve", "--model-path", str(folder), *COMMON, "--nnodes", "2"]
    process = network.start(1, command, stderr=subprocess.PIPE, env={**ENVIRONMENT, "RAY_ADDRESS": f"{ADDRESSES[1]}:6399"})
    err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1
    assert "no Ray cluster answers at RAY_ADDRESS=10.77.0.2:6399 (Connection refused)" in err.splitlines()[-1]
    assert "Traceback" not in err
