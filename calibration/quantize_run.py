"""`octavo.quantize`: from a model to a quantized folder, stage by stage. Knows the order of things; each stage is another file's."""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.checkpoint.hf_config import read_json
from .budget import budget_of
from .climb import climb
from .devices import computing_on, device_of, give_back_memory, peak_bytes, quick_dtype
from .engines import engines_of, hard_storage, limits_of
from .eval_run import DEFAULT_SEQLEN
from .float_model import FLOATS, FloatModel, context_of
from .float_text import served
from .importance import Importance, find_importance
from .kv_ranges import KVRanges
from .original import Original, config_in
from .out_folder import MODEL, WORK, check_out, publish
from .output import Written, by_source, copy_tokenizer, quantization_config, tokenizer_files, with_fused, write_config, write_weights
from .plan import VERIFIED_TOKENS, Plan, check_disk, make_plan, probe_inputs, told_bytes
from .progress import Progress
from .quality import Quality, Speed, by_engine, by_transformers, speed_of
from .quantize_report import write_reports
from .quantize_result import GateError, QuantizeResult
from .recipe import Recipe
from .run_texts import RunTexts
from .streams import Hidden, Inputs
from .tune_model import tune_model
from .tuning import TuningSchedule
from .verify import DequantizingReader, VerificationError, check_logits, check_module
from .walk import Walk, block_name, put, survey
from .work import Results, WorkFolder, version_of_code

logger = logging.getLogger(__name__)

_QUICK_BITS = 4  # of codes whose errors are so much larger than bfloat16's that blocks may run in it
_REPORT_BYTES = 4 << 20  # of the reports and configs, at most
_NOT_IDENTITY = ("max_memory", "max_ppl_increase", "max_kl")  # may differ when a run goes on


def quantize(
    model_path: str | Path | None,
    out: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | Any | None = None,
    eval_text: str | Path | None = None,
    report: str | Path | None = None,
    measure_speed: bool = True,
    resume: bool = False,
    device: str = "auto",
    **options: Any,
) -> QuantizeResult:
    """Quantize a model into the folder `out`, which must be empty or not exist; reports and a model card lie there afterwards.

    `recipe` may be a Recipe, the JSON object of one or a transformers GPTQConfig; `options` are a Recipe's fields, given in place of one or
    beside a GPTQConfig. Quality is measured on the file `eval_text`, or on samples held back from the calibration. `report`: where the HTML
    report goes instead of into `out`. `device`: cpu, cuda, or auto, a GPU when there is one.

    Raises ValueError for what cannot be (named with its remedy), OSError for files, GateError where the recipe's gate does not hold,
    VerificationError where the folder does not read back as what was meant.
    """
    if not isinstance(model_path, str | Path | None):
        raise ValueError(f"model_path {model_path!r} is not valid: give a folder, a GGUF file or a hub id")
    if not isinstance(out, str | Path):
        raise ValueError(f"out {out!r} is not valid: give a folder")
    chosen, text = _recipe_of(recipe, options), None if eval_text is None else Path(eval_text)
    folder, page = Path(out), None if report is None else Path(report)
    if page is not None and not page.absolute().parent.is_dir():
        raise ValueError(f"cannot write report {page}: its folder does not exist")
    if page is not None and page.is_dir():
        raise ValueError(f"cannot write report {page}: that is a folder, give a file")
    check_out(folder, resume=resume)
    model_name, took = None if model_path is None else str(model_path), list[float]()

    def attempt(tried: Recipe) -> QuantizeResult:
        began, run = time.perf_counter(), _Run(model_name, tried, eval_text=text, device=device)
        found = run.all(folder / WORK / attempt_name(chosen, tried), folder, measure_speed=measure_speed, resume=resume)
        took.append(time.perf_counter() - began)
        return found

    result = climb(attempt, chosen)
    if len(took) > 1:
        result = replace(result, seconds={"attempts before": sum(took[:-1]), **result.seconds})
    made = folder / WORK / attempt_name(chosen, result.recipe) / MODEL
    try:
        write_reports(result, made, page)
    except OSError as error:  # the model is there
        logger.warning("the reports were not all written: %s", error)
    publish(made, folder)
    if result.gate:
        worst = "".join(f"\n  {name}: {error:.3g}" for name, error in result.worst[:8])
        raise GateError(f"{result.gate}. The modules that lose most (relative output error):{worst}\n{result.next_step}", result)
    return result


def _recipe_of(recipe: Recipe | Mapping[str, Any] | Any | None, options: Mapping[str, Any]) -> Recipe:
    if recipe is None:
        return Recipe.from_dict(options)
    if isinstance(recipe, str | Path):
        raise ValueError(f"recipe {str(recipe)!r} is no recipe: give json.loads of the file's text")
    if not isinstance(recipe, Recipe | Mapping):
        return Recipe.from_gptq_config(recipe, **options)
    if options:
        raise ValueError(f"give either a recipe or its fields, not both: {', '.join(options)}")
    return recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)


