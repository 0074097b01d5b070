# SPDX-License-Identifier: BSD-3-Clause
"""The floating-point control register: the same after every call, and without influence on results."""

from __future__ import annotations

from child import run, unsanitized

CALLS = """
import ctypes
fp = ctypes.CDLL(sys.argv[1])
fp.fp_control.restype = fp.flush_bits.restype = fp.round_up_bits.restype = ctypes.c_uint64
fp.set_fp_control.argtypes = (ctypes.c_uint64,)
rng = np.random.default_rng(2)
def f(dtype, *shape):
    x = rng.standard_normal(shape)
    x.flat[::7] *= 2.0 ** -133 if dtype == np.float32 else 2.0 ** -1030 if dtype == np.float64 else 2.0 ** -16
    return x.astype(dtype)
a, b = f(np.float32, 200, 200), f(np.float32, 200, 200)
segmented = fastops.Multiplier("min-mse", segments=4)
flushing = fastops.Multiplier(subnormals="flush")
iterative = fastops.Multiplier(corrections=1)
table = fastops.Multiplier().table(8)
u8 = rng.integers(0, 256, (60, 60), dtype=np.uint8)
x, w = f(np.float32, 2, 3, 9, 9), f(np.float32, 4, 3, 3, 3)
dy = f(np.float32, 2, 4, 7, 7)
long = f(np.float32, 300_000)
UNARY = ["square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2"]
CALLS = {
    "matmul": lambda: fastops.mitchell_matmul(a, b),
    "matmul, segments": lambda: fastops.mitchell_matmul(a, b, multiplier=segmented),
    "matmul, iterative": lambda: fastops.mitchell_matmul(a, b, multiplier=iterative),
    "matmul_grad": lambda: fastops.mitchell_matmul_grad(a, b, a),
    "conv2d": lambda: fastops.mitchell_conv2d(x, w),
    "conv2d_grad": lambda: fastops.mitchell_conv2d_grad(x, w, dy),
    "lut_matmul": lambda: fastops.lut_matmul(u8, u8, table),
    "mul_grad": lambda: fastops.mitchell_mul_grad(a, b, a),
    "div_grad": lambda: fastops.mitchell_div_grad(a, b, a, mode="mimic"),
    "ste": lambda: fastops.mitchell_mul_grad(a, b, a, mode="ste"),
    "long mul": lambda: fastops.mitchell_mul(long, long),
    "reduce": lambda: fastops.mitchell_mul.reduce(a, axis=0),
}
# Their features, exponentials and sums leave the subnormal numbers of the operands alone.
rows = f(np.float32, 1, 3, 200, 16)
decay = -abs(f(np.float32, 1, 3, 200))
for feature_map in ("elu", "relu2", "exp", "softmax", "cosine"):
    CALLS[f"linear attention, {feature_map}"] = lambda m=feature_map: fastops.linear_attention(
        rows, rows, rows, causal=m != "exp", feature_map=m)
CALLS["linear attention, decay"] = lambda: fastops.linear_attention(rows, rows, rows, causal=True, decay=decay)
CALLS["linear attention, backward"] = lambda: fastops.linear_attention_backward(rows, rows, rows, rows, rows, causal=True)
for pinv in ("newton", "ridge"):
    of = {"num_landmarks": 12, "pinv": pinv}
    CALLS[f"nystrom attention, {pinv}"] = lambda of=of: fastops.nystrom_attention(rows, rows, rows, **of)
    CALLS[f"nystrom attention, {pinv}, backward"] = lambda of=of: fastops.nystrom_attention_backward(
        rows, rows, rows, rows, **of)
many = f(np.float32, 1, 1, 900, 4)
tiny = many * np.float32(1e-43)
CALLS["nystrom attention of tiny values"] = lambda: fastops.nystrom_attention(many, many, tiny, num_landmarks=8)
CALLS["softmax attention"] = lambda: fastops.softmax_attention(rows, rows, rows, causal=True)
for dtype in (np.float16, np.float32, np.float64):
    p, q = f(dtype, 333), f(dtype, 333)
    for multiplier in (fastops.Multiplier(), segmented, flushing):
        CALLS[f"mul {dtype} {multiplier}"] = lambda p=p, q=q, m=multiplier: m.mul(p, q)
        CALLS[f"div {dtype} {multiplier}"] = lambda p=p, q=q, m=multiplier: m.div(p, q)
    for name in UNARY:
        CALLS[f"{name} {dtype}"] = lambda p=p, name=name: getattr(fastops, "mitchell_" + name)(p)
    CALLS[f"matmul {dtype}"] = lambda p=p, q=q: fastops.mitchell_matmul(p[:330].reshape(11, 30), q[:330].reshape(30, 11))
def results():
    out = {}
    with np.errstate(all="ignore"):
        for name, call in CALLS.items():
            r = call()
            out[name] = [np.array(part) for part in (r if isinstance(r, tuple) else (r,))]
    return out
def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and ((x.view(np.uint8) == y.view(np.uint8)).all()
        if x.dtype.kind in "iu" else bool(((x == y) & (np.signbit(x) == np.signbit(y)) | (x != x) & (y != y)).all()))
"""


