"""The command line of `octavo serve`: flags, help, and the two option objects they make. Knows no server and starts nothing."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from ..runtime.config import AttentionBackend, Device, Dtype, EngineConfig, KVCacheDtype, LoadFormat, Policy
from ..runtime.logs import LogFormat
from .options import LogLevel, ServerOptions
from .parser import Parser

_QUEUED_PER_RUNNING = 4


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: give a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: give a number") from None


def _quantization(text: str) -> str:
    try:
        return EngineConfig(quantization=text).quantization
    except ValueError as error:  # "quantization 'x' is not known. Known: ..."
        _, _, remedy = str(error).partition(" is not known. ")
        raise argparse.ArgumentTypeError(f"{text!r} is not valid. {remedy or error}") from None


def _explanation(text: str) -> str:
    if text not in ("short", "all"):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: give it alone or as --explain-quant=all")
    return text


def _key_file(text: str) -> list[str]:
    try:
        keys = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read ({error}): give a file with a key a line") from None
    found = [key for key in keys if key and not key.startswith("#")]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds no key: give a file with a key a line")
    return found


def choices_of(annotation: Any) -> str:
    """The values of a Literal, for help; the option objects check them."""
    return "{" + ",".join(get_args(annotation)) + "}"


def default_of(config: type[Any], name: str) -> str:
    """The default of a dataclass field, as help shows it."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "automatic" if value is None or value is dataclasses.MISSING else str(value)


