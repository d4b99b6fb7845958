"""Octavo as a Ray Serve application: `serve run octavo.serve.ray_app:build model_path=... replicas=2`, and KubeRay's RayService.

Replicas are engines behind their whole HTTP application; a gateway takes requests from Ray's proxies and asks the replica that Ray's router
names, by PrefixRouter. What is said of every replica (metrics) or to every one (flushing, aborting) goes to all. Needs octavo[ray].
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import math
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ..runtime.config import EngineConfig
from ..runtime.logs import set_up_logging
from ..runtime.start import prepare_environment
from .arguments import options_of, serve_parser
from .errors import ApiError
from .http_limits import BODY_TIMEOUT_S
from .in_process import Asked, Head, ask, header, whole
from .options import ServerOptions
from .prefix_index import beginning_of, blocks_of
from .streaming import error_event, json_response, until_disconnect

logger = logging.getLogger("octavo.serve")

EVERYWHERE = ("/flush_cache", "/abort_request")
_ATTEMPTS = 2  # at replicas that die before they began to answer: more, and one bad request could end them all
_ALL_S = 20.0  # that all replicas have together to answer what is asked of each
_LINGER_S = 1.0  # in which a replica without an engine tells those who wait for it
_METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]
# Of this connection alone; and the id of the request, which Ray's proxy gives to replica and client by itself.
_NOT_PASSED = {b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"x-request-id"}
_NOT_HERE = {
    "host": "http_options of Ray Serve",
    "port": "http_options of Ray Serve",
    "api_key": "api_key_file, since Ray shows arguments to everybody",
    "admin_api_key": "admin_api_key_file, since Ray shows arguments to everybody",
    "dp_size": "replicas",
    "nnodes": "`octavo serve --nnodes`: a replica is on one machine",
    "dist_init_addr": "`octavo serve --nnodes`: a replica is on one machine",
    "node_rank": "`octavo serve --nnodes`: a replica is on one machine",
    "log_file": "Ray's own logs of replicas",
    "help": "`octavo serve --help`",
    "explain_quant": "`octavo serve --explain-quant`",
}
# Arguments of our own that are numbers, and the least that each may be.
_NUMBERS = {
    "replicas": 1,
    "min_replicas": 0,
    "max_replicas": 1,
    "target_ongoing_requests": 0,
    "num_cpus": 0,
    "num_gpus": 0,
    "gateways": 1,
    "most_ahead": 0,
}
_SHARES = ("target_ongoing_requests", "num_cpus", "num_gpus")  # which need not be whole
_ROUTINGS = ("prefix", "least-busy")
_ROUTER = "octavo.serve.ray_router:PrefixRouter"


class UnwellError(Exception):
    """A replica whose engine is dead or silent: another may answer. `replica`: its name in Ray."""

    def __init__(self, reason: str, replica: str) -> None:
        super().__init__(reason, replica)
        self.replica = replica


class Replica:
    """An engine in a process of its own, and its HTTP application in this one."""

    def __init__(self, flags: dict[str, Any], num_keys: tuple[int, int]) -> None:
        """`num_keys`: API keys and admin's where the application was built. Raises ValueError where there are fewer here."""
        prepare_environment()
        from ..runtime.process import launch_engine
        from .app import create_app

        config, options = _options(flags)
        if any(have < wanted for have, wanted in zip((len(options.api_keys), len(options.admin_api_keys)), num_keys, strict=True)):
            raise ValueError(
                "the application was built with API keys that its replicas do not have: give api_key_file, on every node, or set "
                "OCTAVO_API_KEY in the environment of every node or in runtime_env"
            )
        set_up_logging(options.logs, rotates=False)
        self._client = launch_engine(config, logs=options.logs)
        self._app = create_app(self._client, options)
        self._watch: asyncio.Task[None] | None = None

    async def answer(self, asked: Asked) -> AsyncGenerator[Head | bytes, None]:
        """Head and pieces of the answer; a caller that leaves aborts the request."""
        self._check()
        async with aclosing(ask(self._app, asked)) as answer:
            async for piece in answer:
                yield piece

    async def answer_whole(self, asked: Asked) -> tuple[str, Head, bytes]:
        """The replica's name in Ray, and its whole answer."""
        self._check()
        return _own_name(), *await whole(self._app, asked)

    async def check_health(self) -> None:
        """Raises UnwellError for an engine that is dead or silent: Ray then starts another replica in this one's place.

        A dead one does not wait for that: this process ends, once those who wait for it have been told.
        """
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_with_the_engine())
        self._check()

    async def _end_with_the_engine(self) -> None:
        logger.critical("the engine died: %s", await self._client.wait_dead())
        await asyncio.sleep(_LINGER_S)
        os._exit(1)

    def _check(self) -> None:
        state = self._client.health()
        if not state.ok:
            raise UnwellError(state.reason, _own_name())

    def __del__(self) -> None:
        """Ray calls this when the replica has drained."""
        if hasattr(self, "_client"):
            self._client.close()
        if hasattr(self, "_app"):
            self._app.state.context.close()


