"""Finding on any device what a CUDA graph cannot hold: values read by the host, shapes made from values, copies."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import vitgraph

SHAPE_FROM_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::allclose",
    "aten::equal",
}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"}
MASK_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
HOST_CALLS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
MADE_ON_HOST = {"tensor", "as_tensor", "from_numpy"}
MOVES = {"to", "type_as", "cuda"}
COPIES = {"__getitem__", "__setitem__", "copy_"}
LIBRARIES = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in (torch, vitgraph, numpy))
"""Where they lie: folders around an environment may have the same names."""


class HostRead(Exception):
    """A forward does what no graph can hold; the message says what and where. No `TypeError`: torch's operators would
    turn one into a message about operands."""


class UnreadGrid(Tensor):
    """Stands in for an argument that a captured forward must not read: any use of it raises, except taking a part of
    it, which stands in for that part.

    A graph replays for other items than those it was captured with, so nothing may depend on their sizes.
    """

    @staticmethod
    def __new__(cls, name: str) -> UnreadGrid:
        grid = torch.zeros(1, 3, dtype=torch.int64).as_subclass(cls)
        grid.__dict__["argument"] = name
        return grid

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__getitem__" and type(args[0]) is cls:
            return args[0]
        raise HostRead(f"it reads the sizes of its items ({_read_as(func, name)}) {where()}")


_ours: ContextVar[bool] = ContextVar("vitgraph_ours", default=False)


@contextmanager
def our_own_code() -> Iterator[None]:
    """Within it nothing is refused: attention backends may measure and choose before they are captured."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def is_our_own_code() -> bool:
    """Whether `our_own_code` is active."""
    return _ours.get()


@contextmanager
def refuse_host_reads() -> Iterator[None]:
    """Within it, whatever a capture would refuse raises `HostRead` with the line that does it."""
    with _FunctionCheck(), _OperatorCheck():
        yield


def where(error: BaseException | None = None) -> str:
    """The innermost line that is neither torch's nor ours, of an error or else of the running stack, as
    "in function (file:line): text"."""
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    for frame in reversed(frames):
        if not frame.filename.startswith(LIBRARIES):
            return f"in {frame.name} ({Path(frame.filename).name}:{frame.lineno}): {frame.line}"
    return "in code without source"


class _FunctionCheck(TorchFunctionMode):
    """Sees calls that never reach an operator on the CPU, and values that the host would copy to the device.

    Tensors that were made from values of the host are remembered, so that their copies are found where the host is
    the device, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _ours.get():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in HOST_CALLS and not _is_host_constant(args):
            raise HostRead(f"it reads a value back from the device ({name}) {where()}")
        if name in MADE_ON_HOST and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            raise HostRead(f"it copies a value from the host ({name}) {where()}")
        if self._is_copied(name, args, kwargs):
            raise HostRead(f"it copies between host and device ({name.strip('_')}) {where()}")
        result = func(*args, **kwargs)
        made = name in MADE_ON_HOST and not isinstance(args[0], Tensor)
        if isinstance(result, Tensor) and (made or self._all_on_host(args, kwargs)):
            self._host[result] = True
        return result

    def _is_copied(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether a tensor on the host meets the device in a way that torch answers with a copy."""
        if name not in MOVES | COPIES:
            return False
        own, *others = _tensors(args, kwargs)
        if name in MOVES:
            named = any(isinstance(x, (torch.device, str)) for x in (*args[1:], *kwargs.values()))
            return self._is_on_host(own) and (named or not all(map(self._is_on_host, others)))
        # In an index or an assignment to one, a tensor without an axis is a number to torch.
        given = [other for other in others if name == "copy_" or other.dim()]
        return not self._is_on_host(own) and any(map(self._is_on_host, given))

    def _all_on_host(self, args: Any, kwargs: Any) -> bool:
        tensors = _tensors(args, kwargs)
        return bool(tensors) and all(map(self._is_on_host, tensors))

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor in self._host


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _is_host_constant(args: Any) -> bool:
    """`SegmentOffsets` answers some reads itself, from what the host knows."""
    return getattr(args[0], "step", None) == "longest"


class _OperatorCheck(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        reason = "" if _ours.get() else _refused(name, args, kwargs)
        if reason:
            raise HostRead(f"{reason} ({name.removeprefix('aten::')}) {where()}")
        return func(*args, **kwargs)


def _refused(name: str, args: Any, kwargs: Any) -> str:
    if name in READS:
        return "it reads a value back from the device"
    if name in SHAPE_FROM_VALUES:
        return "it makes a shape from values on the device"
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "it makes a shape from values on the device"
    if name in MASK_INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        return "it makes a shape from values on the device: a mask as an index"
    return "it copies between host and device" if _crosses(name, args, kwargs) else ""


def _crosses(name: str, args: Any, kwargs: Any) -> bool:
    if not args:
        return False
    source = args[0]
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type != source.device.type
    if name in MASK_INDEXED:
        return any(index is not None and index.device.type != source.device.type for index in args[1])
    return name == "aten::copy_" and args[1].device.type != source.device.type


def _read_as(func: Any, name: str) -> str:
    return "shape" if name == "__get__" and "shape" in repr(func) else name.strip("_")
