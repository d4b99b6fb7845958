"""`octavo serve`: from a command line to a running server and an exit code. Knows no HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shlex
import signal
import socket
import sys

from .. import __version__
from ..runtime.config import EngineConfig
from ..runtime.logs import set_up_logging
from ..runtime.start import check_ray, prepare_environment
from .announcement import announce, url_of
from .arguments import flags_of, mapping_of, options_of, serve_parser
from .options import ServerOptions
from .served_model import ServedModel
from .server import RunningEngine, listening_socket, serve_until_stopped

_BAD_USAGE = 2
_FAILED = 1
_INTERRUPTED = 128 + signal.SIGINT

logger = logging.getLogger("octavo.serve")


def main(argv: list[str], *, prog: str = "octavo serve") -> int:
    """Serve until stopped, or with --explain-quant explain and end.

    0 after a signal, 128 and its number after a second one, 1 when the start failed or the engine died, 2 for a bad command line.
    """
    try:
        namespace = serve_parser(prog).parse_all(argv)
    except SystemExit as end:  # --help, or an error that was told already
        return int(end.code or 0)
    explanation = vars(namespace).pop("explain_quant", None)
    copies = vars(namespace).pop("dp_size", 1)
    prepare_environment()
    try:
        if copies < 1:
            raise ValueError(f"--dp-size {copies} is not valid: give a whole number of at least 1")
        config, options = options_of(namespace)
        if copies > 1 and options.log_file is not None:
            raise ValueError(f"--log-file {options.log_file} is not for --dp-size: Ray keeps the logs of replicas; leave it out")
        if copies > 1 and config.nnodes > 1:
            raise ValueError(
                f"--dp-size {copies} and --nnodes {config.nnodes} do not go together: an engine of several machines has them alone"
            )
        check_ray(config)
        _check_backend(config)
        _set_up_logging(options)
    except (ValueError, TypeError) as error:
        return _fail(prog, error, _BAD_USAGE)
    if explanation is not None:
        return _explain(prog, config, every_refusal=explanation == "all")
    if config.node_rank:
        return _serve_node(prog, config, options)
    return _serve(prog, config, options) if copies == 1 else _serve_replicas(prog, config, options, copies)


def _serve(prog: str, config: EngineConfig, options: ServerOptions) -> int:
    """One engine, in a process of its own behind this one."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the model loads, it ends us as Ctrl-C does
    interrupted = 0
    try:
        from ..runtime.process import launch_engine  # not for --help

        with listening_socket(options) as sock:
            logger.info("%s", _first_line(config, options))
            client = launch_engine(_with_threads(config), logs=options.logs)
            try:
                return serve_until_stopped(client, options, sock, lambda: _announce(client, options, sock))
            finally:
                interrupted = _INTERRUPTED  # by one signal more, while the engine ends
                client.close()
    except KeyboardInterrupt:
        if not interrupted:
            logger.info("stopped before the model was loaded")
        return interrupted
    except BrokenPipeError:  # nobody reads what is announced
        raise
    except Exception as error:
        logger.debug("the start failed", exc_info=error)
        return _fail(prog, error, _FAILED, options)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _with_threads(config: EngineConfig) -> EngineConfig:
    """With the threads that OMP_NUM_THREADS names, where no flag does: whoever shares cores among processes says so there."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if config.num_threads is not None or not asked.isdecimal() or not int(asked):
        return config
    return dataclasses.replace(config, num_threads=int(asked))


def _serve_node(prog: str, config: EngineConfig, options: ServerOptions) -> int:
    """The ranks of another machine than the first, which serves."""
    from ..runtime.start import serve_node  # not for --help

    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        logger.info("%s", _first_line(config, options))
        return serve_node(_with_threads(config))
    except KeyboardInterrupt:
        logger.info("stopped, with its ranks")
        return 0
    except Exception as error:
        logger.debug("the start failed", exc_info=error)
        return _fail(prog, error, _FAILED, options)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _serve_replicas(prog: str, config: EngineConfig, options: ServerOptions, copies: int) -> int:
    if importlib.util.find_spec("ray") is None:
        told = f"--dp-size {copies} stands on Ray Serve, which is not installed here: pip install 'octavo[ray]', or start {copies} servers"
        return _fail(prog, ValueError(f"{told} behind NGINX (docs/deploy.md)"), _BAD_USAGE)
    from .ray_replicas import CannotServe, serve_replicas  # loads Ray

    logger.info("%s --dp-size %d", _first_line(config, options), copies)
    try:
        return serve_replicas(config, options, mapping_of(flags_of(config, options)), copies)
    except ValueError as error:
        return _fail(prog, error, _BAD_USAGE)
    except (CannotServe, OSError) as error:
        logger.debug("the start failed", exc_info=error)
        return _fail(prog, error, _FAILED, options)


def _check_backend(config: EngineConfig) -> None:
    """Raises ValueError for a --linear-backend that no platform has. The names are with the kernels, which load torch."""
    if config.linear_backend is not None:
        from ..runtime.linear_report import check_backend_name

        check_backend_name(config.linear_backend)


def _explain(prog: str, config: EngineConfig, *, every_refusal: bool) -> int:
    loggers = logging.getLogger("octavo")
    if loggers.level == logging.INFO:
        loggers.setLevel(logging.WARNING)  # how memory is divided is no matter here
    print(
        "Loading the model to see which kernels it gets; it is not served. The first time, kernels are compiled meanwhile.", file=sys.stderr
    )
    try:
        from .explain import explain_quantization  # loads torch

        explanation = explain_quantization(config, every_refusal=every_refusal)
    except Exception as error:
        logger.debug("the model was not loaded", exc_info=error)
        return _fail(prog, error, _FAILED)
    print(explanation)
    return 0


def _first_line(config: EngineConfig, options: ServerOptions) -> str:
    """What is started, for the log. Of `--device auto` only the engine, which asks torch, knows what it comes to."""
    flags = shlex.join(flags_of(config, options)) or "none, all at their defaults"
    return f"Octavo {__version__} starts: model {config.model_path or '(embedded)'}, device {config.device}, flags {flags}"


def _fail(prog: str, error: Exception, code: int, options: ServerOptions | None = None) -> int:
    """Tell why nothing is served: on stderr, or in the log where `options` name one."""
    if options is not None and (options.log_file is not None or options.log_format == "json"):
        logger.critical("the start failed: %s", _text_of(error))
        return code
    print(f"{prog}: {_text_of(error)}", file=sys.stderr)
    return code


def _text_of(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


def _set_up_logging(options: ServerOptions) -> None:
    """Raises ValueError for a log file that cannot be written."""
    try:
        set_up_logging(options.logs, rotates=True)
    except OSError as error:
        raise ValueError(
            f"--log-file {options.log_file} cannot be opened ({error.strerror}): give a file that this user can write"
        ) from None
    level = options.log_level.upper()
    logging.getLogger("uvicorn").setLevel(level if level != "INFO" else "WARNING")


def _announce(client: RunningEngine, options: ServerOptions, sock: socket.socket) -> None:
    """One block when the server listens: what, where, and a command to paste."""
    info = client.model_info
    name = ServedModel(info, options).name
    url = url_of(*sock.getsockname()[:2])
    announce(url, f"{name} (context {info.context_length} tokens)", options, has_template=client.tokenizer.has_chat_template)
    logger.info("ready at %s: model %s, context %d tokens, room for %d", url, name, info.context_length, info.max_total_tokens)
    if info.max_total_tokens < info.context_length:
        logger.warning(
            "the KV cache holds %d tokens, fewer than the context of %d: answers end there; raise --mem-fraction-static or "
            "--max-total-tokens, or set --context-length",
            info.max_total_tokens,
            info.context_length,
        )
