# SPDX-License-Identifier: BSD-3-Clause
"""The public names: what is there, that it is documented, that backends agree on names and signatures."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
from types import ModuleType

import numpy as np
import pytest

import fastops
from fastops import _backend, _validate
from fastops._multiplier import OPS

PACKAGE = pathlib.Path(fastops.__file__).parent
ERRORS = [
    name for name in fastops.__all__ if inspect.isclass(item := getattr(fastops, name)) and issubclass(item, Exception)
]
FUNCTIONS = [
    name for name in fastops.__all__ if callable(getattr(fastops, name)) and name not in ("Multiplier", *ERRORS)
]
ARRAY_LEVEL = [
    "lut_matmul",
    "mitchell_conv2d",
    "mitchell_conv2d_grad",
    "mitchell_div_grad",
    "mitchell_matmul",
    "mitchell_matmul_grad",
    "mitchell_mul_grad",
    "ufunc_of_tensors",
]
ATTENTION = [
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "nystrom_attention",
    "nystrom_attention_backward",
    "plain_step",
    "softmax_attention",
]
STEPS = [
    "adamw_fits",
    "adamw_step",
    "adaptive_eg_step",
    "all_finite",
    "eg_step",
    "ema_update",
    "lazy_adamw_rows",
    "lookahead_sync",
    "sgd_step",
]
COUNTING = ["table_from_bytes", "word_counter", "word_table"]


def test_all_is_sorted_and_every_name_is_there():
    assert fastops.__all__ == sorted(fastops.__all__)
    for name in fastops.__all__:
        assert getattr(fastops, name) is not None
    assert set(fastops.__all__) <= set(dir(fastops))


def test_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="mitchell_mult"):
        _ = fastops.mitchell_mult
    for name in (
        "mitchell_mul__nonsense",
        "mitchell_mul__",
        "mitchell_table__c_none",
        "mitchell_mul__c_0x1p99999",
        "mul__c_none",
    ):
        assert not hasattr(fastops, name), name
    # A multiplier only: its name parses, the operation does not exist.
    assert not hasattr(fastops, "mitchell_div__c_lmul")


def test_the_operations_of_the_plain_multiplier_are_the_public_functions():
    plain = fastops.Multiplier()
    assert fastops.mitchell_mul is plain.mul
    assert fastops.mitchell_div is plain.div
    assert fastops.mitchell_square is plain.square
    assert fastops.mitchell_reciprocal is plain.reciprocal
    assert fastops.mitchell_sqrt is plain.sqrt
    assert fastops.mitchell_rsqrt is plain.rsqrt
    assert fastops.lmul is fastops.Multiplier("lmul").mul


def test_backends_offer_the_same_names(backend: ModuleType):
    wanted = sorted(
        [*ARRAY_LEVEL, *ATTENTION, *STEPS, *COUNTING, "lmul", "mitchell_op", *(f"mitchell_{op}" for op in OPS)]
    )
    assert wanted == _backend.NAMES
    assert sorted(set(backend.__all__) & set(wanted)) == wanted
    for op in OPS:
        assert getattr(backend, f"mitchell_{op}") is backend.mitchell_op(op, fastops.Multiplier())


@pytest.mark.parametrize("name", ["mitchell_op", *ARRAY_LEVEL, *ATTENTION, *STEPS, *COUNTING])
def test_backends_share_the_signatures_of_reference(backend: ModuleType, name: str):
    def shape(function: object) -> list[tuple[str, inspect._ParameterKind]]:
        try:
            return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
        except ValueError:
            # pybind11 writes it into the docstring.
            (written,) = ast.parse(f"def {function.__doc__.splitlines()[0]}: ...").body
            return [(p.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in written.args.args]

    assert shape(getattr(backend, name)) == shape(getattr(fastops.reference, name))


def test_ufuncs_are_ufuncs(native: ModuleType):
    for op in OPS:
        ufunc = getattr(native, f"mitchell_{op}")
        assert isinstance(ufunc, np.ufunc)
        assert ufunc.__name__ == f"mitchell_{op}"
        assert ufunc.nin == (2 if op in ("mul", "div") else 1)
        assert ufunc.nout == 1
    assert isinstance(native.lmul, np.ufunc)
    assert native.lmul.__name__ == "lmul"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_a_full_docstring(name: str):
    item = getattr(fastops, name)
    text = inspect.getdoc(item) or ""
    if _backend.name != "native" and name not in ARRAY_LEVEL and name.startswith(("mitchell_", "lmul")):
        assert text
        return
    for section in ("Examples", *(() if name == "get_num_threads" else ("Parameters", "Raises"))):
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), f"{name} has no section {section}"
    if isinstance(item, np.ufunc) and not hasattr(np.add, "__signature__"):
        # NumPy before 2.4 gives no ufunc a signature.
        return
    assert inspect.signature(item).parameters or name == "get_num_threads"


@pytest.mark.parametrize("name", [f"mitchell_{op}" for op in OPS] + ["lmul"])
def test_the_examples_of_the_elementwise_operations_run(name: str):
    import doctest

    text = getattr(fastops, name).__doc__
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    if _backend.name == "native":
        assert test.examples
    result = doctest.DocTestRunner(verbose=False).run(test)
    assert result.failed == 0


@pytest.mark.parametrize(
    "module",
    [
        "fastops.mitchell",
        "fastops._config",
        "fastops._counts",
        "fastops._multiplier",
        "fastops._tensors",
        "fastops.attention",
        "fastops.averaging",
        "fastops.optim",
        "fastops.wordcount",
    ],
)
def test_the_examples_of_a_module_run(module: str):
    import doctest
    import importlib

    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


FRONT_END = (
    "_attention",
    "_validate",
    "_config",
    "_counts",
    "_backend",
    "_multiplier",
    "_nystrom",
    "_schedules",
    "_shadows",
    "_tensors",
    "analysis",
    "attention",
    "averaging",
    "cuda/_arrays",
    "cuda/_attention",
    "cuda/_conv",
    "cuda/_matmul",
    "cuda/_mitchell",
    "cuda/_nystrom",
    "cuda/_optim",
    "jax/__init__",
    "jax/_attention",
    "jax/_mitchell",
    "jax/_ops",
    "keras/__init__",
    "keras/_averaging",
    "keras/_layers",
    "mitchell",
    "optim",
    "torch/__init__",
    "torch/_attention",
    "torch/_averaging",
    "torch/_distributed",
    "torch/_mitchell",
    "torch/_modules",
    "torch/_ops",
    "torch/_optim",
    "wordcount",
)


def _front_end() -> list[pathlib.Path]:
    return [PACKAGE / f"{name}.py" for name in FRONT_END]


def test_every_error_of_the_front_end_is_made_by_validate():
    makers = {"wrong_type", "wrong_value", "wrong_choice", "wrong_moment", "busy", "no_pickle", "not_offered"}
    allowed = {"AttributeError", "ImportError"}
    seen = 0
    for path in _front_end():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            seen += 1
            call = node.exc
            if isinstance(call, ast.Name):
                # Another's error passed on, or one without a text.
                assert call.id in ("error", "interrupt", "MemoryError"), f"{path.name}:{node.lineno}"
                continue
            assert isinstance(call, ast.Call), f"{path.name}:{node.lineno}"
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in allowed or name in makers:
                continue
            # A text of its own must still say what came.
            assert name in ("TypeError", "ValueError"), f"{path.name}:{node.lineno} raises {name}"
            assert " got " in ast.unparse(call), f"{path.name}:{node.lineno} does not say what came"
    assert seen > 30


def test_messages_are_short_and_hold_no_contents():
    big = np.arange(12345.0, 13345.0)
    for value in (big, "x" * 1000, b"y" * 1000, 10**300, (1,) * 500, [1, 2], big[0], None, {"a": 1}, object()):
        for error in (_validate.wrong_type("name", "a thing", value), _validate.wrong_value("name", "a thing", value)):
            assert len(str(error)) < 200
            assert "12346" not in str(error)
    assert "did you mean 'exact'" in str(_validate.wrong_choice("mode", _validate.GRADIENT_MODES, "exakt"))
