"""The running server: one uvicorn on a socket, from ready to stopped, with an engine that may die. Knows no flag."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import uvicorn

from ..runtime.client import EngineClient
from .app import create_app
from .context import ServeContext
from .http_limits import LimitedHttp
from .options import ServerOptions

logger = logging.getLogger("octavo.serve")

_CUT_OFF_S = 2.0  # after the time to finish is over: for aborted requests to say so
_LOOK_EVERY_S = 0.02
_LAST_WORDS_S = 1.0  # after a second signal
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep a connection, so that none reuses one we just closed


class RunningEngine(EngineClient, Protocol):
    """An engine in a process of its own, as its launcher hands it over."""

    async def wait_dead(self) -> str:
        """Returns when the engine has ended by itself, with what is known of its end."""
        ...

    def close(self) -> None:
        """End the engine and free what it holds."""
        ...


def listening_socket(options: ServerOptions) -> socket.socket:
    """A socket bound to the address of `options`, not listening yet: it holds the port while the model loads.

    Raises OSError whose text says what to do.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((options.host, options.port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, _bind_failure(error, options)) from None
    return sock


def _bind_failure(error: OSError, options: ServerOptions) -> str:
    where = f"port {options.port} on {options.host}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use: stop what listens there, or choose another with --port (0 takes any free one)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where} may not be used by this user: choose one above 1023 with --port"
    return f"cannot listen on {where}: {error.strerror or error}; check --host and --port"


class _Server(uvicorn.Server):
    """uvicorn, with its signals left to us and one call when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def serve_until_stopped(client: RunningEngine, options: ServerOptions, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serve on `sock` until SIGINT or SIGTERM, and a while longer for requests that run; the caller closes `client`.

    Gives 0 after a signal, 1 when the engine died, and 128 and its number for a second signal, which ends every request at once.
    """
    app = create_app(client, options)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # serve/middleware.py logs more, and disconnects too
        lifespan="off",
        timeout_graceful_shutdown=int(options.shutdown_timeout_s + _CUT_OFF_S + 1),
        loop="uvloop",
        http=LimitedHttp,
        ws="none",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = _Server(config, on_ready)
    context: ServeContext = app.state.context
    started = time.monotonic()
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_run(server, client, context, sock))
    finally:
        context.close()
        uptime = timedelta(seconds=round(time.monotonic() - started))
        logger.info("stopped after %s: %s served", uptime, _counted(context.num_served))


async def _run(server: _Server, client: RunningEngine, context: ServeContext, sock: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()
    hurried: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)
        elif not hurried.done():
            hurried.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    serving = asyncio.create_task(server.serve([sock]))
    dying = asyncio.create_task(client.wait_dead())
    tasks: list[asyncio.Task[Any]] = [serving, dying]
    try:
        await _first_of(serving, dying, stopped)
        died = dying.done() and not stopped.done()
        if died:
            await _outlive(dying.result(), stopped, context.options)
        context.is_draining = True  # probes say so, and what comes now is told to go elsewhere, while requests still run
        draining = asyncio.create_task(_drain(server, serving, context))
        tasks.append(draining)
        await _first_of(draining, hurried)
        if not draining.done():
            await _cut_off(server, serving)
            return 128 + hurried.result()
        await draining
        return 1 if died else 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _outlive(cause: str, stopped: asyncio.Future[int], options: ServerOptions) -> None:
    """Waiting requests fail by themselves, through the client; probes and late comers get their 503 for a while."""
    logger.critical("the engine died: %s; this server stops in %g s", cause, options.dead_engine_linger_s)
    await asyncio.wait({stopped}, timeout=options.dead_engine_linger_s)


async def _drain(server: _Server, serving: asyncio.Task[None], context: ServeContext) -> None:
    """Let running requests finish; end those that are still there when the time is over."""
    if context.active:
        timeout_s, requests = context.options.shutdown_timeout_s, _counted(len(context.active))
        logger.info("stopping: %s may finish within %g s; a second signal ends at once", requests, timeout_s)
    until = time.monotonic() + context.options.shutdown_timeout_s
    while context.active and not serving.done() and time.monotonic() < until:
        await asyncio.sleep(_LOOK_EVERY_S)
    server.should_exit = True
    await asyncio.wait({serving}, timeout=max(0.0, until - time.monotonic()))
    if not serving.done():
        count = await context.active.cut_all("the server stops")
        if count:
            logger.warning("stopping: time is over, cut %s; --shutdown-timeout gives more", _counted(count))
    await serving


async def _cut_off(server: _Server, serving: asyncio.Task[None]) -> None:
    """End every exchange now: each tells its client, and one whose client does not listen loses its connection."""
    logger.warning("stopping at once: ending %s", _counted(len(server.server_state.tasks)))
    server.should_exit = True
    for task in server.server_state.tasks:
        task.cancel()
    await asyncio.wait({serving}, timeout=_LAST_WORDS_S)
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.wait({serving}, timeout=_LAST_WORDS_S)


def _counted(requests: int) -> str:
    return "1 request" if requests == 1 else f"{requests} requests"
