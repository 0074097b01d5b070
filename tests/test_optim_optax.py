# SPDX-License-Identifier: BSD-3-Clause
"""Averages and steps beside optax, where it is installed: the same formulas, in float32 on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerance

import fastops

optax = pytest.importorskip("optax")
jnp = pytest.importorskip("jax.numpy")

SHAPES = ((5, 3), (7,), ())


def arrays(seed: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), np.float32) for shape in SHAPES]


def check(got: list[Any], want: Any, terms: int) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, np.asarray(y), rtol=0, atol=tolerance.average(terms, 4.0, np.dtype(np.float32)))


def test_ema_update_is_incremental_update() -> None:
    shadows, params = arrays(0), arrays(1)
    want = optax.incremental_update([jnp.asarray(p) for p in params], [jnp.asarray(s) for s in shadows], 0.1)
    fastops.ema_update_(shadows, params, 0.9)
    check(shadows, want, 2)


def test_debiased_average_is_that_of_optax() -> None:
    params = arrays(2)
    average = optax.ema(0.9, debias=True)
    state = average.init([jnp.asarray(p) for p in params])
    ema = fastops.EMA(params, 0.9, debias=True)
    for step in range(4):
        for p in params:
            p += np.float32(step + 1)
        want, state = average.update([jnp.asarray(p) for p in params], state)
        ema.update()
    with ema.average_parameters():
        check([p.copy() for p in params], want, 40)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_step(weight_decay: float) -> None:
    params, m, v = arrays(3), [np.zeros_like(p) for p in arrays(3)], [np.zeros_like(p) for p in arrays(3)]
    theirs = [jnp.asarray(p) for p in params]
    optimizer = optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    state = optimizer.init(theirs)
    for step in range(1, 6):
        grads = arrays(10 + step)
        updates, state = optimizer.update([jnp.asarray(g) for g in grads], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        fastops.adamw_step_(params, grads, m, v, step=step, lr=0.01, weight_decay=weight_decay)
    check(params, theirs, 40)


def test_jax_arrays_are_read_and_never_written() -> None:
    shadow, param = np.zeros(3, np.float32), jnp.ones(3, jnp.float32)
    fastops.ema_update_([shadow], [param], 0.5)
    assert shadow.tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"shadows\[0\] must be writable"):
        fastops.ema_update_([param], [shadow], 0.5)
    assert param.tolist() == [1.0, 1.0, 1.0]
