"""TokenizerParts: what a tokenizer is made of, read from a Hugging Face folder or a GGUF file. Knows not how it is used.

tokenizer.json is read with the `tokenizers` library directly, and a GGUF vocabulary is built with it: importing transformers costs
seconds at every start and its reading of the GGUF vocabulary cuts digits and spaces otherwise than the smollm pre-tokenizer does.
transformers comes in only for folders that have no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.gguf_header import GgufHeader, read_gguf_header
from ..quant.checkpoint.hf_config import read_generation_config, read_json
from ..quant.checkpoint.resolve import TOKENIZER_FILES, ModelFiles, resolve_tokenizer
from .gguf_tokenizer import add_begin_and_end, build_gguf_tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_GGUF_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class TokenizerParts:
    """See Tokenizer for the meaning of each."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]


def read_tokenizer_parts(files: ModelFiles, *, tokenizer_path: str | None = None, chat_template: str | None = None) -> TokenizerParts:
    """Read the model's own tokenizer, or the one at `tokenizer_path` (folder, tokenizer.json, .gguf or hub id).

    `chat_template` is a file, or a template's text, and replaces the model's. Raises CheckpointError with what was looked for.
    """
    source = resolve_tokenizer(tokenizer_path) if tokenizer_path is not None else files.gguf_file or files.root
    if source.suffix.lower() == ".gguf":
        header = read_gguf_header(source)
        backend, special_tokens, templates = build_gguf_tokenizer(header), _gguf_special_tokens(header), _gguf_templates(header)
    else:
        backend, special_tokens, templates = _read_folder(source)
    if chat_template is not None:
        templates = {"default": _template_text(chat_template)}
    ends = [backend.token_to_id(special_tokens["eos_token"])] if "eos_token" in special_tokens else []
    configured = read_generation_config(files).get("eos_token_id")
    if configured is None and files.config_path is not None:
        configured = read_json(files.config_path).get("eos_token_id")
    ends += configured if isinstance(configured, list) else [configured]
    return TokenizerParts(backend, tuple(dict.fromkeys(end for end in ends if end is not None)), special_tokens, templates)


def _gguf_special_tokens(header: GgufHeader) -> dict[str, str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    ids = {role: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in _GGUF_IDS.items()}
    return {role: tokens[token_id] for role, token_id in ids.items() if token_id is not None and token_id < len(tokens)}


def _gguf_templates(header: GgufHeader) -> dict[str, str]:
    found = {}
    for key, text in header.metadata.items():
        prefix, _, name = key.partition("tokenizer.chat_template")
        if not prefix and isinstance(text, str) and key.startswith("tokenizer.chat_template"):
            found[name.removeprefix(".") or "default"] = text
    return found


def _read_folder(source: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    folder, path = (source.parent, source) if source.is_file() else (source, source / "tokenizer.json")
    config = _optional_json(folder / "tokenizer_config.json")
    if not path.is_file():
        return _read_with_transformers(folder, config)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise CheckpointError(f"{path} is no sound tokenizer ({error}): download it again") from error
    named = {**_optional_json(folder / "special_tokens_map.json"), **config}
    special_tokens = {role: text for role in _ROLES if (text := _token_text(named.get(role))) is not None}
    _add_listed_tokens(backend, config)
    _follow_begin_and_end_flags(backend, config, special_tokens)
    return backend, special_tokens, _folder_templates(folder, config)


def _add_listed_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json lists and tokenizer.json lacks, in the order of their ids."""
    listed = config.get("added_tokens_decoder") or {}
    for token_id in sorted(listed, key=int):
        entry = listed[token_id]
        if backend.token_to_id(entry["content"]) is None:
            known = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **known)])


def _follow_begin_and_end_flags(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """add_bos_token and add_eos_token in tokenizer_config.json win over what tokenizer.json does, as in transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    wanted: dict[str, tuple[str, int] | None] = {}
    for kind in ("bos", "eos"):
        text = special_tokens.get(f"{kind}_token")
        token_id = backend.token_to_id(text) if text is not None else None
        wanted[kind] = (text, token_id) if config.get(f"add_{kind}_token") and text is not None and token_id is not None else None
    plain, full = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    if full != [*([wanted["bos"][1]] if wanted["bos"] else []), *plain, *([wanted["eos"][1]] if wanted["eos"] else [])]:
        add_begin_and_end(backend, bos=wanted["bos"], eos=wanted["eos"])


def _read_with_transformers(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer: looked for {', '.join(TOKENIZER_FILES)}. Copy them from the original model, or name its folder "
            "with --tokenizer-path"
        )
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # Each of its tokenizer classes fails in its own way.
    except Exception as error:
        raise CheckpointError(f"{folder} has no tokenizer.json, and transformers cannot make one from its other files: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(
            f"{folder}: its tokenizer ({type(loaded).__name__}) has no fast version. Name a folder that has a tokenizer.json with "
            "--tokenizer-path"
        )
    special_tokens = {role: text for role in _ROLES if (text := _token_text(loaded.special_tokens_map.get(role))) is not None}
    return backend, special_tokens, _folder_templates(folder, config)


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja with its named companions, else what tokenizer_config.json or chat_template.json hold."""
    found = {file.stem: _read_text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {**found, "default": _read_text(file)}
    template = config.get("chat_template") or _optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {**found, "default": template}
    return {**found, **{entry["name"]: entry["template"] for entry in template or ()}}


def _template_text(chat_template: str) -> str:
    """A file's text when there is such a file; the argument itself when it looks like a template."""
    if "{" not in chat_template and "\n" not in chat_template:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise CheckpointError(f"chat template {chat_template!r} is neither a file nor the text of a Jinja template")
        return _read_text(path)
    return chat_template


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(token: Any) -> str | None:
    """A special token is written as its text or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return str(text) if text is not None else None
