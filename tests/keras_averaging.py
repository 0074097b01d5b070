# SPDX-License-Identifier: BSD-3-Clause
"""fastops.keras.EMA over the backend that KERAS_BACKEND names: test_keras.py runs this file in a process of its own."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tolerance
from keras import layers

import fastops.keras as fk

# Keras's own way from torch to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Array = np.ndarray[Any, np.dtype[Any]]
X = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
Y = X.sum(1, keepdims=True)


def array(x: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(getattr(x, "value", x)))


def made(optimizer: Any = None, **options: Any) -> Any:
    """A small model with a variable of every kind: trained, a statistic, a seed."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.1),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"], **options)
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    options = {"x": X, "y": Y, "batch_size": 8, "shuffle": False, "verbose": 0, **options}
    return model.fit(epochs=epochs, callbacks=list(callbacks), **options)


class Recorder(keras.callbacks.Callback):
    """The weights after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Array]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.weights.append([array(v) for v in self.model.trainable_variables])


class Looker(keras.callbacks.Callback):
    """What the model holds at each moment."""

    def __init__(self, **moments: list[Any]) -> None:
        super().__init__()
        self.seen: dict[str, list[list[Array]]] = {}

    def look(self, moment: str) -> None:
        self.seen.setdefault(moment, []).append([array(v) for v in self.model.weights])

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.look("test")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.look("epoch")

    def on_train_end(self, logs: Any = None) -> None:
        self.look("end")


def same(got: list[Any], want: list[Any]) -> bool:
    return all(np.array_equal(array(x), array(y)) for x, y in zip(got, want, strict=True))


def by_hand(weights: list[list[Array]], decay: Any, shadows: list[Array] | None = None) -> list[Array]:
    """s += (1 - decay(step)) (p - s) in float64."""
    shadows = [w.astype(np.float64) for w in weights[0]] if shadows is None else shadows
    for step, now in enumerate(weights, 1):
        shadows = [s + (1.0 - decay(step)) * (w - s) for s, w in zip(shadows, now, strict=True)]
    return shadows


def near(got: list[Any], want: list[Any], updates: int) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(
            array(x), array(y), rtol=0, atol=tolerance.average(updates, 4.0, np.dtype(np.float32))
        )


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({"decay": 0.9}, lambda step: 0.9 if step > 1 else 0.0),
        ({"decay": 0.9, "update_after_step": 0}, lambda _: 0.9),
        ({"decay": 0.9, "update_after_step": 3}, lambda step: 0.9 if step > 3 else 0.0),
        ({"decay": "equal"}, lambda step: (step - 1) / step),
        ({"decay": 0.999, "warmup": "tf"}, lambda step: step / (9 + step) if step > 1 else 0.0),
        ({"decay": 0.6, "warmup": "timm"}, lambda step: min(0.6, 1 - step ** (-2 / 3)) if step > 1 else 0.0),
        ({"decay": 0.8, "update_every": 3}, lambda step: 1.0 if step % 3 else 0.8),
    ],
    ids=str,
)
def test_average_is_that_by_hand(options: dict[str, Any], decay: Any) -> None:
    model = made()
    start = [array(v).astype(np.float64) for v in model.trainable_variables]
    ema, recorder = fk.EMA(**options), Recorder()
    fit(model, ema, recorder)
    assert (ema.step, len(recorder.weights), ema.skipped) == (8, 8, 0)
    assert ema.updates == 8 // options.get("update_every", 1)
    assert ema.names == [v.path for v in model.trainable_variables]
    near(ema.shadows, by_hand(recorder.weights, decay, start), 8)
    if "update_every" not in options:
        np.testing.assert_allclose([ema.decay_at(s) for s in range(1, 9)], [decay(s) for s in range(1, 9)], rtol=1e-15)
    # A second fit goes on.
    fit(model, ema, recorder)
    near(ema.shadows, by_hand(recorder.weights, decay, start), 16)


def test_average_is_that_of_keras_use_ema() -> None:
    optimizer = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)
    model, ema = made(optimizer), fk.EMA(0.9)
    fit(model, ema)
    near(ema.shadows, optimizer._model_variables_moving_average, 8)


@pytest.mark.parametrize("options", [{}, {"swap": False}, {"nonfinite": "skip"}, {"buffers": "average"}], ids=str)
def test_training_does_not_notice(options: dict[str, Any]) -> None:
    """The same weights, losses, and states of the optimizer, bit by bit."""
    models = [made(), made()]
    histories = [
        fit(model, *more, validation_data=(X, Y)).history
        for model, more in zip(models, ([], [fk.EMA(0.9, **options)]), strict=True)
    ]
    assert histories[0]["loss"] == histories[1]["loss"]
    assert same(models[0].weights, models[1].weights)
    assert same(models[0].optimizer.variables, models[1].optimizer.variables)
    assert (histories[0]["val_loss"] == histories[1]["val_loss"]) == (options == {"swap": False})
    assert "evaluate" not in vars(models[1])


def test_validation_sees_the_averages() -> None:
    model, ema, recorder, looker = made(), fk.EMA(0.9), Recorder(), Looker()
    history = fit(model, ema, recorder, looker, validation_data=(X, Y), validation_batch_size=32).history
    averages = by_hand(recorder.weights[:4], lambda step: 0.9 if step > 1 else 0.0)
    trained = [i for i, v in enumerate(model.weights) if v.trainable]
    near([looker.seen["test"][0][i] for i in trained], averages, 4)
    for epoch in range(2):
        assert same([looker.seen["epoch"][epoch][i] for i in trained], recorder.weights[4 * epoch + 3])
    weights = model.get_weights()
    with ema.average_parameters() as averaged:
        assert averaged is model
        assert same([model.get_weights()[i] for i in trained], ema.shadows)
        # The statistics are the model's own.
        rest = [i for i in range(len(weights)) if i not in trained]
        assert rest
        assert same([model.get_weights()[i] for i in rest], [weights[i] for i in rest])
        np.testing.assert_allclose(
            model.evaluate(X, Y, verbose=0, batch_size=32)[0], history["val_loss"][-1], rtol=1e-6
        )
        prediction = array(model.predict(X, verbose=0))
        with pytest.raises(RuntimeError, match="update must be called when no averages are swapped in"):
            ema.update()
        with pytest.raises(RuntimeError, match="got those of this one"), ema.average_parameters():
            pass
        with pytest.raises(RuntimeError, match="fit must be called when no averages are swapped in"):
            fit(model, ema)
        assert same([model.get_weights()[i] for i in trained], ema.shadows)
    assert same(model.get_weights(), weights)
    assert not np.array_equal(array(model.predict(X, verbose=0)), prediction)
    with pytest.raises(KeyError), ema.average_parameters():
        raise KeyError
    assert same(model.get_weights(), weights)


def test_buffers_can_be_averaged() -> None:
    model, ema = made(), fk.EMA(0.5, update_after_step=0, buffers="average")
    statistics = [array(v) for v in model.layers[1].non_trainable_variables]
    fit(model, ema, epochs=1, batch_size=32)
    averages = dict(zip(ema.names, ema.shadows, strict=True))
    assert len(averages) == len(model.trainable_variables) + 2
    for v, start in zip(model.layers[1].non_trainable_variables, statistics, strict=True):
        near([averages[v.path]], [(start + array(v)) / 2], 1)


def test_frozen_layers_are_left_out_until_they_are_trained() -> None:
    model, ema = made(), fk.EMA(0.9)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    fit(model, ema)
    assert len(ema.names) == len(model.trainable_variables) == 4
    before = {name: s.copy() for name, s in zip(ema.names, ema.shadows, strict=True)}
    model.layers[0].trainable = True
    model.compile("sgd", "mse")
    ema.set_model(model)
    fit(model, ema, epochs=1)
    assert len(ema.names) == 6
    assert ema.step == 12
    assert not any(np.array_equal(before[n], s) for n, s in zip(ema.names, ema.shadows, strict=True) if n in before)


def test_an_update_with_nan_is_left_out() -> None:
    model, ema = made(), fk.EMA(0.9, nonfinite="skip")
    fit(model, ema)
    before = [s.copy() for s in ema.shadows]
    weights = model.get_weights()
    model.set_weights([np.full_like(w, np.nan) for w in weights])
    assert not ema.update()
    assert (ema.step, ema.updates, ema.skipped) == (9, 8, 1)
    assert same(ema.shadows, before)


class Fault(keras.callbacks.Callback):
    """Raises at one moment of a validation."""

    def __init__(self, moment: str, error: type[BaseException]) -> None:
        super().__init__()
        self.moment, self.error = moment, error

    def at(self, moment: str) -> None:
        if moment == self.moment:
            raise self.error(moment)

    def on_test_begin(self, logs: Any = None) -> None:
        self.at("begin")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.at("batch begin")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            self.at("batch")

    def on_test_end(self, logs: Any = None) -> None:
        self.at("end")


class Data(keras.utils.PyDataset):
    """Batches, and an error in place of the third."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Array, Array]:
        if i == 2 and self.error is not None:
            raise self.error("data")
        return X[:8], Y[:8]