def serve_parser(prog: str) -> Parser:
    """The parser of `octavo serve`. What it parses holds the flags that were given and nothing else."""
    parser = Parser(
        prog=prog,
        alone={"--explain-quant": "--explain-quant=short"},
        description="Serve a model over an OpenAI-compatible HTTP API.",
        epilog=f"Example: {prog} Qwen/Qwen2.5-0.5B-Instruct --port 8000",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    _add_model(parser)
    _add_quantization(parser)
    _add_server(parser)
    _add_memory(parser)
    _add_scheduling(parser)
    return parser


def _engine(text: str, name: str) -> str:
    return f"{text} (default: {default_of(EngineConfig, name)})".replace("%", "%%")


def _server(text: str, name: str) -> str:
    return f"{text} (default: {default_of(ServerOptions, name)})".replace("%", "%%")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("model", nargs="?", metavar="MODEL", help="the same as --model-path")
    group.add_argument(
        "--model-path",
        "--model",
        metavar="PATH",
        help=_engine("a folder, a hub id or a .gguf file; none: the embedded model", "model_path"),
    )
    group.add_argument("--tokenizer-path", metavar="PATH", help=_engine("where the tokenizer is, if not with the model", "tokenizer_path"))
    group.add_argument("--revision", help=_engine("branch, tag or commit on the hub", "revision"))
    group.add_argument("--chat-template", metavar="FILE", help=_engine("a Jinja file in place of the model's template", "chat_template"))
    group.add_argument(
        "--load-format",
        metavar=choices_of(LoadFormat),
        help=_engine("dummy: random weights of the model's config, whose own need not be there, to measure speed with", "load_format"),
    )
    group.add_argument("--device", metavar=choices_of(Device), help=_engine("where to run", "device"))
    group.add_argument("--dtype", metavar=choices_of(Dtype), help=_engine("of weights", "dtype"))
    group.add_argument(
        "--kv-cache-dtype", metavar=choices_of(KVCacheDtype), help=_engine("of the KV cache; auto: that of --dtype", "kv_cache_dtype")
    )
    group.add_argument(
        "--context-length", type=whole_number, metavar="N", help=_engine("tokens of prompt and answer together", "context_length")
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="give a request the same tokens whatever else is computed, cached or cut into chunks; slower on a GPU, free on the CPU",
    )
    group.add_argument(
        "--random-seed", "--seed", type=whole_number, metavar="N", help=_engine("for requests without a seed", "random_seed")
    )
    told = "compute threads of a rank on the CPU (default: OMP_NUM_THREADS, or its share of the cores)"
    group.add_argument("--num-threads", type=whole_number, metavar="N", help=told)


def _add_quantization(parser: Parser) -> None:
    group = parser.add_argument_group("quantization and kernels")
    group.add_argument(
        "--quantization",
        type=_quantization,
        metavar="NAME",
        help=_engine(
            "auto: as the checkpoint is; fp8, int8, int4: quantize a dense model while it loads; none, awq, gptq, compressed-tensors, "
            "modelopt, gguf: insist that the checkpoint is that",
            "quantization",
        ),
    )
    group.add_argument(
        "--linear-backend",
        metavar="NAME",
        help=_engine("the kernel for the linear layers that it is made for; octavo doctor lists them", "linear_backend"),
    )
    group.add_argument("--allow-reference", action="store_true", help="take the slow float reference for layers that no kernel computes")
    group.add_argument(
        "--skip-kernel-check", action="store_true", help="do not hold the kernels against the float reference while the model loads"
    )
    group.add_argument(
        "--explain-quant",
        nargs="?",
        type=_explanation,
        metavar="=all",
        help="load the model, print which kernel computes which layers and why no faster one, and exit without serving; "
        "=all: also the kernels that are not made for such weights",
    )


def _add_server(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", help=_server("address to listen on; 0.0.0.0 for every interface", "host"))
    group.add_argument("--port", type=whole_number, metavar="N", help=_server("port to listen on; 0 for any free one", "port"))
    group.add_argument(
        "--api-key",
        action="append",
        dest="api_keys",
        metavar="KEY",
        help="a key that clients must send; repeat it for several (default: open)",
    )
    group.add_argument(
        "--api-key-file",
        action="extend",
        type=_key_file,
        dest="api_keys",
        metavar="FILE",
        help="more such keys, one a line, # before comments; OCTAVO_API_KEY in the environment holds one too",
    )
    group.add_argument(
        "--admin-api-key",
        action="append",
        dest="admin_api_keys",
        metavar="KEY",
        help="a key for what changes the server (/flush_cache, /abort_request), and for everything else; OCTAVO_ADMIN_API_KEY in the "
        "environment too (default: with --api-key, nobody may do that)",
    )
    group.add_argument(
        "--admin-api-key-file",
        action="extend",
        type=_key_file,
        dest="admin_api_keys",
        metavar="FILE",
        help="more such keys, as in --api-key-file",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        dest="cors_origins",
        metavar="ORIGIN",
        help="an origin whose pages may ask from a browser, such as https://chat.example, or *; repeat it for several (default: none)",
    )
    group.add_argument("--served-model-name", metavar="NAME", help=_server("the model's name in the API", "served_model_name"))
    group.add_argument("--strict-model-names", action="store_true", help="answer 404 to other model names (default: accept any)")
    group.add_argument(
        "--max-body-mib", type=whole_number, metavar="N", help=_server("larger request bodies are refused with 413", "max_body_mib")
    )
    group.add_argument("--log-level", metavar=choices_of(LogLevel), help=_server("how much to log", "log_level"))
    group.add_argument("--log-file", metavar="FILE", help="log to this file too; rotated at 100 MiB, with five old ones kept")
    group.add_argument("--log-format", metavar=choices_of(LogFormat), help=_server("json: an object a line", "log_format"))
    group.add_argument("--log-requests", action="store_true", help="log what each request asks: parameters and the beginning of its prompt")
    group.add_argument("--enable-metrics", action="store_true", help="serve /metrics, which is the default")
    group.add_argument("--disable-metrics", action="store_false", dest="enable_metrics", help="do not serve /metrics")
    group.add_argument(
        "--config", type=Path, dest="config_file", metavar="FILE", help="a YAML file of flags, without dashes; the command line wins"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_number,
        dest="shutdown_timeout_s",
        metavar="S",
        help=_server(
            "seconds for which running requests may go on after Ctrl-C or SIGTERM, before they are cut; a second signal cuts them at once",
            "shutdown_timeout_s",
        ),
    )


def _add_memory(parser: Parser) -> None:
    group = parser.add_argument_group("memory and prefix cache")
    group.add_argument(
        "--mem-fraction-static", type=_number, metavar="F", help=_engine("share of memory for weights and KV cache", "mem_fraction_static")
    )
    group.add_argument(
        "--max-total-tokens",
        type=whole_number,
        metavar="N",
        help=_engine("tokens that the KV cache holds; with --mem-fraction-static the smaller of both", "max_total_tokens"),
    )
    group.add_argument("--page-size", type=whole_number, metavar="N", help=_engine("tokens in one page of the KV cache", "page_size"))
    group.add_argument("--disable-radix-cache", action="store_true", help="do not reuse the prefixes of earlier requests")
    group.add_argument(
        "--max-radix-cache-len",
        type=whole_number,
        metavar="N",
        help=_engine("most tokens kept for reuse by later requests", "max_radix_cache_len"),
    )


def _add_scheduling(parser: Parser) -> None:
    group = parser.add_argument_group("scheduling")
    group.add_argument(
        "--tp-size",
        "--tp",
        "--tensor-parallel-size",
        type=whole_number,
        metavar="N",
        help=_engine("ranks that every layer is cut across: GPUs, or processes on the CPU", "tp_size"),
    )
    group.add_argument(
        "--dp-size",
        "--dp",
        "--data-parallel-size",
        type=whole_number,
        metavar="N",
        help="engines behind one address, on Ray Serve, found by the prefixes that they hold (default: 1; more want octavo[ray])",
    )
    group.add_argument(
        "--pp-size",
        "--pp",
        "--pipeline-parallel-size",
        type=whole_number,
        metavar="N",
        help="stages of --tp-size ranks that the layers are divided into (default: 1, or one a machine where --tp-size ranks fit into it)",
    )
    group.add_argument(
        "--nnodes",
        "--num-nodes",
        type=whole_number,
        metavar="N",
        help=_engine("machines, as many ranks on each: of the Ray cluster that this one is in, or by --dist-init-addr", "nnodes"),
    )
    group.add_argument(
        "--dist-init-addr",
        metavar="HOST:PORT",
        help="of the first machine, where machines meet without Ray: start the same command on each (default: Ray)",
    )
    group.add_argument("--node-rank", type=whole_number, metavar="N", help="which machine this is, with --dist-init-addr: 0, 1, ...")
    group.add_argument(
        "--attention-backend",
        metavar=choices_of(AttentionBackend),
        help=_engine("on a GPU: flashinfer in place of our own kernels, where it is installed", "attention_backend"),
    )
    group.add_argument("--disable-cuda-graph", action="store_true", help="on a GPU: launch every kernel of every step")
    group.add_argument(
        "--cuda-graph-max-bs",
        type=whole_number,
        metavar="N",
        help="on a GPU: most decoding requests for which steps are captured as graphs (default: 256, or --max-running-requests)",
    )
    group.add_argument(
        "--disable-overlap-schedule",
        action="store_true",
        help="on a GPU: launch a step only when the tokens of the one before are known",
    )
    group.add_argument(
        "--max-running-requests", type=whole_number, metavar="N", help=_engine("most requests computed together", "max_running_requests")
    )
    group.add_argument(
        "--max-queued-requests",
        type=whole_number,
        metavar="N",
        help=f"most requests that wait; more get 503 (default: {_QUEUED_PER_RUNNING} times --max-running-requests)",
    )
    group.add_argument(
        "--queue-timeout",
        type=_number,
        dest="queue_timeout_s",
        metavar="S",
        help="seconds that a request may wait for its turn before it gets 503 (default: no limit)",
    )
    group.add_argument(
        "--request-timeout",
        type=_number,
        dest="request_timeout_s",
        metavar="S",
        help="seconds from a request's arrival after which it is ended with 504 (default: no limit)",
    )
    group.add_argument(
        "--chunked-prefill-size",
        type=whole_number,
        metavar="N",
        help=_engine("most prompt tokens computed in one step", "chunked_prefill_size"),
    )
    group.add_argument(
        "--schedule-policy",
        metavar=choices_of(Policy),
        help=_engine("first come first served, or longest cached prefix first", "schedule_policy"),
    )


def options_of(namespace: argparse.Namespace) -> tuple[EngineConfig, ServerOptions]:
    """The two option objects that the given flags make. Raises ValueError when a value or a combination cannot be used."""
    given = vars(namespace)
    positional = given.pop("model", None)
    if positional is not None:
        if given.get("model_path", positional) != positional:
            raise ValueError(f"two models are given, {positional!r} and --model-path {given['model_path']!r}: leave one out")
        given["model_path"] = positional
    for name, variable in (("api_keys", "OCTAVO_API_KEY"), ("admin_api_keys", "OCTAVO_ADMIN_API_KEY")):
        keys = [*given.get(name, ()), *([key] if (key := os.environ.get(variable, "").strip()) else [])]
        if keys:
            given[name] = tuple(keys)
    if "cors_origins" in given:
        given["cors_origins"] = tuple(given["cors_origins"])
    server = _taken(given, (field.name for field in dataclasses.fields(ServerOptions)))
    return _bounded(EngineConfig(**given)), ServerOptions(**server)


def _bounded(config: EngineConfig) -> EngineConfig:
    """A server's queue has an end: behind it a client does better to ask another replica than to wait."""
    if config.max_queued_requests is not None:
        return config
    return dataclasses.replace(config, max_queued_requests=_QUEUED_PER_RUNNING * config.max_running_requests)


def mapping_of(words: Sequence[str]) -> dict[str, Any]:
    """What `flags_of` gives as a mapping, as a config file has it: a flag that stands alone is true, one that is given again a list."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word.removeprefix("--").replace("-", "_"), [])
        else:
            values.append(word)
    return {name: values if len(values) > 1 else values[0] if values else True for name, values in found.items()}


def flags_of(config: EngineConfig, options: ServerOptions) -> list[str]:
    """The flags, but for the model, that make two option objects what they are: words for people, which tell no API key."""
    given = {**vars(config), **vars(options)}
    usual = _bounded(EngineConfig(max_running_requests=config.max_running_requests))
    default = {**vars(usual), **vars(ServerOptions()), "model_path": config.model_path}
    default["max_running_requests"] = EngineConfig().max_running_requests
    words: list[str] = []
    for action in serve_parser("")._actions:
        value = given.get(action.dest)
        if not action.option_strings or value == default.get(action.dest):
            continue
        flag = action.option_strings[0]
        if action.dest in ("api_keys", "admin_api_keys"):
            words += [flag, "..."] * len(value or ()) if not flag.endswith("-file") else []
        elif isinstance(value, tuple):
            words += [word for one in value for word in (flag, str(one))]
        elif isinstance(value, bool):
            words += [flag] if value is action.const else []
        else:
            words += [flag, str(value)]
    return words


def _taken(given: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}
