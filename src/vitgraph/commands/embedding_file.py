"""A safetensors file of embeddings, written item by item so that memory stays bounded."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from vitgraph.commands.outputs import OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from vitgraph.embedding import VisionEmbedding

DTYPE_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class EmbeddingFile:
    """Writes `<key>` `[M, C]` and, for families with deepstack, `<key>.deepstack` `[levels, M, C]` per item.

    The header's metadata holds `facts` as text and `files`: a JSON list of `{"key", "grid", "tokens"}` in the order
    written. Bytes are kept beside the target and put in place on a clean exit of the `with` block; nothing is
    written when no item was added or the block raised.

    Args:
        path: the file to write.
        facts: text values for the header, such as the model and dtype.
    """

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path = path
        self._facts = facts
        self._header: dict[str, Any] = {}
        self._files: list[dict[str, Any]] = []
        self._size = 0
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by __exit__)

    def __len__(self) -> int:
        return len(self._files)

    def add(self, key: str, embedding: VisionEmbedding) -> None:
        """Appends one item."""
        self._append(key, embedding.tokens)
        if embedding.deepstack is not None:
            self._append(f"{key}.deepstack", embedding.deepstack)
        self._files.append({"key": key, "grid": list(embedding.grid), "tokens": embedding.tokens.shape[0]})

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._files:
                self._finish()
        finally:
            self._data.close()

    def _append(self, key: str, tensor: Tensor) -> None:
        import torch

        if key in self._header:
            raise OutputError(f"two inputs would both be stored as {key!r}; rename one of them.")
        raw = tensor.detach().contiguous().cpu()
        data = raw.view(torch.uint8).numpy().tobytes()
        self._header[key] = {
            "dtype": DTYPE_NAMES[str(raw.dtype)],
            "shape": list(raw.shape),
            "data_offsets": [self._size, self._size + len(data)],
        }
        self._data.write(data)
        self._size += len(data)

    def _finish(self) -> None:
        metadata = {"format": "pt", **self._facts, "files": json.dumps(self._files)}
        header = json.dumps({"__metadata__": metadata, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        part = self.path.with_name(f".{self.path.name}.part")
        self._data.seek(0)
        try:
            with part.open("wb") as out:
                out.write(len(header).to_bytes(8, "little"))
                out.write(header)
                shutil.copyfileobj(self._data, out, 1 << 20)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
