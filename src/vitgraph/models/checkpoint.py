"""Checkpoints: a local folder or a hub repository with config.json and safetensors shards.

Only the index, the configs and the shards that hold vision tensors are opened (or downloaded).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitgraph.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """Read access to one checkpoint.

    Args:
        model: local folder, or hub id such as "Qwen/Qwen3-VL-8B-Instruct".
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: when there is no such folder or repository, or it has no config.json.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.model = str(model)
        self._folder = Path(model) if Path(model).is_dir() else None
        self._revision = revision
        if self._folder is None and (isinstance(model, Path) or str(model).startswith((".", "/", "~"))):
            raise CheckpointError(f"{self.model} is not a folder; give a checkpoint folder or a hub id.")
        config = self.read_json("config.json")
        if config is None:
            raise CheckpointError(f"{self.model} has no config.json, so it is not a model checkpoint.")
        self.config: dict[str, Any] = config

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, or None when it has no such file."""
        path = self._path(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.model}/{name} is not readable JSON: {error}.") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.model}/{name} holds a {type(content).__name__}, expected an object.")
        return content

    def keys(self) -> dict[str, str]:
        """Every tensor's key with the file that holds it."""
        index = self.read_json(INDEX)
        if index is not None:
            return dict(index["weight_map"])
        if self._path(SINGLE) is None:
            raise CheckpointError(f"{self.model} has neither {INDEX} nor {SINGLE}; only safetensors are read.")
        with self._open(SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def tensors(self, keys: Iterable[str], files: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of `keys` on the CPU, file by file.

        Raises:
            CheckpointError: when a shard is missing, broken, or lacks a key that the index promises.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(files[key], []).append(key)
        for name, wanted in by_file.items():
            with self._open(name) as file:
                present = set(file.keys())
                for key in wanted:
                    if key not in present:
                        raise CheckpointError(f"{self.model}/{name} lacks {key}, which {INDEX} says it holds.")
                    yield key, file.get_tensor(key)

    def _open(self, name: str) -> Any:
        path = self._path(name)
        if path is None:
            raise CheckpointError(f"{self.model} lacks shard {name}; download the checkpoint again.")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.model}/{name} is not a readable safetensors file ({error}); download it again."
            ) from error

    def _path(self, name: str) -> Path | None:
        if self._folder is not None:
            path = self._folder / name
            return path if path.is_file() else None
        return _download(self.model, name, self._revision)


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"cannot reach the hub for {repository}/{name}, and it is not in the local cache; "
            "check the network, or give a local checkpoint folder."
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot get {name} of {repository!r}: {error}") from error