def attempt_name(asked: Recipe, tried: Recipe) -> str:
    """What an attempt's folder is called: the same for the same attempt."""
    kept = len(tried.ignore) - len(asked.ignore)
    return tried.effort + (f"-{kept}-kept" if kept else "")


def plan(model_path: str | None, recipe: Recipe, *, eval_text: Path | None = None, device: str = "auto") -> Plan:
    """What `quantize` would do. Raises ValueError as it would, for texts that it cannot take too; hub data sets are not looked at."""
    run = _Run(model_path, recipe, eval_text=eval_text, device=device)
    planned = run.plan()[1]
    run.texts.check_calibration()
    return planned


class _Run:
    def __init__(self, model_path: str | None, recipe: Recipe, *, eval_text: Path | None, device: str) -> None:
        self.device = device_of(device)
        self.original = Original(model_path)
        self.recipe = recipe = recipe.within(context_of(self.original.transformers_config()))
        self.files, self.reader = self.original.files, self.original.reader
        self.served = served(model_path)
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.texts = RunTexts(self.original, recipe, eval_text, self.device)

    def plan(self) -> tuple[FloatModel, Plan]:
        """The model, what is outside its blocks read, and what will be done to it."""
        model = FloatModel(self.original.transformers_config(), self.reader, self.device)
        model.load_outer()
        ranges = KVRanges()
        found = survey(model, probe_inputs(model), ranges)
        model.is_quick = found.runs_quick and not self.recipe.eight_bit and self.recipe.bits <= _QUICK_BITS
        if self.recipe.kv_cache is not None:
            if getattr(model.module.config.get_text_config(), "kv_lora_rank", None):  # type: ignore[union-attr, operator]
                raise ValueError("kv_cache fp8: this model caches latent vectors, whose scales no format names; leave --kv-cache out")
            if not ranges.largest:
                raise ValueError("kv_cache fp8: the model calls no attention whose keys and values could be seen; leave --kv-cache out")
        size = sum(info.nbytes for info in self.reader.tensors().values())
        worth = budget_of(self.recipe)
        planned = make_plan(self.files.name, model, self.recipe, found.shapes, worth, size, served=self.served, left=found.left)
        hard = hard_storage(self.reader.tensors(), model.names.targets, planned.linears, found.transposed)
        group_size = planned.group_size
        known = limits_of(hard, self.recipe, group_size, make_empty=self._empty, modules=planned.linears)
        blocks_in = quick_dtype(self.device) if model.is_quick else torch.float32
        device = planned.device if blocks_in is torch.float32 else f"{planned.device}, blocks in {str(blocks_in).removeprefix('torch.')}"
        known += [told for told in (self._quantized_before(), self.texts.same_text()) if told is not None]
        engines = engines_of(hard, self.recipe, group_size, served=self.served)
        return model, replace(planned, device=device, engines=engines, notes=tuple(known))

    def _empty(self) -> nn.Module:
        return FloatModel(self.original.transformers_config(), self.reader).module

    def _quantized_before(self) -> str | None:
        kinds = sorted({info.stored for info in self.reader.tensors().values() if info.stored not in FLOATS})
        if self.files.kind != "gguf" or not kinds:
            return None
        return f"the original, a GGUF file, was quantized before ({', '.join(kinds)}): what that lost is not counted"

    def all(self, place: Path, out: Path, *, measure_speed: bool, resume: bool) -> QuantizeResult:
        """Everything, in the work folder `place`; the model is made in its subfolder MODEL, and is meant to lie in `out` one day."""
        model, plan = self.plan()
        beside = sum(file.stat().st_size for file in tokenizer_files(self.files)) + _REPORT_BYTES
        check_disk(plan, out, beside=beside, present=sum(file.stat().st_size for file in place.rglob("*") if file.is_file()))
        work = WorkFolder(place, self._identity(), resume=resume)
        plan = plan.as_decided(work.decided({"tuned": plan.budget.schedule is not None})["tuned"])
        logger.info("%s", plan.describe())
        if (few := self.texts.few_tokens()) is not None:
            logger.warning("%s", few)
        made = work.path / MODEL
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            with self._timed("samples"):
                tokens, held_back = self.texts.samples(work, self._identity(), own=plan.budget.own_samples)
            floats = self._hidden(plan, len(tokens), model, work, "floats")
            with self._timed("blocks"):
                self._walk(model, Inputs(model, tokens, cut=plan.budget.solve_samples, quick=True), work, plan, floats)
        except (ValueError, TypeError):
            if not work.has(block_name(0)):  # nothing is done that --resume could go on with
                shutil.rmtree(work.path)
                for folder in (work.path.parent, out):
                    with suppress(OSError):  # other things lie there
                        folder.rmdir()
            raise
        results = Results(work, [block_name(index) for index in range(plan.num_blocks)])
        if plan.budget.schedule is not None:
            with self._timed("tuning"):
                results = self._tune(model, tokens, plan.budget.samples, work, results, floats, plan.budget.schedule)
        del floats
        with self._timed("writing"):
            written = self._write(made, model, results, plan)
        with self._timed("verifying"):
            verified = self._verify(made, model, results, written, tokens[:1, :VERIFIED_TOKENS])
        with self._timed("evaluating"):
            quality = self._evaluate(made, model, held_back, written, plan)
            before, after = self._speeds(made, tokens[0].tolist(), model, plan) if measure_speed else (None, None)
        notes = results.notes()
        notes_of_run = [] if plan.skipped_tuning is None else [f"tuning {plan.skipped_tuning}"]
        if len(tokens) < plan.budget.samples + plan.budget.own_samples:
            notes_of_run.append("tuning had the samples that were given alone: the model wrote none of its own")
        modules = {name: about for note in notes for name, about in note["modules"].items()}
        notes_of_run += [*plan.notes, *self.notes]
        if self.recipe.max_memory is not None and (taken := _peak_bytes()) > self.recipe.max_memory:
            notes_of_run.append(
                f"it took {told_bytes(taken)}, more than the {told_bytes(self.recipe.max_memory)} that --max-memory allowed"
            )
        if (few := self.texts.few_tokens(quality.num_tokens)) is not None:
            notes_of_run.append(few)
        return QuantizeResult(
            out=out,
            model=self.files.name,
            recipe=self.recipe,
            group_size=plan.group_size,
            modules=modules,
            block_errors=_added([note["error"] for note in notes], [model.block_prefix(index)[:-1] for index in range(plan.num_blocks)]),
            kept=written.kept,
            notes=tuple(notes_of_run),
            engines=plan.engines,
            groups=written.groups,
            bits_per_weight=8 * written.packed_bytes / written.num_packed,
            quality=quality,
            speed_before=before,
            speed_after=after,
            verified=verified,
            estimated_peak_bytes=plan.peak_bytes,
            peak_bytes=_peak_bytes(),
            device=plan.device,
            device_peak_bytes=peak_bytes(self.device),
            seconds=self.seconds,
        )

    def _hidden(self, plan: Plan, samples: int, model: FloatModel, work: WorkFolder, name: str) -> Hidden:
        shape = (samples, self.recipe.row_tokens, *model.hidden_shape)
        return Hidden(shape, work.path / f"{name}.bin" if plan.on_disk else None, self.device)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started
        give_back_memory()

    def _identity(self) -> Mapping[str, Any]:
        weights = {file.name: [file.stat().st_size, int(file.stat().st_mtime)] for file in self.files.weight_files}
        recipe = {name: value for name, value in self.recipe.to_dict().items() if name not in _NOT_IDENTITY}
        return {
            "recipe": recipe,
            "model": self.files.name,
            "weights": weights,
            "measured on": str(self.texts.eval_text),
            "device": self.device.type,
            "version of octavo": version_of_code(),
        }

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _walk(self, model: FloatModel, inputs: Inputs, work: WorkFolder, plan: Plan, floats: Hidden) -> None:
        quantized = self._hidden(plan, plan.budget.solve_samples, model, work, "quantized")
        importance = self._importance(model, inputs.tokens[: plan.budget.solve_samples], work) if plan.budget.weighs else None
        walk = Walk(model, inputs, probe_inputs(model), work, floats, quantized, plan.grid_of, importance)
        with Progress("quantizing", plan.num_blocks, "blocks") as bar:
            for index in range(plan.num_blocks):
                notes = walk.block(index, plan.budget.steps).notes
                bar.step(note=f"error so far {notes['error']:.2g}, {_peak_bytes() / 2**30:.1f} GiB")

    def _importance(self, model: FloatModel, tokens: Tensor, work: WorkFolder) -> Callable[[int], Importance]:
        if not work.has("importance"):
            with Progress("weighing", len(tokens), "samples") as bar, computing_on(self.device):
                work.save_importance(find_importance(model, tokens, seed=self.recipe.seed, on_sample=bar.step))
        return work.load_importance

    def _tune(
        self,
        model: FloatModel,
        tokens: Tensor,
        num_given: int,
        work: WorkFolder,
        results: Results,
        floats: Hidden,
        schedule: TuningSchedule,
    ) -> Results:
        names = [f"tuned-{index:05}" for index in range(len(results))]
        if not work.has(names[-1]):
            with Progress("tuning", schedule.steps, "steps") as bar, computing_on(self.device):
                tuned = tune_model(model, tokens, num_given, floats, results, schedule, on_step=lambda kl: bar.step(note=f"KL {kl:.4f}"))
            if tuned.blocks is None:
                told = "tuning did not help samples that it had not seen (KL %.5f before, %.5f after): it is left out"
                logger.warning(told, tuned.kl_before, tuned.kl_after)
            for name, result in zip(names, tuned.blocks or results, strict=True):
                work.save_block(name, result)
        return Results(work, names)

    # -- writing and proving ------------------------------------------------------------------------------------------

    def _write(self, out: Path, model: FloatModel, results: Results, plan: Plan) -> Written:
        written = write_weights(out, model, self.reader, results, self.recipe)
        kept = dict.fromkeys(["lm_head", *model.outer_linears(), *with_fused(written.kept)])
        original = self.original.config if self.files.config_path is None else read_json(self.files.config_path)
        write_config(out, original, quantization_config(self.recipe, plan.group_size, written.example, list(kept)))
        copy_tokenizer(self.files, out)
        return written

    def _written_config(self, out: Path) -> Any:
        """The config as it was written and as transformers reads it, without what it says of quantization."""
        try:
            config = config_in(out)
        except Exception as error:  # other people's code, which raises what it likes
            raise VerificationError(f"transformers does not read the config that was written ({type(error).__name__}: {error})") from error
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    @torch.no_grad()
    def _verify(self, out: Path, model: FloatModel, results: Results, written: Written, tokens: Tensor) -> float:
        with DequantizingReader(out, self.reader.tensors(), written.transposed) as reader:
            again = FloatModel(self._written_config(out), reader, self.device)
            again.load_outer()
            meant, calls = model.calls(tokens)
            found, their_calls = again.calls(tokens)
            for index, result in enumerate(results):
                for path, weight in by_source(model, index, result).weights.items():
                    check_module(reader, path, weight)
                block = model.load_block(index)
                put(block, result)
                meant = calls[index].run(block, meant)
                model.free_block(index)
                found = their_calls[index].run(again.load_block(index), found)
                again.free_block(index)
            return check_logits(again.logits(tokens, found), model.logits(tokens, meant))

    def _evaluate(self, out: Path, model: FloatModel, held_back: Tensor, written: Written, plan: Plan) -> Quality:
        recipe, texts = self.recipe, self.texts
        if texts.eval_text is not None and texts.eval_tokens is not None:
            tokens = texts.eval_tokens
            seqlen, text = min(DEFAULT_SEQLEN, len(tokens), model.context_length or DEFAULT_SEQLEN), texts.eval_text.name
        else:
            tokens, seqlen = held_back.flatten().tolist(), recipe.row_tokens
            text = "text of the model's own" if recipe.calibration == "self" else f"samples held back from {recipe.calibration}"
        if plan.evaluates_whole:
            model.free_outer()  # both models will be in memory
            try:
                return by_engine(
                    self.original.model_path or str(self.files.gguf_file),
                    out,
                    tokens,
                    seqlen=seqlen,
                    text=text,
                    device=self.device.type,
                    kv_cache=recipe.kv_cache,
                )
            except (ValueError, RuntimeError) as error:  # a config of a known architecture does not promise known weights
                logger.warning("Octavo's engine does not read this model (%s): transformers evaluates it", error)
                self.served = False
                model.load_outer()
        with DequantizingReader(out, self.reader.tensors(), written.transposed) as reader:
            quantized = FloatModel(self.original.transformers_config(), reader, self.device)
            quantized.load_outer()
            return by_transformers(model, quantized, tokens, seqlen=seqlen, text=text, scratch=out.parent if plan.on_disk else None)

    def _speeds(self, out: Path, prompt: list[int], model: FloatModel, plan: Plan) -> tuple[Speed | None, Speed | None]:
        """Before and after; None with a note where it cannot be measured: hours of work do not hang on it."""
        if not self.served or not plan.evaluates_whole:
            return None, None
        prompt = prompt[: max(1, (model.context_length or len(prompt)) // 2)]
        try:
            device = self.device.type
            return speed_of(self.original.model_path, prompt, device=device), speed_of(str(out), prompt, device=device)
        except (ValueError, RuntimeError, MemoryError) as error:
            self.notes.append(f"speed was not measured: {error}")
            return None, None


def _peak_bytes() -> int:
    """The most resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _added(errors: Sequence[float], paths: Sequence[str]) -> Mapping[str, float]:
    """What each block adds to the relative error of the hidden state."""
    return {path: error - before for path, error, before in zip(paths, errors, [0.0, *errors], strict=False)}
