# SPDX-License-Identifier: BSD-3-Clause
"""The GPU kernels against torch's, and flash-linear-attention's where it is installed: `python bench/bench_cuda.py`, some minutes. Every row is checked before it is timed.

Prints, for each case, the median of interleaved rounds timed by events on the stream, the ratio to torch's, and the share of what
limits it: the bandwidth of a copy, or the issue rate of a product's two instructions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import fastops
from fastops import cuda

try:
    import torch
except ImportError:
    sys.exit("bench_cuda needs torch with CUDA")


def milliseconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each, host and device together, one after another in every round with cold caches."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            flush.zero_()
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


class Report:
    """Rows as they come, printed and kept."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, case: str, times: dict[str, float], *, bytes_moved: float = 0, bandwidth: float = 0, share: Any = None
    ) -> None:
        ours = times["fastops"]
        row: dict[str, Any] = {"case": case, **{f"{name} ms": t for name, t in times.items()}}
        for name, t in times.items():
            if name != "fastops":
                row[f"speed against {name}"] = t / ours
        if bandwidth:
            row["share of copy bandwidth"] = bytes_moved / ours / 1e6 / bandwidth
        if share is not None:
            row["share of the bound"] = share(ours)
        self.rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)


def same_bits(got: Any, want: Any) -> None:
    """Checks a row: one nan is as good as another."""
    x, y = got.cpu().numpy(), np.asarray(want)
    assert ((x == y) | (np.isnan(x) & np.isnan(y))).all(), "wrong result"


