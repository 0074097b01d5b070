# SPDX-License-Identifier: BSD-3-Clause
# Types of the compiled module.

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._rule import Rule

_Array: TypeAlias = NDArray[Any]
_Spec: TypeAlias = tuple[int, int, int, int, int, float, tuple[float, ...]]
_Pair: TypeAlias = tuple[int, int]

def abi_version() -> int: ...
def compiled_targets() -> list[str]: ...
def targets() -> list[str]: ...
def get_target() -> str: ...
def set_target(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def default_num_threads() -> int: ...
def cpu_info() -> dict[str, Any]: ...
def register_bfloat16(dtype_type: type) -> None: ...
def make_ufunc(op: str, name: str, doc: str, spec: _Spec) -> np.ufunc: ...
def ufunc_of_tensors(ufunc: Any, a: Any, b: Any) -> Any: ...
def matmul(a: _Array, b: _Array, spec: _Spec, out: _Array) -> None: ...
def exact_matmul(a: _Array, b: _Array, out: _Array) -> None: ...
def matmul_grad(a: _Array, b: _Array, dy: _Array, spec: _Spec, mode: int, da: _Array, db: _Array) -> None: ...
def conv2d(
    x: _Array, w: _Array, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, spec: _Spec, out: _Array
) -> None: ...
def conv2d_grad(
    x: _Array,
    w: _Array,
    dy: _Array,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    groups: int,
    spec: _Spec,
    mode: int,
    dx: _Array,
    dw: _Array,
) -> None: ...
def lut_matmul(a: _Array, b: _Array, table: _Array, out: _Array) -> None: ...
def mul_grad(a: _Array, b: _Array, dy: _Array, spec: _Spec, mode: int, da: _Array, db: _Array) -> None: ...
def div_grad(a: _Array, b: _Array, dy: _Array, spec: _Spec, mode: int, da: _Array, db: _Array) -> None: ...

class TensorPlan:
    def walk(self, tensors: tuple[Any, ...]) -> Iterator[Any]: ...

class GradientReader:
    def __init__(self) -> None: ...
    def read(self, params: list[Any]) -> tuple[list[Any], bool]: ...

def hold(dicts: list[dict[str, Any]], names: tuple[str, ...], entries: list[Any]) -> bool: ...
def register_tensor_list(type: type) -> None: ...
def ema_update(
    shadow_sets: tuple[Any, ...], params: Any, weights: tuple[Any, ...], seed: int | None, checked: bool
) -> int: ...
def sgd_step(params: Any, grads: Any, momentum_buffers: Any, ema: Any, step: tuple[Any, ...], checked: bool) -> int: ...
def adamw_step(
    params: Any,
    grads: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    ema: Any,
    step: tuple[Any, ...],
    checked: bool,
    only_looks: bool = False,
) -> int: ...
def lazy_adamw_rows(
    params: list[Any],
    grads: list[Any],
    exp_avg: list[Any],
    exp_avg_sq: list[Any],
    rows: list[Any] | None,
    live: list[Any] | None,
    decays: bool,
    step: tuple[Any, ...],
) -> None: ...
def lookahead_sync(slow: Any, fast: Any, alpha: float, checked: bool) -> int: ...
def eg_step(params: Any, grads: Any, lr: float, checked: bool) -> int: ...
def adaptive_eg_step(
    params: Any, grads: Any, momentum: Any, update: Any, gain: Any, scales: _Array, step: tuple[Any, ...], checked: bool
) -> int: ...
def all_finite(arrays: Any, checked: bool) -> int: ...

_State: TypeAlias = tuple[_Array, ...]

def linear_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    options: tuple[Any, ...],
    key_mask: _Array | None,
    offsets: _Array | None,
    decay: _Array | None,
    state: _State | None,
    state_out: _State | None,
) -> None: ...
def linear_attention_step(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    options: tuple[Any, ...],
    decay: _Array | None,
    state: _State,
) -> None: ...
def plain_step(q: Any, k: Any, v: Any, state: Any, out: Any, options: tuple[Any, ...]) -> _Array | None: ...
def linear_attention_backward(
    dy: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    y: _Array,
    dq: _Array,
    dk: _Array,
    dv: _Array,
    options: tuple[Any, ...],
    key_mask: _Array | None,
    offsets: _Array | None,
    decay: _Array | None,
    state: _State | None,
    d_state: _State | None,
    d_initial: _State | None,
) -> None: ...
def nystrom_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    options: tuple[Any, ...],
    key_mask: _Array | None,
    conv_weight: _Array | None,
    q_landmarks: _Array | None,
    k_landmarks: _Array | None,
    info: _Array | None,
) -> None: ...
def nystrom_attention_backward(
    dy: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    dq: _Array,
    dk: _Array,
    dv: _Array,
    options: tuple[Any, ...],
    key_mask: _Array | None,
    conv_weight: _Array | None,
    d_conv_weight: _Array | None,
    q_landmarks: _Array | None,
    k_landmarks: _Array | None,
    d_q_landmarks: _Array | None,
    d_k_landmarks: _Array | None,
) -> None: ...
def softmax_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    causal: bool,
    scale: float,
    key_mask: _Array | None,
    offsets: _Array | None,
    logn: _Array | None,
) -> None: ...

class WordTable:
    def __init__(self, docs: bool = False) -> None: ...
    def __len__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def total(self) -> int: ...
    @property
    def has_docs(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    documents: int
    error_bound: int
    def get(self, key: bytes) -> tuple[int, int]: ...
    def add(self, key: bytes, count: int, docs: int = 0) -> None: ...
    def merge(self, other: WordTable) -> None: ...
    def copy(self) -> WordTable: ...
    def select(
        self, min_count: int = 1, max_count: int | None = None, min_docs: int = 0, max_docs: int | None = None
    ) -> WordTable: ...
    def only(self, keys: Sequence[bytes]) -> WordTable: ...
    def without(self, keys: Sequence[bytes]) -> WordTable: ...
    def shrink(self, kept: int) -> None: ...
    def split(self, k: int) -> list[WordTable]: ...
    def top(
        self, k: int | None = None
    ) -> tuple[bytes, NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64] | None]: ...
    def to_bytes(self) -> bytes: ...
    def encode(self, rule: Rule, documents: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

def table_from_bytes(buffer: Any) -> WordTable: ...

class WordRule:
    def __init__(
        self,
        tokenizer: int,
        lowercase: int,
        errors: int,
        lines: bool,
        doc_freq: bool,
        ngrams: tuple[int, int],
        max_token_bytes: int,
        stop_words: WordTable | None,
        tables: dict[str, Any],
    ) -> None: ...

class WordCounter:
    def __init__(self, rule: WordRule, workers: int = 1, memory_limit: int = 0, approx: int = 0) -> None: ...
    name: str
    def feed(self, data: Any) -> None: ...
    def end(self) -> None: ...
    def documents(self, texts: Sequence[bytes]) -> None: ...
    def tokens(self, tokens: Iterable[str]) -> None: ...
    def file(self, fd: int, start: int, stop: int) -> None: ...
    def finish(self) -> WordTable: ...
    def stop(self) -> None: ...

class ZhModel:
    def __init__(
        self,
        words: bytes,
        numbers: _Array,
        weights: _Array,
        hmm: tuple[_Array, _Array, _Array] | None,
        split: list[str] | list[bytes],
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def cut(self, text: bytes) -> list[bytes]: ...
    def cut_str(self, text: str) -> list[str]: ...
