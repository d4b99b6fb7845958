"""`octavo serve --dp-size N`: N engines on Ray Serve, in a cluster of this machine's own or the one that RAY_ADDRESS names.

What is served is serve/ray_app.py; this starts it at the address of the flags, says where it is, and ends it. Needs octavo[ray].
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ..runtime.config import EngineConfig, default_memory_fraction
from ..runtime.rank_plan import check_model
from ..runtime.ray_hosts import check_address
from .announcement import announce, url_of
from .options import ServerOptions
from .ray_app import build
from .server import listening_socket

logger = logging.getLogger("octavo.serve")

_APPLICATION = "octavo"
_NOT_OF_REPLICAS = ("host", "port", "api_key", "admin_api_key")
_ASK_S = 10.0
_LOOK_EVERY_S = 0.2
_DELETE_S = 20.0  # for Ray to end replicas that have drained


class CannotServe(RuntimeError):
    """Replicas cannot be started; the text says why and what to do."""


def serve_replicas(config: EngineConfig, options: ServerOptions, flags: Mapping[str, Any], copies: int) -> int:
    """Serve until SIGINT or SIGTERM; gives the exit code. `flags` are those of `config` and `options`, by name.

    Raises OSError for an address that cannot be had, ValueError for flags that are not for replicas, CannotServe.
    """
    check_model(config)
    _on_signals(signal.default_int_handler)  # until replicas are ready, all of them end us as Ctrl-C does
    try:
        with listening_socket(options) as sock:  # Ray's proxy tells less of a port that is taken
            port = sock.getsockname()[1]
        with tempfile.TemporaryDirectory(prefix="octavo-keys-") as folder:  # only this user can enter it
            files = _key_files(options, Path(folder))
            try:
                return _serve(config, options, {**flags, **files}, copies, port)
            finally:
                if ray.is_initialized() and not _is_shared():  # in a cluster of others, so are the applications
                    serve.shutdown()
                ray.shutdown()
    except KeyboardInterrupt:
        logger.info("stopped before the replicas were ready")
        return 0


def _serve(config: EngineConfig, options: ServerOptions, flags: Mapping[str, Any], copies: int, port: int) -> int:
    address = os.environ.get("RAY_ADDRESS")
    on_gpu = _has_gpus(config) if address is None else config.device == "cuda"
    if address is None:  # ranks and replicas are processes that share cores: Ray's count of these is not what bounds them
        cores = max(copies * config.num_ranks, os.cpu_count() or 1)
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    else:
        try:
            check_address(address)
        except ValueError as error:
            raise CannotServe(str(error)) from error
        ray.init(address=address, logging_level=logging.WARNING)
        on_gpu = on_gpu or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    _on_signals(signal.default_int_handler)  # Ray has its own
    wants = {"num_gpus": config.num_ranks, "num_cpus": 1} if on_gpu else {"num_cpus": config.num_ranks}
    _check_resources(wants, copies)
    _check_name()
    application = build({**_of_replicas(config, flags, copies, on_gpu=on_gpu), "replicas": copies, **wants})
    serve.start(http_options={"host": options.host, "port": port})
    where = "a cluster of its own" if address is None else f"the cluster at {address}"
    logger.info("Starting %d replicas on Ray %s, in %s", copies, ray.__version__, where)
    stopped = threading.Event()
    try:
        try:
            serve.run(application, name=_APPLICATION)
        except (RuntimeError, RayServeException) as error:
            raise CannotServe(f"the replicas did not start: {_first_reason(error)}") from error
        _on_signals(lambda *_: stopped.set())
        _announce(options, port, copies)
        stopped.wait()
        logger.info("stopping: requests in flight may go on for %g s", options.shutdown_timeout_s)
    finally:
        _delete(options.shutdown_timeout_s + _DELETE_S)
    return 0


def _check_name() -> None:
    """Raises CannotServe where the cluster has an application of this name already, which would be replaced."""
    if _is_shared() and _APPLICATION in serve.status().applications:
        raise CannotServe(
            f"the Ray cluster at {os.environ['RAY_ADDRESS']} serves an application {_APPLICATION!r} already: end it with "
            f"`python -c \"from ray import serve; serve.delete('{_APPLICATION}')\"`, or start another by `serve run --name ...`"
        )


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _is_shared() -> bool:
    return "RAY_ADDRESS" in os.environ


def _delete(timeout_s: float) -> None:
    """End the application, and wait until it is gone."""
    serve.delete(_APPLICATION, _blocking=False)
    until = time.monotonic() + timeout_s
    while _APPLICATION in serve.status().applications and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)


def _has_gpus(config: EngineConfig) -> bool:
    if config.device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


def _key_files(options: ServerOptions, folder: Path) -> dict[str, str]:
    """Keys as files that replicas read: Ray shows arguments to everybody. Raises ValueError where replicas may be on other machines."""
    files = {}
    for name, keys in (("api_key_file", options.api_keys), ("admin_api_key_file", options.admin_api_keys)):
        if keys:
            file = folder / name
            file.write_text("\n".join(keys) + "\n")
            files[name] = str(file)
    if files and _is_shared():
        raise ValueError(
            "--dp-size with API keys is for one machine: in a cluster, put them into OCTAVO_API_KEY of every node's "
            "environment and use `serve run octavo.serve.ray_app:build`"
        )
    return files


def _of_replicas(config: EngineConfig, flags: Mapping[str, Any], copies: int, *, on_gpu: bool) -> dict[str, Any]:
    """The flags of each replica. On the CPU they share cores and memory, where the flags do not say how."""
    own = {name: value for name, value in flags.items() if name not in _NOT_OF_REPLICAS}
    if config.model_path is not None:
        own["model_path"] = config.model_path
    if not on_gpu and not _is_shared():
        if config.num_threads is None:
            own["num_threads"] = max(1, len(os.sched_getaffinity(0)) // (copies * config.num_ranks))
        if config.mem_fraction_static is None and config.max_total_tokens is None:
            own["mem_fraction_static"] = math.floor(100 * default_memory_fraction("cpu") / copies) / 100
    return own


def _check_resources(wants: Mapping[str, int], copies: int) -> None:
    """Raises CannotServe where the cluster has too little for `copies` of replicas that want so much each."""
    wanted = {name.removeprefix("num_").rstrip("s").upper(): copies * count for name, count in wants.items()}
    there = ray.cluster_resources()
    short = [f"{count} {name} where it has {there.get(name, 0):g}" for name, count in wanted.items() if there.get(name, 0) < count]
    if short:
        where = f"the Ray cluster at {os.environ['RAY_ADDRESS']}" if _is_shared() else "this machine"
        raise CannotServe(f"--dp-size {copies} asks {where} for {' and '.join(short)}: give fewer replicas, or add machines")


def _first_reason(error: Exception) -> str:
    """What a replica's start failed with, out of Ray's traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line and not line.startswith(("ray.", "File"))]
    return (told or lines or ["Ray says no more"])[-1]


def _announce(options: ServerOptions, port: int, copies: int) -> None:
    url = url_of(options.host, port)
    request = urllib.request.Request(
        f"{url}/models", headers={"Authorization": f"Bearer {options.api_keys[0]}"} if options.api_keys else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=_ASK_S) as answer:
            (model,) = json.loads(answer.read())["data"]
    except OSError as error:  # this machine of a cluster may have no proxy
        logger.warning(
            "%d replicas are ready; nothing answers at %s (%s): ask a machine of the cluster that has a proxy", copies, url, error
        )
        return
    about = f"{model['id']} (context {model['max_model_len']} tokens), {copies} replicas"
    announce(url, about, options, has_template=False)  # which is for the replicas to know: a prompt is always taken
    logger.info("ready at %s: model %s, %d replicas", url, model["id"], copies)
