"""Where encoded bytes come from: a path, an http(s) URL, a `data:` URI, or memory."""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from vitgraph.errors import InputError

TIMEOUT_S = 20.0
"""Seconds that a server may stay silent."""


def describe(source: Any) -> str:
    """Names a source in an error message, in one short line."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the given bytes ({memoryview(source).nbytes} bytes)"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = os.fsdecode(text) if isinstance(text, bytes) else text
        return repr(text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)")
    shape = getattr(source, "shape", None)
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    return f"the given {kind}" if shape is None else f"the given {kind} of shape {tuple(shape)}"


def resolve(source: Any, error: type[InputError], max_bytes: int) -> Path | bytes:
    """A readable path, or bytes that were fetched or given.

    Args:
        source: path, http(s) URL, `data:` URI or bytes.
        error: class to raise.
        max_bytes: most bytes to accept from a URL.

    Raises:
        InputError: of class `error`; the source is missing, a folder, unreachable, too long or empty.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _not_empty(bytes(source), source, error)
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            return _not_empty(_download(source, error, max_bytes), source, error)
        if scheme.startswith("data:"):
            return _not_empty(_data_uri(source, error), source, error)
    return _existing_file(source, error)


def _existing_file(source: Any, error: type[InputError]) -> Path:
    path = Path(os.fsdecode(source))
    try:
        mode_is_folder, found = path.is_dir(), path.exists()
    except (OSError, ValueError) as problem:  # a name that is too long, or holds a null byte
        raise error(
            f"{describe(source)} is no usable path: {problem}. Pass a path, an http(s) URL, or encoded bytes "
            "(base64 text goes into a data: URI)."
        ) from problem
    if mode_is_folder:
        raise error(f"{describe(source)} is a folder, not a file. Pass the files in it one by one.")
    if not found:
        raise error(f"there is no file {describe(source)} (in {os.getcwd()!r}). Check the path.")
    if not os.access(path, os.R_OK):
        raise error(f"{describe(source)} cannot be read: permission denied. Change its mode or its owner.")
    if path.is_file() and path.stat().st_size == 0:
        raise error(f"{describe(source)} is empty (0 bytes). Write or download it again.")
    return path


def _download(url: str, error: type[InputError], max_bytes: int) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vitgraph"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data = response.read(max_bytes + 1)
    except urllib.error.HTTPError as problem:
        raise error(
            f"{describe(url)} answered with HTTP status {problem.code} ({problem.reason}). Check the "
            "address and its access rights, or download the file and pass its path."
        ) from problem
    except (OSError, ValueError, http.client.HTTPException) as problem:
        reason = getattr(problem, "reason", problem)
        raise error(
            f"{describe(url)} cannot be downloaded: {reason}. Check the address and the network, or "
            "download the file and pass its path."
        ) from problem
    if len(data) > max_bytes:
        raise error(
            f"{describe(url)} is longer than {max_bytes} bytes, the limit for a download. Download it and "
            "pass its path."
        )
    return data


def _data_uri(uri: str, error: type[InputError]) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise error(f"{describe(uri)} is no data: URI: it has no comma. Write 'data:image/jpeg;base64,...'.")
    raw = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise error(f"{describe(uri)} does not hold valid base64: {problem}. Encode the file again.") from problem


def _not_empty(data: bytes, source: Any, error: type[InputError]) -> bytes:
    if not data:
        raise error(f"{describe(source)} holds no data (0 bytes). Read or download the file again.")
    return data