MOMENTS = ("begin", "batch begin", "batch", "end", "data")


@pytest.fixture(scope="module")
def one() -> Any:
    """A model for many tests: jax compiles its steps once."""
    return made()


@pytest.mark.parametrize("first", [False, True], ids=["ema-last", "ema-first"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_validation_puts_the_weights_back(
    one: Any, moment: str, error: type[BaseException], first: bool
) -> None:
    model, ema, recorder = one, fk.EMA(0.9), Recorder()
    order = [recorder, Fault(moment, error)]
    order.insert(0 if first else 2, ema)
    with pytest.raises(error):
        fit(model, *order, validation_data=Data(error if moment == "data" else None))
    assert same(model.trainable_variables, recorder.weights[-1])
    assert "evaluate" not in vars(model)
    # Nothing is left behind: training and evaluation go on.
    fit(model, ema, validation_data=(X, Y))
    assert model.evaluate(X, Y, verbose=0)[0] > 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of jax's compiled steps alone")
def test_an_error_within_a_compiled_validation_puts_the_weights_back() -> None:
    """jax has given the arrays of the step away by then, and Keras would be left with deleted ones."""
    import jax

    def failing(y: Any, prediction: Any) -> Any:
        def look(x: Array) -> Array:
            if validates[0]:
                raise ValueError("inside")
            return x

        return jax.pure_callback(look, jax.ShapeDtypeStruct((), np.float32), keras.ops.mean(y - prediction))

    class Mark(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
            validates[0] = batch == 1

    validates = [False]
    model, ema, recorder = made(), fk.EMA(0.9), Recorder()
    model.compile("sgd", "mse", metrics=[failing])
    with pytest.raises(Exception, match="inside"):
        fit(model, ema, recorder, Mark(), validation_data=(X, Y))
    assert same(model.trainable_variables, recorder.weights[-1])


def test_an_interrupted_training_leaves_the_weights() -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise KeyboardInterrupt

    model, ema, recorder = made(), fk.EMA(0.9), Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(model, ema, recorder, Stop(), validation_data=(X, Y))
    assert same(model.trainable_variables, recorder.weights[-1])
    loss = model.evaluate(X, Y, verbose=0)
    with ema.average_parameters():
        assert model.evaluate(X, Y, verbose=0) != loss
    assert model.evaluate(X, Y, verbose=0) == loss


def test_a_training_step_that_raised_leaves_nothing_behind() -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise ValueError("in a step")

    model, ema, looker = made(), fk.EMA(0.9), Looker()
    with pytest.raises(ValueError, match="in a step"):
        fit(model, ema, Stop(), validation_data=(X, Y))
    weights = model.get_weights()
    # An evaluation of the user is not taken for a validation of the fit that is over, with this EMA or another.
    for other in (ema, fk.EMA(0.9)):
        with pytest.raises(RuntimeError, match="averages in evaluate must be left to"):
            model.evaluate(X, Y, verbose=0, callbacks=[other])
    # One that fails within the context leaves the averages to it.
    with ema.average_parameters():
        with pytest.raises(ValueError, match="data"):
            model.evaluate(Data(ValueError), verbose=0)
        # Over jax the values are in the loop that was left, until the model is asked for.
        assert same(ema.model.trainable_variables, ema.shadows)
    assert same(model.weights, weights)
    fit(model, ema, looker, validation_data=(X, Y))
    trained = [i for i, v in enumerate(model.weights) if v.trainable]
    assert same([looker.seen["test"][-1][i] for i in trained], ema.shadows)
    assert "evaluate" not in vars(model)


def test_an_interrupt_while_weights_are_put_back_is_heard_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ema = made(), fk.EMA(0.9)
    fit(model, ema)
    weights = model.get_weights()
    kind = type(model.weights[0])
    assign = kind.assign

    def interrupting(at: int) -> Any:
        count = itertools.count()

        def interrupted(self: Any, value: Any) -> Any:
            if next(count) == at:
                raise KeyboardInterrupt
            return assign(self, value)

        return interrupted

    for at in (2, 6, 8):  # of 6 variables in, 6 back
        with monkeypatch.context() as patched:
            patched.setattr(kind, "assign", interrupting(at))
            with pytest.raises(KeyboardInterrupt), ema.average_parameters():
                pass
        assert same(model.get_weights(), weights)


def test_callbacks_given_to_it_see_the_averages(tmp_path: Path) -> None:
    file = tmp_path / "averages.keras"
    inner = Looker()
    checkpoint = keras.callbacks.ModelCheckpoint(str(file), monitor="val_loss", save_best_only=True)
    model, outer, recorder = made(), Looker(), Recorder()
    ema = fk.EMA(0.9, callbacks=[inner, checkpoint])
    fit(model, ema, outer, recorder, epochs=1, validation_data=(X, Y))
    trained = [i for i, v in enumerate(model.weights) if v.trainable]
    assert same([inner.seen["epoch"][0][i] for i in trained], ema.shadows)
    assert same([outer.seen["epoch"][0][i] for i in trained], recorder.weights[-1])
    again = keras.models.load_model(file)
    with ema.average_parameters():
        assert same(again.weights, model.weights)

    class Full(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise OSError("no space left on device")

    recorder = Recorder()
    with pytest.raises(OSError, match="no space"):
        fit(made(), fk.EMA(0.9, callbacks=[Full()]), recorder)
    assert same(recorder.model.trainable_variables, recorder.weights[-1])


def test_early_stopping_restores_the_best_averages() -> None:
    stopping = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=1, restore_best_weights=True)
    looker = Looker()
    model, ema = made(), fk.EMA(0.9, callbacks=[looker, stopping], finalize=True)
    fit(model, ema, epochs=6, validation_data=(X, Y))
    assert stopping.stopped_epoch == 1
    assert same(model.weights, looker.seen["epoch"][0])


def test_averages_can_become_the_weights() -> None:
    model, ema, looker = made(), fk.EMA(0.9, finalize=True), Looker()
    fit(model, ema, looker)
    assert same(model.trainable_variables, ema.shadows)
    assert not same(looker.seen["epoch"][-1], looker.seen["end"][-1])
    model, ema = made(), fk.EMA(0.9)
    fit(model, ema)
    assert not same(model.trainable_variables, ema.shadows)
    ema.copy_to_()
    assert same(model.trainable_variables, ema.shadows)
    # jax would take over their memory.
    weights = model.get_weights()
    for shadow in ema.shadows:
        shadow += 1
    assert same(model.get_weights(), weights)


def test_state_goes_through_a_file() -> None:
    whole, parts, ema, first = made(), made(), fk.EMA(0.9), fk.EMA(0.9)
    for _ in range(2):
        fit(whole, ema)
    fit(parts, first)
    file = io.BytesIO()
    np.savez(file, **first.state_dict())
    file.seek(0)
    second = fk.EMA(0.9)
    with pytest.raises(RuntimeError, match="load_state_dict must be called with a built model"):
        second.load_state_dict(first.state_dict())
    second.set_model(parts)
    second.load_state_dict(np.load(file, allow_pickle=False))
    fit(parts, second)
    assert second.step == ema.step == 16
    assert same(second.shadows, ema.shadows)
    state = first.state_dict()
    for bad, text in (
        ({k: v for k, v in state.items() if k != "step"}, "a mapping with the key 'step'"),
        (state | {"shadow.9": state["shadow.0"]}, "a mapping without the key 'shadow.9'"),
        (state | {"shadow.0": state["shadow.1"]}, "state['shadow.0'] must be of shape (6, 8), got (8,)"),
        (state | {"updates": 99}, "state['updates'] must be an integer in [0, 8], got 99"),
    ):
        before = [s.copy() for s in second.shadows]
        with pytest.raises(ValueError, match=re.escape(text)):
            second.load_state_dict(bad)
        assert same(second.shadows, before)


def test_another_model_begins_anew() -> None:
    model, ema = made(), fk.EMA(0.9)
    fit(model, ema)
    other, recorder = made(keras.optimizers.SGD(0.1)), Recorder()
    fit(other, ema, recorder)
    assert ema.step == 8
    near(ema.shadows, by_hand(recorder.weights, lambda step: 0.9 if step > 1 else 0.0), 8)


def test_a_loop_of_ones_own() -> None:
    model, ema = made(), fk.EMA(0.9)
    ema.set_model(model)
    weights = []
    for i in range(4):
        model.train_on_batch(X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8])
        assert ema.update()
        weights.append([array(v) for v in model.trainable_variables])
    near(ema.shadows, by_hand(weights, lambda step: 0.9 if step > 1 else 0.0), 4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_dtypes(policy: str) -> None:
    if policy == "float64" and keras.backend.backend() == "jax":
        pytest.skip("jax has no float64 unless it is asked for")
    keras.config.set_dtype_policy(policy)
    try:
        model, ema, recorder = made(), fk.EMA(0.9), Recorder()
        fit(model, ema, recorder, validation_data=(X, Y))
        assert {s.dtype.name for s in ema.shadows} == {"float64" if policy == "float64" else "float32"}
        weights = [[w.astype(np.float64) for w in step] for step in recorder.weights]
        near(ema.shadows, by_hand(weights, lambda step: 0.9 if step > 1 else 0.0), 8)
        assert same(model.trainable_variables, recorder.weights[-1])
    finally:
        keras.config.set_dtype_policy("float32")


def test_several_steps_in_one_execution() -> None:
    if keras.backend.backend() == "torch":
        pytest.skip("Keras over torch has no steps_per_execution")
    model, ema = made(steps_per_execution=2), fk.EMA(0.9)
    fit(model, ema, validation_data=(X, Y))
    assert ema.step == 4


def test_two_averages_of_a_model() -> None:
    model, recorder = made(), Recorder()
    slow, fast = fk.EMA(0.9), fk.EMA(0.5, swap=False)
    fit(model, fast, slow, recorder, validation_data=(X, Y))
    for ema, decay in ((slow, 0.9), (fast, 0.5)):
        near(ema.shadows, by_hand(recorder.weights, lambda step, d=decay: d if step > 1 else 0.0), 8)  # type: ignore[misc]
    assert same(model.trainable_variables, recorder.weights[-1])
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="another EMA"):
        fit(model, fk.EMA(0.9), fk.EMA(0.5), recorder, validation_data=(X, Y))
    assert same(model.trainable_variables, recorder.weights[-1])


def test_evaluate_and_predict_of_the_user_are_left_to_a_context() -> None:
    model, ema = made(), fk.EMA(0.9)
    fit(model, ema)
    weights = model.get_weights()
    with pytest.raises(RuntimeError, match=r"averages in evaluate must be left to with ema.average_parameters\(\)"):
        model.evaluate(X, Y, verbose=0, callbacks=[ema])
    with pytest.raises(RuntimeError, match="averages in predict must be left to"):
        model.predict(X, verbose=0, callbacks=[ema])
    assert same(model.get_weights(), weights)
    with ema.average_parameters():
        model.evaluate(X, Y, verbose=0, callbacks=[ema])
        model.predict(X, verbose=0, callbacks=[ema])
        assert same(model.trainable_variables, ema.shadows)
    assert same(model.get_weights(), weights)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": 1.5}, "decay must be a finite number in [0, 1], got 1.5"),
        ({"decay": (0.9, 0.99)}, "decay must be a number or 'equal'"),
        ({"warmup": "power"}, "warmup must be 'none' or 'timm' or 'tf', got 'power'"),
        ({"update_every": 0}, "update_every must be an integer >= 1, got 0"),
        ({"update_after_step": -1}, "update_after_step must be an integer >= 0, got -1"),
        ({"buffers": "copy"}, "buffers must be 'skip' or 'average', got 'copy'"),
        ({"nonfinite": "drop"}, "nonfinite must be 'propagate' or 'skip', got 'drop'"),
        ({"swap": 1}, "swap must be True or False, got 1"),
        ({"finalize": None}, "finalize must be True or False, got None"),
        ({"callbacks": [3]}, "callbacks must be a list of Keras's callbacks, got 3"),
        (
            {"callbacks": keras.callbacks.ModelCheckpoint("x.keras", save_freq=5)},
            "save_freq of a ModelCheckpoint here must be 'epoch', got 5",
        ),
    ],
    ids=str,
)
def test_bad_options_say_what_is_wanted(options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        fk.EMA(**options)


def test_without_a_model() -> None:
    ema = fk.EMA()
    for call in (ema.update, ema.copy_to_, lambda: ema.average_parameters().__enter__()):
        with pytest.raises(RuntimeError, match="must be called with a built model"):
            call()