def _own_name() -> str:
    name: str = serve.get_replica_context().replica_id.unique_id
    return name


@serve.ingress()
class Gateway:
    """Hands each request on to a replica, whole, and its answer back as it is made."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self._replicas, self._max_body_bytes = replicas, max_body_bytes

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray's hook: the application of a replica that is set up."""
        return Starlette(routes=[Route("/{path:path}", self.forward, methods=_METHODS)])

    async def forward(self, request: Request) -> Response:
        try:
            asked = await self._read(request)
            return await until_disconnect(request.receive, self._answer(asked))
        except ApiError as error:
            return json_response(error.body, error.status_code)
        except (BackPressureError, DeploymentUnavailableError, TimeoutError) as error:
            return _unavailable(str(error))

    async def _answer(self, asked: Asked) -> Response:
        if asked.path in EVERYWHERE:
            return await self._to_all(asked)
        return await (self._metrics(asked) if asked.path == "/metrics" else self._to_one(asked))

    async def _read(self, request: Request) -> Asked:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._max_body_bytes:
                        raise ApiError(
                            f"the body is larger than {self._max_body_bytes >> 20} MiB: send less at once, or set a larger max_body_mib",
                            status_code=413,
                            code="body_too_large",
                        )
        except TimeoutError:
            raise ApiError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status_code=408, code="request_timeout") from None
        client = None if request.client is None else (request.client.host, request.client.port)
        headers = tuple((bytes(name), bytes(value)) for name, value in request.headers.raw)
        whole_body = bytes(body)
        blocks = blocks_of(beginning_of(whole_body)) if body else ()
        return Asked(request.method, request.url.path, request.url.query.encode(), headers, whole_body, client, blocks)

    async def _to_one(self, asked: Asked) -> Response:
        for attempt in range(_ATTEMPTS):
            answer = self._replicas.options(stream=True).answer.remote(asked)
            try:
                head: Head = await anext(answer)
                break
            except (RayActorError, UnwellError) as error:
                logger.warning("a replica could not answer %s %s (attempt %d): %s", asked.method, asked.path, attempt + 1, error)
                if isinstance(error, UnwellError):
                    asked = replace(asked, avoid=(*asked.avoid, error.replica))
            except BaseException:
                answer.cancel()
                raise
        else:
            return _unavailable(f"{_ATTEMPTS} replicas could not, one after the other")
        streams = header(head.headers, b"content-type").startswith(b"text/event-stream")
        response = StreamingResponse(_body(answer, streams=streams), head.status)
        response.raw_headers = [(name, value) for name, value in head.headers if name not in _NOT_PASSED]
        return response

    async def _to_all(self, asked: Asked) -> Response:
        """What failed at one has failed; of how many requests were aborted, the sum."""
        answers = await self._everywhere(asked)
        if not answers:
            return _unavailable("none is well")
        _, head, body = next((answer for answer in answers if answer[1].status >= 400), answers[0])
        if head.status < 400 and asked.path == "/abort_request":
            return json_response({"aborted": sum(json.loads(body)["aborted"] for _, _, body in answers)})
        return _whole_response(head, body)

    async def _everywhere(self, asked: Asked) -> list[tuple[str, Head, bytes]]:
        """The answers of all replicas that are well."""
        found = await self._replicas.broadcast("answer_whole", asked).results_async(timeout_s=_ALL_S, return_exceptions=True)
        return [answer for answer in found if not isinstance(answer, BaseException)]

    async def _metrics(self, asked: Asked) -> Response:
        answers = await self._everywhere(asked)
        if not answers:
            return _unavailable("none is well")
        wrong = next(((head, body) for _, head, body in answers if head.status != 200), None)
        if wrong is not None:
            return _whole_response(*wrong)
        texts = {replica: body.decode() for replica, _, body in answers}
        return Response(merged(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _body(answer: Any, *, streams: bool) -> AsyncGenerator[bytes, None]:
    """What follows the head. A replica that dies meanwhile ends a stream of events with an error, and cuts any other answer off."""
    try:
        async for piece in answer:
            yield piece
    except RayActorError as error:
        logger.warning("a replica died in the middle of an answer: %s", error)
        if not streams:
            raise
        yield error_event(ApiError("the replica that answered has died: ask again", status_code=503, code="engine_dead"))
    finally:
        answer.cancel()  # which does nothing where it is complete


def _whole_response(head: Head, body: bytes) -> Response:
    response = Response(body, head.status)
    response.raw_headers = [
        *((name, value) for name, value in head.headers if name not in _NOT_PASSED),
        (b"content-length", str(len(body)).encode()),
    ]
    return response


def _unavailable(reason: str) -> Response:
    error = ApiError(f"no replica takes the request: {reason}", status_code=503, code="engine_overloaded")
    response = json_response(error.body, 503)
    response.headers["retry-after"] = "1"
    return response


def merged(texts: Mapping[str, str]) -> bytes:
    """Metrics of several replicas, by name, as one text, each series with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                known.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))

    class Found:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Found())  # type: ignore[arg-type, unused-ignore]
    return generate_latest(registry)


def build(args: dict[str, Any]) -> serve.Application:
    """The application, of flags of `octavo serve` as a mapping (`model_path`, `max_running_requests`, ...) and:

    `replicas`: how many engines, 1 by default; or `min_replicas` and `max_replicas`, between which their number follows the queue;
    `target_ongoing_requests` of each then, by default as many as it runs together; `num_gpus` and `num_cpus` of each;
    `gateways`: processes that hand requests on; `routing`: by `prefix`, or `least-busy`, Ray's own of two at random; `most_ahead`: requests
    that a replica may have more than the least busy one and still get more for the prefixes that it holds. Raises ValueError for what is
    none of these, with the remedy.
    """
    given = {name.replace("-", "_"): value for name, value in args.items()}
    for name, instead in _NOT_HERE.items():
        if name in given:
            raise ValueError(f"{name} is not for here: use {instead}")
    numbers = {name: _number(name, given.pop(name), least) for name, least in _NUMBERS.items() if name in given}
    resources = {name: numbers[name] for name in ("num_cpus", "num_gpus") if name in numbers}
    gateways, most_ahead = int(numbers.get("gateways", 1)), int(numbers.get("most_ahead", 4))
    routing = str(given.pop("routing", "prefix"))
    if routing not in _ROUTINGS:
        raise ValueError(f"routing {routing!r} is not possible: give {' or '.join(_ROUTINGS)}")
    for name in given:
        if near := difflib.get_close_matches(name, [*_NUMBERS, "routing"], n=1, cutoff=0.8):  # no flag's name is that near to one of these
            raise ValueError(f"{name} is not known; did you mean {near[0]}?")
    config, options = _options(given)
    router = RequestRouterConfig(request_router_class=_ROUTER, request_router_kwargs={"most_ahead": most_ahead})
    room = config.max_running_requests + (config.max_queued_requests or 0)
    scaling, most = _scaling(numbers, config.max_running_requests)
    replica = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=room + 16,  # the engine's own queue refuses, with its own words; probes find room
        ray_actor_options=resources or {"num_cpus": 1},
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=options.shutdown_timeout_s + 5,
        request_router_config=router if routing == "prefix" else RequestRouterConfig(),
        **scaling,
    )
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=gateways,
        max_ongoing_requests=2 * room * most // gateways + 64,
        ray_actor_options={"num_cpus": 0},  # it waits more than it computes, and must find room where replicas have taken every core
    )
    return gateway.bind(replica.bind(given, (len(options.api_keys), len(options.admin_api_keys))), options.max_body_mib << 20)


def _options(flags: Mapping[str, Any]) -> tuple[EngineConfig, ServerOptions]:
    return options_of(serve_parser("octavo serve").parse_mapping(flags, "the application's arguments"))


def _number(name: str, value: Any, least: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number >= least or (name not in _SHARES and not number.is_integer()):
        what = "number" if name in _SHARES else "whole number"
        raise ValueError(f"{name} {value!r} is not possible: give a {what} of at least {least}")
    return number


def _scaling(given: Mapping[str, float], running: int) -> tuple[dict[str, Any], int]:
    """What Ray is told of how many replicas there are, and the most of them."""
    bounds = [name for name in ("min_replicas", "max_replicas", "target_ongoing_requests") if name in given]
    if bounds and "replicas" in given:
        raise ValueError(f"replicas is a fixed number, and {bounds[0]} lets it change: give one of them")
    if not bounds:
        most = int(given.get("replicas", 1))
        return {"num_replicas": most}, most
    least = int(given.get("min_replicas", 1))
    most = int(given.get("max_replicas", max(1, least)))
    if least > most:
        raise ValueError(f"min_replicas {least} and max_replicas {most} are not possible: the first must be 0 to the second")
    target = given.get("target_ongoing_requests", float(running))
    return {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}}, most
