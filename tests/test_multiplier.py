# SPDX-License-Identifier: BSD-3-Clause
"""The description of a multiplier: what it accepts, that it is a value, and what it hands to the backends."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import FLOATS, MULTIPLIERS, assert_same_bits, near_one

import fastops
from fastops import Multiplier, _backend
from fastops._multiplier import COMPENSATIONS, OPS, OpSpec
from fastops._segments import segment_table

options = (
    st.fixed_dictionaries(
        {},
        optional={
            "compensation": st.sampled_from(COMPENSATIONS) | st.floats(-0.499, 0.499),
            "mantissa_bits": st.none() | st.integers(1, 52),
            "subnormals": st.sampled_from(["keep", "flush"]),
        },
    )
    | st.fixed_dictionaries(
        {"segments": st.sampled_from([2, 4, 8, 16])},
        optional={
            "compensation": st.sampled_from(["none", "min-mse"]),
            "subnormals": st.sampled_from(["keep", "flush"]),
        },
    )
    | st.fixed_dictionaries({"corrections": st.integers(0, 3)}, optional={"mantissa_bits": st.integers(1, 52)})
)


@given(options)
def test_multiplier_round_trips(kwargs: dict[str, Any]) -> None:
    m = Multiplier(**kwargs)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(m, protocol)) == m
    assert eval(repr(m), {"Multiplier": Multiplier}) == m
    assert Multiplier._from_token(m._token()) == m
    assert m._op_name("mul").isidentifier()
    assert copy.deepcopy(m) == m
    assert hash(copy.copy(m)) == hash(m)


def test_multiplier_is_a_value() -> None:
    m = Multiplier("min-mse", mantissa_bits=7)
    assert m == Multiplier("min-mse", mantissa_bits=7)
    assert m != Multiplier("min-mse", mantissa_bits=8)
    assert m != "min-mse"
    assert len({m, Multiplier("min-mse", mantissa_bits=7), Multiplier()}) == 2
    assert Multiplier(-0.0) == Multiplier(0)
    assert repr(Multiplier(-0.0)) == "Multiplier(0.0)"
    assert repr(Multiplier("lmul", subnormals="flush")) == "Multiplier('lmul', subnormals='flush')"
    assert repr(Multiplier(np.float32(0.25), mantissa_bits=np.int64(5))) == "Multiplier(0.25, mantissa_bits=5)"
    assert (m.compensation, m.segments, m.mantissa_bits, m.subnormals, m.corrections) == (
        "min-mse",
        None,
        7,
        "keep",
        None,
    )
    with pytest.raises(AttributeError, match="immutable"):
        m.segments = 4  # type: ignore[misc]
    with pytest.raises(AttributeError):
        m.other = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="immutable"):
        del m._hash


@pytest.mark.parametrize(
    ("kwargs", "error", "names"),
    [
        ({"compensation": "minmse"}, ValueError, ["compensation", "'minmse'", "did you mean 'min-mse'"]),
        ({"compensation": "Mitchell"}, ValueError, ["compensation", "'none'", "'Mitchell'"]),
        ({"compensation": None}, TypeError, ["compensation", "None"]),
        ({"compensation": True}, TypeError, ["compensation", "True"]),
        ({"compensation": 0.5}, ValueError, ["compensation", "(-0.5, 0.5)", "0.5"]),
        ({"compensation": math.nan}, ValueError, ["compensation", "nan"]),
        ({"compensation": -math.inf}, ValueError, ["compensation", "-inf"]),
        ({"compensation": 1j}, TypeError, ["compensation", "1j"]),
        ({"segments": 3}, ValueError, ["segments", "2, 4, 8, 16", "3"]),
        ({"segments": 32}, ValueError, ["segments", "32"]),
        ({"segments": 4.0}, TypeError, ["segments", "4.0"]),
        ({"segments": True}, TypeError, ["segments", "True"]),
        ({"segments": 4, "compensation": "zero-mean"}, ValueError, ["compensation", "segments", "'zero-mean'"]),
        ({"segments": 4, "compensation": 0.1}, ValueError, ["compensation", "segments", "0.1"]),
        ({"segments": 4, "corrections": 1}, ValueError, ["segments", "corrections"]),
        ({"mantissa_bits": 0}, ValueError, ["mantissa_bits", "[1, 52]", "0"]),
        ({"mantissa_bits": 53}, ValueError, ["mantissa_bits", "53"]),
        ({"mantissa_bits": 7.5}, TypeError, ["mantissa_bits", "7.5"]),
        ({"subnormals": "zero"}, ValueError, ["subnormals", "'keep'", "'flush'", "'zero'"]),
        ({"subnormals": 1}, TypeError, ["subnormals", "1"]),
        ({"corrections": 4}, ValueError, ["corrections", "[0, 3]", "4"]),
        ({"corrections": -1}, ValueError, ["corrections", "-1"]),
        ({"corrections": "1"}, TypeError, ["corrections", "'1'"]),
        ({"corrections": 1, "compensation": "min-mse"}, ValueError, ["compensation", "corrections", "'min-mse'"]),
    ],
)
def test_wrong_options(kwargs: dict[str, Any], error: type[Exception], names: list[str]) -> None:
    with pytest.raises(error) as caught:
        Multiplier(**kwargs)
    text = str(caught.value)
    assert len(text) < 200
    for name in names:
        assert name in text


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        Multiplier("none", 4)  # type: ignore[misc]
    assert list(inspect.signature(Multiplier).parameters) == [
        "compensation",
        "segments",
        "mantissa_bits",
        "subnormals",
        "corrections",
    ]


def test_spec_carries_the_constants() -> None:
    assert Multiplier().spec("mul") == OpSpec(0, 0, 0, 0, 0, 0.0, ())
    for name, mul, div in (
        ("zero-mean", 474991, -486498),
        ("min-mse", 463511, -498358),
        ("minimax", 578814, -629146),
    ):
        assert Multiplier(name).spec("mul").c * 2**23 == mul
        assert Multiplier(name).spec("div").c * 2**23 == div
    assert Multiplier("zero-mean").spec("rsqrt").c == -0.086279
    assert Multiplier(0.125).spec("sqrt").c == 0.125
    assert Multiplier(subnormals="flush", mantissa_bits=9).spec("square") == OpSpec(0, 1, 0, 9, 0, 0.0, ())
    assert Multiplier(corrections=3).spec("mul") == OpSpec(2, 0, 3, 0, 0, 0.0, ())
    for bits, c in ((1, 0.5), (2, 0.25), (3, 0.125), (4, 0.125), (5, 0.0625), (23, 0.0625), (None, 0.0625)):
        assert Multiplier("lmul", mantissa_bits=bits).spec("mul") == OpSpec(0, 0, 0, bits or 0, 0, c, ())
        assert Multiplier("lmul-equation", mantissa_bits=bits).spec("square") == OpSpec(1, 0, 0, bits or 0, 0, c, ())
    for op in ("log2", "exp2"):
        for kwargs in MULTIPLIERS.values():
            m = Multiplier(**kwargs)
            assert m.spec(op) == OpSpec(0, int(m.subnormals == "flush"), 0, 0, 0, 0.0, ())


def test_spec_carries_the_table() -> None:
    for segments in (2, 4, 8, 16):
        assert Multiplier(segments=segments).spec("mul").table == segment_table("mul", segments)
        assert Multiplier("min-mse", segments=segments).spec("div") == Multiplier(segments=segments).spec("div")
        assert len(Multiplier(segments=segments).spec("div").table) == segments**2
        assert len(Multiplier(segments=segments).spec("sqrt").table) == segments
    assert all(abs(c) < 0.25 and (c * 2**30).is_integer() for op in OPS[:6] for c in segment_table(op, 16))
    assert segment_table("mul", 16) is segment_table("mul", 16)


def test_spec_refuses_what_is_not_defined() -> None:
    with pytest.raises(ValueError, match="did you mean 'mul'"):
        Multiplier().spec("mull")
    with pytest.raises(ValueError, match="multiplier only"):
        Multiplier("lmul").spec("div")


@pytest.mark.parametrize("m", [Multiplier("lmul"), Multiplier("lmul-equation"), Multiplier(corrections=0)], ids=repr)
def test_multipliers_only_multiply(m: Multiplier) -> None:
    assert callable(m.mul)
    assert callable(m.square)
    for op in ("div", "reciprocal", "sqrt", "rsqrt"):
        assert not hasattr(m, op)
        with pytest.raises(AttributeError, match=rf"no {op}: it is a multiplier only"):
            getattr(m, op)


def test_operations_are_those_of_the_module() -> None:
    assert Multiplier().mul is fastops.mitchell_mul
    for op in ("div", "square", "reciprocal", "sqrt", "rsqrt"):
        assert getattr(Multiplier(), op) is getattr(fastops, f"mitchell_{op}")
    assert Multiplier("lmul").mul is fastops.lmul
    assert Multiplier("min-mse").mul is Multiplier("min-mse").mul
    assert Multiplier("min-mse").mul is not Multiplier("minimax").mul


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
def test_operations_pickle_by_name(kind: str) -> None:
    m = Multiplier(**MULTIPLIERS[kind])
    for op in ("mul", "square", "div", "rsqrt"):
        if m._has(op):
            assert pickle.loads(pickle.dumps(getattr(m, op))) is getattr(m, op)
            assert getattr(fastops, m._op_name(op)) is getattr(m, op)
    # No attributes of a multiplier, whose options they do not heed; the backends have them all the same.
    for op in ("log2", "exp2"):
        assert not hasattr(m, op)
        found = _backend.backend.mitchell_op(op, m)
        assert pickle.loads(pickle.dumps(found)) is found


def test_names_of_undefined_operations_are_refused() -> None:
    for name in ("mitchell_div__c_lmul", "mitchell_sqrt__c_none__k1", "mitchell_pow__c_none__m4"):
        with pytest.raises(AttributeError, match=name):
            getattr(fastops, name)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "c_",
        "none",
        "c_nope",
        "c_none__s4__s4",
        "c_none__m07",
        "c_none__",
        "c_0x1p0",
        "c_none__k9",
        "c_none__flush__s4",
    ],
)
def test_foreign_tokens_are_refused(token: str) -> None:
    with pytest.raises(ValueError):
        Multiplier._from_token(token)


def test_table() -> None:
    table = Multiplier().table(8)
    assert table.dtype == np.uint16
    assert int(table.sum(dtype=np.int64)) == 1025628691
    assert_same_bits(Multiplier().table(3), table[:8, :8])
    assert_same_bits(Multiplier(corrections=3).table(1), np.array([[0, 0], [0, 1]], np.uint16))
    wide = Multiplier("minimax").table(9)
    assert wide.dtype == np.uint32
    assert wide.shape == (512, 512)
    # Up to 8 bits the entries saturate where 16 bits end.
    assert_same_bits(np.minimum(wide[:256, :256], 65535).astype(np.uint16), Multiplier("minimax").table(8))
    assert int(Multiplier(0.4999).table(8).max()) == 65535
    with pytest.raises(ValueError, match=r"bits must be an integer in \[1, 12\], got 13"):
        Multiplier().table(13)
    with pytest.raises(TypeError, match="bits"):
        Multiplier().table(8.0)  # type: ignore[arg-type]


def test_matmul_and_conv2d_are_the_functions() -> None:
    m = Multiplier("min-mse", mantissa_bits=4)
    a, b = near_one(FLOATS["f32"], 12, 1).reshape(3, 4), near_one(FLOATS["f32"], 20, 2).reshape(4, 5)
    out = np.empty((3, 5), np.float32)
    assert m.matmul(a, b, out) is out
    assert_same_bits(out, fastops.mitchell_matmul(a, b, multiplier=m))
    x, w = near_one(FLOATS["f32"], 96, 3).reshape(2, 2, 4, 6), near_one(FLOATS["f32"], 16, 4).reshape(4, 1, 2, 2)
    got = m.conv2d(x, w, stride=(1, 2), padding=1, dilation=(2, 1), groups=2)
    assert_same_bits(
        got, fastops.mitchell_conv2d(x, w, stride=(1, 2), padding=1, dilation=(2, 1), groups=2, multiplier=m)
    )


def test_error_stats_is_the_function() -> None:
    from fastops.analysis import error_stats

    assert Multiplier("lmul").error_stats(4) == error_stats(Multiplier("lmul"), 4)
    assert Multiplier("lmul").error_stats("float32", [1.5, 1.25]).count == 4