def copy_bandwidth(rounds: int) -> float:
    """GB/s of reading and writing, as torch's copy has it."""
    x = torch.empty(2**28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds({"copy": lambda: y.copy_(x)}, rounds)["copy"] / 1e6


def elementwise(report: Report, bandwidth: float, rounds: int) -> None:
    """One large tensor."""
    n = 2**27
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        a = (torch.rand(n, device="cuda") + 0.5).to(dtype)
        b = (torch.rand(n, device="cuda") + 0.5).to(dtype)
        out = torch.empty_like(a)
        cuda.mitchell_mul(a, b, out=out)
        if dtype is not torch.bfloat16:
            same_bits(out[:100_000], fastops.mitchell_mul(a[:100_000].cpu().numpy(), b[:100_000].cpu().numpy()))
        times = milliseconds(
            {"fastops": lambda: cuda.mitchell_mul(a, b, out=out), "torch.mul": lambda: torch.mul(a, b, out=out)}, rounds
        )
        report.add(f"mitchell_mul {dtype} {n}", times, bytes_moved=3 * a.nbytes, bandwidth=bandwidth)
        times = milliseconds(
            {"fastops": lambda: cuda.mitchell_log2(a, out=out), "torch.log2": lambda: torch.log2(a, out=out)}, rounds
        )
        report.add(f"mitchell_log2 {dtype} {n}", times, bytes_moved=2 * a.nbytes, bandwidth=bandwidth)


def product_rate() -> float:
    """Terms a second: an addition and a multiply-add for each, at 128 instructions a cycle and multiprocessor."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or torch.cuda.clock_rate() * 1e6
    return float(properties.multi_processor_count * 64 * clock)


def products(report: Report, rounds: int) -> None:
    """Matrix products."""
    bound = product_rate()
    torch.backends.cuda.matmul.allow_tf32 = False
    for n in (512, 1024, 4096, 8192):
        a, b = torch.randn(n, n, device="cuda"), torch.randn(n, n, device="cuda")
        out = torch.empty_like(a)
        cuda.mitchell_matmul(a, b, out=out)
        want = fastops.mitchell_matmul(a[:4].cpu().numpy(), b.cpu().numpy())
        assert np.allclose(out[:4].cpu().numpy(), want, rtol=1e-3, atol=1e-3 * n**0.5), "wrong result"
        times = milliseconds(
            {
                "fastops": lambda: cuda.mitchell_matmul(a, b, out=out),
                "torch.mm (exact, no TF32)": lambda: torch.mm(a, b, out=out),
            },
            rounds,
        )
        report.add(f"mitchell_matmul float32 {n}", times, share=lambda t, n=n: n**3 / (t * 1e-3) / bound)
    table = fastops.Multiplier().table(8)
    for n in (1024, 4096):
        x = torch.randint(0, 256, (n, n), dtype=torch.uint8, device="cuda")
        out = torch.empty(n, n, dtype=torch.int32, device="cuda")
        report.add(f"lut_matmul {n}", milliseconds({"fastops": lambda: cuda.lut_matmul(x, x, table, out=out)}, rounds))


def gradients(report: Report, bandwidth: float, rounds: int) -> None:
    """Those of products, element by element and of matrices."""
    n = 2**26
    a, b, dy = (torch.rand(n, device="cuda") + 0.5 for _ in range(3))
    for mode in ("exact", "ste", "mimic"):
        found = cuda.mitchell_mul_grad(a, b, dy, mode=mode)
        host = [x[:100_000].cpu().numpy() for x in (a, b, dy)]
        for got, want in zip(found, fastops.mitchell_mul_grad(*host, mode=mode), strict=True):
            same_bits(got[:100_000], want)
        times = milliseconds(
            {
                "fastops": lambda: cuda.mitchell_mul_grad(a, b, dy, mode=mode),
                "torch.mul (exact products)": lambda: (torch.mul(dy, b), torch.mul(dy, a)),
            },
            rounds,
        )
        report.add(f"mitchell_mul_grad {mode} float32 {n}", times, bytes_moved=5 * a.nbytes, bandwidth=bandwidth)
    for n in (1024, 4096):
        a, b, dy = (torch.randn(n, n, device="cuda") for _ in range(3))
        for mode in ("exact", "ste", "mimic"):
            da, _ = cuda.mitchell_matmul_grad(a, b, dy, mode=mode)
            want, _ = fastops.mitchell_matmul_grad(
                a[:4].cpu().numpy(), b.cpu().numpy(), dy[:4].cpu().numpy(), mode=mode
            )
            assert np.allclose(da[:4].cpu().numpy(), want, rtol=1e-3, atol=1e-3 * n**0.5), "wrong result"
            times = milliseconds(
                {
                    "fastops": lambda: cuda.mitchell_matmul_grad(a, b, dy, mode=mode),
                    "torch.mm (exact, no TF32)": lambda: (torch.mm(dy, b.T), torch.mm(a.T, dy)),
                },
                rounds,
            )
            # Exact slopes take three instructions a term.
            most = product_rate() * (2 / 3 if mode == "exact" else 1)
            report.add(
                f"mitchell_matmul_grad {mode} float32 {n}",
                times,
                share=lambda t, n=n, most=most: 2 * n**3 / (t * 1e-3) / most,
            )


# Images, kernels and strides: of a residual network, then depthwise of MobileNet, EfficientNet and ConvNeXt.
CONVOLUTIONS = (
    ((32, 64, 56, 56), (64, 64, 3, 3), 1),
    ((32, 128, 28, 28), (256, 128, 3, 3), 2),
    ((32, 256, 14, 14), (1024, 256, 1, 1), 1),
    ((32, 3, 224, 224), (64, 3, 7, 7), 2),
    ((32, 32, 112, 112), (32, 1, 3, 3), 1),
    ((32, 144, 56, 56), (144, 1, 3, 3), 2),
    ((32, 672, 14, 14), (672, 1, 5, 5), 1),
    ((32, 192, 28, 28), (192, 1, 7, 7), 1),
)


def convolutions(report: Report, bandwidth: float, rounds: int) -> None:
    """Images of networks, forward and with both gradients."""
    torch.backends.cudnn.allow_tf32 = False
    for x_shape, w_shape, stride in CONVOLUTIONS:
        padding = w_shape[-1] // 2
        x, w = torch.randn(x_shape, device="cuda"), torch.randn(w_shape, device="cuda")
        groups = x_shape[1] // w_shape[1]
        options = {"stride": stride, "padding": padding, "groups": groups}
        y = cuda.mitchell_conv2d(x, w, **options)
        dy = torch.randn_like(y)
        few = [t[:1].cpu().numpy() for t in (x, dy)]
        kernels = w.cpu().numpy()
        terms = w[0].numel()
        want = fastops.mitchell_conv2d(few[0], kernels, **options)
        assert np.allclose(y[:1].cpu().numpy(), want, rtol=1e-3, atol=1e-3 * terms**0.5), "wrong result"
        for got, exact in zip(
            cuda.mitchell_conv2d_grad(x[:1], w, dy[:1], **options),
            fastops.mitchell_conv2d_grad(few[0], kernels, few[1], **options),
            strict=True,
        ):
            size = np.abs(exact).max()
            assert np.allclose(got.cpu().numpy(), exact, rtol=1e-3, atol=1e-4 * size), "wrong gradient"
        products_made = y.numel() * terms
        name = f"mitchell_conv2d float32 {x_shape} * {w_shape}, stride {stride}"
        times = milliseconds(
            {
                "fastops": lambda: cuda.mitchell_conv2d(x, w, out=y, **options),
                "torch conv2d (exact, no TF32)": lambda: torch.nn.functional.conv2d(x, w, **options),
            },
            rounds,
        )
        # Few products for each pixel: reading and writing them is the limit of depthwise convolutions.
        moved = {"bytes_moved": x.nbytes + y.nbytes, "bandwidth": bandwidth} if groups > 1 else {}
        report.add(name, times, share=lambda t, n=products_made: n / (t * 1e-3) / product_rate(), **moved)
        for mode in ("exact", "ste", "mimic"):
            times = milliseconds(
                {
                    "fastops": lambda: cuda.mitchell_conv2d_grad(x, w, dy, **options, mode=mode),
                    "torch (exact, no TF32)": lambda: (
                        torch.nn.grad.conv2d_input(x.shape, w, dy, **options),
                        torch.nn.grad.conv2d_weight(x, w.shape, dy, **options),
                    ),
                },
                rounds,
            )
            most = product_rate() * (2 / 3 if mode == "exact" else 1)
            report.add(
                f"{name}, gradients, {mode}",
                times,
                share=lambda t, n=products_made, most=most: 2 * n / (t * 1e-3) / most,
            )


def lists(report: Report, bandwidth: float, rounds: int) -> None:
    """Many small tensors, and one large one."""
    rng = np.random.default_rng(0)
    sizes = [int(x) for x in rng.lognormal(7, 1.5, 5000)]
    for name, shapes in (("5000 tensors", sizes), ("one tensor", [2**28])):
        made = [[torch.randn(n, device="cuda") for n in shapes] for _ in range(2)]
        shadows, params = made
        want = torch.lerp(shadows[0], params[0], 0.001)
        fixed = [cuda.TensorList(x, verify=False) for x in made]
        read = [cuda.TensorList(x) for x in made]
        cuda.ema_update_(*fixed, 0.999)
        same_bits(shadows[0], want.cpu().numpy())
        times = milliseconds(
            {
                "fastops": lambda: cuda.ema_update_(*fixed, 0.999),
                "fastops, lists read in each call": lambda: cuda.ema_update_(*read, 0.999),
                "torch._foreach_lerp_": lambda: torch._foreach_lerp_(shadows, params, 0.001),
            },
            rounds,
        )
        report.add(f"ema_update_ float32 {name}", times, bytes_moved=12 * sum(shapes), bandwidth=bandwidth)
        grads, moments, squares = ([torch.rand(n, device="cuda") for n in shapes] for _ in range(3))
        p, g, m, v = (cuda.TensorList(x, verify=False) for x in (params, grads, moments, squares))
        leaves = [torch.nn.Parameter(x.clone()) for x in params]
        for leaf, gradient in zip(leaves, grads, strict=True):
            leaf.grad = gradient
        fused = torch.optim.AdamW(leaves, lr=1e-3, fused=True)
        times = milliseconds(
            {
                "fastops": lambda: cuda.adamw_step_(p, g, m, v, step=3, lr=1e-3, weight_decay=0.01),
                "torch AdamW(fused)": fused.step,
            },
            rounds,
        )
        report.add(f"adamw_step_ float32 {name}", times, bytes_moved=28 * sum(shapes), bandwidth=bandwidth)


def torch_chunks(q: Any, k: Any, v: Any) -> Any:
    """Causal linear attention of elu + 1 by torch's own products, in chunks of 64 tokens."""
    b, h, n = q.shape[:3]
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    q, k, v = (x.reshape(b, h, n // 64, 64, -1) for x in (q, k, v))
    sums, ones = k.transpose(-1, -2) @ v, k.sum(-2)
    before = sums.cumsum(2) - sums
    before_z = ones.cumsum(2) - ones
    weights = (q @ k.transpose(-1, -2)).tril()
    total = weights.sum(-1, keepdim=True) + q @ before_z.unsqueeze(-1)
    return ((weights @ v + q @ before) / total).reshape(b, h, n, -1)


def fla_chunks() -> Callable[..., Any] | None:
    """flash-linear-attention's kernel, heads second as ours; None where it is not installed."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return None

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        found = chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0, normalize=True)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


def attention(report: Report, bandwidth: float, rounds: int) -> None:
    """Causal linear attention, forward, with its gradient, and token by token."""
    fla = fla_chunks()
    if fla is None:
        print("flash-linear-attention is not installed: no rows of it")
    for shape in ((1, 16, 8192, 64), (8, 16, 1024, 64), (1, 16, 8192, 128), (1, 1, 131072, 64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
            y = cuda.linear_attention(q, k, v, causal=True)
            dy = torch.randn_like(y)
            host = [x[:1, :1].float().cpu().numpy() for x in (q, k, v, y)]
            off = np.abs(fastops.linear_attention(*host[:3], causal=True) - host[3]).max()
            assert off <= (4e-6 if dtype is torch.float32 else 5e-2) * np.abs(host[2]).max(), "wrong result"
            functions: dict[str, Callable[[], Any]] = {
                "fastops": lambda: cuda.linear_attention(q, k, v, causal=True),
                "torch in chunks": lambda: torch_chunks(q, k, v),
            }
            if dtype is torch.float32:
                fast = cuda.linear_attention(q, k, v, causal=True, tf32=True)
                # Three bits of fraction more than bfloat16's.
                assert (fast - y).abs().max() <= 5e-2 / 8 * v.abs().max(), "wrong result in TF32"
                functions["fastops in TF32"] = lambda: cuda.linear_attention(q, k, v, causal=True, tf32=True)
            if shape[2] <= 8192:
                functions["torch SDPA (softmax)"] = lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True
                )
            if fla is not None:
                functions["fla"] = lambda: fla(q, k, v)
            moved = 4 * q.nbytes
            report.add(
                f"linear_attention {dtype} {shape}",
                milliseconds(functions, rounds),
                bytes_moved=moved,
                bandwidth=bandwidth,
            )
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

            def with_gradient(attend: Callable[..., Any]) -> Any:
                return torch.autograd.grad(attend(*leaves), leaves, dy)

            functions = {
                "fastops": lambda: cuda.linear_attention_backward(
                    dy, q, k, v, cuda.linear_attention(q, k, v, causal=True), causal=True
                ),
                "torch in chunks": lambda: with_gradient(torch_chunks),
            }
            if fla is not None:
                functions["fla"] = lambda: with_gradient(fla)
            report.add(f"linear_attention with gradient {dtype} {shape}", milliseconds(functions, rounds))
    for b, h, d in ((1, 8, 64), (32, 32, 128)):
        x = torch.randn(b, h, d, device="cuda")
        state = torch.zeros(b, h, d, d, device="cuda"), torch.zeros(b, h, d, device="cuda")
        report.add(
            f"linear_attention_step_ float32 {(b, h, d)}",
            milliseconds({"fastops": lambda: cuda.linear_attention_step_(x, x, x, state)}, rounds),
            bytes_moved=8 * b * h * d * (d + 1),
            bandwidth=bandwidth,
        )


def torch_nystrom(q: Any, k: Any, v: Any, m: int) -> Any:
    """Nystrom attention by torch's own products, in float32 between landmarks."""
    scale = q.shape[-1] ** -0.5
    qt, kt = (x.float().unflatten(2, (m, -1)).mean(3) for x in (q, k))
    a = torch.softmax(scale * (qt @ kt.mT), -1)
    z = a.mT / (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[..., None, None]
    one = torch.eye(m, device=q.device)
    for _ in range(6):
        x = a @ z
        z = z @ (13 * one - x @ (15 * one - x @ (7 * one - x))) / 4
    b = torch.softmax(scale * (qt.to(q.dtype) @ k.mT), -1) @ v
    return torch.softmax(scale * (q @ kt.to(q.dtype).mT), -1) @ (z @ b.float()).to(q.dtype)


def nystrom(report: Report, rounds: int) -> None:
    """Nystrom attention, forward and with its gradient."""
    for shape, m in (
        ((1, 16, 1024, 64), 64),
        ((1, 16, 8192, 64), 64),
        ((8, 16, 1024, 64), 64),
        ((1, 16, 8192, 64), 128),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
            y = cuda.nystrom_attention(q, k, v, num_landmarks=m)
            dy = torch.randn_like(y)
            host = [x[:1, :1].float().cpu().numpy() for x in (q, k, v, y)]
            off = np.linalg.norm(fastops.nystrom_attention(*host[:3], num_landmarks=m) - host[3])
            assert off <= (4e-6 if dtype is torch.float32 else 6e-3) * np.linalg.norm(host[3]), "wrong result"
            functions: dict[str, Callable[[], Any]] = {
                "fastops": lambda: cuda.nystrom_attention(q, k, v, num_landmarks=m),
                "torch P1 (Z (P3 V))": lambda: torch_nystrom(q, k, v, m),
                "torch SDPA (softmax)": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
            }
            if dtype is torch.float32:
                fast = cuda.nystrom_attention(q, k, v, num_landmarks=m, tf32=True)
                assert torch.linalg.norm(fast - y) <= 2e-3 * torch.linalg.norm(y), "wrong result in TF32"
                functions["fastops in TF32"] = lambda: cuda.nystrom_attention(q, k, v, num_landmarks=m, tf32=True)
            report.add(f"nystrom_attention m{m} {dtype} {shape}", milliseconds(functions, rounds))
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

            def forward_and_backward() -> None:
                cuda.nystrom_attention(q, k, v, num_landmarks=m)
                cuda.nystrom_attention_backward(dy, q, k, v, num_landmarks=m)

            functions = {
                "fastops": forward_and_backward,
                "torch P1 (Z (P3 V))": lambda: torch.autograd.grad(torch_nystrom(*leaves, m), leaves, dy),
            }
            report.add(f"nystrom_attention with gradient m{m} {dtype} {shape}", milliseconds(functions, rounds))


def main() -> None:
    """The whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="a file for the rows")
    options = parser.parse_args()
    if not cuda.is_available() or not torch.cuda.is_available():
        sys.exit("bench_cuda needs a GPU that fastops and torch can use")
    print(torch.cuda.get_device_name(0), "torch", torch.__version__, "fastops", fastops.__version__)
    bandwidth = copy_bandwidth(options.rounds)
    print(f"copy bandwidth {bandwidth:.0f} GB/s")
    report = Report()
    elementwise(report, bandwidth, options.rounds)
    products(report, options.rounds)
    gradients(report, bandwidth, options.rounds)
    convolutions(report, bandwidth, options.rounds)
    lists(report, bandwidth, options.rounds)
    attention(report, bandwidth, options.rounds)
    nystrom(report, options.rounds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(0), "copy GB/s": bandwidth, "rows": report.rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
