# SPDX-License-Identifier: BSD-3-Clause
"""Lists whose arrays are not what their addresses and sizes say: shapes exchanged under a plan, storages shrunk under tensors,
lazy negatives, more dimensions than NumPy has, scales within a tensor; and numbers that only float() would take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastops

f32 = np.float32


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, f32)


def test_a_plan_sees_another_shape_of_the_same_size() -> None:
    shadow, param = ones(2, 6), np.full((2, 6), 3.0, f32)
    shadows, params = fastops.TensorList([shadow]), fastops.TensorList([param])
    fastops.ema_update_(shadows, params, 0.5)
    param.resize((3, 4), refcheck=False)
    with pytest.raises(ValueError, match=r"shadows\[0\] must be of shape \(3, 4\)"):
        fastops.ema_update_(shadows, params, 0.5)
    assert (shadow == 2.0).all()


@pytest.mark.parametrize("strided", [False, True])
def test_scales_must_not_lie_within_a_tensor(strided: bool) -> None:
    memory = np.ones(8)
    params = [memory[:4:2] if strided else memory[:2]]
    states = [[np.ones(2)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"scales must be memory apart from params\[0\]"):
        fastops.adaptive_eg_step_(params, *states, memory[2:3] if strided else memory[1:2], lr=0.1)
    assert (memory == 1.0).all()
    if strided:  # between the elements, not in them
        fastops.adaptive_eg_step_(params, *states, memory[1:2], lr=0.1)
        assert (memory[:4:2] != 1.0).all()


def test_scales_must_be_plain() -> None:
    lists = [[np.ones(2)] for _ in range(5)]
    with pytest.raises(TypeError, match="scales must be an array without a mask"):
        fastops.adaptive_eg_step_(*lists, np.ma.ones(1), lr=0.1)


@pytest.mark.parametrize("decay", ["0.5", b"\x01", bytearray(b"\x01"), memoryview(b"\x01")])
def test_bytes_and_text_are_no_decays(decay: Any) -> None:
    with pytest.raises(TypeError, match="decay must be a finite number"):
        fastops.ema_update_([ones(2)], [ones(2)], decay)


def test_a_decay_may_be_a_0d_array() -> None:
    shadow = np.zeros(2, f32)
    fastops.ema_update_([shadow], [ones(2)], np.array(0.5))
    assert (shadow == 0.5).all()


def test_what_is_no_list_is_named() -> None:
    with pytest.raises(TypeError, match="shadows must be a list of arrays, got 5"):
        fastops.ema_update_(5, [ones(2)], [0.5])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params must be a list of arrays, got None"):
        fastops.adaptive_eg_step_(None, [], [], [], [], np.ones(1), lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [bytearray(b"0.5"), np.timedelta64(5)])
def test_what_only_float_takes_is_no_number(lr: Any) -> None:
    with pytest.raises(TypeError, match="lr must be a finite number"):
        fastops.eg_step_([ones(2)], [ones(2)], lr=lr)


def test_integers_beyond_float_are_refused() -> None:
    lists = [[ones(2)] for _ in range(4)]
    with pytest.raises(ValueError, match="step must be an integer below"):
        fastops.adamw_step_(*lists, step=10**400, lr=0.1)
    with pytest.raises(ValueError, match=r"accumulate\[1\] must be an integer below"):
        fastops.sgd_step_(*lists[:3], lr=0.1, momentum=0.9, accumulate=(0, 10**400))
    with pytest.raises(ValueError, match="step must be an integer below"):
        fastops.EMA([], warmup="timm").decay_at(10**400)


def test_the_narrowest_power_average_is_the_last_value() -> None:
    param = ones(2)
    ema = fastops.EMA([param], warmup="power", sigma=1e-200)
    for value in (2.0, 3.0):
        param[:] = value
        ema.update()
    assert (ema.shadows[0] == 3.0).all()


class Broken:
    def __dlpack__(self, **options: Any) -> Any:
        raise KeyError("broken")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_a_broken_protocol_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"params\[0\] must be an array in host memory"):
        fastops.ema_update_([ones(2)], [Broken()], 0.5)


@pytest.mark.parametrize("wrap", [list, fastops.TensorList])
class TestTorch:
    def test_a_lazy_negative_is_refused(self, wrap: Any) -> None:
        torch = pytest.importorskip("torch")
        for count in (1, 4):
            param = torch.full((count,), 1.0 + 1.0j).conj().imag
            assert param.is_neg()
            shadow = torch.zeros(count)
            plain = torch.ones(count)
            for written, read in ((shadow, param), (param, plain)):
                with pytest.raises(TypeError, match="a tensor that NumPy can share"):
                    fastops.ema_update_(wrap([written]), wrap([read]), 0.5)
            assert (shadow == 0.0).all()
            assert (param == -1.0).all()

    def test_more_dimensions_than_numpy_has(self, wrap: Any) -> None:
        torch = pytest.importorskip("torch")
        shadow = torch.zeros([1] * 299 + [4, 5]).transpose(-1, -2)
        with pytest.raises((TypeError, ValueError), match="dimensions"):
            fastops.ema_update_(wrap([shadow]), wrap([torch.ones([1] * 299 + [5, 4])]), 0.5)

    def test_layouts_and_dtypes_that_numpy_lacks(self, wrap: Any) -> None:
        torch = pytest.importorskip("torch")
        for odd in (torch.ones(4).to_sparse(), torch.zeros(4, dtype=torch.float8_e4m3fn)):
            with pytest.raises(TypeError, match=r"\[0\] must be a (dense tensor|tensor that NumPy can share)"):
                fastops.ema_update_(wrap([torch.zeros(4)]), wrap([odd]), 0.5)


def test_a_shrunk_storage_is_refused() -> None:
    torch = pytest.importorskip("torch")
    shadow, params = torch.zeros(100_000), [torch.ones(100_000)]
    fastops.ema_update_([shadow], params, 0.5)
    shadow.untyped_storage().resize_(64)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shadows\[0\] must be a tensor whose storage holds its elements"):
            fastops.ema_update_([shadow], params, 0.5)
