"""`octavo eval`: flags, and the table of what was measured. Knows no arithmetic and opens no engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .command import BAD_INPUT, FAILED, INTERRUPTED, CommandParser, at_least, fail
from .eval_run import DEFAULT_SEQLEN, EvalResult, EvalSetup, ModelInfo, evaluate

_MIB = 1 << 20


def main(argv: Sequence[str] | None = None, *, prog: str = "octavo eval") -> int:
    """Run `octavo eval <argv>`: 0, 1 when a model failed, 2 for what the user can mend (flags, files, models that do not fit)."""
    from octavo import Engine

    options = Engine.options()
    parser = _parser(prog, options)
    args = parser.parse(argv)
    if args.text is None:
        parser.error("--text FILE is missing: give the text to evaluate on; --help explains")
    try:
        _check_output(args.output_json)
        result = evaluate(
            args.model_path,
            reference=args.reference,
            text=args.text,
            seqlen=args.seqlen,
            stride=args.stride,
            max_tokens=args.max_tokens,
            max_windows=args.max_windows,
            add_bos=args.add_bos,
            reference_dtype=args.reference_dtype,
            engine_options={name: value for name in options if name != "model_path" and (value := getattr(args, name, None)) is not None},
        )
    except UnicodeDecodeError as error:
        return fail(prog, f"{args.text} is not UTF-8 ({error.reason} at byte {error.start}): convert it first", BAD_INPUT)
    except OSError as error:
        return fail(prog, f"{error.filename}: {error.strerror}; give an existing text file" if error.filename else str(error), BAD_INPUT)
    except (ValueError, TypeError) as error:
        return fail(prog, str(error), BAD_INPUT)
    except RuntimeError as error:
        return fail(prog, str(error), FAILED)
    except KeyboardInterrupt:
        return fail(prog, "stopped, nothing was written", INTERRUPTED)
    return _tell(prog, result, args.output_json)


def _check_output(file: Path | None) -> None:
    """Raises ValueError where `file` cannot be written: no result is to be lost for that."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {file}: the folder {folder} does not exist")
    if file.is_dir():
        raise ValueError(f"cannot write {file}: it is a folder, give a file in it")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"cannot write {file}: this user may not; give a file in another folder")


def _tell(prog: str, result: EvalResult, file: Path | None) -> int:
    """Write `file` first and print last: who reads what is printed may leave."""
    code, written = 0, []
    if file is not None:
        try:
            file.write_text(result.to_json() + "\n", encoding="utf-8")
            written = [f"wrote {file}"]
        except OSError as error:
            code = fail(prog, f"cannot write {file}: {error.strerror or error}", FAILED)
    print("\n".join([table(result), *written]))
    return code


# -- flags ------------------------------------------------------------------------------------------------------------


def _parser(prog: str, engine: Mapping[str, Any]) -> CommandParser:
    """`engine`: the options that Engine has, with their defaults."""
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} --text FILE [--model-path PATH] [--reference PATH] [flags]",
        allow_abbrev=False,
        description="Perplexity of a model over a text; with --reference also KL divergence and top-1 agreement, token by token.",
        epilog=f"Example: {prog} --model-path ./my-model-int4 --reference ./my-model --text wiki.test.txt",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    add = parser.add_argument_group("models").add_argument
    add("--model-path", "--model", metavar="PATH", help="a folder, a hub id or a .gguf file; none: the embedded model")
    add("--reference", metavar="PATH", help="the model to compare with, such as the one that was quantized")
    add("--reference-dtype", default="auto", metavar="DTYPE", help="of its weights (default: auto, its checkpoint's)")

    group = parser.add_argument_group("text")
    add = group.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8; read as it is, without chat template; required")
    add("--seqlen", type=at_least(2), default=DEFAULT_SEQLEN, metavar="N", help="tokens in a window (default: %(default)s)")
    add(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="tokens from window to window; below --seqlen, tokens get more context and still count once (default: --seqlen)",
    )
    how_much = group.add_mutually_exclusive_group()
    how_much.add_argument("--max-tokens", type=at_least(2), metavar="N", help="only the first N tokens of the text (default: all)")
    how_much.add_argument("--max-windows", type=at_least(1), metavar="N", help="only the first N windows (default: all)")
    add(
        "--add-bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="a BOS token once, before the text (default: auto, as the tokenizer does it)",
    )
    _add_engine_flags(parser, engine)
    parser.add_argument_group("report").add_argument("--output-json", type=Path, metavar="FILE", help="write everything measured")
    return parser


