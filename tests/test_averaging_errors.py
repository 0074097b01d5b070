# SPDX-License-Identifier: BSD-3-Clause
"""`EMA` and `posthoc_ema_weights`: targets that cannot be written, and wrong calls in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastops.averaging import EMA, posthoc_ema_weights

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("over_backend")


class _Frozen:
    """Targets that cannot be written, the last of them for the reason named."""

    @staticmethod
    def read_only() -> list[Array]:
        b = np.zeros(2)
        b.flags.writeable = False
        return [np.zeros(2), b]

    @staticmethod
    def overlapping() -> list[Array]:
        base = np.zeros(3)
        return [base[:2], base[1:]]

    @staticmethod
    def folded() -> list[Array]:
        return [np.zeros(2), np.lib.stride_tricks.as_strided(np.zeros(1), (2,), (0,))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_Frozen.read_only, "params[1] must be writable, got a read-only array"),
        (_Frozen.overlapping, "params[1] must be memory apart from params[0], got arrays that overlap"),
        (_Frozen.folded, "params[1] must be an array whose elements are all distinct in memory"),
    ],
)
def test_targets_that_cannot_be_written_stop_everything(make: Callable[[], list[Array]], text: str) -> None:
    source = EMA([np.full(2, 5.0), np.full(2, 5.0)], 0.5)
    targets = make()
    with pytest.raises(ValueError) as caught:
        source.copy_to_(targets)
    assert text in str(caught.value)
    assert not any(target.any() for target in targets)
    # The same arrays as parameters: following them is fine, writing there is not.
    ema = EMA(targets, 0.5, debias=True)
    assert ema.update()
    with pytest.raises(ValueError) as caught:
        ema.swap_()
    assert text in str(caught.value)
    with pytest.raises(ValueError), ema.average_parameters():
        raise AssertionError("not reached")
    assert not any(target.any() for target in targets)
    assert ema.update()


def _ema(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: EMA(*(arguments or ([np.zeros(2)],)), **options)


P = [np.zeros(2)]
N = {"w": np.zeros(2)}
FLOAT_WORDS = "float16, bfloat16, float32 or float64"


WRONG_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (_ema(3), TypeError, "params must be a list of arrays, got 3"),
        (_ema("abc"), TypeError, "params must be a list of arrays, got 'abc'"),
        (_ema([[1.0]]), TypeError, "params[0] must be an array in host memory"),
        (_ema([np.zeros(2), np.zeros(2, complex)]), TypeError, f"params[1] must be of dtype {FLOAT_WORDS}, an integer or bool, got complex128"),
        (_ema({"w": np.zeros(2, ">f4")}), TypeError, "params['w'] must be of dtype"),
        (_ema([np.zeros(2, ">i4")]), TypeError, "params[0] must be of dtype"),
        (_ema([np.zeros(2, np.longdouble)]), TypeError, "params[0] must be of dtype"),
        (_ema([np.ma.masked_array(np.zeros(2))]), TypeError, "params[0] must be an array without a mask"),
        (_ema({1: np.zeros(2)}), TypeError, "params must be a mapping of text to arrays, got a key of int"),
        (_ema(decay=1.5), ValueError, "decay must be a finite number in [0, 1], got 1.5"),
        (_ema(decay=float("nan")), ValueError, "decay must be a finite number in [0, 1], got nan"),
        (_ema(decay=True), TypeError, "decay must be a finite number"),
        (_ema(decay="mean"), ValueError, "decay must be 'equal', got 'mean'"),
        (_ema(decay=(0.9, 1.5)), ValueError, "decay[1] must be a finite number in [0, 1], got 1.5"),
        (_ema(decay=()), ValueError, "decay must be a number or a sequence of at least one, got an empty one"),
        (_ema(decay="equal", warmup="tf"), ValueError, "decay must be a number with warmup='tf', got 'equal'"),
        (_ema(warmup="timm2"), ValueError, "warmup must be 'none' or 'timm' or 'tf' or 'power', got 'timm2'; did you mean 'timm'?"),
        (_ema(warmup=None), TypeError, "warmup must be 'none'"),
        (_ema(warmup="power"), ValueError, "sigma must be a number or a sequence of them with warmup='power', got None"),
        (_ema(sigma=0.1), ValueError, "sigma must be None without warmup='power', got 0.1"),
        (_ema(warmup="power", sigma=0.3), ValueError, "sigma must be a finite number in (0, 0.288675], got 0.3"),
        (_ema(warmup="power", sigma=(0.1, 0.0)), ValueError, "sigma[1] must be a finite number in (0, 0.288675], got 0.0"),
        (_ema(warmup="power", sigma=0.1, decay=(0.9,)), TypeError, "decay must be a number, unused, with warmup='power'"),
        (_ema(inv_gamma=0), ValueError, "inv_gamma must be a finite number in (0, inf), got 0.0"),
        (_ema(power=-1.0), ValueError, "power must be a finite number in (0, inf), got -1.0"),
        (_ema(update_every=0), ValueError, "update_every must be an integer >= 1, got 0"),
        (_ema(update_every=1.0), TypeError, "update_every must be an integer >= 1, got 1.0"),
        (_ema(update_after_step=-1), ValueError, "update_after_step must be an integer >= 0, got -1"),
        (_ema(min_decay=0.9999), ValueError, "min_decay must be a finite number in [0, 0.999], got 0.9999"),
        (_ema(debias=1), TypeError, "debias must be True or False, got 1"),
        (_ema(buffers="keep"), ValueError, "buffers must be 'copy' or 'average' or 'skip', got 'keep'"),
        (_ema(nonfinite="raise"), ValueError, "nonfinite must be 'propagate' or 'skip', got 'raise'"),
        (_ema(shadow_dtype="float16"), ValueError, "shadow_dtype must be None, 'float32', 'float64' or 'bfloat16', got 'float16'"),
        (_ema(shadow_dtype="nonsense"), ValueError, "shadow_dtype must be None, 'float32'"),
        (_ema(shadow_dtype=">f4"), ValueError, "shadow_dtype must be None, 'float32'"),
        (_ema(seed=-1), ValueError, "seed must be an integer in [0, 18446744073709551615], got -1"),
        (_ema(seed=None), TypeError, "seed must be an integer"),
        (lambda: EMA(P).decay_at(0), ValueError, "step must be an integer >= 1, got 0"),
        (lambda: EMA(P).decay_at(1.0), TypeError, "step must be an integer >= 1, got 1.0"),
        (lambda: EMA(P).decay_at(1, 1), ValueError, "profile must be an integer in [0, 0], got 1"),
        (lambda: EMA(P).swap_(-1), ValueError, "profile must be an integer in [0, 0], got -1"),
        (lambda: EMA(P).copy_to_(P, profile="0"), TypeError, "profile must be an integer in [0, 0], got '0'"),
        (lambda: EMA(P).average_parameters(2).__enter__(), ValueError, "profile must be an integer in [0, 0], got 2"),
        (lambda: EMA(P).update([]), ValueError, "params must be a list of 1 arrays, got 0"),
        (lambda: EMA(P).update(N), TypeError, "params must be a list of arrays, as the EMA was made with"),
        (lambda: EMA(N).update(P), TypeError, "params must be a mapping of names to arrays, as the EMA was made with"),
        (lambda: EMA(N).update({}), ValueError, "params must be a mapping with the key 'w', got one of 0 keys"),
        (lambda: EMA({"w" * 99: np.zeros(2)}).update({}), ValueError, f"params must be a mapping with the key '{'w' * 37}...', got one of 0 keys"),
        (lambda: EMA(N).copy_to_({**N, "x": 1}), ValueError, "params must be a mapping without the key 'x', got one of 2 keys"),
        (lambda: EMA(N).copy_to_({"w": np.zeros(3)}), ValueError, "params['w'] must be of shape (2,), got (3,)"),
        (lambda: EMA(N).copy_to_({"w": np.zeros(2, int)}), TypeError, f"params['w'] must be of dtype {FLOAT_WORDS}, got int64"),
        (lambda: (ema := EMA(P)).copy_to_(ema.shadows), ValueError, "params[0] must be memory apart from shadows[0]"),
        (lambda: posthoc_ema_weights([1j], 0.1, 1, 0.1), TypeError, "t must be an array of real numbers"),
        (lambda: posthoc_ema_weights([], 0.1, 1, 0.1), ValueError, "t must be of shape (N,), N >= 1"),
        (lambda: posthoc_ema_weights(5, 0.1, 1, 0.1), ValueError, "t must be of shape (N,), N >= 1"),
        (lambda: posthoc_ema_weights([1, 2], [0.1], 1, 0.1), ValueError, "sigma must be a number or of shape (2,)"),
        (lambda: posthoc_ema_weights([0, 2], 0.1, 1, 0.1), ValueError, "t must be of finite numbers > 0, got an array with others"),
        (lambda: posthoc_ema_weights([1], 0.5, 1, 0.1), ValueError, "sigma must be of numbers in (0, 0.288675], got 0.5"),
        (lambda: posthoc_ema_weights([1], 0.1, np.nan, 0.1), ValueError, "t_out must be of finite numbers > 0, got nan"),
        (lambda: posthoc_ema_weights([1], 0.1, 1, [[0.1]]), ValueError, "sigma_out must be a number or of shape ()"),
        (lambda: posthoc_ema_weights([1], 0.1, [[1]], 0.1), ValueError, "t_out must be a number or of shape (M,)"),
        (lambda: posthoc_ema_weights([1, 1], 0.1, 1, 0.1), ValueError, "t must be of pairs (t, sigma) that are all distinct"),
        (lambda: posthoc_ema_weights([1, 2], 0.1, 1, 0.1, normalize=1), TypeError, "normalize must be True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_wrong_calls_are_refused_in_words(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert len(str(caught.value)) < 200
