"""The tensors inside what a vision module returns: where their rows lie, and how to put the whole together again.

An engine's output is `[levels, rows, width]`; a module's may be any nest of classes, tuples and lists of tensors.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from vitgraph.core import Counts
from vitgraph.errors import UnsupportedModuleError
from vitgraph.models.contract import OutputSpec


@dataclass(frozen=True)
class Leaf:
    """One tensor of an output.

    Attributes:
        name: its path, as "deepstack_features[0]".
        rows: what its rows count.
        before, after: its shape before and after the axis of rows.
        each: entries of that axis per row (a class row and its patches may share an axis with the images).
    """

    name: str
    rows: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    each: int = 1

    @property
    def spec(self) -> OutputSpec:
        return OutputSpec(self.name, self.rows, prod(self.after) * self.each, prod(self.before))

    def pack(self, tensor: Tensor) -> Tensor:
        """From the module's shape to `[levels, rows, width]`."""
        return tensor.reshape(prod(self.before), -1, prod(self.after) * self.each)

    def unpack(self, output: Tensor) -> Tensor:
        """From `[levels, rows, width]` to the module's shape."""
        return output.reshape(*self.before, -1, *self.after)


class OutputForm:
    """The form of an output: how to flatten one, and how to build one.

    Args:
        example: an output of the module.
    """

    def __init__(self, example: Any) -> None:
        found: dict[str, Tensor] = {}
        self._tree = _describe(example, "", found)
        # What lies in another tensor (a pooler that is the last state, or its first row) is not copied again.
        self._within = {name: place for name, tensor in found.items() if (place := _within(name, tensor, found))}
        self.names = tuple(name for name in found if name not in self._within)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the output's own fields that hold tensors."""
        return tuple(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in (*self.names, *self._within)))

    def flatten(self, output: Any) -> list[Tensor]:
        """The tensors of an output of this form, in the order of `names`.

        Raises:
            UnsupportedModuleError: the output has another form.
        """
        found: dict[str, Tensor] = {}
        if _describe(output, "", found) != self._tree:
            raise UnsupportedModuleError("what it returns has a form that changes with its items")
        return [found[name] for name in self.names]

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """An output of this form from its tensors."""
        by_name = dict(zip(self.names, tensors, strict=True))
        for name, (whole, axis) in self._within.items():
            by_name[name] = by_name[whole] if axis is None else by_name[whole].select(axis, 0)
        return _rebuild(self._tree, by_name.__getitem__)


def find_leaves(form: OutputForm, outputs: Sequence[Any], totals: Sequence[Counts]) -> tuple[Leaf, ...]:
    """Where the rows of every tensor lie.

    Args:
        form: of the outputs.
        outputs: of the module, for packs of different sizes.
        totals: rows of each kind in these packs.

    Raises:
        UnsupportedModuleError: a tensor has no axis that grows with the items, or more than one.
    """
    columns = zip(*(form.flatten(output) for output in outputs), strict=True)
    return tuple(_find_leaf(name, tensors, totals) for name, tensors in zip(form.names, columns, strict=True))


def _find_leaf(name: str, tensors: Sequence[Tensor], totals: Sequence[Counts]) -> Leaf:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    axes = [i for i, sizes in enumerate(zip(*shapes, strict=False)) if len(set(sizes)) > 1]
    if len({len(shape) for shape in shapes}) > 1 or len(axes) != 1:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise UnsupportedModuleError(f"its output {name} has shapes {listed}; expected one axis that grows with items")
    axis = axes[0]
    sizes = [shape[axis] for shape in shapes]
    for kind in totals[0]:
        each = sizes[0] // max(totals[0][kind], 1)
        if each and all(size == each * total[kind] for size, total in zip(sizes, totals, strict=True)):
            return Leaf(name, kind, shapes[0][:axis], shapes[0][axis + 1 :], each)
    counted = " and ".join(
        f"{size} rows for {total['patch']} patches" for size, total in zip(sizes, totals, strict=True)
    )
    raise UnsupportedModuleError(f"its output {name} has {counted}; expected patches, tokens, items or segments")


def _within(name: str, tensor: Tensor, found: Mapping[str, Tensor]) -> tuple[str, int | None] | None:
    """The tensor that this one is, or whose first entries along an axis it is; None for one with memory of its own."""
    for other, whole in found.items():
        if other == name or whole.data_ptr() != tensor.data_ptr() or whole.dtype != tensor.dtype:
            continue
        if whole.dim() == tensor.dim() + 1:
            for axis in range(whole.dim()):
                first = whole.select(axis, 0)
                if (first.shape, first.stride()) == (tensor.shape, tensor.stride()):
                    return other, axis
        same = (whole.shape, whole.stride()) == (tensor.shape, tensor.stride())
        if same and list(found).index(other) < list(found).index(name):
            return other, None
    return None


def _describe(value: Any, path: str, found: dict[str, Tensor]) -> Any:
    """A comparable description of a nest; tensors are entered into `found` and described by their path."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise UnsupportedModuleError(f"its output {path or 'tensor'} is {value.dtype}; expected floating point")
        found[path or "output"] = value
        return ("tensor", path or "output")
    if value is None:
        return None
    if isinstance(value, Mapping):
        fields = tuple((key, _describe(v, f"{path}.{key}".lstrip("."), found)) for key, v in value.items())
        return ("fields", type(value), fields)
    if isinstance(value, (tuple, list)):
        return ("items", type(value), tuple(_describe(v, f"{path}[{i}]", found) for i, v in enumerate(value)))
    raise UnsupportedModuleError(f"its output {path} is a {type(value).__name__}; expected tensors")


def _rebuild(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    if tree is None:
        return None
    what, *rest = tree
    if what == "tensor":
        return tensor(rest[0])
    kind, children = rest
    if what == "fields":
        built = kind(**{key: _rebuild(child, tensor) for key, child in children})
        for key, _ in children if isinstance(built, OrderedDict) else ():
            # Fields that Transformers adds to an output later come last, wherever the class lists them.
            built.move_to_end(key)
        return built
    return kind(_rebuild(child, tensor) for child in children)
