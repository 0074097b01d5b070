# SPDX-License-Identifier: BSD-3-Clause
"""What the shim cannot show of fastops.cuda: streams that run beside one another, graphs that replay, and memory that is used again."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastops
from fastops import cuda

pytestmark = pytest.mark.gpu
# Cycles: long enough that what waits for nothing comes first.
LONG = 200_000_000


@pytest.fixture
def torch() -> ModuleType:
    """torch, with a GPU whose earlier work is done."""
    if not cuda.is_available():
        pytest.skip("no GPU")
    module: ModuleType = pytest.importorskip("torch")
    module.cuda.synchronize()
    return module


class Bare:
    """A tensor of which only its interface is known."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__ | {"version": 3, "stream": None}


def filled(torch: ModuleType, value: float, n: int = 1 << 20) -> Any:
    return torch.full((n,), value, device="cuda")


def square(value: float) -> float:
    return float(fastops.mitchell_square(np.float32(value)))


def test_a_call_waits_for_the_stream_of_its_operands(torch: ModuleType) -> None:
    stream, a, y = torch.cuda.Stream(), filled(torch, 1.0), filled(torch, 0.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    a.fill_(3.0)
    cuda.mitchell_square(a, out=y, stream=stream)
    stream.synchronize()
    assert torch.all(y == square(3.0))


def test_a_call_goes_to_the_current_stream(torch: ModuleType) -> None:
    stream, a = torch.cuda.Stream(), filled(torch, 1.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        a.fill_(3.0)
        y = cuda.mitchell_square(a)
    stream.synchronize()
    assert torch.all(y == square(3.0))


def test_operands_stay_until_the_stream_is_done(torch: ModuleType) -> None:
    """torch would give their memory to the next tensor of its own stream."""
    stream, y = torch.cuda.Stream(), filled(torch, 0.0)
    a, lists = filled(torch, 3.0), [[filled(torch, 0.0)], [filled(torch, 4.0)]]
    shadow = lists[0][0]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
    cuda.mitchell_square(a, out=y, stream=stream)
    cuda.ema_update_(*lists, 0.5, stream=stream)
    del a, lists
    others = [filled(torch, 9.0) for _ in range(8)]
    stream.synchronize()
    assert torch.all(y == square(3.0))
    assert torch.all(shadow == 2.0)
    assert torch.all(others[0] == 9.0)


def test_memory_of_arrays_is_used_again(torch: ModuleType) -> None:
    """Ten times what the GPU has, on two streams by turns, with no wait of the host between."""
    n = 1 << 26
    a, streams = Bare(filled(torch, 3.0, n)), [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(0).total_memory
    made = cuda.mitchell_square(a, stream=streams[0])
    for i in range(10 * total // (4 * n)):
        made = cuda.mitchell_sqrt(cuda.mitchell_square(made, stream=streams[i % 2]), stream=streams[i % 2])
    assert isinstance(made, cuda.Array)
    torch.cuda.synchronize()
    y = torch.from_dlpack(made)
    assert bool(torch.all(y == y[0]))
    expected = fastops.mitchell_square(np.float32(3.0))
    for _ in range(10 * total // (4 * n)):
        expected = fastops.mitchell_sqrt(fastops.mitchell_square(expected))
    assert float(y[0]) == float(expected)


def test_a_graph_replays_its_calls(torch: ModuleType) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    a, b = (torch.randn(64, 64, device="cuda", generator=generator) for _ in range(2))
    shadows, params = [torch.zeros(64, device="cuda")], [torch.ones(64, device="cuda")]
    held = cuda.mitchell_square(Bare(b))
    stream = torch.cuda.Stream()
    drawn_in = torch.empty_like(a)

    def calls() -> list[Any]:
        cuda.ema_update_(shadows, params, 0.5)
        cuda.mitchell_square(a, out=drawn_in, stream=stream)
        return [
            cuda.mitchell_mul(a, b),
            cuda.mitchell_matmul(a, b),
            cuda.linear_attention(a, b, b, causal=True),
            cuda.mitchell_mul(a, held),
        ]

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls()
    for seed in (2, 3):
        a.copy_(torch.randn(64, 64, device="cuda", generator=generator.manual_seed(seed)))
        shadows[0].zero_()
        graph.replay()
        found = [x.clone() for x in (*results, drawn_in, shadows[0])]
        shadows[0].zero_()
        expected = [*calls(), drawn_in, shadows[0]]
        torch.cuda.synchronize()
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_a_graph_refuses_what_comes_from_host_memory(torch: ModuleType) -> None:
    """Before anything that would end its capture."""
    a, y = filled(torch, 3.0, 64), filled(torch, 0.0, 64)
    numbers = torch.ones(2, 2, device="cuda", dtype=torch.uint8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture"):
            cuda.lut_matmul(numbers, numbers, np.ones((256, 256), np.int32))
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture"):
            cuda.ema_update_([y], [a], 0.5)
        cuda.mitchell_square(a, out=y)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.all(y == square(3.0))
