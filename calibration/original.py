"""The model that is to be quantized: its files, its config as transformers has it, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.quantization_config import read_quantization_config
from ..quant.checkpoint.reader import WeightReader
from ..quant.checkpoint.resolve import ModelFiles, resolve_model


class Original:
    """Raises ValueError for a model that is quantized already, or that transformers does not know."""

    def __init__(self, model_path: str | None) -> None:
        self.model_path = model_path
        self.files = resolve_model(model_path)
        self.config = read_config(self.files)
        self.reader = open_reader(self.files)
        refuse_quantized(self.files, self.config, self.reader)

    def transformers_config(self) -> Any:
        """A new one each time: models change theirs."""
        from transformers import AutoConfig

        if self.files.kind == "hf":
            return config_in(self.files.root)
        return AutoConfig.for_model(**self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """Raises ValueError where there is none that transformers reads."""
        from transformers import AutoTokenizer

        if self.files.gguf_file is not None:
            return AutoTokenizer.from_pretrained(self.files.root, gguf_file=self.files.gguf_file.name)
        try:
            return AutoTokenizer.from_pretrained(self.files.root, trust_remote_code=False)
        except Exception as error:  # whatever lies there
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{self.files.root} has no tokenizer that transformers reads ({first[:200]}): put tokenizer.json and "
                "tokenizer_config.json beside the weights"
            ) from None

    def check_vocabulary(self, largest: int) -> None:
        """Raises ValueError where the tokenizer's `largest` token is none of the model's."""
        size = self.transformers_config().get_text_config().vocab_size
        if largest >= size:
            raise ValueError(f"the tokenizer gives token {largest}, and the model knows {size}: this is another model's tokenizer")


def config_in(folder: Path) -> Any:
    """The folder's config as transformers reads it."""
    from transformers import AutoConfig
    from transformers import __version__ as version

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-untyped-call, unused-ignore]
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} is of an architecture that transformers {version} does not have; it comes as code beside the weights, "
            "which Octavo does not run: use a newer transformers, if that has it"
        ) from None


def refuse_quantized(files: ModelFiles, config: Mapping[str, Any], reader: WeightReader) -> None:
    """Raises ValueError for a checkpoint whose weights are quantized already; a GGUF file's are read as floats."""
    found = read_quantization_config(files, config, reader.tensors())
    if found is not None:
        raise ValueError(f"{files.name} is quantized already ({found.method}, says {found.source}): give the original model")
