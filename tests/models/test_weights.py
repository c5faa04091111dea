"""Reading checkpoints strictly: what is wrong is listed at once, and nothing else is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitgraph import VisionEncoder
from vitgraph.errors import CheckpointError, ConfigError, UnknownFamilyError
from vitgraph.models.checkpoint import INDEX, Checkpoint
from vitgraph.models.tiny import TEXT_KEY, write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint("qwen3_vl", tmp_path / "model")


def load(folder: Path, **settings) -> VisionEncoder:
    return VisionEncoder.from_pretrained(folder, device="cpu", **settings)


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


def edit_index(folder: Path, weight_map: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_shard(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def test_missing_and_unexpected_keys_are_listed_together(folder: Path) -> None:
    weight_map = index_of(folder)["weight_map"]
    shard = weight_map.pop("model.visual.merger.norm.weight")
    weight_map.pop("model.visual.blocks.1.attn.qkv.bias")
    weight_map["model.visual.blocks.7.norm1.weight"] = shard
    weight_map["model.visual.surprise"] = shard
    edit_index(folder, weight_map)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for text in ("2 missing keys", "merger.norm.weight", "blocks.1.attn.qkv.bias", "2 unexpected keys", "surprise"):
        assert text in str(error.value)


def test_tensors_of_another_shape_are_listed_together(folder: Path) -> None:
    weight_map = index_of(folder)["weight_map"]
    names = ["model.visual.merger.norm.weight", "model.visual.blocks.0.norm1.bias"]
    for name in names:
        edit_shard(folder, weight_map[name], lambda tensors, name=name: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"2 tensors of another shape") as error:
        load(folder)
    assert all(f"{name}: (3,), expected (64,)" in str(error.value) for name in names)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks shard model-00002-of-00002\.safetensors.*download"):
        load(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors.*not a readable"):
        load(folder)


def test_an_index_that_promises_too_much_is_caught(folder: Path) -> None:
    name = "model.visual.merger.norm.weight"
    edit_shard(folder, index_of(folder)["weight_map"][name], lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks {name}"):
        load(folder)


def test_only_vision_shards_and_tensors_are_opened(folder: Path, monkeypatch) -> None:
    weight_map = index_of(folder)["weight_map"]
    assert TEXT_KEY in weight_map
    weight_map[TEXT_KEY] = "model-of-text.safetensors"
    edit_index(folder, weight_map)
    opened, read = [], []
    plain_open, plain_tensors = Checkpoint._open, Checkpoint.tensors
    monkeypatch.setattr(Checkpoint, "_open", lambda self, name: opened.append(name) or plain_open(self, name))

    def tensors(self, keys, files):
        for key, value in plain_tensors(self, keys, files):
            read.append(key)
            yield key, value

    monkeypatch.setattr(Checkpoint, "tensors", tensors)
    load(folder)
    assert "model-of-text.safetensors" not in opened
    assert TEXT_KEY not in read
    assert len(read) == len(set(read)) == len(weight_map) - 1


def test_one_file_without_an_index_is_read_too(folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_to_the_dtype(folder: Path, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in load(folder, dtype=dtype).tower.parameters()} == {wanted}


def test_wrong_config_files_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UnknownFamilyError, match=r"'gpt2'.*known:.*qwen3_vl"):
        load(folder)
    del config["vision_config"]["depth"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="lacks 'depth'"):
        load(folder)
    (folder / "config.json").write_text("{nope")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(folder)


def test_a_folder_that_does_not_exist_is_not_sought_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a folder"):
        VisionEncoder.from_pretrained("./nothing", device="cpu")


def test_hub_errors_are_typed(monkeypatch) -> None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def refuse(error):
        def download(*_args, **_kwargs):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    refuse(LocalEntryNotFoundError("offline"))
    with pytest.raises(CheckpointError, match="cannot reach the hub"):
        VisionEncoder.from_pretrained("someone/model", device="cpu")
    refuse(HFValidationError("bad id"))
    with pytest.raises(CheckpointError, match="bad id"):
        VisionEncoder.from_pretrained("not a model", device="cpu")


def test_hub_downloads_only_vision_shards(folder: Path, monkeypatch) -> None:
    weight_map = index_of(folder)["weight_map"]
    weight_map[TEXT_KEY] = "model-of-text.safetensors"
    edit_index(folder, weight_map)
    asked = []

    def download(repository, name, revision=None):
        from huggingface_hub.errors import EntryNotFoundError

        asked.append(name)
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    encoder = VisionEncoder.from_pretrained("someone/model", device="cpu")
    assert encoder.family.name == "qwen3_vl"
    assert "model-of-text.safetensors" not in asked
    assert set(weight_map.values()) - {"model-of-text.safetensors"} <= set(asked)
