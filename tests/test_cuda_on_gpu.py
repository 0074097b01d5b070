# SPDX-License-Identifier: BSD-3-Clause
"""What the shim cannot show of fastops.cuda: streams that run beside one another, graphs that replay, and memory that is used again."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastops
from fastops import cuda
from fastops.cuda import _runtime

pytestmark = pytest.mark.gpu
# Cycles: long enough that what waits for nothing comes first.
LONG = 200_000_000


@pytest.fixture
def torch() -> ModuleType:
    """torch, with a GPU that has loaded the kernels and pinned memory: the first call of each may wait for the device."""
    if not cuda.is_available():
        pytest.skip("no GPU")
    module: ModuleType = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    a, y = filled(module, 1.0), filled(module, 0.0)
    cuda.mitchell_square(a, out=y)
    cuda.mitchell_sqrt(cuda.mitchell_square(Bare(a)))
    for _ in range(2):
        # Both parts of a table find pinned memory from here on.
        module.cuda._sleep(LONG // 10)
        cuda.ema_update_([y], [a], 0.5)
        _runtime.module().forget_plans()
    module.cuda.synchronize()
    return module


class Bare:
    """A tensor of which only its interface is known."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__ | {"version": 3, "stream": None}


def filled(torch: ModuleType, value: float, n: int = 1 << 20) -> Any:
    return torch.full((n,), value, device="cuda")


def warm(torch: ModuleType, stream: Any) -> None:
    """torch has memory for tensors of this stream, and need not ask the device for it."""
    with torch.cuda.stream(stream):
        tensors = [filled(torch, 0.0) for _ in range(16)]
    torch.cuda.synchronize()
    del tensors


def square(value: float) -> float:
    return float(fastops.mitchell_square(np.float32(value)))


def test_a_call_waits_for_the_stream_of_its_operands(torch: ModuleType) -> None:
    stream, a, y = torch.cuda.Stream(), filled(torch, 1.0), filled(torch, 0.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    a.fill_(3.0)
    cuda.mitchell_square(a, out=y, stream=stream)
    assert not torch.cuda.current_stream().query(), "the host has waited, so that nothing was shown"
    stream.synchronize()
    assert torch.all(y == square(3.0))


def test_a_call_goes_to_the_current_stream(torch: ModuleType) -> None:
    stream, a = torch.cuda.Stream(), filled(torch, 1.0)
    warm(torch, stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        a.fill_(3.0)
        y = cuda.mitchell_square(a)
    assert not stream.query(), "the host has waited, so that nothing was shown"
    stream.synchronize()
    assert torch.all(y == square(3.0))


def test_operands_and_results_stay_until_the_stream_is_done(torch: ModuleType) -> None:
    """torch would give their memory to the next tensors of its own stream, which would be written."""
    stream, y = torch.cuda.Stream(), filled(torch, 0.0)
    a, gone, shadow, param = filled(torch, 3.0), filled(torch, 0.0), filled(torch, 0.0), filled(torch, 4.0)
    warm(torch, torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
    cuda.mitchell_square(a, out=y, stream=stream)
    cuda.mitchell_square(a, out=gone, stream=stream)
    cuda.mitchell_square(a, stream=stream)
    cuda.ema_update_([shadow], [param], 0.5, stream=stream)
    del a, gone, param
    others = [filled(torch, 9.0) for _ in range(8)]
    assert not stream.query(), "the host has waited, so that nothing was shown"
    stream.synchronize()
    assert torch.all(y == square(3.0))
    assert torch.all(shadow == 2.0)
    torch.cuda.synchronize()
    assert all(bool(torch.all(x == 9.0)) for x in others)


def test_memory_of_arrays_is_used_again(torch: ModuleType) -> None:
    """Twenty times what the GPU has, on two streams that share its pool, with no wait of the host between."""
    n, values = 1 << 26, (3.0, 5.0)
    rounds = 5 * torch.cuda.get_device_properties(0).total_memory // (4 * n)
    streams = [torch.cuda.Stream() for _ in values]
    starts = [Bare(filled(torch, value, n)) for value in values]
    torch.cuda.synchronize()
    made = [cuda.mitchell_square(x, stream=s) for x, s in zip(starts, streams, strict=True)]
    for _ in range(rounds):
        made = [
            cuda.mitchell_sqrt(cuda.mitchell_square(x, stream=s), stream=s) for x, s in zip(made, streams, strict=True)
        ]
    assert all(isinstance(x, cuda.Array) for x in made)
    torch.cuda.synchronize()
    for x, value in zip(made, values, strict=True):
        expected = fastops.mitchell_square(np.float32(value))
        for _ in range(rounds):
            expected = fastops.mitchell_sqrt(fastops.mitchell_square(expected))
        assert bool(torch.all(torch.from_dlpack(x) == float(expected)))


def test_a_graph_replays_its_calls(torch: ModuleType) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    a, b = (torch.randn(64, 64, device="cuda", generator=generator) for _ in range(2))
    shadows, params = [torch.zeros(64, device="cuda")], [torch.ones(64, device="cuda")]
    held = cuda.mitchell_square(Bare(b))
    stream = torch.cuda.Stream()
    forked = [torch.empty_like(a) for _ in range(2)]

    def calls() -> list[Any]:
        cuda.ema_update_(shadows, params, 0.5)
        stream.wait_stream(torch.cuda.current_stream())
        for out in forked:
            cuda.mitchell_square(a, out=out, stream=stream)
        torch.cuda.current_stream().wait_stream(stream)
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
        found = [x.clone() for x in (*results, *forked, shadows[0])]
        shadows[0].zero_()
        expected = [*calls(), *forked, shadows[0]]
        torch.cuda.synchronize()
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_a_graph_refuses_what_it_cannot_have(torch: ModuleType) -> None:
    """Before anything that would end its capture."""
    a, y = filled(torch, 3.0, 64), filled(torch, 0.0, 64)
    numbers = torch.ones(2, 2, device="cuda", dtype=torch.uint8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture tables"):
            cuda.lut_matmul(numbers, numbers, np.ones((256, 256), np.int32))
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture a call whose list"):
            cuda.ema_update_([y], [a], 0.5)
        for stream in (0, torch.cuda.Stream()):
            with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture a call on a stream outside of them"):
                cuda.mitchell_square(a, out=y, stream=stream)
        cuda.mitchell_square(a, out=y)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.all(y == square(3.0))
