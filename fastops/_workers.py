# SPDX-License-Identifier: BSD-3-Clause
"""Worker processes that cannot hang: a dead, stopped or failing worker ends the run with an error that names its item.

Every worker has a socket of its own, read and written without blocking, so that the parent always comes back to its clock; a
worker that loses its parent ends itself.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection, reduction
from typing import Any, Self, TypeVar, overload

from . import _validate
from ._rule import WorkerDied

T = TypeVar("T")
R = TypeVar("R")

_LENGTH = struct.Struct("<Q")
# What fits into the buffer of a socket whatever the kernel's accounting: a second item is sent ahead only up to here.
_AHEAD = 2**15
_TICK = 0.2
# Seconds that a worker may take to start, beside the timeout of its first item.
_START = 60.0
_GUARD = (
    "worker processes import the main module: code that starts them belongs under 'if __name__ == \"__main__\":', and "
    "functions that they run into a module"
)

# The parent's ends, which a forked worker must not keep open.
_parents: weakref.WeakSet[_Channel] = weakref.WeakSet()


class _Remote(Exception):
    """The traceback of a worker, as the cause of its error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._text = text

    def __str__(self) -> str:
        return f'\n"""\n{self._text}"""'


class _Handle:
    """A descriptor on its way to a process that is being started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_handle, (reduction.DupFd(self.fd),)


def _rebuild_handle(duplicate: Any) -> _Handle:
    return _Handle(duplicate.detach())


class _Channel:
    """The parent's end of a worker's socket: messages are a length and that many bytes."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self.closed = False
        _parents.add(self)

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def writing(self) -> bool:
        """Whether a message is not yet wholly sent."""
        return bool(self._out)

    @property
    def readable(self) -> bool:
        """Whether something has come that was not received yet."""
        poll = select.poll()
        poll.register(self._end.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def send(self, message: bytes) -> None:
        """Takes a message; `flush` sends it."""
        length = _LENGTH.pack(len(message))
        if len(message) < _AHEAD:
            self._out.append(memoryview(length + message))
        else:
            self._out += (memoryview(length), memoryview(message))
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now."""
        try:
            while self._out:
                sent = self._end.send(self._out[0])
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            pass
        except OSError:
            # The reading side sees the end.
            self._out.clear()

    def receive(self) -> Iterator[bytes]:
        """The messages that have come; sets `closed` at the end of the worker's side."""
        try:
            while not self.closed:
                piece = self._end.recv(2**18)
                self._in += piece
                self.closed = not piece
                if len(piece) < 2**18:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        while len(self._in) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._in)[0]
            if len(self._in) < end:
                break
            message = bytes(memoryview(self._in)[_LENGTH.size : end])
            del self._in[:end]
            yield message

    def close(self) -> None:
        _parents.discard(self)
        self._end.close()


class _Worker:
    """A process, its channel, and the items that were given to it and not answered yet, the one in work first."""

    def __init__(self, context: Any, number: int, shared: int | None) -> None:
        ours, theirs = socket.socketpair()
        try:
            self.channel = _Channel(ours)
            self.number = number
            self.shared = shared
            self.ready = False
            self.finished = False
            self.last = ""  # the item that it answered last
            self.items: deque[tuple[int, str, int]] = deque()
            self.since = time.monotonic()
            handles = _Handle(theirs.fileno()), None if shared is None else _Handle(shared)
            self.process = context.Process(target=_main, args=handles, name=f"fastops-{number}", daemon=True)
            self.process.start()
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()

    @property
    def ahead(self) -> int:
        """Bytes of items that may still lie in the socket."""
        return sum(size for _, _, size in self.items)

    def end(self) -> None:
        """Kills the process and waits for it."""
        with suppress(Exception):
            self.process.kill()
        # A killed process ends at once, but a disk that does not answer may hold it: it is left to the system then.
        self.process.join(2)
        # Its descriptors, which an exception's frames would keep open.
        with suppress(ValueError):
            self.process.close()
        self.channel.close()


