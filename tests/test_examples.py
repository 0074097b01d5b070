# SPDX-License-Identifier: BSD-3-Clause
"""The programs of examples/ run as a user would run them, and show what they promise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tolerance

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines(program: str, picture: Path) -> list[str]:
    """What a program prints in 12 epochs, with its plot drawn."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = [sys.executable, str(EXAMPLES / program), "--epochs", "12", "--plot", str(picture)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_approximate_network_accuracy_near_exact(tmp_path: Path) -> None:
    picture = tmp_path / "error.svg"
    header, *rows = lines("approximate_network.py", picture)
    assert header.split() == ["multiplication", "accuracy", "points", "time", "x", "exact"]
    accuracy = {row[:24].strip(): float(row[24:].split()[0]) for row in rows}
    assert list(accuracy) == [
        "exact",
        "Mitchell",
        "Mitchell, min-mse",
        "L-Mul",
        "8-bit table, exact",
        "8-bit table, Mitchell",
    ]
    # Chance is 10 %; a network that did not learn would agree with anything.
    assert accuracy["exact"] > 93
    for name, value in accuracy.items():
        assert abs(value - accuracy["exact"]) <= tolerance.ACCURACY_POINTS, name
    assert picture.read_text(encoding="utf-8").count("<image") >= 3


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The program sets it where it is not set; the other tests must not see that.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    spec = importlib.util.spec_from_file_location("approximate_network", EXAMPLES / "approximate_network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_error_surface_within_one_ninth(network: ModuleType) -> None:
    surface = network.error_surface(network.MULTIPLIERS["Mitchell"], points=64)
    assert surface.shape == (64, 64)
    np.testing.assert_array_equal(surface, surface.T)
    assert -100 / 9 <= surface.min() < -11
    assert -0.1 < surface.max() <= tolerance.ENUMERATED


def test_signed_table_is_the_integer_product_with_sign(network: ModuleType) -> None:
    table = network.signed_table(network.MULTIPLIERS["Mitchell"])
    # 16 is a power of two: exact. 200 * 3 = 2^7 (1 + 72/128) 2 (1 + 1/2) -> 2^9 (1 + (72/128 + 1/2 - 1)) = 544.
    assert table[16, 5] == 80
    assert table[16, 256 - 5] == -80
    assert table[200, 3] == 544
    assert table[200, 256 - 3] == -544
    assert not table[0].any()
    assert not table[:, 0].any()


def test_moving_average_beats_the_raw_weights(tmp_path: Path) -> None:
    picture = tmp_path / "accuracy.svg"
    header, *rows = lines("moving_average.py", picture)
    assert header.split() == ["epoch", "raw", "average"]
    assert [row.split()[0] for row in rows[:-2]] == ["1", "2", "3", "4", "5", "10", "12"]
    mean = {name: float(text.split()[0]) for name, text in (row.split(": ") for row in rows[-2:])}
    # Chance is 10 %; a network that did not learn would agree with anything.
    assert mean["raw weights"] > 85
    assert mean["moving average"] >= mean["raw weights"] + tolerance.AVERAGE_GAIN
    assert picture.read_text(encoding="utf-8").count("<path") > 10


def long_context(*arguments: str) -> list[str]:
    """What the program prints."""
    command = [sys.executable, str(EXAMPLES / "long_context.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_long_context_compares_linear_with_softmax(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "attention.svg"
    title, header, *rows = long_context("--length", "1500", "--shortest", "256", "--plot", str(picture))
    assert title.startswith("1500 bytes, 4 heads of 64")
    assert header.split() == ["bytes", "linear", "ms", "MiB", "softmax", "ms", "MiB", "faster", "apart"]
    assert [int(row.split()[0]) for row in rows] == [256, 512, 1024, 1500]
    for row in rows:
        _, linear, _, softmax, _, faster, apart = map(float, row.split())
        half = tolerance.printed(1)  # of the last digit of all three
        assert (softmax - half) / (linear + half) - half <= faster <= (softmax + half) / max(linear - half, 1e-9) + half
        # Both are averages of the same values, by other weights: neither the same nor strangers.
        assert 0.05 < apart < 1
    assert picture.read_text(encoding="utf-8").count("<path") > 10


def test_long_context_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"to be or not to be, " * 20)
    title, _, row = long_context(str(path), "--shortest", "400")
    assert title.startswith("400 bytes")
    assert row.split()[0] == "400"


def nystrom_error(*arguments: str) -> list[list[str]]:
    """The words of each line that the program prints."""
    command = [sys.executable, str(EXAMPLES / "nystrom_error.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    return [line.replace("|", " ").split() for line in run.stdout.splitlines()]


def test_nystrom_error_falls_with_landmarks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "error.svg"
    title, header, *rows = nystrom_error("--length", "512", "--steps", "40", "--plot", str(picture))
    assert title[:2] == ["40", "steps"]
    # 8 bits and more at first; those that know how often each byte is need about 4.6.
    assert float(title[title.index("to") + 1]) < float(title[title.index("from") + 1]) - 1
    assert header[:6] == ["mean", "m=8", "m=16", "m=32", "m=64", "m=128"]
    assert [row[:2] for row in rows[::2]] == [["layer", "0"], ["layer", "1"]]
    assert [row[0] for row in rows[1::2]] == ["ridge"] * 2
    errors = np.array([[float(x) for x in row[2:]] for row in rows[::2]])
    mean, landmarks, steps = errors[:, 0], errors[:, 1:6], errors[:, 6:]
    assert (landmarks[:, -1] < landmarks[:, 0]).all()
    assert (landmarks[:, 3] < mean).all()
    # The same call: 64 landmarks and six steps.
    six = header.index("it=6") - 6
    np.testing.assert_array_equal(landmarks[:, 3], steps[:, six])
    assert (steps[:, six] < steps[:, 0]).all()
    assert picture.read_text(encoding="utf-8").count("<path") > 10


def test_nystrom_error_learns_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab" * 1000)
    title, *_ = nystrom_error("--length", "256", "--steps", "10", "--text", str(path))
    assert title[:4] == ["10", "steps", "on", "1744"]


def test_nystrom_gradients_of_the_example_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each matrix of weights along the step that lowers the loss most."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    spec = importlib.util.spec_from_file_location("nystrom_error", EXAMPLES / "nystrom_error.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 20, np.uint8)
    found: list[list[np.ndarray]] = []

    def keep(weights: list[np.ndarray], gradients: list[np.ndarray], *_: object, **__: object) -> None:
        found.append([g.copy() for g in gradients])

    monkeypatch.setattr(example.fastops, "adamw_step_", keep)
    model = example.Encoder(256, np.random.default_rng(1))
    model.weights = [w.astype(np.float64) for w in model.weights]

    def loss() -> float:
        bits: float = model.learn(text, 0.0, np.random.default_rng(2))
        return bits * float(np.log(2))

    loss()
    for w, g in zip(model.weights, found[0], strict=True):
        size = float(np.linalg.norm(g))
        assert size > 0
        ends = []
        for step in (1e-4, -2e-4):
            w += step * g / size
            ends.append(loss())
        w += 1e-4 * g / size
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-4, size, rtol=tolerance.EXAMPLE_SLOPE)


def test_nystrom_error_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "qkv.npz"
    np.savez(path, first=np.random.default_rng(0).standard_normal((3, 2, 300, 16)).astype(np.float16))
    title, _, row, _ = nystrom_error(str(path), "--length", "280")
    assert title[:2] == ["q,", "k"]
    assert row[0] == "first"


def test_nystrom_error_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.npz"
    wanted = f"nystrom_error.py: error: {wrong} must be an .npz of arrays (3, heads, tokens, numbers) of floats, got"
    good = np.zeros((3, 2, 300, 16), np.float32)
    np.savez(tmp_path / "good.npz", x=good)
    whole = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "one.npy", good)
    cases: list[tuple[bytes | dict[str, np.ndarray], str]] = [
        (b"no archive", "another kind of file"),
        (b"", "another kind of file"),
        (whole[: len(whole) // 2], "another kind of file"),
        ((tmp_path / "one.npy").read_bytes(), "another kind of file"),
        ({}, "none"),
        ({"q": good[0]}, "'q' of shape (2, 300, 16) and dtype float32"),
        ({"qkv": good[:2]}, "'qkv' of shape (2, 2, 300, 16) and dtype float32"),
        ({"qkv": good.astype(int)}, "'qkv' of shape (3, 2, 300, 16) and dtype int64"),
        ({"qkv": np.array([None])}, "another kind of file"),
    ]
    for content, got in cases:
        if isinstance(content, bytes):
            wrong.write_bytes(content)
        else:
            np.savez(wrong, **content)  # type: ignore[arg-type]
        command = [sys.executable, str(EXAMPLES / "nystrom_error.py"), str(wrong)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 2
        assert run.stderr.splitlines()[-1] == f"{wanted} {got}"


def with_torch(program: str, *arguments: str) -> list[str]:
    """What a program that needs torch prints, on one thread."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = [sys.executable, "-W", "error", str(EXAMPLES / program), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_language_model_learns_and_its_average_is_better(tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    header, *rows, given, continued = with_torch("language_model.py", "--steps", "200", "--plot", str(picture))
    assert header.split() == ["step", "raw", "average", "seconds"]
    table = np.array([[float(x) for x in row.split()] for row in rows])
    assert table[:, 0].tolist() == list(range(20, 201, 20))
    raw, average = table[:, 1], table[:, 2]
    # Bytes of text drawn one by one, from their frequencies alone, need some 4.6 bits.
    assert raw[-1] < 3.5
    assert (np.diff(average) < 0).all()
    # An average begins late and ends ahead.
    assert average[0] > raw[0]
    assert average[-1] < raw[-1]
    assert given.startswith("given:")
    assert len(continued) > 50
    assert picture.read_text(encoding="utf-8").count("<path") > 10


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_keras_attention_maps_show_where_each_row_looks(tmp_path: Path, framework: str) -> None:
    for name in ("keras", "matplotlib", framework):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    picture = tmp_path / "maps.svg"
    command = [sys.executable, str(EXAMPLES / "keras_attention_maps.py"), "--plot", str(picture)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KERAS_BACKEND": framework}
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert run.returncode == 0, run.stderr
    header, *rows = run.stdout.splitlines()
    assert header.split() == ["attention", "accuracy", "averaged", "on", "target", "to", "functions"]
    found = {row.split()[0]: [float(x.rstrip("%")) for x in row.split()[1:]] for row in rows}
    assert list(found) == ["softmax", "linear", "Nystrom"]
    for accuracy, averaged, on_target, apart in found.values():
        # Chance is 10 %, and a row that looks everywhere has 1/24 on its target.
        assert min(accuracy, averaged) > 80
        assert on_target > 0.3
        assert apart <= tolerance.KERAS_LAYER
    assert found["softmax"][2] > found["linear"][2]
    assert picture.read_text(encoding="utf-8").count("<image") >= 6


def test_language_model_wants_enough_text(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "text"
    path.write_bytes(b"to be or not to be")
    command = [sys.executable, str(EXAMPLES / "language_model.py"), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 2
    assert "text must be of at least 2560 bytes, got 18" in run.stderr


def test_mitchell_cnn_keeps_its_accuracy_and_learns_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    picture = tmp_path / "retraining.svg"
    arguments = ("--epochs", "8", "--retrain", "2", "--plot", str(picture))
    exact, header, *rows = with_torch("mitchell_cnn.py", *arguments)
    accuracy = float(exact.split()[3])
    # Chance is 10 %; a network that did not learn would agree with anything.
    assert accuracy > 93
    assert header.split() == ["multiplier", "converted", "loss", "retrained", "loss"]
    found = {row[:26].strip(): [float(x) for x in row[26:].split()] for row in rows}
    assert list(found) == ["Mitchell", "Mitchell, min-mse", "Mitchell, 2-bit mantissas", "Mitchell, 1-bit mantissas"]
    for name in ("Mitchell", "Mitchell, min-mse"):
        converted, _, retrained, _ = found[name]
        assert abs(converted - accuracy) <= tolerance.ACCURACY_POINTS
        assert abs(retrained - accuracy) <= tolerance.ACCURACY_POINTS
    # The coarsest loses most, and wins most of it back.
    losses = [row[1] for row in found.values()]
    assert losses[3] == max(losses)
    assert found["Mitchell, 1-bit mantissas"][3] < 0.8 * losses[3]
    assert picture.read_text(encoding="utf-8").count("<path") > 10
