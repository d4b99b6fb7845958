"""Reading GGUF: names, row order, blocks, damage. Held against llama.cpp's own writer and against transformers' reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.gguf_header import read_gguf_header
from octavo.quant.checkpoint.gguf_reader import SUPPORTED_TYPES, GgufReader
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import resolve_model

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 32, 40, 2
Array = np.ndarray[Any, np.dtype[Any]]


def hf_weights(*, qkv_bias: bool, qk_norm: bool, tied: bool) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    make: Callable[..., Array] = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = {"model.embed_tokens.weight": make(VOCAB, HIDDEN), "model.norm.weight": make(HIDDEN)}
    if not tied:
        weights["lm_head.weight"] = make(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            weights[f"{p}.self_attn.{name}_proj.weight"] = make(rows, HIDDEN)
            if qkv_bias:
                weights[f"{p}.self_attn.{name}_proj.bias"] = make(rows)
            if qk_norm and name != "v":
                weights[f"{p}.self_attn.{name}_norm.weight"] = make(HEAD_DIM)
        weights[f"{p}.self_attn.o_proj.weight"] = make(HIDDEN, HEADS * HEAD_DIM)
        weights[f"{p}.mlp.gate_proj.weight"] = make(FFN, HIDDEN)
        weights[f"{p}.mlp.up_proj.weight"] = make(FFN, HIDDEN)
        weights[f"{p}.mlp.down_proj.weight"] = make(HIDDEN, FFN)
        weights[f"{p}.input_layernorm.weight"] = make(HIDDEN)
        weights[f"{p}.post_attention_layernorm.weight"] = make(HIDDEN)
    return weights


def interleave(rows: Array, heads: int) -> Array:
    """What llama.cpp's converter does to q and k of a llama, from its description: the halves of each head alternate."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, architecture: str, weights: dict[str, Array], *, kind: Kind = Kind.F32, extra: Any = None) -> Path:
    """Write as llama.cpp's converter would: its names come from the gguf package's own table."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if extra is not None:
        extra(writer)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, values in weights.items():
        stored = values
        if architecture in ("llama", "mistral3") and ("q_proj" in name or "k_proj" in name):
            stored = interleave(values, HEADS if "q_proj" in name else KV_HEADS)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if kind == Kind.F32 or values.ndim == 1:
            writer.add_tensor(gguf_name, np.ascontiguousarray(stored))
        else:
            writer.add_tensor(gguf_name, gguf.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CASES = {
    "llama": {"qkv_bias": False, "qk_norm": False, "tied": True},
    "mistral3": {"qkv_bias": False, "qk_norm": False, "tied": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False, "tied": True},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "tied": False},
}


@pytest.mark.parametrize("architecture", sorted(CASES))
def test_names_and_row_order_come_back(tmp_path: Path, architecture: str) -> None:
    weights = hf_weights(**CASES[architecture])
    with GgufReader(write_gguf(tmp_path / "m.gguf", architecture, weights)) as reader:
        assert set(reader.tensors()) == set(weights)
        for name, values in weights.items():
            info = reader.tensors()[name]
            assert (info.shape, info.dtype, info.stored) == (values.shape, torch.float32, "F32")
            assert torch.equal(reader.read(name), torch.from_numpy(values)), name
            assert torch.equal(reader.read(name, slice(3, 17)), torch.from_numpy(values[3:17])), name


def test_llama_biases_are_reordered_too(tmp_path: Path) -> None:
    weights = hf_weights(qkv_bias=True, qk_norm=False, tied=True)
    with GgufReader(write_gguf(tmp_path / "m.gguf", "llama", weights)) as reader:
        name = "model.layers.1.self_attn.k_proj.bias"
        assert torch.equal(reader.read(name), torch.from_numpy(weights[name]))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_quantized_tensors_and_raw_blocks(tmp_path: Path, architecture: str, kind: Kind) -> None:
    """Quantization works on rows, so quantizing in either row order must give the same bits of each row."""
    weights = hf_weights(**CASES[architecture])
    with GgufReader(write_gguf(tmp_path / "m.gguf", architecture, weights, kind=kind)) as reader:
        for name in (
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
        ):
            expected = gguf.quantize(weights[name], kind)
            raw, raw_kind = reader.read_raw(name)
            assert raw_kind == kind
            assert np.array_equal(raw.view(np.uint8), expected.view(np.uint8))
            assert reader.tensors()[name].stored == kind.name
            assert reader.tensors()[name].nbytes == expected.nbytes
            values = torch.from_numpy(gguf.dequantize(expected, kind))
            assert torch.equal(reader.read(name), values)
            assert torch.equal(reader.read(name, slice(5, 11)), values[5:11])
            assert np.array_equal(reader.read_raw(name, slice(5, 11))[0].view(np.uint8), expected[5:11].view(np.uint8))
        norm = "model.layers.0.input_layernorm.weight"
        assert torch.equal(reader.read(norm), torch.from_numpy(weights[norm]))


@pytest.mark.parametrize("stored", sorted(SUPPORTED_TYPES))
def test_every_supported_type_can_be_read(tmp_path: Path, stored: str) -> None:
    """Any bytes are valid blocks; what they mean is the gguf package's word."""
    kind = Kind[stored]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = 2 * max(block, 32)
    raw = np.random.default_rng(1).integers(0, 60, (VOCAB, width // block * size), dtype=np.uint8)
    weights = hf_weights(**CASES["qwen2"])
    del weights["model.embed_tokens.weight"]
    kinds = {Kind.F32: np.float32, Kind.F16: np.float16}
    values = raw.view(kinds[kind]) if kind in kinds else raw

    def add_embedding(writer: Any) -> None:
        writer.add_tensor("token_embd.weight", values, raw_dtype=kind)

    with GgufReader(write_gguf(tmp_path / "m.gguf", "qwen2", weights, extra=add_embedding)) as reader:
        expected = np.asarray(gguf.dequantize(values, kind), dtype=np.float32)
        assert reader.tensors()["model.embed_tokens.weight"].shape == (VOCAB, width)
        assert np.array_equal(reader.read("model.embed_tokens.weight").numpy(), expected, equal_nan=True)


def test_tensors_outlive_the_reader(tmp_path: Path) -> None:
    weights = hf_weights(**CASES["llama"])
    path = write_gguf(tmp_path / "m.gguf", "llama", weights)
    with GgufReader(path) as reader:
        read = {name: (reader.read(name), reader.read_raw(name)[0]) for name in weights}
    with path.open("r+b") as stream:
        stream.write(b"\0" * path.stat().st_size)
    for name, values in weights.items():
        assert torch.equal(read[name][0], torch.from_numpy(values))
        assert np.array_equal(read[name][1], values)
    with pytest.raises(ValueError, match="closed"):
        reader.read("model.norm.weight")


def test_transformers_reads_the_same_llama(tmp_path: Path) -> None:
    """An independent reader of the same file, down to the row order of q and k."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "m.gguf", "llama", hf_weights(**CASES["llama"]), kind=Kind.Q4_0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "head_dim": HEAD_DIM}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True))
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    with GgufReader(path) as reader:
        assert set(theirs) == set(reader.tensors())
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in theirs.items())


def test_embedded_model_against_its_bytes() -> None:
    """Q4_1 decoded by hand from the file: 32 values of a block are scale * nibble + minimum, low nibbles first."""
    files = resolve_model(None)
    assert files.gguf_file is not None
    entry = read_gguf_header(files.gguf_file).tensors["blk.3.attn_k.weight"]
    blocks = np.fromfile(files.gguf_file, np.uint8, count=entry.nbytes, offset=entry.offset).reshape(192, 576 // 32, 20)
    scale, minimum = (blocks[..., at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    in_file_order = (scale * nibbles + minimum).reshape(192, 576)
    with open_reader(files) as reader:
        assert len(reader.tensors()) == 272
        assert "lm_head.weight" not in reader.tensors()
        read = reader.read("model.layers.3.self_attn.k_proj.weight").numpy()
    assert np.array_equal(interleave(read, 3), in_file_order)
    assert not np.array_equal(read, in_file_order)


def test_truncation_anywhere_is_found_at_open(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_weights(**CASES["llama"]))
    data = path.read_bytes()
    for size in (0, 3, 20, 40, 300, 900, 2000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf is truncated.*again"):
            GgufReader(path)


def test_truncated_data_names_the_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_weights(**CASES["llama"]))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.1\.[a-z_]+\.weight' ends at byte"):
        GgufReader(path)


def test_no_damaged_byte_of_the_header_escapes(tmp_path: Path) -> None:
    """Any one byte of the header changed: either it still reads or it is refused in our words."""

    def add_arrays(writer: Any) -> None:
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_array("x.texts", ["a", "b"])

    path = write_gguf(tmp_path / "m.gguf", "llama", hf_weights(**CASES["llama"]), extra=add_arrays)
    data = path.read_bytes()
    refused = 0
    for at in range(900):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            GgufReader(path).close()
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_foreign_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_weights(**CASES["llama"]))
    data = path.read_bytes()
    for start, told in ((b"PK\x03\x04", "no GGUF file"), (b"GGUF\x00\x00\x00\x03", "big-endian"), (b"GGUF\x01\x00\x00\x00", "version 1")):
        path.write_bytes(start + data[len(start) :])
        with pytest.raises(CheckpointError, match=told):
            GgufReader(path)
    with pytest.raises(CheckpointError, match=r"gone\.gguf cannot be read"):
        GgufReader(tmp_path / "gone.gguf")


@pytest.mark.parametrize(
    ("architecture", "extra", "told"),
    [
        ("gpt2", None, "architecture 'gpt2' is not supported.*llama, mistral3, qwen2, qwen3"),
        ("llama", lambda writer: writer.add_expert_count(8), "8 experts"),
        ("llama", lambda writer: writer.add_uint16("split.count", 3), "llama-gguf-split --merge"),
        ("llama", lambda writer: writer.add_tensor("blk.0.attn_qkv.weight", np.zeros((4, 64), np.float32)), r"'blk\.0\.attn_qkv\.weight'"),
        (
            "llama",
            lambda writer: writer.add_tensor("output.weight", np.zeros((4, 64), np.int32), raw_dtype=Kind.I32),
            "'output.weight' has type I32, which is not supported. Supported: BF16",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, architecture: str, extra: Any, told: str) -> None:
    weights = hf_weights(**CASES["llama"]) if architecture == "llama" else {}
    with pytest.raises(CheckpointError, match=told):
        GgufReader(write_gguf(tmp_path / "m.gguf", architecture, weights, extra=extra))


def test_rope_table_is_no_parameter(tmp_path: Path) -> None:
    def add_table(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32))

    weights = hf_weights(**CASES["llama"])
    with GgufReader(write_gguf(tmp_path / "m.gguf", "llama", weights, extra=add_table)) as reader:
        assert set(reader.tensors()) == set(weights)


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    def add_fields(writer: Any) -> None:
        writer.add_string("x.text", "héllo")
        writer.add_bool("x.flag", True)
        writer.add_float64("x.double", 0.1)
        writer.add_int64("x.negative", -(2**40))
        writer.add_array("x.texts", ["a", "", "ü"])
        writer.add_array("x.numbers", [1, -2, 3])

    path = write_gguf(tmp_path / "m.gguf", "qwen3", hf_weights(**CASES["qwen3"]), kind=Kind.Q8_0, extra=add_fields)
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    assert {name: (tensor.type, tensor.offset, tensor.nbytes, tensor.shape) for name, tensor in ours.tensors.items()} == {
        tensor.name: (tensor.tensor_type, tensor.data_offset, tensor.n_bytes, tuple(int(size) for size in reversed(tensor.shape)))
        for tensor in theirs.tensors
    }
