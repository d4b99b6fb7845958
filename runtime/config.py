"""EngineConfig: every engine option and its default, once. Frozen; `resolve` gives another. Knows no HTTP and loads no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..quant.checkpoint.method_names import canonical_method

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "int8", "fp8"]
AttentionBackend = Literal["auto", "flashinfer"]
Policy = Literal["fcfs", "lpm"]

_CHOICES = {
    "attention_backend": get_args(AttentionBackend),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kv_cache_dtype": get_args(KVCacheDtype),
    "load_format": get_args(LoadFormat),
    "schedule_policy": ("fcfs", "lpm"),
}
_AT_LEAST_ONE = (
    "max_total_tokens",
    "max_running_requests",
    "max_queued_requests",
    "chunked_prefill_size",
    "page_size",
    "context_length",
    "cuda_graph_max_bs",
    "num_threads",
    "tp_size",
    "pp_size",
    "nnodes",
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine, named as SGLang's flags. None means "worked out at start". Raises ValueError naming flag, value and remedy."""

    model_path: str | None = None  # folder, GGUF file or hub id; None: the embedded default model
    tokenizer_path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    load_format: LoadFormat = "auto"  # dummy: random weights of the config, whose files need not be there
    device: Device = "auto"
    dtype: Dtype = "auto"  # auto: the checkpoint's, bfloat16 for GGUF
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: the model's dtype; fp8: fp8_e4m3
    quantization: str = "auto"  # auto: as the checkpoint is; fp8, int8, int4 quantize a dense model while it loads
    linear_backend: str | None = None  # the kernel for the linears that it is made for; None: the first that does not refuse
    attention_backend: AttentionBackend = "auto"  # auto: our own kernels
    allow_reference: bool = False  # serve linears that only the slow float reference computes
    skip_kernel_check: bool = False  # do not hold each kind of kernel against the float reference at start
    context_length: int | None = None  # None: the model's own
    # Both size the KV pool; where both are given, the smaller pool is made.
    mem_fraction_static: float | None = None  # of the device's memory for weights and KV; None: 0.88 on CUDA, 0.5 on the CPU
    max_total_tokens: int | None = None  # tokens in the KV pool; None: what mem_fraction_static leaves
    max_running_requests: int = 256
    max_queued_requests: int | None = None
    queue_timeout_s: float | None = None  # a request that waits longer for its turn ends with 503
    request_timeout_s: float | None = None  # a request that is older ends with 504
    chunked_prefill_size: int | None = None  # tokens a step computes at most; None: 2048 on CUDA, 256 on the CPU
    page_size: int = 16
    schedule_policy: Policy = "fcfs"
    disable_radix_cache: bool = False
    disable_cuda_graph: bool = False  # on CUDA: launch every kernel of every step
    cuda_graph_max_bs: int | None = None  # most decoding requests for which steps are captured; None: 256, or max_running_requests
    disable_overlap_schedule: bool = False  # on CUDA: launch a step only when the one before it has landed
    max_radix_cache_len: int | None = None  # cap on evictable cached tokens
    random_seed: int | None = None
    deterministic: bool = False  # a request's tokens do not depend on the batch, the cache or the chunking, to the bit
    num_threads: int | None = None  # compute threads of a rank on the CPU; None: the cores this process may use, shared by the ranks
    tp_size: int = 1  # ranks that every layer is cut across: GPUs, or processes on the CPU
    pp_size: int | None = None  # stages of tp_size ranks that the layers are divided into; None: 1, or one a node where tp_size fits it
    nnodes: int = 1  # machines, with as many ranks each: those of a Ray cluster, or those that meet at dist_init_addr
    dist_init_addr: str | None = None  # HOST:PORT of the first machine
    node_rank: int | None = None  # which of the machines this one is, with dist_init_addr

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{_flag(name)} {getattr(self, name)!r} is not valid: give {one_of(choices)}")
        canonical_method(self.quantization)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{_flag(name)} {value!r} is not valid: give a whole number of at least 1")
        fraction = self.mem_fraction_static
        if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
            raise ValueError(f"--mem-fraction-static {fraction!r} is not valid: give a number between 0 and 1, such as 0.85")
        if self.load_format == "dummy" and self.model_path is None:
            raise ValueError("--load-format dummy makes weights out of a config.json: name its folder or hub id with --model-path")
        if self.cuda_graph_max_bs is not None and self.disable_cuda_graph:
            raise ValueError(f"--cuda-graph-max-bs {self.cuda_graph_max_bs} and --disable-cuda-graph contradict each other: leave one out")
        for name in ("queue_timeout_s", "request_timeout_s"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{_flag(name.removesuffix('_s'))} {seconds!r} is not valid: give seconds, more than 0")
        cached = self.max_radix_cache_len
        if cached is not None and (not isinstance(cached, int) or isinstance(cached, bool) or cached < 0):
            raise ValueError(f"--max-radix-cache-len {cached!r} is not valid: give 0 or more tokens")
        if cached and self.disable_radix_cache:
            raise ValueError(f"--max-radix-cache-len {cached} and --disable-radix-cache contradict each other: leave one out")
        self._check_nodes()
        if self.max_total_tokens is not None and self.max_total_tokens < self.page_size:
            raise ValueError(
                f"--max-total-tokens {self.max_total_tokens} is not valid: give at least one page (--page-size {self.page_size}), "
                "or a smaller page"
            )

    def _check_nodes(self) -> None:
        number, address = self.node_rank, self.dist_init_addr
        if self.nnodes == 1:
            for name in ("dist_init_addr", "node_rank"):
                if getattr(self, name) not in (None, 0):
                    raise ValueError(f"{_flag(name)} {getattr(self, name)} is for several machines: give --nnodes too, or leave it out")
        elif address is None and number is not None:
            raise ValueError(f"--node-rank {number} needs --dist-init-addr HOST:PORT, where the machines meet; with Ray leave both out")
        elif address is not None:
            host, _, port = address.rpartition(":")
            if host.startswith("["):
                raise ValueError(f"--dist-init-addr {address!r} is not possible: give an IPv4 address or a name that stands for one")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"--dist-init-addr {address!r} is not valid: give HOST:PORT of the first machine, such as 10.0.0.1:5000")
            if not isinstance(number, int) or not 0 <= number < self.nnodes:
                told = "is missing" if number is None else f"{number!r} is not valid"
                raise ValueError(
                    f"--node-rank {told}: with --dist-init-addr give 0 on the first machine, up to {self.nnodes - 1} on the last"
                )
        if (self.pp_size or 1) > 1 and self.disable_overlap_schedule:
            raise ValueError(
                f"--disable-overlap-schedule is for one stage: with {self.pp_size} (--pp-size, --nnodes) each has a batch of its own under "
                "way. Leave it out"
            )
        if self.pp_size is not None and self.tp_size * self.pp_size % self.nnodes:
            raise ValueError(
                f"--tp-size {self.tp_size} times --pp-size {self.pp_size} ranks cannot be shared equally by --nnodes {self.nnodes}: "
                "give sizes whose product it divides"
            )

    def resolve(self, *, device: Literal["cpu", "cuda"], num_devices: int = 1) -> EngineConfig:
        """The same options with what depends on the device filled in. `num_devices`: the GPUs of this machine, where it has some.

        Several machines are a stage each, where the ranks that share a layer fit one of them. Raises ValueError where they are not shared
        equally.
        """
        on_cpu = device == "cpu"
        if self.pp_size is None:
            stages = self.nnodes if on_cpu or self.tp_size <= num_devices else 1
            return replace(self, pp_size=stages).resolve(device=device, num_devices=num_devices)
        return replace(
            self,
            device=device,
            kv_cache_dtype="fp8_e4m3" if self.kv_cache_dtype == "fp8" else self.kv_cache_dtype,
            chunked_prefill_size=self.chunked_prefill_size or (256 if on_cpu else 2048),
            num_threads=self.num_threads or max(1, len(os.sched_getaffinity(0)) // self.ranks_per_node),
        )

    @property
    def num_ranks(self) -> int:
        """Ranks in all. Of what is not resolved: with one stage, where none are asked for."""
        return self.tp_size * (self.pp_size or 1)

    @property
    def num_stages(self) -> int:
        """Stages of layers. Of what is not resolved: one, where none are asked for."""
        return self.pp_size or 1

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each machine, which `resolve` has found to be equally many."""
        return max(1, self.num_ranks // self.nnodes)

    @property
    def needs_weights(self) -> bool:
        """Whether the model's weight files must be there."""
        return self.load_format != "dummy"

    @property
    def memory_fraction(self) -> float:
        """`mem_fraction_static`, or the device's default."""
        return default_memory_fraction(self.device) if self.mem_fraction_static is None else self.mem_fraction_static


def default_memory_fraction(device: str) -> float:
    """The share of memory for weights and KV cache on "cpu", "cuda" or a numbered device such as "cuda:0"."""
    return 0.88 if device.startswith("cuda") else 0.5


def one_of(choices: Sequence[str]) -> str:
    """Choices as an error names them: "a, b or c"."""
    return " or ".join([*([", ".join(choices[:-1])] if choices[1:] else []), choices[-1]])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