def default_context() -> Any:
    """How workers are started: as `multiprocessing.set_start_method` says where that was called, else by spawn.

    A fork copies the locks of other threads as they are; NumPy's own libraries have threads from their import on.
    """
    return multiprocessing.get_context(multiprocessing.get_start_method(allow_none=True) or "spawn")


def check_main() -> None:
    """Refuses to start workers while a worker imports the main module."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(f"workers were to be started while a worker was being started: {_GUARD}")


def pickled(name: str, value: object) -> bytes:
    """`value` for a worker; a TypeError that says which argument cannot be sent."""
    try:
        return pickle.dumps(value, protocol=5)
    except Exception as problem:
        raise TypeError(
            f"{name} must be picklable to be sent to worker processes (a function of a module, not a lambda or a local "
            f"one): {_one_line(problem)}"
        ) from problem


def _one_line(problem: BaseException) -> str:
    return _validate.clip(f"{type(problem).__name__}: {problem}".partition("\n")[0], 160)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end: half a process, half started or half ended, would be left behind.

    A process that is started inside inherits that SIGINT is blocked, and cannot answer Ctrl-C with a traceback before it
    ignores it. To block it here does not do: another thread of the program may take the signal.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # Each of these calls may raise: it runs the handlers of other signals, such as that of an alarm.
    try:
        signal.signal(signal.SIGINT, lambda *about: came.append(about))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        finally:
            signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


class Crew:
    """Worker processes that run one job; a context manager that leaves none behind.

    Parameters
    ----------
    job : bytes
        A pickled object whose call with an item gives the result; `finish()`, where `tables` is true, gives bytes.
    workers : int
        How many processes.
    tables : bool
        Whether `tables()` will be asked: each worker gets anonymous memory to write its bytes to.
    timeout : float or None
        Seconds that one item may take.
    deadline : float or None
        When `time.monotonic()` ends the run.
    """

    def __init__(
        self,
        job: bytes,
        workers: int,
        *,
        tables: bool = False,
        timeout: float | None = None,
        deadline: float | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        check_main()
        self._job = job
        self._count = workers
        self._tables = tables
        self._timeout = timeout
        self._deadline = deadline
        self._tick = tick
        self._workers: list[_Worker] = []
        self._files: list[int] = []
        self._context = default_context()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with _uninterrupted():
            while self._workers:
                self._workers.pop().end()
            while self._files:
                os.close(self._files.pop())

    def _start(self) -> None:
        with _uninterrupted():
            shared = None
            if self._tables:
                shared = _anonymous()
                self._files.append(shared)
            unset = multiprocessing.get_start_method(allow_none=True) is None
            try:
                worker = _Worker(self._context, len(self._workers) + 1, shared)
                self._workers.append(worker)
            finally:
                # To start one by spawn settles multiprocessing's own default, fork, as if the program had asked for it.
                if unset:
                    multiprocessing.set_start_method(None, force=True)
        worker.channel.send(self._job)

    def run(
        self, items: Iterator[tuple[str, bytes]], most: Callable[[int], bool] = lambda index: True
    ) -> Iterator[tuple[int, bytes]]:
        """Gives out the items, each with its name; yields the answers with the items' numbers as they come.

        `most(index)` says whether item `index` may be given out yet.
        """
        given = 0
        more = True
        held: tuple[str, bytes] | None = None
        while True:
            while more and most(given):
                if held is None:
                    # Not before somebody can take it, and no worker is started before there is something for it.
                    if len(self._workers) == self._count and self._free(0) is None:
                        break
                    held = next(items, None)
                    if held is None:
                        more = False
                        break
                worker = self._free(len(held[1]))
                if worker is None:
                    break
                label, item = held
                held = None
                if not worker.items:
                    worker.since = time.monotonic()
                worker.items.append((given, label, len(item)))
                worker.channel.send(b"i" + item)
                given += 1
            if not more and not any(worker.items for worker in self._workers):
                return
            yield from self._answers()

    def _free(self, size: int) -> _Worker | None:
        """The worker to give an item to; one more is started where all are busy."""
        for worker in self._workers:
            if not worker.items and not worker.channel.writing:
                return worker
        if len(self._workers) < self._count:
            self._start()
            return self._workers[-1]
        best = min(self._workers, key=lambda worker: len(worker.items))
        small = len(best.items) < 8 and best.ahead + size < _AHEAD
        return best if small and best.ready and not best.channel.writing else None

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        """Waits a while and yields the answers that have come."""
        for worker, message in self._wait():
            kind, body = message[:1], message[1:]
            if kind == b"r":
                worker.ready = True
                worker.since = time.monotonic()
                continue
            index, label, _ = worker.items.popleft() if worker.items else (-1, self._end(worker), 0)
            worker.last = label
            worker.since = time.monotonic()
            if kind == b"e":
                raise _error(body, label)
            yield index, body

    def _wait(self) -> Iterator[tuple[_Worker, bytes]]:
        wait = _TICK if self._tick is None else 0.1
        now = time.monotonic()
        if self._deadline is not None:
            wait = min(wait, self._deadline - now)
        wait = min([wait, *(self._due(worker) - now for worker in self._workers if worker.items)])
        _ready([worker.channel for worker in self._workers if not worker.finished], max(wait, 0.0))
        if self._tick is not None:
            self._tick()
        for worker in self._workers:
            if worker.finished:
                continue
            worker.channel.flush()
            # Whether it lived is asked first: what it sent before its end is then in the socket.
            dead = not worker.process.is_alive()
            for message in worker.channel.receive():
                yield worker, message
            if dead or worker.channel.closed:
                raise self._died(worker)
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            if self._tick is not None:
                self._tick()  # whose clock it is, in its own words
            raise TimeoutError("the run took longer than its timeout")
        for worker in self._workers:
            # Its answer may lie there: this process did something else meanwhile, with the answers before it say.
            if worker.items and now >= self._due(worker) and not worker.channel.readable:
                raise TimeoutError(f"{worker.items[0][1]} took longer than {self._timeout:g} s")

    def _due(self, worker: _Worker) -> float:
        """When the item in work has taken too long."""
        if self._timeout is None:
            return math.inf
        return worker.since + self._timeout + (0 if worker.ready else _START)

    def _died(self, worker: _Worker) -> WorkerDied:
        worker.process.join(1)
        code = worker.process.exitcode
        how = "ended"
        if code is not None:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if not worker.ready:
            hint = f" ({_GUARD})" if code is not None and code > 0 else ""
            return WorkerDied(f"worker {worker.number} {how} while it started{hint}")
        at = worker.items[0][1] if worker.items else self._end(worker)
        return WorkerDied(f"worker {worker.number} {how} at {at}")

    @staticmethod
    def _end(worker: _Worker) -> str:
        return f"the end of its work, after {worker.last}" if worker.last else "the end of its work"

    def tables(self) -> Iterator[mmap.mmap]:
        """After `run`: asks every worker for its bytes; yields them as memory maps, each valid until the next is asked for."""
        for worker in self._workers:
            worker.items.append((-1, self._end(worker), 0))
            worker.since = time.monotonic()
            worker.channel.send(b"t")
        sizes: dict[int, int] = {}
        while len(sizes) < len(self._workers):
            for worker, message in self._wait():
                kind, body = message[:1], message[1:]
                if kind == b"r":
                    worker.ready = True
                    continue
                if kind == b"e":
                    raise _error(body, self._end(worker))
                worker.items.clear()
                worker.finished = True
                sizes[worker.number] = _LENGTH.unpack(body)[0]
        for worker in self._workers:
            size = sizes[worker.number]
            if size and worker.shared is not None:
                with mmap.mmap(worker.shared, size, prot=mmap.PROT_READ) as memory:
                    yield memory

    def close(self) -> None:
        """Lets the workers end by themselves, and sees that they do."""
        for worker in self._workers:
            worker.channel.send(b"q")
        for worker in self._workers:
            worker.process.join(1)


def _ready(channels: list[_Channel], seconds: float) -> None:
    """Waits until a channel can be read, or written where something waits to be sent."""
    poll = select.poll()
    for channel in channels:
        poll.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.writing else 0))
    poll.poll(int(seconds * 1000) + 1 if seconds else 0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _anonymous() -> int:
    """A descriptor of memory without a name, or of a file without one."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            return os.memfd_create("fastops", os.MFD_CLOEXEC)
    import tempfile

    with tempfile.TemporaryFile(prefix="fastops-") as file:
        return os.dup(file.fileno())


