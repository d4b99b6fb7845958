"""ModelRunner: device memory: the model, its KV pool and its workspace. Knows no queue, no request's life and no socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..kernels.gpu.device import is_gpu
from ..kernels.pages import CODE_RANGE
from ..quant.build import KernelOptions
from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.resolve import ModelFiles
from ..quant.module_formats import ModuleFormats
from ..quant.self_check import SelfCheck
from .batch import Batch
from .config import EngineConfig
from .decode_graphs import Capture, CudaCapture, DecodeGraphs, graph_sizes
from .dummy_weights import DummySource
from .forward_batch import AttentionShape, ForwardBatch, StepArrays, lay_out, make_forward_batch
from .kv_pool import KV_DTYPES, KVPool, kv_bytes_per_token, kv_dtype_name
from .layers.parallel import TensorParallelGroup
from .linear_report import LinearReport, check_backend
from .memory import MemoryBudget, OutOfMemoryPlan, device_memory, plan_memory
from .models.config import ModelConfig
from .models.kv_scales import is_kv_scale
from .models.llama import LlamaModel
from .phases import Phases
from .pipeline import Pipeline
from .profile_step import compute_step, largest_step, measured_bytes
from .sampler import Draw
from .weight_dtype import weight_dtype
from .weights import WeightSource

if TYPE_CHECKING:
    from ..kernels.gpu.flashinfer_attention import FlashInfer
    from .ranks import Ranks

logger = logging.getLogger("octavo.runtime")
_MOST_GRAPH_ROWS = 256


class ModelRunner:
    """Loads a model and computes batches. One thread at a time."""

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        *,
        group: TensorParallelGroup | None = None,
        pipeline: Pipeline | None = None,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
        show_progress: bool = True,
    ) -> None:
        """`config` is resolved. Raises CheckpointError, UnsupportedModel, OutOfMemoryPlan or ValueError with the remedy; KernelFault.

        `group` is the ranks that each layer is cut across, `pipeline` those that layers are divided among; the first rank of all has
        `ranks`, the others, which compute what it tells them.
        """
        self.phases = Phases()
        self._config = config
        self._graphs: DecodeGraphs | None = None
        self._group = group or TensorParallelGroup()
        self._pipeline = pipeline or Pipeline()
        self._ranks: Ranks | None = None  # while a step is measured and captured, every rank computes it by itself
        self.device = device or choose_device(config)
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or 1)
            if ignored := _for_gpus_alone(config):
                logger.info("no effect on the CPU: %s", ", ".join(ignored))
        self.model_config = model = ModelConfig.from_hf(read_config(files))
        self.context_length = model.context_length(config.context_length)
        self.dtype = weight_dtype(config, files, model)
        self.kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, self.dtype)
        activation_dtype = self.dtype if is_gpu(self.device) else torch.float32
        peer = self._attention_peer(activation_dtype)  # refused before minutes of loading
        with torch.inference_mode():
            source = self._source(config, files, activation_dtype, show_progress=show_progress)
            formats = source.formats
            with source:
                scales_for = _kv_scales_made_for(formats) if self.kv_dtype in CODE_RANGE else None
                reads_scales = scales_for is not None and (self.kv_dtype == torch.int8) == (scales_for == "int8")
                self.model = self._load(source, has_kv_scales=reads_scales)
            self.phases.ends("load_weights")
            _refuse_unread(source, tied=self.model.is_tied, is_here=self._holds)
            check_backend(config.linear_backend, self.model.linears)
            if self.kv_dtype in CODE_RANGE:
                left = any(is_kv_scale(name) for name in source.unread)
                why = f"the checkpoint's scales are for {scales_for}" if left and not reads_scales else "the checkpoint has none"
                logger.info("KV cache: %s, %s", kv_dtype_name(self.kv_dtype), self._describe_kv_scales(why))
            assert config.chunked_prefill_size is not None
            self._workspace = self.model.make_workspace(config.chunked_prefill_size + config.max_running_requests)
            self._share = self._group.heads(model.num_heads, model.num_kv_heads)
            self._shape = AttentionShape(
                self._share.heads,
                self._share.kv_heads,
                model.head_dim,
                self.kv_dtype,
                config.deterministic,
                peer,
            )
            self.budget = self._plan(config, self._measure_step() if self.device.type == "cuda" else None)
            self.pool = self._make_pool(self.budget.num_tokens // config.page_size)
            self.phases.ends("make_kv_pool")
            reason = self._reason_against_graphs()
            if reason is None:
                self.capture_graphs(CudaCapture(), show_progress=show_progress)
                self.phases.ends("capture_graphs")
            elif reason:
                logger.info("Steps are not captured as CUDA graphs: %s", reason)
        self.linear_report = LinearReport.of(self.model.linears, formats.method)
        self._ranks = ranks
        self._tell()

    def _load(self, source: WeightSource, *, has_kv_scales: bool) -> LlamaModel:
        memory = device_memory(self.device)
        try:
            return LlamaModel(
                self.model_config,
                source,
                max_position=self.context_length,
                group=self._group,
                pipeline=self._pipeline,
                has_kv_scales=has_kv_scales,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryPlan(
                f"the weights do not fit into {memory.name}, which had {memory.free / 2**30:.2f} GiB free before them, of "
                f"{memory.total / 2**30:.2f}: free some, use a smaller or a quantized model, or give --quantization fp8 or int4"
            ) from error

    def _tell(self) -> None:
        """What the operator should know of the memory and the kernels."""
        for text in (self.budget.table(), self.linear_report.summary(), self.linear_report.advice(self.device.type)):
            if text:
                logger.info("%s", text)

    def _attention_peer(self, activation_dtype: torch.dtype) -> FlashInfer | None:
        """FlashInfer, where it was asked for. Raises ValueError with the remedy where it cannot be."""
        if self._config.attention_backend != "flashinfer":
            return None
        from ..kernels.gpu import flashinfer_attention

        reason = flashinfer_attention.refuses(
            head_dim=self.model_config.head_dim,
            kv_dtype=self.kv_dtype,
            activation_dtype=activation_dtype,
            deterministic=self._config.deterministic,
            device=self.device,
        )
        if reason is not None:
            raise ValueError(f"--attention-backend flashinfer: {reason}")
        return flashinfer_attention.FlashInfer(self.device)

    def _source(self, config: EngineConfig, files: ModelFiles, activation_dtype: torch.dtype, *, show_progress: bool) -> WeightSource:
        """Where weights come from: the files, or nowhere."""
        self_check = None if config.skip_kernel_check else SelfCheck()
        options = KernelOptions(config.linear_backend, config.allow_reference, self_check, config.deterministic)
        described = read_config(files)
        if not config.needs_weights:
            return DummySource(
                ModuleFormats(files, described, {}, quantization=config.quantization),
                weight_dtype=self.dtype,
                activation_dtype=activation_dtype,
                device=self.device,
                kernel_options=options,
                has_head=not self.model_config.tie_word_embeddings,
            )
        reader = open_reader(files)
        return WeightSource(
            reader,
            ModuleFormats(files, described, reader.tensors(), quantization=config.quantization),
            weight_dtype=self.dtype,
            activation_dtype=activation_dtype,
            device=self.device,
            kernel_options=options,
            show_progress=show_progress,
            is_wanted=self._holds,
        )

    def _holds(self, name: str) -> bool:
        """Whether a tensor is this stage's."""
        return self._pipeline.place.holds(name, self.model_config.num_layers, is_tied=self.model_config.tie_word_embeddings)

    def forward(self, batch: Batch, awaited: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of a batch, float32 [R, vocab_size], in the order that ForwardBatch.logits_rows describes.

        `awaited` int64 [n] are the tokens that the last step sampled, where the batch's requests await any.
        """
        return self.finish(self.begin(batch, awaited), awaited)

    def begin(self, batch: Batch, awaited: torch.Tensor | None = None) -> StepArrays:
        """Lay a batch out and have the other ranks compute it. Every step that was begun is to be finished, in order."""
        arrays = lay_out(batch, self.pool.page_size)
        if self._ranks is not None:
            self._ranks.tell(arrays, 0 if awaited is None else len(awaited), self.pool.page_size)
        return arrays

    @torch.inference_mode()
    def finish(self, arrays: StepArrays, awaited: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's part of a step that was begun, with the logits that `forward` gives."""
        if self._ranks is None:
            return self._run(arrays, awaited)
        try:
            if awaited is not None:
                self._group.broadcast(awaited)
            return self._run(arrays, awaited)
        except RuntimeError as error:
            raise self._ranks.explained(error) from error

    @torch.inference_mode()
    def follow(self, arrays: StepArrays, num_awaited: int) -> None:
        """Compute the step that the first rank has laid out."""
        assert not num_awaited or self.num_stages == 1, "with stages no batch has a request of another one under way"
        awaited = torch.empty(num_awaited, dtype=torch.int64, device=self.device) if num_awaited else None
        if awaited is not None:
            self._group.broadcast(awaited)
        self._run(arrays, awaited)

    def _run(self, arrays: StepArrays, awaited: torch.Tensor | None) -> torch.Tensor:
        hidden = self._workspace.residual[: arrays.num_tokens]  # between stages: graphs find it there as well
        self._pipeline.receive(hidden)
        if self._graphs is not None and self._graphs.takes(arrays):
            logits = self._graphs.replay(arrays, awaited)
        else:
            logits = self._compute(make_forward_batch(arrays, awaited, self._shape, self.pool.page_size, self.device))
        self._pipeline.hand_on(hidden)
        return logits

    @property
    def num_ranks(self) -> int:
        """All ranks of the engine, this one among them."""
        return self._group.size * self._pipeline.size

    @property
    def num_stages(self) -> int:
        """Stages that the layers are divided into."""
        return self._pipeline.size

    def check(self) -> None:
        """Raises EngineDead where another rank has ended."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """End the other ranks."""
        if self._ranks is not None:
            self._ranks.close()

    @property
    def _logits_width(self) -> int:
        """Of logits as this rank has them: none where it does not sample."""
        return self.model_config.vocab_size if self._pipeline.is_last and self._group.rank == 0 else 0

    @property
    def _most_graph_rows(self) -> int:
        return min(self._config.cuda_graph_max_bs or _MOST_GRAPH_ROWS, self._config.max_running_requests)

    def _reason_against_graphs(self) -> str | None:
        """Why steps are not captured; None when they are."""
        if self.device.type != "cuda" or self._config.disable_cuda_graph:
            return ""
        if self._shape.peer is not None:
            return "FlashInfer plans its steps on the host"
        if torch.float32 in (self.dtype, self.kv_dtype):
            return "attention in float32 is computed by the reference, which asks the device for lengths"
        names = sorted({built.kernel.name for linear in self.model.linears for built in linear.kernels if not built.kernel.can_be_captured})
        return f"{', '.join(names)} cannot be captured" if names else None

    @property
    def draw(self) -> Draw | None:
        """What draws from the logits of replayed steps, where there are any."""
        return None if self._graphs is None else self._graphs.draw

    def _compute(self, batch: ForwardBatch, into: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.forward(batch, self.pool, self._workspace, into=into)

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture, *, show_progress: bool = True) -> None:
        """Have steps replayed in which all requests decode, up to `cuda_graph_max_bs` of them."""
        config, most = self._config, self._most_graph_rows
        started = time.perf_counter()
        try:
            self._graphs = DecodeGraphs(
                self._compute,
                shape=self._shape,
                sizes=graph_sizes(most),
                max_pages=-(-self.context_length // self.pool.page_size),
                vocab_size=self._logits_width,
                max_awaited=config.max_running_requests,
                spare_page=self.pool.spare_page,
                page_size=self.pool.page_size,
                device=self.device,
                capture=capture,
                show_progress=show_progress,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryPlan(
                f"no memory to capture CUDA graphs for up to {most} requests: lower --mem-fraction-static "
                f"(now {config.memory_fraction:g}), --max-total-tokens or --cuda-graph-max-bs, or give --disable-cuda-graph"
            ) from error
        logger.info("CUDA graphs for up to %d decoding requests captured in %.1f s", most, time.perf_counter() - started)

    def kernels_in_use(self) -> dict[str, int]:
        """How many linear layers run on which kernel."""
        counts: dict[str, int] = {}
        for linear in self.model.linears:
            for built in linear.kernels:
                counts[built.kernel.name] = counts.get(built.kernel.name, 0) + 1
        return counts

    def _describe_kv_scales(self, why_dynamic: str) -> str:
        layers = self.model.layers
        static = sum(layer.kv_scales is not None for layer in layers)
        if static == len(layers):
            return "static scales from the checkpoint"
        dynamic = "dynamic scale per token and head"
        if static:
            return f"static scales from the checkpoint in {static} of {len(layers)} layers, {dynamic} in the others"
        return f"{dynamic} ({why_dynamic})"

    def _make_pool(self, num_pages: int) -> KVPool:
        model = self.model_config
        return KVPool(
            num_pages=num_pages,
            page_size=self._config.page_size,
            num_layers=len(self.model.layers),
            num_kv_heads=self._share.kv_heads,
            head_dim=model.head_dim,
            dtype=self.kv_dtype,
            device=self.device,
            has_spare=is_gpu(self.device),
        )

    @torch.inference_mode()
    def profile_step(self) -> None:
        """Compute the largest step that there can be, in a pool of its own, and sample from it with every filter there is."""
        config = self._config
        assert config.chunked_prefill_size is not None
        batch = largest_step(
            prompt_tokens=config.chunked_prefill_size,
            max_running_requests=config.max_running_requests,
            context_length=self.context_length,
            page_size=config.page_size,
        )
        self.pool = self._make_pool(max(len(row.request.pages) for row in batch.rows))
        compute_step(batch, self.forward, self.device, samples=self._pipeline.is_last)
        del self.pool

    def _measure_step(self) -> int:
        """Bytes that a step allocates, its pool not among them. Raises OutOfMemoryPlan when there is no memory for one."""
        config = self._config
        try:
            peak = measured_bytes(self.profile_step, self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryPlan(
                f"no memory for a step of {config.chunked_prefill_size} prompt tokens and {config.max_running_requests} requests beside "
                f"the weights ({self.model.weight_bytes / 2**30:.2f} GiB): lower --chunked-prefill-size or --max-running-requests, "
                "or use a smaller model"
            ) from error
        pages = -(-min(config.chunked_prefill_size or 1, self.context_length) // config.page_size) + 1
        graphs = 0 if config.disable_cuda_graph else self._most_graph_rows * self._logits_width * 4  # the logits that they fill
        return max(0, peak - pages * config.page_size * self._kv_per_token()) + graphs

    def _kv_per_token(self) -> int:
        model = self.model_config
        return kv_bytes_per_token(
            num_layers=len(self.model.layers), num_kv_heads=self._share.kv_heads, head_dim=model.head_dim, dtype=self.kv_dtype
        )

    def _plan(self, config: EngineConfig, activations: int | None) -> MemoryBudget:
        logits = 0 if activations is not None else config.max_running_requests * self._logits_width * 4 * 2
        self._pipeline.wait_for_all()  # what they have loaded is gone from what is free
        device = device_memory(self.device)
        budget = plan_memory(
            config,
            device=device if self.device.type == "cuda" else device.share(config.ranks_per_node),
            weights=self.model.weight_bytes + self.model.cos_sin.nbytes,
            workspace=self._workspace.nbytes + logits,
            activations=activations,
            kv_per_token=self._kv_per_token(),
            kv_dtype=kv_dtype_name(self.kv_dtype),
            context_length=self.context_length,
        )
        return replace(budget, num_tokens=self._pipeline.smallest(budget.num_tokens))


def _for_gpus_alone(config: EngineConfig) -> list[str]:
    """The flags that were given and are about steps on a GPU."""
    given = {
        "--disable-cuda-graph": config.disable_cuda_graph,
        f"--cuda-graph-max-bs {config.cuda_graph_max_bs}": config.cuda_graph_max_bs is not None,
        "--disable-overlap-schedule": config.disable_overlap_schedule,
    }
    return [flag for flag, is_given in given.items() if is_given]


def choose_device(config: EngineConfig, index: int = 0) -> torch.device:
    """The device that `--device` means here, for a rank that has number `index` of this machine's.

    Raises ValueError when it asks for CUDA and there is none, or too few.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build of torch and its driver")
    if not has_cuda or config.device == "cpu":
        return torch.device("cpu")
    if config.num_ranks == 1:
        return torch.device("cuda")
    found, wanted = torch.cuda.device_count(), config.ranks_per_node if config.nnodes == 1 else index + 1
    if wanted > found:
        asked = f"--tp-size {config.tp_size}" + (f" --pp-size {config.pp_size}" if config.num_stages > 1 else "")
        raise ValueError(
            f"{asked}: torch sees {found} GPU{'s' * (found != 1)} here; give at most {found}{' in all' * (config.num_stages > 1)}, "
            "or --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _refuse_unread(source: WeightSource, *, tied: bool, is_here: Callable[[str], bool]) -> None:
    """Raises CheckpointError when tensors are left that the model has no place for: they would have changed the answer."""
    left = [name for name in source.unread if not is_kv_scale(name) and not (tied and name.startswith("lm_head."))]
    unread = [name for name in left if is_here(name)]  # another stage finds its own
    if unread:
        shown = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        raise CheckpointError(
            f"{source.file_of(unread[0].rpartition('.')[0])} holds tensors that the model of its config has no place for: {shown}. "
            "Config and weights do not fit: download both again, or correct the config"
        )


def _kv_scales_made_for(formats: ModuleFormats) -> str:
    """What the checkpoint's static KV scales map to the range of: "int8" where its config says so, else "fp8_e4m3"."""
    kv_cache = formats.config.kv_cache if formats.config is not None else None
    return kv_cache.dtype if kv_cache is not None else "fp8_e4m3"
