"""The MLPs of transformer blocks, `[P, D] -> [P, D]`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vitgraph.layers.gemm import linear, linear_gelu_tanh
from vitgraph.layers.ops import Activation, activate, gate

Weights = tuple[Tensor, Tensor | None]

ALIGNED, HIDDEN_MULTIPLE = 64, 128
"""A hidden width that is no multiple of the first is padded to a multiple of the second."""


class BlockMlp(nn.Module, ABC):
    """An MLP in two halves, so that a block may merge the second one's GEMM with the residual.

    Its hidden width F may be padded with zeros; the activation of zero is zero, so that padding adds nothing.
    """

    ups: tuple[str, ...]
    """Linears from D to F."""

    last: str
    """The linear from F to D."""

    def __init__(self) -> None:
        super().__init__()
        self._padded: dict[str, Weights] = {}

    @abstractmethod
    def up(self, x: Tensor) -> Tensor:
        """`[P, D] -> [P, F]`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.up(x), *self.down)

    @property
    def down(self) -> Weights:
        """Weight `[D, F]` and bias of the last linear."""
        return self.weights(self.last)

    def weights(self, name: str) -> Weights:
        """Weight and bias of a linear, padded if `lay_out` did so."""
        linear = self._linear(name)
        return self._padded.get(name) or (linear.weight, linear.bias)

    def lay_out(self) -> None:
        """Moves weights into zeroed storage of a hidden width that tensor cores like; does nothing where F has one.

        Parameters keep their shapes, as views of that storage, and lose their values: to be called before weights are
        loaded. With 4304 padded to 4352, the two GEMMs of 1024 rows take 41 us instead of 44 on an H100.
        """
        wide = self.aligned_width()
        if wide == self._linear(self.last).in_features:
            return
        for name in self.ups:
            self._pad_rows((name,), wide)
        self._pad_columns(wide)

    def aligned_width(self) -> int:
        """F, or the padded width that takes its place."""
        hidden = self._linear(self.last).in_features
        return hidden if hidden % ALIGNED == 0 else -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE

    def _pad_rows(self, names: tuple[str, ...], wide: int) -> Weights:
        """Gives linears D to F one storage, each `wide` rows of it."""
        linears = [self._linear(name) for name in names]
        weight = linears[0].weight.new_zeros(len(names) * wide, linears[0].in_features)
        bias = None if linears[0].bias is None else linears[0].bias.new_zeros(len(names) * wide)
        for number, (name, part) in enumerate(zip(names, linears, strict=True)):
            own = slice(number * wide, (number + 1) * wide)
            part.weight = _view(weight[own], part.weight)
            if bias is not None:
                part.bias = _view(bias[own], part.bias)
            self._padded[name] = weight[own], None if bias is None else bias[own]
        return weight, bias

    def _pad_columns(self, wide: int) -> None:
        last = self._linear(self.last)
        weight = last.weight.new_zeros(last.out_features, wide)
        last.weight = _view(weight, last.weight)
        self._padded[self.last] = weight, last.bias

    def _linear(self, name: str) -> nn.Linear:
        linear = getattr(self, name)
        assert isinstance(linear, nn.Linear)
        return linear


def _view(storage: Tensor, parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape in the first rows and columns of `storage`."""
    view = storage[tuple(slice(n) for n in parameter.shape)]
    return nn.Parameter(view, requires_grad=parameter.requires_grad)


class Mlp(BlockMlp):
    """Linear, activation, Linear."""

    ups, last = ("fc1",), "fc2"

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu_tanh") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def up(self, x: Tensor) -> Tensor:
        weight, bias = self.weights("fc1")
        if self.activation == "gelu_tanh" and bias is not None:
            return linear_gelu_tanh(x, weight, bias)
        return activate(linear(x, weight, bias), self.activation)


class GatedMlp(BlockMlp):
    """`down(activation(gate(x)) * up(x))`, optionally with another output width."""

    ups, last = ("gate_proj", "up_proj"), "down_proj"

    def __init__(
        self, dim: int, hidden: int, bias: bool, activation: Activation = "silu", out_dim: int | None = None
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self._both: Weights | None = None
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, out_dim or dim, bias=bias)

    def lay_out(self) -> None:
        """As in `BlockMlp`; gate and up projections also come to lie side by side, so that one GEMM makes both."""
        wide = self.aligned_width()
        self._both = self._pad_rows(self.ups, wide)
        if wide != self._linear(self.last).in_features:
            self._pad_columns(wide)

    def up(self, x: Tensor) -> Tensor:
        if self._both is None:
            return gate(linear(x, *self.weights("gate_proj")), linear(x, *self.weights("up_proj")), self.activation)
        gates, ups = linear(x, *self._both).chunk(2, dim=1)
        return gate(gates, ups, self.activation)
