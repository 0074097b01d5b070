# SPDX-License-Identifier: BSD-3-Clause
"""Arrays of dask, xarray and pandas go through the ufuncs and come back as what they are."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

import fastops

X = np.linspace(-3.0, 4.0, 24).reshape(4, 6)
CHEAP = fastops.Multiplier("min-mse", mantissa_bits=7)


def test_dask_arrays_stay_lazy_and_keep_their_chunks(native: ModuleType) -> None:
    da = pytest.importorskip("dask.array", reason="dask is not installed")
    x = da.from_array(X, chunks=(2, 3))
    y = fastops.mitchell_mul(x, x.T.T + 1)
    assert isinstance(y, da.Array)
    assert y.chunks == x.chunks
    np.testing.assert_array_equal(y.compute(), fastops.mitchell_mul(X, X + 1))
    single = CHEAP.mul(x.astype(np.float32), np.float32(1.5))
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single.compute(), CHEAP.mul(X.astype(np.float32), np.float32(1.5)))


def test_xarray_keeps_dimensions_and_coordinates(native: ModuleType) -> None:
    xr = pytest.importorskip("xarray", reason="xarray is not installed")
    x = xr.DataArray(X, dims=("row", "column"), coords={"row": list("abcd")}, name="x")
    y = fastops.mitchell_div(x, x.isel(row=0) + 10)
    assert y.dims == ("row", "column")
    assert list(y.coords["row"].values) == list("abcd")
    np.testing.assert_array_equal(y.values, fastops.mitchell_div(X, X[0] + 10))
    both = fastops.mitchell_mul(xr.Dataset({"x": x}), 2.0)
    np.testing.assert_array_equal(both["x"].values, fastops.mitchell_mul(X, 2.0))


def test_xarray_over_dask_stays_lazy(native: ModuleType) -> None:
    xr = pytest.importorskip("xarray", reason="xarray is not installed")
    pytest.importorskip("dask.array", reason="dask is not installed")
    y = fastops.mitchell_square(xr.DataArray(X, dims=("row", "column")).chunk({"row": 2}))
    assert y.chunks == ((2, 2), (6,))
    np.testing.assert_array_equal(y.compute().values, fastops.mitchell_square(X))


def test_pandas_keeps_index_and_columns(native: ModuleType) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    series = pd.Series(X[0], index=list("uvwxyz"), name="s")
    y = fastops.mitchell_mul(series, 2.5)
    assert isinstance(y, pd.Series)
    assert list(y.index) == list("uvwxyz")
    np.testing.assert_array_equal(y.to_numpy(), fastops.mitchell_mul(X[0], 2.5))
    # Two series are put in line by their labels.
    z = fastops.mitchell_mul(series, series[::-1])
    np.testing.assert_array_equal(z[list("uvwxyz")].to_numpy(), fastops.mitchell_mul(X[0], X[0]))
    frame = pd.DataFrame(np.abs(X), columns=list("abcdef"))
    root = fastops.mitchell_sqrt(frame)
    assert list(root.columns) == list("abcdef")
    np.testing.assert_array_equal(root.to_numpy(), fastops.mitchell_sqrt(np.abs(X)))


def test_pandas_keeps_what_is_missing(native: ModuleType) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    series = pd.Series([1.5, None, 3.0], dtype="Float64")
    y = fastops.mitchell_mul(series, series)
    assert str(y.dtype) == "Float64"
    assert list(y.isna()) == [False, True, False]
    assert y.dropna().tolist() == [2.0, 8.0]
