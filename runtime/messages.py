"""Messages between the server process and the engine process: tagged msgspec structs in msgpack. No pickle, no code."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from .config import EngineConfig
from .logs import LogSettings
from .outputs import TokenOutput
from .sampling_params import SamplingParams


class Add(msgspec.Struct, tag=True, frozen=True):
    """Run a request. `prompt` is int32 token ids as bytes."""

    request_id: str
    prompt: bytes
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    namespace: str = ""
    priority: int = 0


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a request. `status_code` 0: it is done, its text has come to a stop string."""

    request_id: str
    message: str
    status_code: int


class Ask(msgspec.Struct, tag=True, frozen=True):
    """A question answered by one Answer of the same number: "flush_cache" or "info"."""

    number: int
    question: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    pass


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded. `info` are the engine's fixed figures."""

    context_length: int
    max_total_tokens: int
    vocab_size: int
    info: dict[str, Any]


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What one step made."""

    outputs: list[TokenOutput]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The engine did not take a request."""

    request_id: str
    message: str
    status_code: int
    code: str | None
    param: str | None


class Answer(msgspec.Struct, tag=True, frozen=True):
    number: int
    value: Any


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """The engine's loop went round `idle_s` seconds ago."""

    idle_s: float


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine ends, for this reason. `is_user_error` when what it was asked for cannot work, so that no stack trace helps."""

    message: str
    is_user_error: bool


ToEngine = Add | Abort | Ask | Shutdown
FromEngine = Ready | Outputs | Refused | Answer | Heartbeat | Failed

encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode_config(config: EngineConfig) -> str:
    return msgspec.json.encode(config).decode()


def decode_config(text: str) -> EngineConfig:
    return msgspec.json.decode(text, type=EngineConfig)


def encode_logs(logs: LogSettings) -> str:
    return msgspec.json.encode(logs).decode()


def decode_logs(text: str) -> LogSettings:
    return msgspec.json.decode(text, type=LogSettings)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    tokens = array("i")
    tokens.frombytes(packed)
    return tokens.tolist()
