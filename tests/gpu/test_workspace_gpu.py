"""On a GPU: linears captured without a workspace launch nothing but their GEMM, and streams keep theirs afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from vitgraph.capture import capturing
from vitgraph.workspace import without_workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
ROWS = (256, 2048, 3200, 8192)
LAYERS = 3


def linears(rows: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Rows of width 1152, and weights and biases to width 3456."""
    generator = torch.Generator(DEVICE).manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).bfloat16()

    return random(rows, 1152), [(random(3456, 1152) / 34, random(3456)) for _ in range(LAYERS)]


@pytest.mark.parametrize("rows", ROWS)
def test_a_captured_linear_is_one_kernel(rows: int) -> None:
    x, layers = linears(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), without_workspace(DEVICE):
        F.linear(x, *layers[0])
        with capturing(graph, DEVICE, torch.cuda.graph_pool_handle()):
            results = [F.linear(x, *layer) for layer in layers]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        graph.replay()
        torch.cuda.synchronize()
    launched = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == LAYERS, [event.name for event in launched]
    for result, (weight, bias) in zip(results, layers, strict=True):
        torch.testing.assert_close(result.float(), x.float() @ weight.float().T + bias.float(), atol=0.1, rtol=0.02)


def test_a_stream_has_its_workspace_afterwards() -> None:
    x, layers = linears(3200)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
        # torch warns when it must do without a workspace that it expects.
        warnings.simplefilter("error")
        with without_workspace(DEVICE):
            inside = F.linear(x, *layers[0])
        after = F.linear(x, *layers[0])
        torch.testing.assert_close(inside.float(), after.float(), atol=0.1, rtol=0.02)
