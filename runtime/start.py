"""Starting an engine: from options to a loaded core. Shared by the engine process and the in-process engine."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .logs import LogSettings

if TYPE_CHECKING:
    from ..quant.checkpoint.resolve import ModelFiles
    from .hosts import Hosts
    from .ranks import Ranks

logger = logging.getLogger("octavo.runtime")


def die_with_parent() -> None:
    """Have the kernel end this process when its parent does, so that a killed parent leaves none behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # engines are deaf to other signals


def start_deaf_to_signals(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Ctrl-C reaches a terminal's whole group, and SIGTERM a service's: whoever starts a process so decides alone when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_environment() -> None:
    """Settle what libraries read at import: call before torch or numba are loaded.

    Compiled CPU kernels are kept in a cache folder that outlives an installation without write access; waiting threads sleep soon,
    because one that spins takes a core from the server.
    """
    cache = Path(os.environ.get("OCTAVO_CACHE_DIR") or Path.home() / ".cache" / "octavo")
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache / "numba" / _kernel_digest()))
    os.environ.setdefault("GOMP_SPINCOUNT", "500")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # who leaves a store or a group is told of in our own words


def _kernel_digest() -> str:
    """Changes with any kernel source: Numba's own cache looks only at the file that holds the outermost function."""
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parent.parent / "kernels" / "cpu").glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _has_compiled_kernels() -> bool:
    """Whether an earlier start left kernels of these sources in the cache folder that `prepare_environment` chose."""
    return any(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbc"))


def _check_cache_folder() -> None:
    """Raises OSError where compiled kernels cannot be kept: Numba refuses to compile them then, in many lines."""
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"compiled CPU kernels cannot be kept in {folder} ({error.strerror}): set OCTAVO_CACHE_DIR to a folder that can be written to, "
            "or mount a volume there"
        ) from None


def load_core(  # type: ignore[no-untyped-def]
    config: EngineConfig, *, logs: LogSettings | None = None, on_rank_end: Callable[[str], None] | None = None, show_progress: bool = True
):
    """Load the model that `config` names and give its core, kernels compiled; whoever gets it closes it.

    Raises ValueError (and its kin) with the remedy, EngineDead where another rank ends. `logs` are for those, and `on_rank_end`
    is told why, on a thread of its own.
    """
    from ..quant.checkpoint.resolve import resolve_model
    from .core import EngineCore
    from .model_runner import ModelRunner, choose_device

    resolved = _resolved(config)
    files = resolve_model(resolved.model_path, revision=resolved.revision, needs_weights=resolved.needs_weights)
    threads = f" with {resolved.num_threads} threads" if resolved.device == "cpu" else ""
    logger.info("Loading %s on %s%s", files.name, resolved.device, threads)
    if resolved.device == "cpu":
        _check_cache_folder()
    must_compile = resolved.device == "cpu" and not _has_compiled_kernels()
    ranks = _start_ranks(resolved, files, logs or LogSettings(), on_rank_end, config.num_threads) if resolved.num_ranks > 1 else None
    try:
        if ranks is None:
            runner = ModelRunner(resolved, files, show_progress=show_progress)
        else:
            device = choose_device(resolved, ranks.device)
            together = ranks.join(device)
            parts: dict[str, Any] = {"group": together.group, "pipeline": together.pipeline}
            runner = ModelRunner(resolved, files, **parts, ranks=ranks, device=device, show_progress=show_progress)
        core = EngineCore(resolved, runner)
        if ranks is not None:
            ranks.tell_loaded(core.runner.model.weight_bytes)
        if must_compile:
            logger.info("Compiling kernels, once: later starts reuse them")
        _warm_up(core)
    except BaseException as error:
        if ranks is not None:
            explained = ranks.explained(error) if isinstance(error, RuntimeError) else error
            ranks.close()
            raise explained from error
        raise
    core.runner.phases.ends("warm_up")
    return core


def check_ray(config: EngineConfig) -> None:
    """Raises ValueError where `config` is for the machines of a Ray cluster, and Ray is not installed."""
    if config.nnodes > 1 and config.dist_init_addr is None and importlib.util.find_spec("ray") is None:
        raise ValueError(
            f"--nnodes {config.nnodes} wants Ray, which is not installed here: pip install 'octavo[ray]', or give --dist-init-addr and "
            "--node-rank, which need none"
        )


def serve_node(config: EngineConfig) -> int:
    """Run the ranks of a machine that is not the first, until they end. Gives an exit code; raises ValueError or EngineDead."""
    from .nodes import serve_node

    return serve_node(_resolved(config))


def _resolved(config: EngineConfig) -> EngineConfig:
    """The options with what depends on this machine filled in."""
    import torch

    from .model_runner import choose_device

    if choose_device(config).type == "cpu":
        return config.resolve(device="cpu")
    return config.resolve(device="cuda", num_devices=torch.cuda.device_count())


def _start_ranks(
    resolved: EngineConfig, files: ModelFiles, logs: LogSettings, on_end: Callable[[str], None] | None, num_threads: int | None
) -> Ranks:
    from .rank_plan import RankPlan
    from .ranks import Ranks

    plan = RankPlan.of(resolved, files)
    hosts = _find_hosts(resolved)
    try:
        logger.info("%s", plan.describe(hosts.machines))
        cores = len(os.sched_getaffinity(0))
        if resolved.device == "cpu" and resolved.ranks_per_node > cores:
            logger.warning("%d ranks share %d cores: fewer ranks are faster here", resolved.ranks_per_node, cores)
        return Ranks(resolved, logs, hosts, on_end=on_end, num_threads=num_threads)
    except BaseException:
        hosts.close(0.0)
        raise


def _find_hosts(resolved: EngineConfig) -> Hosts:
    """Where the ranks are to run. Raises ValueError or EngineDead where machines do not come or do not fit."""
    assert resolved.device != "auto"
    if resolved.nnodes == 1:
        from .hosts import ThisMachine

        return ThisMachine(resolved.device)
    if resolved.dist_init_addr is not None:
        from .nodes import FirstNode

        if resolved.node_rank:
            told = f"--node-rank {resolved.node_rank} has no engine of its own, but ranks of the first machine's"
            raise ValueError(f"{told}: start `octavo serve` with these options there")
        return FirstNode(resolved)
    check_ray(resolved)
    from .ray_hosts import RayHosts  # loads Ray

    return RayHosts(resolved)


def _warm_up(core) -> None:  # type: ignore[no-untyped-def]
    """Run a short prompt, greedy and sampled, so that no request pays for compiling kernels."""
    from .sampling_params import SamplingParams

    for index, params in enumerate(
        (SamplingParams(max_tokens=2, temperature=0.0), SamplingParams(max_tokens=2, top_p=0.9, top_k=20, logprobs=1, seed=0))
    ):
        core.add(f"warm-up-{index}", [0] * min(3, core.limits.context_length - 2, core.limits.max_total_tokens - 2), params)
        while core.has_work:  # one after the other: the queue may hold but one
            core.step()
    core.flush_cache()
    core.scheduler.counters = type(core.scheduler.counters)()
