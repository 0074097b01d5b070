# SPDX-License-Identifier: BSD-3-Clause
"""Two processes of gloo against one: averages and steps over shards, and linear attention over a sequence that is split."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("fastops.torch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)

BEGIN = """
import os, sys, warnings
import torch, torch.distributed as dist
import fastops, fastops.torch as ft
torch.set_num_threads(1)
rank, ranks = int(os.environ["RANK"]), 2
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=ranks)
torch.manual_seed(0)
"""
END = """
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def together(folder: pathlib.Path, code: str) -> None:
    """Runs a program in two ranks."""
    program = BEGIN + textwrap.dedent(code) + END
    env = {**os.environ, "STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    assert all(text.splitlines()[-1] == "done" for text in said)


@pytest.mark.parametrize("causal", [False, True])
def test_a_split_sequence_gives_the_rows_and_gradients_of_a_whole_one(tmp_path: pathlib.Path, causal: bool) -> None:
    together(
        tmp_path,
        f"""
        import itertools
        causal = {causal}
        for layout, feature_map in itertools.product(("bhnd", "bnhd"), ("elu", "exp", "softmax")):
            heads = (4, 2, 2)
            whole = [torch.randn(2, h, 11, d, dtype=torch.float64) * 3 for h, d in zip(heads, (3, 3, 2))]
            decay = -torch.rand(2, 2, 11, dtype=torch.float64) if causal and feature_map != "softmax" else None
            mask = torch.rand(2, 11) < 0.8
            if layout == "bnhd":
                whole = [x.transpose(1, 2).contiguous() for x in whole]
            axis = 2 if layout == "bhnd" else 1
            start, stop = ((0, 4), (4, 11))[rank]
            options = dict(causal=causal, layout=layout, feature_map=feature_map)
            mine = [x.narrow(axis, start, stop - start).clone().requires_grad_() for x in whole]
            part = None if decay is None else decay[..., start:stop]
            got = ft.distributed_linear_attention(*mine, decay=part, key_mask=mask[:, start:stop], return_state=causal, **options)
            whole = [x.requires_grad_() for x in whole]
            want = ft.linear_attention(*whole, decay=decay, key_mask=mask, return_state=causal, **options)
            if causal:
                (got, state), (want, last) = got, want
                if rank == 1:
                    for x, y in zip(state[:2], last[:2]):
                        scale = state[2] - last[2] if len(last) > 2 else torch.zeros_like(last[1])
                        x = x * torch.exp2(scale[..., None] if x.ndim > scale.ndim else scale)
                        torch.testing.assert_close(x, y)
            torch.testing.assert_close(got, want.narrow(axis, start, stop - start))
            dy = torch.randn(want.shape, dtype=want.dtype)
            got.backward(dy.narrow(axis, start, stop - start))
            want.backward(dy)
            for x, y in zip(mine, whole):
                torch.testing.assert_close(x.grad, y.grad.narrow(axis, start, stop - start))
        """,
    )


def test_ranks_send_states_and_not_keys(tmp_path: pathlib.Path) -> None:
    together(
        tmp_path,
        """
        sent = []
        gather = dist.all_gather
        dist.all_gather = lambda found, x, **options: (sent.append(x.numel()), gather(found, x, **options))
        for n in (8, 512):
            x = torch.randn(1, 3, n, 4, requires_grad=True)
            decay = torch.tensor([-0.1, -0.2, -0.3])
            ft.distributed_linear_attention(x, x, x, decay=decay).sum().backward()
        forward, backward = 3 * (4 * 4 + 2 * 4), 3 * (4 * 4 + 4)
        assert sent == [forward, backward] * 2, sent
        """,
    )


FSDP = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (2,))

def make():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))

whole, split = make(), make()
"""


def test_averages_of_shards_are_those_of_the_whole(tmp_path: pathlib.Path) -> None:
    together(
        tmp_path,
        FSDP
        + textwrap.dedent("""
        ema, average = ft.EMA(split, 0.75), ft.EMA(whole, 0.75)
        fully_shard(split, mesh=mesh)
        fully_shard(ema.module, mesh=mesh)
        for i in range(4):
            with torch.no_grad():
                for p, q in zip(whole.parameters(), split.parameters()):
                    p.add_(i + 1)
                    q.add_(i + 1)
            assert ema.update() and average.update()
        for p, q in zip(average.module.parameters(), ema.module.parameters()):
            assert type(q).__name__ == "DTensor" and q.to_local().numel() < p.numel()
            torch.testing.assert_close(q.full_tensor(), p)
        before = [q.full_tensor().clone() for q in split.parameters()]
        x = torch.randn(4, 5)
        with ema.average_parameters():
            torch.testing.assert_close(split(x), average.module(x))
        # Leaving forgets the averages that the forward pass gathered.
        torch.testing.assert_close(split(x), whole(x))
        split.reshard()
        for p, q in zip(before, split.parameters()):
            assert torch.equal(p, q.full_tensor())
        """),
    )


def test_steps_over_shards_are_those_of_the_whole(tmp_path: pathlib.Path) -> None:
    together(
        tmp_path,
        FSDP
        + textwrap.dedent("""
        fully_shard(split, mesh=mesh)
        pairs = [(m, ft.AdamW(m.parameters(), lr=0.05, ema_decay=0.75)) for m in (whole, split)]
        for i in range(4):
            x, y = torch.randn(8, 5), torch.randn(8, 3)
            for model, optimizer in pairs:
                # Every rank has half of the batch; their gradients are averaged.
                part = slice(4 * rank, 4 * rank + 4) if model is split else slice(None)
                loss = (model(x[part]) - y[part]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for p, q in zip(whole.parameters(), split.parameters()):
            torch.testing.assert_close(q.full_tensor(), p, rtol=1e-4, atol=1e-5)
            mine, other = pairs[1][1].state[q], pairs[0][1].state[p]
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                torch.testing.assert_close(mine[name].full_tensor(), other[name], rtol=1e-4, atol=1e-5)
        x = torch.randn(4, 5)
        with pairs[0][1].average_parameters(), pairs[1][1].average_parameters():
            torch.testing.assert_close(whole(x), split(x), rtol=1e-4, atol=1e-5)
            split.reshard()
        # The state is the one of torch's optimizer over the same shards.
        theirs = torch.optim.AdamW(split.parameters())
        theirs.load_state_dict(pairs[1][1].state_dict())
        theirs.step()
        """),
    )


def test_shards_that_lie_elsewhere_are_stepped(tmp_path: pathlib.Path) -> None:
    """As after a change of dtype and back, which leaves the parameters the objects that they were."""
    together(
        tmp_path,
        FSDP
        + textwrap.dedent("""
        theirs = make()
        pairs = []
        for model, kind in ((split, ft.AdamW), (theirs, torch.optim.AdamW)):
            fully_shard(model, mesh=mesh)
            pairs.append((model, kind(model.parameters(), lr=0.05)))
        for i in range(4):
            x = torch.randn(4, 5)
            for model, optimizer in pairs:
                if i == 2:
                    model.double().float()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        for p, q in zip(theirs.parameters(), split.parameters()):
            torch.testing.assert_close(q.full_tensor(), p.full_tensor(), rtol=1e-4, atol=1e-5)
        """),
    )


def test_a_call_without_a_group_is_named() -> None:
    import fastops.torch as ft

    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="called after init_process_group"):
        ft.distributed_linear_attention(x, x, x)
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        ft.distributed_linear_attention(x, x, x, scal=1.0)
