"""cuBLASLt through ctypes: products of row-major matrices by an algorithm of one's own choice.

torch always takes the first algorithm that the library's heuristics name. Numbers are those of `cublasLt.h`, which the
library keeps.
"""

from __future__ import annotations

import ctypes
from functools import cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from vitgraph.engine.cudart import loaded_file
from vitgraph.engine.order import current_handle
from vitgraph.layers.gemm import Kind

MOST_NAMED = 8
"""The heuristics name no more."""

ALIGNMENT = 256
"""Bytes, of every matrix: what the heuristics take for granted."""

COUNTER = 4
"""Bytes of workspace in which a kernel counts its tiles. It asks for them, and does without: see
`vitgraph.workspace`."""

HOPPER = (9, 0)
"""Compute capability whose kernels `CublasLt.hopper` makes."""

_COMPUTE_32F, _REAL_32F = 68, 0
_TYPES = {torch.bfloat16: 14, torch.float16: 2}
_TRANSPOSE_A, _EPILOGUE, _BIAS = 3, 7, 8
_EPILOGUES: dict[Kind, int] = {"plain": 1, "bias": 4, "gelu": 36, "add": 1}
_WORKSPACE = 1
_HOPPER_ID, _STAGES_AUTO = 66, 35
_TILE, _SPLIT, _SCHEDULE, _STAGES, _CLUSTER = 1, 2, 5, 6, 8
_SHORT = (_CLUSTER,)
"""Settings of two bytes; the others have four."""

_Algorithm = ctypes.c_uint64 * 8


class Setting(NamedTuple):
    """Of one of Hopper's kernels, in the library's numbers.

    Attributes:
        tile: columns and rows of the output that a block of threads makes.
        cluster: blocks that share what they load.
        schedule: of a kernel's warps and tiles; what the numbers mean is not public.
    """

    tile: int
    cluster: int
    schedule: int