@unsanitized
def test_control_register_is_left_alone(fp_control: str, target: str) -> None:
    code = """
    usual = fp.fp_control()
    for threads in (1, 3):
        fastops.set_num_threads(threads)
        for bits in (0, fp.flush_bits(), fp.round_up_bits()):
            for name, call in CALLS.items():
                with np.errstate(all="ignore"):
                    fp.set_fp_control(usual | bits)
                    try:
                        call()
                        after = fp.fp_control()
                    finally:
                        fp.set_fp_control(usual)
                assert after == usual | bits, (name, hex(usual | bits), hex(after))
    """
    run(CALLS, code, arguments=[fp_control], env=_env(target))


@unsanitized
def test_results_do_not_depend_on_the_callers_control_register(fp_control: str, target: str) -> None:
    """A library linked with -ffast-math has set flush-to-zero: the results are still those of the documentation.

    Nor do they follow its rounding mode, short arrays as little as long ones that threads share.
    """
    code = """
    usual = fp.fp_control()
    for threads in (1, 3):
        fastops.set_num_threads(threads)
        want = results()
        for bits in (fp.flush_bits(), fp.round_up_bits()):
            fp.set_fp_control(usual | bits)
            try:
                got = results()
            finally:
                fp.set_fp_control(usual)
            bad = [name for name in want if not all(same(g, v) for g, v in zip(got[name], want[name]))]
            assert not bad, (hex(bits), threads, bad)
    """
    run(CALLS, code, arguments=[fp_control], env=_env(target))


@unsanitized
def test_elementwise_results_of_any_length_do_not_depend_on_the_register(fp_control: str, target: str) -> None:
    """Long arrays, which threads share, and short ones, where results are subnormal and there is something to round."""
    code = """
    usual = fp.fp_control()
    n, short = 1_200_000, 40_000
    calls = {}
    for dtype in (np.float16, np.float32, np.float64):
        small = np.ldexp(rng.uniform(1, 2, n), np.finfo(dtype).minexp + rng.integers(-5, 3, n)).astype(dtype)
        part = rng.uniform(0.25, 1, n).astype(dtype)
        for m in (fastops.Multiplier(), fastops.Multiplier(0.25), iterative, segmented):
            calls[f"mul {dtype} {m}"] = lambda s, x=small, y=part, m=m: m.mul(x[s], y[s])
            if hasattr(m, "div"):
                calls[f"div {dtype} {m}"] = lambda s, x=small, y=part, m=m: m.div(x[s], y[s] * 8)
        calls[f"log2 {dtype}"] = lambda s, y=part: fastops.mitchell_log2(y[s])
        calls[f"exp2 {dtype}"] = lambda s, y=part: fastops.mitchell_exp2(y[s])
        calls[f"mul_grad {dtype}"] = lambda s, x=small, y=part: np.stack(fastops.mitchell_mul_grad(y[s], x[s], y[s]))[0]
    for name, call in calls.items():
        want = call(slice(None))
        for bits in (fp.flush_bits(), fp.round_up_bits(), fp.flush_bits() | fp.round_up_bits()):
            for threads in (1, 3):
                fastops.set_num_threads(threads)
                with np.errstate(all="ignore"):
                    fp.set_fp_control(usual | bits)
                    try:
                        long = call(slice(None))
                        parts = [call(slice(i, i + short)) for i in range(0, n, short)]
                        after = fp.fp_control()
                    finally:
                        fp.set_fp_control(usual)
                assert after == usual | bits, (name, hex(bits), hex(after))
                assert same(long, want), (name, hex(bits), threads)
                assert same(np.concatenate(parts), want), (name, hex(bits), "short")
    assert pool_threads(2) == 2
    """
    run(CALLS, code, arguments=[fp_control], env=_env(target), timeout=120)


@unsanitized
def test_constants_are_rounded_to_nearest_whatever_the_register_says(fp_control: str, target: str) -> None:
    code = """
    usual = fp.fp_control()
    constants = [k / 1009 for k in range(1, 500, 17)]
    one = np.ones(1, np.float32)
    fp.set_fp_control(usual | fp.round_up_bits())
    try:
        got = [fastops.Multiplier(c).mul(one, one)[0] for c in constants]
    finally:
        fp.set_fp_control(usual)
    assert got == [np.float32(1 + round(c * 2**23) / 2**23) for c in constants], got
    """
    run(CALLS, code, arguments=[fp_control], env=_env(target))


def test_status_flags_do_not_depend_on_the_length(target: str) -> None:
    """np.errstate answers alike whether one thread did the work or many."""
    code = """
    fastops.set_num_threads(4)
    for n in (5, 1000, 100_000, 3_000_000):
        quiet = np.full(n, 1.5, np.float32)
        with np.errstate(all="raise"):
            fastops.mitchell_mul(quiet, quiet)
            fastops.mitchell_div(quiet, quiet)
        for place in (0, n // 2, n - 1):
            for f, left, right, kind in (
                (fastops.mitchell_mul, 3e38, 3e38, "over"),
                (fastops.mitchell_mul, np.inf, 0.0, "invalid"),
                (fastops.mitchell_div, 1.0, 0.0, "divide"),
            ):
                a, b = quiet.copy(), quiet.copy()
                a[place], b[place] = left, right
                try:
                    with np.errstate(all="ignore", **{kind: "raise"}):
                        f(a, b)
                except FloatingPointError:
                    continue
                raise AssertionError((n, place, kind))
    """
    run(code, env=_env(target))


def _env(target: str) -> dict[str, str]:
    return {"FASTOPS_TARGET": target} if target != "-" else {}
