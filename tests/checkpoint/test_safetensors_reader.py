"""Reading safetensors: values, rows, lifetimes, and every kind of damage found at open."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.safetensors_reader import SafetensorsReader

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.float(), right.float())


@pytest.mark.parametrize("stored", sorted(DTYPES))
def test_every_dtype_and_its_rows(tmp_path: Path, stored: str) -> None:
    tensor = torch.arange(-24, 24).reshape(6, 4, 2).to(DTYPES[stored])
    save_file({"a": tensor, "b": torch.ones(3)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    with SafetensorsReader((tmp_path / "m.safetensors",)) as reader:
        info = reader.tensors()["a"]
        assert (info.shape, info.dtype, info.stored, info.nbytes) == ((6, 4, 2), DTYPES[stored], stored, tensor.nbytes)
        assert same(reader.read("a"), tensor)
        for rows in (slice(0, 6), slice(2, 5), slice(None, 3), slice(-2, None), slice(4, 4), slice(5, 99)):
            assert same(reader.read("a", rows), tensor[rows])
        assert reader.metadata == {"format": "pt"}


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    save_file({str(number): torch.rand(1 << 20) for number in range(16)}, tmp_path / "m.safetensors")

    def pages_of_files() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) // 1024

    with SafetensorsReader((tmp_path / "m.safetensors",)) as reader:
        before = pages_of_files()
        for name in reader.tensors():
            assert reader.read(name).max() > 0.9
        assert pages_of_files() - before < 16, "of 64 MiB"


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, tmp_path / "m.safetensors")
    with SafetensorsReader((tmp_path / "m.safetensors",)) as reader:
        assert reader.read("scalar").item() == 2.5
        assert reader.read("empty").shape == (0, 4)
        with pytest.raises(ValueError, match="scalar"):
            reader.read("scalar", slice(0, 1))


def test_tensors_outlive_reader_and_file(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(1000.0)}, file)
    with SafetensorsReader((file,)) as reader:
        whole, part = reader.read("a"), reader.read("a", slice(10, 20))
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(whole, torch.arange(1000.0))
    assert torch.equal(part, torch.arange(10.0, 20.0))
    assert whole.untyped_storage().nbytes() == 4000
    assert part.untyped_storage().nbytes() == 40
    with pytest.raises(ValueError, match="closed"):
        reader.read("a")


def test_steps_and_unknown_names(tmp_path: Path) -> None:
    save_file({"layers.0.q.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with SafetensorsReader((tmp_path / "m.safetensors",)) as reader:
        with pytest.raises(ValueError, match="step"):
            reader.read("layers.0.q.weight", slice(0, 4, 2))
        with pytest.raises(CheckpointError, match=r"no tensor 'layers.9.q.weight'.*layers.0.q.weight"):
            reader.read("layers.9.q.weight")


def test_shards_and_their_index(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{name}.safetensors" for name in "ab")
    save_file({"x": torch.zeros(2)}, files[0])
    save_file({"y": torch.ones(2)}, files[1])
    with SafetensorsReader(files, weight_map={"x": "a.safetensors", "y": "b.safetensors"}) as reader:
        assert torch.equal(reader.read("y"), torch.ones(2))
        assert reader.tensors()["y"].file == files[1]
    for weight_map in ({"x": "b.safetensors"}, {"z": "a.safetensors"}):
        with pytest.raises(CheckpointError, match="index places tensor"):
            SafetensorsReader(files, weight_map=weight_map)
    save_file({"x": torch.zeros(2)}, files[1])
    with pytest.raises(CheckpointError, match=r"tensor 'x' is in both .*a\.safetensors and .*b\.safetensors"):
        SafetensorsReader(files)


def test_truncation_anywhere_is_found_at_open(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(64.0), "b": torch.arange(64.0)}, file)
    data = file.read_bytes()
    for size in (0, 4, 8, 30, len(data) - 300, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"m\.safetensors.*(truncated|corrupt).*again"):
            SafetensorsReader((file,))
    file.write_bytes(data + b"\0\0")
    with pytest.raises(CheckpointError, match="514 bytes of tensors where its header describes 512"):
        SafetensorsReader((file,))


def test_truncation_names_the_tensor(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "m.safetensors", {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 12)
    with pytest.raises(CheckpointError, match=r"truncated: tensor 'w' ends at byte 16 of 12"):
        SafetensorsReader((file,))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"not json", "corrupt header"),
        (b"\xff\xfe\x00", "corrupt header"),
        ([1], "not an object"),
        ({"w": 3}, "header entry for tensor 'w'"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "header entry for tensor 'w'"),
        ({"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "header entry for tensor 'w'"),
        ({"w": {"dtype": "F4_MAGIC", "shape": [1], "data_offsets": [0, 4]}}, "F4_MAGIC.*Supported: .*BF16"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8 bytes but has 4"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "tensor 'w'"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "tensor 'w'"),
        (
            {"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
            "describes 8",
        ),
    ],
)
def test_corrupt_headers(tmp_path: Path, header: object, told: str) -> None:
    file = write_raw(tmp_path / "m.safetensors", header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors.*{told}"):
        SafetensorsReader((file,))


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    file = write_raw(tmp_path / "m.safetensors", {"v": entry, "w": entry}, b"\0" * 8)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        SafetensorsReader((file,))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read"):
        SafetensorsReader((tmp_path / "gone.safetensors",))


def test_one_tensor_does_not_load_the_others(tmp_path: Path) -> None:
    size = 256 << 20
    entries = {
        "big": {"dtype": "F32", "shape": [256, 1 << 18], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]},
    }
    file = write_raw(tmp_path / "m.safetensors", entries)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + size + 32)
    code = (
        "import re, sys, pathlib\n"
        "from octavo.quant.checkpoint.safetensors_reader import SafetensorsReader\n"
        # Not ru_maxrss, which begins with the parent's.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) // 1024\n"
        "reader = SafetensorsReader((pathlib.Path(sys.argv[1]),)); before = peak()\n"
        "small, rows = reader.read('small'), reader.read('big', slice(3, 4)); after_rows = peak()\n"
        "whole = reader.read('big'); print(after_rows - before, peak() - before)"
    )
    output = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True).stdout
    grown_by_rows_mib, grown_by_all_mib = (int(number) for number in output.split())
    assert grown_by_rows_mib < 32
    assert grown_by_all_mib > 200  # the measurement sees what is loaded