def _error(body: bytes, label: str) -> BaseException:
    """What a worker raised, its traceback as the cause and the item's name as a note."""
    packed, kind, text, trace = pickle.loads(body)
    error: BaseException | None = None
    if packed is not None:
        with suppress(Exception):
            error = pickle.loads(packed)
    if not isinstance(error, BaseException):
        error = RuntimeError(f"{kind}: {text}")
    if isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration)):
        # These would end more than the run, or less.
        error = RuntimeError(f"{kind}: {text}" if text else kind)
    error.__cause__ = _Remote(trace)
    error.add_note(f"in a worker process, at {label}")
    return error


# The worker's side.


def _main(end: _Handle, shared: _Handle | None) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # A fork has the parent's ends of all channels, which would hide its end from the others.
    for other in list(_parents):
        other.close()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()
    with socket.socket(fileno=end.fd) as channel:
        try:
            _serve(channel, shared)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            os._exit(1)


def _watch(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _serve(channel: socket.socket, shared: _Handle | None) -> None:
    first = _read(channel)
    try:
        job = pickle.loads(first)
        del first
    except BaseException as problem:  # noqa: BLE001 (the parent raises it)
        _write(channel, b"r")
        _read(channel)
        wrong = TypeError(f"the function cannot be loaded in a worker process ({_one_line(problem)}): {_GUARD}")
        wrong.__cause__ = problem
        _write(channel, b"e" + _packed_error(wrong))
        return
    _write(channel, b"r")
    while True:
        message = _read(channel)
        kind, body = message[:1], message[1:]
        del message
        if kind == b"q":
            return
        try:
            answer = _LENGTH.pack(_hand_over(job.finish(), shared)) if kind == b"t" else job(body)
        except BaseException as problem:  # noqa: BLE001 (the parent raises it)
            _write(channel, b"e" + _packed_error(problem))
            return
        _write(channel, b"a" + answer)
        del answer


def _hand_over(table: bytes, shared: _Handle | None) -> int:
    if shared is None:
        raise RuntimeError("no memory to hand a table over")
    view = memoryview(table).cast("B")
    at = 0
    while at < len(view):
        at += os.pwrite(shared.fd, view[at : at + 2**30], at)
    return len(view)


def _packed_error(problem: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(problem))
    packed = None
    with suppress(Exception):
        packed = pickle.dumps(problem)
        pickle.loads(packed)
    try:
        text = str(problem)
    except Exception:  # noqa: BLE001 (an exception's own methods may fail)
        text = "(its text cannot be had)"
    try:
        return pickle.dumps((packed, type(problem).__name__, text, trace))
    except Exception:  # noqa: BLE001 (surrogates cannot be pickled)
        return pickle.dumps((None, type(problem).__name__, ascii(text), ascii(trace)))


def _read(channel: socket.socket) -> bytes:
    size = _LENGTH.unpack(_exactly(channel, _LENGTH.size))[0]
    return bytes(_exactly(channel, size))


def _exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = channel.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _write(channel: socket.socket, message: bytes) -> None:
    length = _LENGTH.pack(len(message))
    if len(message) < _AHEAD:
        channel.sendall(length + message)  # comes whole, whenever the worker is stopped
    else:
        channel.sendall(length)
        channel.sendall(message)


class _Apply:
    """The job of `parallel_apply`."""

    def __init__(self, func: Callable[[Any], Any]) -> None:
        self._func = func

    def __call__(self, item: bytes) -> bytes:
        result = self._func(pickle.loads(item))
        try:
            return pickle.dumps(result, protocol=5)
        except Exception as problem:
            raise TypeError(f"the result must be picklable to be sent back: {_one_line(problem)}") from problem


def _items(iterable: Iterable[Any]) -> Iterator[tuple[str, bytes]]:
    for index, item in enumerate(iterable):
        yield f"item {index}", pickled(f"item {index}", item)


@overload
def parallel_apply(
    func: Callable[[T], R],
    iterable: Iterable[T],
    workers: int | None = None,
    *,
    callback: None = None,
    ordered: bool = False,
    timeout: float | None = None,
) -> Iterator[R]: ...
@overload
def parallel_apply(
    func: Callable[[T], R],
    iterable: Iterable[T],
    workers: int | None = None,
    *,
    callback: Callable[[R], object],
    ordered: bool = False,
    timeout: float | None = None,
) -> None: ...
def parallel_apply(
    func: Callable[[T], R],
    iterable: Iterable[T],
    workers: int | None = None,
    *,
    callback: Callable[[R], object] | None = None,
    ordered: bool = False,
    timeout: float | None = None,
) -> Iterator[R] | None:
    """Apply a function to every item in worker processes, without a way to hang.

    Parameters
    ----------
    func : callable
        Called with one item in a worker; found there by its module and name, so no lambda and no local function.
    iterable : iterable
        The items, read as they are needed: a few for each worker are held at a time.
    workers : int, optional
        How many processes; by default the CPUs that this process may use.
    callback : callable, optional
        Called in this process with every result; nothing is returned then.
    ordered : bool
        Results in the order of the items instead of as they come.
    timeout : float, optional
        Seconds that one item may take in its worker.

    Returns
    -------
    iterator or None
        Of the results. Closing it, or an exception where it is used, ends the workers.

    Raises
    ------
    TypeError
        `func`, an item or a result that cannot be pickled.
    WorkerDied
        A worker that was killed or that ended, within 2 s; names its item.
    TimeoutError
        An item that took longer than `timeout`.
    Exception
        What `func` raised, with the worker's traceback as its cause and a note that names the item.

    Notes
    -----
    Processes are started as `multiprocessing.set_start_method` says, else by spawn, which is safe beside threads; they import
    the main module, so a script's own code belongs under ``if __name__ == "__main__":``. Ctrl-C ends them, and so does the end
    of this process, however it comes. An item costs about 0.1 ms beside its pickling: make items of that size or more.

    The function's shape is that of `parallel_apply` in bert4keras (J. Su, 2019), whose pool waits for ever after an
    exception in `func`.

    Examples
    --------
    >>> import math
    >>> from fastops import parallel_apply
    >>> list(parallel_apply(math.sqrt, [1, 4, 9], 2, ordered=True))
    [1.0, 2.0, 3.0]
    """
    if not callable(func):
        raise _validate.wrong_type("func", "callable", func)
    if not isinstance(iterable, Iterable):
        raise _validate.wrong_type("iterable", "an iterable", iterable)
    count = (
        _validate.default_workers()
        if workers is None
        else _validate.integer("workers", workers, 1, _validate.MAX_THREADS)
    )
    if callback is not None and not callable(callback):
        raise _validate.wrong_type("callback", "callable or None", callback)
    ordered = _validate.boolean("ordered", ordered)
    if timeout is not None:
        timeout = _validate.number("timeout", timeout, 0, open_low=True)
    check_main()
    job = pickled("func", _Apply(func))
    results = _results(job, iterable, count, ordered, timeout)
    if callback is None:
        return results
    with closing(results):
        for result in results:
            callback(result)
    return None


def _results(
    job: bytes, iterable: Iterable[Any], workers: int, ordered: bool, timeout: float | None
) -> Generator[Any, None, None]:
    due = 0
    early: dict[int, bytes] = {}

    def may(index: int) -> bool:
        # What waits for an earlier result is bounded too.
        return not ordered or index < due + 8 * workers

    with Crew(job, workers, timeout=timeout) as crew:
        for index, answer in crew.run(_items(iterable), may):
            if not ordered:
                yield _loaded(index, answer)
                continue
            early[index] = answer
            while due in early:
                yield _loaded(due, early.pop(due))
                due += 1
        crew.close()


def _loaded(index: int, answer: bytes) -> Any:
    try:
        return pickle.loads(answer)
    except Exception as problem:
        raise TypeError(f"the result of item {index} cannot be unpickled: {_one_line(problem)}") from problem
