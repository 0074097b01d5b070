# SPDX-License-Identifier: BSD-3-Clause
"""Lists of tensors that other threads change under a call, and lists of very many tensors."""

from __future__ import annotations

from child import once, run

pytestmark = once


def test_lists_that_change_under_a_call() -> None:
    """Elements dropped, replaced and appended: an error or any values, never memory that is gone."""
    code = """
    import threading
    stop, wrong = threading.Event(), []
    def fresh(k=0):
        return np.full(20_000, k, np.float32)
    shadows, params = [fresh() for _ in range(40)], [fresh(1) for _ in range(40)]
    def change():
        k = 0
        while not stop.is_set():
            k += 1
            i = k % 40
            shadows[i], params[i] = fresh(), fresh(1)
            if k % 7 == 0:
                shadows.append(fresh())
                params.append(fresh(1))
                shadows.pop(), params.pop()
    def use():
        while not stop.is_set():
            try:
                fastops.ema_update_(shadows, params, 0.5)
            except (ValueError, RuntimeError) as error:
                if "must be" not in str(error) and "must stay" not in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)
    threads = [threading.Thread(target=f) for f in (change, use, use)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert len(shadows) == len(params) == 40
    assert all(0 <= x.min() and x.max() <= 1 for x in shadows)
    """
    run(code)


def test_contents_that_change_under_a_call() -> None:
    code = """
    import threading
    stop = threading.Event()
    lists = [[np.ones(n, np.float32) for n in (300_000, 5, 70_000)] for _ in range(4)]
    def write():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            for items in lists:
                for x in items:
                    x[:] = rng.random(1)
    thread = threading.Thread(target=write)
    thread.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        fastops.adamw_step_(*lists, step=1, lr=0.1)
    stop.set()
    thread.join()
    for items in lists:
        for x in items:
            x[:] = 1
    fresh = [[np.ones_like(x) for x in items] for items in lists]
    for values in (lists, fresh):
        fastops.adamw_step_(*values, step=1, lr=0.1)
    assert all(np.array_equal(x, y) for i, j in zip(lists, fresh) for x, y in zip(i, j))
    """
    run(code)


def test_a_hundred_thousand_tensors() -> None:
    code = """
    n = 100_000
    block, other = np.zeros((n, 3), np.float32), np.ones((n, 3), np.float32)
    shadows, params = list(block), list(other)
    start = time.monotonic()
    fastops.ema_update_(shadows, params, 0.5)
    plans = fastops.TensorList(shadows), fastops.TensorList(params)
    for _ in range(3):
        fastops.ema_update_(*plans, 0.5)
    fastops.ema_update_(shadows, params, [0.5] * n)
    assert time.monotonic() - start < 20
    assert (block == 1 - 0.5**5).all()
    shadows[n // 2] = shadows[3]
    before = block.copy()
    try:
        fastops.ema_update_(shadows, params, 0.5)
        raise SystemExit("not refused")
    except ValueError as error:
        assert "shadows[50000]" in str(error) or "shadows[3]" in str(error), error
    assert (block == before).all()
    """
    run(code)


def test_an_array_that_frees_itself_in_the_call() -> None:
    """The last reference of a tensor dropped by the call runs code that calls again."""
    code = """
    class Last(np.ndarray):
        def __del__(self):
            fastops.ema_update_([np.zeros(3, np.float32)], [np.ones(3, np.float32)], 0.5)
    for _ in range(50):
        def items():
            yield np.zeros(3, np.float32).view(Last)
        fastops.ema_update_(items(), [np.ones(3, np.float32)], 0.5)
        fastops.ema_update_([np.zeros(3, np.float32).view(Last)], [np.ones(3, np.float32)], 0.5)
    """
    run(code)