def _add_engine_flags(parser: argparse.ArgumentParser, engine: Mapping[str, Any]) -> None:
    """Those of `octavo serve` that change figures, speed or memory here. Engine knows their values; what it lacks is not offered."""
    title = "engine", "as for octavo serve; --quantization, --linear-backend, --dtype and --kv-cache-dtype are not the reference's"
    group = parser.add_argument_group(*title)
    number = at_least(1)
    flags: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
        ("quantization", "METHOD", str, "of weights: fp8, int8 and int4 quantize a dense model while it loads"),
        ("linear_backend", "NAME", str, "the kernel for the linear layers that it is made for"),
        ("dtype", "DTYPE", str, "of weights"),
        ("kv_cache_dtype", "DTYPE", str, "of the KV cache"),
        ("device", "DEVICE", str, "where to run"),
        ("num_threads", "N", number, "compute threads on the CPU"),
        ("chunked_prefill_size", "N", number, "tokens computed in one step, whose logits are in memory together"),
        ("context_length", "N", number, "tokens that a model may see together"),
        ("tokenizer_path", "PATH", str, "where the tokenizer is, if not with the model; for both models"),
        ("revision", "NAME", str, "branch, tag or commit on the hub"),
    )
    for name, metavar, kind, text in flags:
        if name in engine:
            default = "automatic" if engine[name] is None else engine[name]
            group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=f"{text} (default: {default})")
    for name, text in (
        ("allow_reference", "take the slow float reference for linear layers that no kernel computes"),
        ("skip_kernel_check", "do not hold the kernels against the float reference at start"),
    ):
        if name in engine:
            group.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)


# -- the table --------------------------------------------------------------------------------------------------------


def table(result: EvalResult) -> str:
    """What was measured and on what, for people."""
    setup = result.setup
    rows = [("model", _about(result.model))]
    if result.reference is not None:
        rows.append(("reference", _about(result.reference)))
    rows += [
        ("text", f"{setup.text or 'given in memory'}, token digest {setup.tokens_sha256[:12]}"),
        ("windows", f"{setup.num_windows} x {setup.seqlen} tokens, stride {setup.stride}; {_bos(setup)}"),
        ("tokens evaluated", f"{result.num_tokens:,}"),
        ("perplexity", f"{result.perplexity:.4f}"),
    ]
    if result.reference_perplexity is not None and result.perplexity_ratio is not None:
        rows.append(("  of the reference", f"{result.reference_perplexity:.4f}"))
        rows.append(("  ratio", f"{result.perplexity_ratio:.4f}"))
    if result.kl_mean is not None:
        rows.append(("KL(ref || model)", f"mean {result.kl_mean:.3g}   p99 {result.kl_p99:.3g}   max {result.kl_max:.3g}   nats a token"))
    if result.top1_agreement_percent is not None:
        rows.append(("top-1 agreement", f"{result.top1_agreement_percent:.2f} %"))
    both = " (both models together)" if result.reference is not None else ""
    rows.append(("time", f"{result.seconds:.1f} s, {result.tokens_per_s:,.1f} tokens/s{both}"))
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _about(model: ModelInfo) -> str:
    kernels = ", ".join(f"{count} on {name}" for name, count in model.kernels.items())
    return (
        f"{model.path} ({model.dtype}, KV {model.kv_cache_dtype}, weights {model.weight_bytes / _MIB:,.1f} MiB; linear layers: {kernels})"
    )


def _bos(setup: EvalSetup) -> str:
    if setup.add_bos is None:
        return "tokens as given"
    how = {"auto": "as the tokenizer does it", "yes": "asked for", "no": "asked for"}[setup.add_bos]
    return f"no BOS ({how})" if setup.bos_token_id is None else f"BOS {setup.bos_token_id} once, before the text ({how})"
