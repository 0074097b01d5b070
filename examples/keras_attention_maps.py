# SPDX-License-Identifier: BSD-3-Clause
"""What a layer of attention looks at, read out of a trained Keras model, and any other variable of it.

    python keras_attention_maps.py --plot maps.png

Models with one layer of attention each (softmax, linear, Nystrom) learn to read digits backwards, so row i has to look at row
n - 1 - i. A second model over the same tensors then gives what the first one computes on its way, the input of the layer, its queries
and keys, and the layer, called once more, its matrix of weights. Nothing is trained or copied for it, and the first model stays as it is. KERAS_BACKEND says
over which backend (torch where it is installed, else jax). Needs matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

# Keras reads it when it is imported.
os.environ.setdefault("KERAS_BACKEND", "torch" if importlib.util.find_spec("torch") else "jax")

import keras
import numpy as np
import numpy.typing as npt

import fastops
import fastops.keras as fk

Array = npt.NDArray[Any]

DIGITS, WIDTH, HEADS = 10, 48, 2
LAYERS = {
    "softmax": lambda: fk.SoftmaxAttention(HEADS, WIDTH // HEADS, name="attention"),
    "linear": lambda: fk.LinearAttention(HEADS, WIDTH // HEADS, feature_map="exp", name="attention"),
    "Nystrom": lambda: fk.NystromAttention(HEADS, WIDTH // HEADS, num_landmarks=8, name="attention"),
}


@keras.saving.register_keras_serializable("examples")
class Positions(keras.layers.Layer):
    """Adds a learned row for each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.rows = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.5))

    def call(self, x: Any) -> Any:
        return x + self.rows


def reader_of_digits(kind: str, length: int) -> keras.Model:
    """Digits in, the logits of digits out."""
    tokens = keras.Input((length,), dtype="int32")
    x = Positions(name="positions")(keras.layers.Embedding(DIGITS, WIDTH)(tokens))
    x = LAYERS[kind]()(x)
    model = keras.Model(tokens, keras.layers.Dense(DIGITS)(x), name=kind)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def what_is_inside(model: keras.Model, tokens: Array) -> dict[str, Array]:
    """What the model computes on its way, its rows, queries and keys, and the weights of its attention."""
    layer = model.get_layer("attention")
    x = (
        layer.input
    )  # a tensor of the model, as any layer's input and output are; and parts of a layer can be called on it again
    inner = keras.Model(model.input, {"rows": x, "queries": layer.query_dense(x), "keys": layer.key_dense(x)})
    found = inner.predict(tokens, verbose=0)
    # The layer itself, called on numbers. (Keras's models want as many results of a layer's second call as of its first.)
    _, scores = layer(found["rows"], return_attention_scores=True)
    return {**found, "scores": keras.ops.convert_to_numpy(scores)}


def matrix(kind: str, q: Array, k: Array) -> Array:
    """The same weights by fastops' own functions: the attention of a unit matrix, whose rows are the values."""
    unit = np.broadcast_to(np.eye(k.shape[1], dtype=k.dtype)[:, None], (*k.shape[:3], k.shape[1]))
    if kind == "softmax":
        y = fastops.softmax_attention(q, k, unit, layout="bnhd")
    elif kind == "linear":
        y = fastops.linear_attention(q, k, unit, feature_map="exp", layout="bnhd")
    else:
        y = fastops.nystrom_attention(q, k, unit, num_landmarks=8, layout="bnhd")
    return y.swapaxes(1, 2)


def draw(maps: dict[str, Array], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(HEADS, len(maps), figsize=(3 * len(maps) + 1, 3 * HEADS), layout="constrained")
    high = max(float(scores.max()) for scores in maps.values())
    for column, (name, scores) in zip(axes.T, maps.items(), strict=True):
        for head, axis in enumerate(column):
            image = axis.imshow(scores[head], cmap="magma_r", vmin=0.0, vmax=high)
            axis.set(title=f"{name}, head {head}", xlabel="looks at row", ylabel="row")
            axis.label_outer()
    figure.colorbar(image, ax=axes, label="weight (negative ones, which Nystrom's can be, as 0)", shrink=0.6)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=24, help="digits (24)")
    parser.add_argument("--epochs", type=int, default=5, help="of 32 batches (5)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the weights to an SVG or PNG file")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, DIGITS, (n, arguments.length), dtype=np.int32) for n in (2048, 256))
    print(f"{'attention':10} {'accuracy':>9} {'averaged':>9} {'on target':>10} {'to functions':>13}")
    maps = {}
    for kind in LAYERS:
        model, ema = reader_of_digits(kind, arguments.length), fk.EMA(0.97)
        model.fit(train, train[:, ::-1], batch_size=64, epochs=arguments.epochs, verbose=0, callbacks=[ema])
        accuracy = model.evaluate(test, test[:, ::-1], verbose=0)[1]
        with ema.average_parameters():  # all that follows reads the averaged weights
            averaged = model.evaluate(test, test[:, ::-1], verbose=0)[1]
            inside = what_is_inside(model, test)
        scores = inside["scores"]
        on_target = np.flip(scores, -1).diagonal(axis1=-2, axis2=-1).mean()
        apart = np.abs(scores - matrix(kind, inside["queries"], inside["keys"])).max()
        print(f"{kind:10} {accuracy:9.1%} {averaged:9.1%} {on_target:10.3f} {apart:13.1e}", flush=True)
        maps[kind] = scores.mean(0)
    if arguments.plot is not None:
        draw(maps, arguments.plot)


if __name__ == "__main__":
    main()