class _Found(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Problem(NamedTuple):
    """One product: `[rows, inner] @ [columns, inner].T -> [rows, columns]`.

    Attributes:
        rows, columns, inner: sizes; every matrix lies row by row without gaps.
        kind: see `Kind`.
        dtype: of all tensors; sums are fp32.
    """

    rows: int
    columns: int
    inner: int
    kind: Kind
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As files call it."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} x {self.columns} x {self.inner} {self.kind} {kind}"


class _Described(NamedTuple):
    """A problem as the library knows it. The library is column-major: its A is our weight, its D our output."""

    product: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    out: ctypes.c_void_p


class CublasLt:
    """The library on one device. Its kernels get no workspace, see `vitgraph.workspace`.

    Args:
        device: CUDA.

    Raises:
        OSError: the library that torch uses is not found.
        RuntimeError: it fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL(loaded_file("cublasLt"))
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self._library.cublasLtGetStatusString.restype = ctypes.c_char_p
        self.device = device
        self.gpu = torch.cuda.get_device_name(device)
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors = properties.multi_processor_count
        self.is_hopper = (properties.major, properties.minor) == HOPPER
        self.version = int(self._library.cublasLtGetVersion())
        self._handle = ctypes.c_void_p()
        self._described: dict[Problem, _Described] = {}
        self._lock = Lock()
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        with torch.cuda.device(device):
            self._check(self._library.cublasLtCreate(ctypes.byref(self._handle)))

    def named(self, problem: Problem) -> list[bytes]:
        """Algorithms that the heuristics name and that need no workspace, the one that torch takes leading; none where
        the library has none. Their bytes may be kept: they are good for one version of the library."""
        own, found, count = self._describe(problem), (_Found * MOST_NAMED)(), ctypes.c_int()
        preference = self._make("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE, ctypes.c_uint64(0))
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, own.product, own.weight, own.x, own.out, own.out, preference,
            ctypes.c_int(MOST_NAMED), found, ctypes.byref(count),
        )  # fmt: skip
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        if status:
            return []
        return [bytes(one.algorithm) for one in found[: count.value] if not one.state and not one.workspace]

    def setting(self, algorithm: bytes) -> Setting:
        """Of an algorithm that was named."""
        own = _Algorithm.from_buffer_copy(algorithm)
        return Setting(*(self._configured(own, attribute) for attribute in (_TILE, _CLUSTER, _SCHEDULE)))

    def hopper(self, problem: Problem, setting: Setting) -> bytes | None:
        """The kernel with this setting; None where there is none, or it needs a workspace for more than a counter."""
        kind, own = ctypes.c_int(_TYPES[problem.dtype]), _Algorithm()
        status = self._library.cublasLtMatmulAlgoInit(
            self._handle, ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_REAL_32F), kind, kind, kind, kind,
            ctypes.c_int(_HOPPER_ID), ctypes.byref(own),
        )  # fmt: skip
        values = {
            _TILE: setting.tile, _SPLIT: 1, _SCHEDULE: setting.schedule, _STAGES: _STAGES_AUTO,
            _CLUSTER: setting.cluster,
        }  # fmt: skip
        if status or not all(self._configure(own, attribute, value) for attribute, value in values.items()):
            return None
        algorithm = bytes(own)
        return algorithm if self.accepts(problem, algorithm, COUNTER) else None

    def accepts(self, problem: Problem, algorithm: bytes, most_workspace: int | None = None) -> bool:
        """Whether an algorithm runs this problem here.

        Args:
            most_workspace: bytes that it may ask for; None: any number, as what the heuristics named runs without.
        """
        if len(algorithm) != ctypes.sizeof(_Algorithm):
            return False
        own, found = self._describe(problem), _Found()
        kept = _Algorithm.from_buffer_copy(algorithm)
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle, own.product, own.weight, own.x, own.out, own.out, ctypes.byref(kept), ctypes.byref(found)
        )
        return not status and (most_workspace is None or found.workspace <= most_workspace)

    def run(
        self, problem: Problem, algorithm: bytes, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        """Queues the product on the current stream.

        Args:
            problem: sizes and kind.
            algorithm: one of its candidates.
            x: `[rows, inner]`.
            weight: `[columns, inner]`.
            bias: `[columns]` for the kinds that have one.
            out: `[rows, columns]`; the kind "add" reads it, too.
        """
        own, add = self._describe(problem), self._one if problem.kind == "add" else self._zero
        target = ctypes.c_void_p(out.data_ptr())
        stream = ctypes.c_void_p(current_handle(self.device))
        with self._lock:  # the bias is a part of the description
            if bias is not None:
                self._set_product(own.product, _BIAS, ctypes.c_void_p(bias.data_ptr()))
            status = self._library.cublasLtMatmul(
                self._handle, own.product, ctypes.byref(self._one), ctypes.c_void_p(weight.data_ptr()), own.weight,
                ctypes.c_void_p(x.data_ptr()), own.x, ctypes.byref(add), target, own.out, target, own.out,
                ctypes.byref(_Algorithm.from_buffer_copy(algorithm)), None, ctypes.c_size_t(0), stream,
            )  # fmt: skip
        self._check(status)

    def _describe(self, problem: Problem) -> _Described:
        """Made once per problem and kept as long as the library."""
        if problem not in self._described:
            rows, columns, inner, kind, dtype = problem
            product = self._make("cublasLtMatmulDescCreate", ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_REAL_32F))
            self._set_product(product, _TRANSPOSE_A, ctypes.c_int32(1))
            self._set_product(product, _EPILOGUE, ctypes.c_int32(_EPILOGUES[kind]))
            self._described[problem] = _Described(
                product,
                weight=self._layout(dtype, inner, columns),
                x=self._layout(dtype, inner, rows),
                out=self._layout(dtype, columns, rows),
            )
        return self._described[problem]

    def _configure(self, algorithm: ctypes.Array[ctypes.c_uint64], attribute: int, value: int) -> bool:
        """Whether the library takes the setting."""
        given = (ctypes.c_uint16 if attribute in _SHORT else ctypes.c_uint32)(value)
        return not self._library.cublasLtMatmulAlgoConfigSetAttribute(
            ctypes.byref(algorithm), ctypes.c_int(attribute), ctypes.byref(given), ctypes.c_size_t(ctypes.sizeof(given))
        )

    def _configured(self, algorithm: ctypes.Array[ctypes.c_uint64], attribute: int) -> int:
        found, written = (ctypes.c_uint16 if attribute in _SHORT else ctypes.c_uint32)(), ctypes.c_size_t()
        status = self._library.cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(algorithm), ctypes.c_int(attribute), ctypes.byref(found),
            ctypes.c_size_t(ctypes.sizeof(found)), ctypes.byref(written),
        )  # fmt: skip
        return -1 if status else found.value

    def _layout(self, dtype: torch.dtype, width: int, height: int) -> ctypes.c_void_p:
        """Of `[height, width]`, row by row: columns of `width` to the library."""
        return self._make(
            "cublasLtMatrixLayoutCreate", ctypes.c_int(_TYPES[dtype]), ctypes.c_uint64(width),
            ctypes.c_uint64(height), ctypes.c_int64(width),
        )  # fmt: skip

    def _make(self, function: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._check(getattr(self._library, function)(ctypes.byref(made), *arguments))
        return made

    def _set_product(self, product: ctypes.c_void_p, attribute: int, value: object) -> None:
        self._set("cublasLtMatmulDescSetAttribute", product, attribute, value)

    def _set(self, function: str, target: ctypes.c_void_p, attribute: int, value: object) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))  # type: ignore[arg-type]
        self._check(getattr(self._library, function)(target, ctypes.c_int(attribute), ctypes.byref(value), size))  # type: ignore[arg-type]

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLASLt: {self._library.cublasLtGetStatusString(ctypes.c_int(status)).decode()}")


@cache
def cublaslt(device: torch.device) -> CublasLt:
    """The library on this device, one for the process.

    Raises:
        OSError, RuntimeError: see `CublasLt`.
    """
    return CublasLt(device)
