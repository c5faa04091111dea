"""A tower on the weights of a Transformers module: memory is shared wherever the layout is the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from vitgraph.errors import UnsupportedModuleError
from vitgraph.models.layout import Layout, Transform

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_NAMES = 4


class OptimizerSteps:
    """Notices that an optimiser of this process has stepped: fused ones do not raise the version counters of weights.

    Attributes:
        last: another object after every step.
    """

    def __init__(self) -> None:
        self.last = object()
        self._watched = False

    def watch(self) -> None:
        """Starts to notice steps, of all optimisers and for good; doing it again changes nothing."""
        if not self._watched:
            self._watched = True
            register_optimizer_step_post_hook(self._note)

    def _note(self, *_: object) -> None:
        self.last = object()


STEPS = OptimizerSteps()


@dataclass(frozen=True)
class Derived:
    """A tower parameter in memory of its own, because its layout differs from its sources'."""

    parameter: Tensor
    sources: tuple[Tensor, ...]
    transform: Transform


@dataclass
class TowerWeights:
    """What `bind` made.

    Attributes:
        device, dtype: of all weights.
        shared_bytes: of parameters that are views of the module's.
        copied_bytes: of parameters that are copies.
        derived: the copies.
    """

    device: torch.device
    dtype: torch.dtype
    shared_bytes: int = 0
    copied_bytes: int = 0
    derived: list[Derived] = field(default_factory=list)
    _versions: list[object] = field(default_factory=list)

    def changed(self) -> bool:
        """Whether a source of a copy may have been written in place since: by what raises its version counter, or by an
        optimiser. Writes through `.data` do not show."""
        return bool(self.derived) and self._versions != self._count()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copies anew, in their old place: graphs read them there."""
        self._versions = self._count()
        for entry in self.derived:
            entry.parameter.copy_(entry.transform.load(list(entry.sources)))

    def remember(self) -> None:
        """Takes the sources as they are now for what the copies were made from."""
        self._versions = self._count()

    def _count(self) -> list[object]:
        return [STEPS.last, *(source._version for entry in self.derived for source in entry.sources)]


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weights.

    Raises:
        UnsupportedModuleError: they differ, or are such as no tower can use.
    """
    parameters = list(module.parameters())
    kinds = {type(p.data).__name__ for p in parameters} - {"Tensor"}
    if kinds:
        raise UnsupportedModuleError(f"its weights are {', '.join(sorted(kinds))}, not plain tensors")
    if any(p.is_meta for p in parameters):
        raise UnsupportedModuleError("its weights are on the meta device: not loaded, or offloaded")
    if any(p.is_inference() for p in parameters):
        raise UnsupportedModuleError("its weights were made under torch.inference_mode, so their changes do not show")
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters}
    if len(devices) != 1 or len(dtypes) != 1:
        found = sorted(map(str, devices if len(devices) != 1 else dtypes))
        raise UnsupportedModuleError(f"its weights are of several kinds: {', '.join(found) or 'there are none'}")
    device, dtype = devices.pop(), dtypes.pop()
    if device.type not in ("cuda", "cpu"):
        raise UnsupportedModuleError(f"its weights are on {device.type}; expected cuda or cpu")
    if dtype not in DTYPES:
        raise UnsupportedModuleError(f"its weights are {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    return device, dtype


def bind(tower: nn.Module, module: nn.Module, layouts: Iterable[Layout]) -> TowerWeights:
    """Fills a tower that was built on the meta device from a module's parameters.

    Args:
        tower: its parameters become views of the module's, or copies where a layout differs.
        module: whose parameters' names are a layout's keys without its first prefix.
        layouts: of the tower's family.

    Raises:
        UnsupportedModuleError: missing or unexpected parameters, other shapes, and what `place_of` refuses.
    """
    weights = TowerWeights(*place_of(module))
    sources = dict(module.named_parameters(remove_duplicate=False))
    layout = _find_layout(layouts, tower, set(sources))
    prefix, used = layout.prefixes[0], set()
    for name, parameter in list(tower.named_parameters()):
        keys, transform = layout.sources(name)
        names = [key.removeprefix(prefix) for key in keys]
        missing = [key for key in names if key not in sources]
        if missing:
            raise UnsupportedModuleError(f"it lacks {_some(missing)} of layout {layout.name!r}")
        used.update(names)
        tensors = [sources[key].detach() for key in names]
        value = transform.load(tensors)
        if value.shape != parameter.shape:
            raise UnsupportedModuleError(
                f"{' + '.join(names)} is {tuple(value.shape)}; expected {tuple(parameter.shape)}"
            )
        _assign(tower, name, _shared_or_copied(value, tensors, transform, weights))
    extra = [n for n in sources if n not in used and not _unused(layout, prefix + n)]
    if extra:
        raise UnsupportedModuleError(f"it has parameters that layout {layout.name!r} does not know: {_some(extra)}")
    for owner in tower.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.to(weights.device)
    if weights.derived:
        STEPS.watch()
    weights.remember()
    return weights


def _find_layout(layouts: Iterable[Layout], tower: nn.Module, names: set[str]) -> Layout:
    """The layout that finds most of its keys among the module's names, once its prefix is put before them."""
    parameters = [name for name, _ in tower.named_parameters()]
    return max(layouts, key=lambda one: sum(_hits(one, name, names) for name in parameters))


def _hits(layout: Layout, parameter: str, names: set[str]) -> int:
    return sum(key.removeprefix(layout.prefixes[0]) in names for key in layout.sources(parameter)[0])


def _shared_or_copied(value: Tensor, sources: list[Tensor], transform: Transform, weights: TowerWeights) -> Tensor:
    own = value.untyped_storage().data_ptr() != sources[0].untyped_storage().data_ptr()
    if not own and value.is_contiguous():
        weights.shared_bytes += value.nbytes
        return value
    value = value.contiguous() if own else value.clone(memory_format=torch.contiguous_format)
    weights.copied_bytes += value.nbytes
    weights.derived.append(Derived(value, tuple(sources), transform))
    return value


def _assign(tower: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    tower.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _unused(layout: Layout, key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in layout.unused)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
