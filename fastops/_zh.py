# SPDX-License-Identifier: BSD-3-Clause
"""Chinese words as jieba cuts them: the dictionary and the tables of an installed jieba, read without importing it."""

from __future__ import annotations

import ast
import errno
import importlib.util
import json
import os
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _validate
from .reference._zh import _RUN, LOWEST, Dictionary, States

_FIRST_HAN, _LAST_HAN = 0x4E00, 0x9FD5
_LETTERS = "BMES"  # the order of ZhState in wordcount_zh.h
UserWords = tuple[tuple[str, int | None], ...]


class ZhTokenizer:
    """Chinese words exactly as jieba 0.42.1's ``lcut`` gives them.

    Parameters
    ----------
    dictionary : path, optional
        A dictionary in jieba's format (a word, a space, a frequency and what else follows on every line). By default
        that of the installed package jieba, which is read, not imported.
    hmm : bool, optional
        Find words that are not in the dictionary, with jieba's hidden Markov model.
    user_words : mapping of words to frequencies or iterable of words, optional
        Words that are added in this order, as ``jieba.add_word`` does: a word without a frequency (None) gets one that
        keeps it whole, one of frequency 0 is taken apart.

    Raises
    ------
    ImportError
        jieba is not installed, and its dictionary or its tables are wanted.
    FileNotFoundError
        There is no such dictionary.
    TypeError, ValueError
        An argument does not fit.

    Notes
    -----
    The dictionary is read when text is first cut (ValueError where a line does not fit), and kept: about a second and 10
    MB with jieba's. Tokenizers with equal arguments are equal, share what they read, and may be used by many threads.
    Pickles hold the arguments alone.

    Examples
    --------
    >>> from fastops import ZhTokenizer  # doctest: +SKIP
    >>> ZhTokenizer().cut("我来到北京清华大学")  # doctest: +SKIP
    ['我', '来到', '北京', '清华大学']
    """

    __slots__ = ("_dictionary", "_hmm", "_user_words")

    def __init__(
        self,
        dictionary: str | os.PathLike[str] | None = None,
        *,
        hmm: bool = True,
        user_words: Mapping[str, int | None] | Iterable[str] | None = None,
    ) -> None:
        self._hmm = _validate.boolean("hmm", hmm)
        self._dictionary = None if dictionary is None else _checked_path(dictionary)
        self._user_words = _checked_words(user_words)
        if self._dictionary is None and _jieba() is None:
            raise ImportError(
                "tokenizer 'zh' needs the dictionary of jieba: pip install 'fastops[zh]', or pass ZhTokenizer(dictionary=...)"
            )
        if self._hmm and _jieba() is None:
            raise ImportError(
                "ZhTokenizer with hmm=True needs the tables of jieba: pip install 'fastops[zh]', or pass hmm=False"
            )

    def cut(self, text: str) -> list[str]:
        """Cut a text into tokens, white space included, by the compiled code where there is some.

        Parameters
        ----------
        text : str
            The text.

        Returns
        -------
        list of str
            The tokens; joined they are the text.

        Raises
        ------
        TypeError
            `text` is no str.

        Examples
        --------
        >>> ZhTokenizer().cut("小明硕士毕业于中国科学院计算所")  # doctest: +SKIP
        ['小明', '硕士', '毕业', '于', '中国科学院', '计算所']
        """
        if not isinstance(text, str):
            raise _validate.wrong_type("text", "a str", text)
        try:
            model = native_model(self)
        except ImportError:
            return self.cut_reference(text)
        try:
            return list(model.cut_str(text))
        except UnicodeEncodeError:  # surrogates
            return self.cut_reference(text)

    def cut_reference(self, text: str) -> list[str]:
        """Cut a text as `cut` does, by plain Python.

        Parameters
        ----------
        text : str
            The text.

        Returns
        -------
        list of str
            The tokens; joined they are the text.

        Raises
        ------
        ImportError
            jieba is not installed and no dictionary was given.

        Examples
        --------
        >>> ZhTokenizer().cut_reference("小明硕士毕业于中国科学院计算所")  # doctest: +SKIP
        ['小明', '硕士', '毕业', '于', '中国科学院', '计算所']
        """
        return _reference(self._key).cut(text, hmm=self._hmm)

    @property
    def _key(self) -> _Key:
        """What makes two tokenizers equal."""
        return self._dictionary, self._hmm, self._user_words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZhTokenizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._key

    def __repr__(self) -> str:
        options = [] if self._dictionary is None else [repr(self._dictionary)]
        options += [] if self._hmm else ["hmm=False"]
        options += [f"user_words=<{len(self._user_words)} words>"] if self._user_words else []
        return f"ZhTokenizer({', '.join(options)})"


_Key = tuple[str | None, bool, UserWords]
_building = threading.Lock()


@lru_cache(1)
def default_tokenizer() -> ZhTokenizer:
    """What tokenizer="zh" means."""
    return ZhTokenizer()


def _rebuild(dictionary: str | None, hmm: bool, user_words: UserWords) -> ZhTokenizer:
    return ZhTokenizer(dictionary, hmm=hmm, user_words=dict(user_words))


def _checked_path(dictionary: object) -> str:
    if not isinstance(dictionary, (str, os.PathLike)):
        raise _validate.wrong_type("dictionary", "a path or None", dictionary)
    path = os.path.abspath(os.fspath(dictionary))
    if not isinstance(path, str):
        raise _validate.wrong_type("dictionary", "a path or None", dictionary)
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return path


def _checked_words(words: object) -> UserWords:
    if words is None:
        return ()
    if isinstance(words, (str, bytes)) or not isinstance(words, Iterable):
        raise _validate.wrong_type("user_words", "words, or a mapping of words to frequencies", words)
    pairs = words.items() if isinstance(words, Mapping) else ((word, None) for word in words)
    checked: dict[str, int | None] = {}
    for word, frequency in pairs:
        if not isinstance(word, str):
            raise _validate.wrong_type("user_words", "words, or a mapping of words to frequencies", word)
        if not word:
            raise _validate.wrong_value("user_words", "words of one character or more", word)
        checked[word] = None if frequency is None else _validate.integer("user_words", frequency, 0)
    return tuple(checked.items())


def _jieba() -> Path | None:
    """The folder of the installed jieba."""
    try:
        spec = importlib.util.find_spec("jieba")
    except ValueError:  # a module without a spec stands in its place
        return None
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in map(Path, folders):
        if (folder / "dict.txt").is_file() and (folder / "finalseg" / "prob_emit.py").is_file():
            return folder
    return None


def _installed_jieba() -> Path:
    folder = _jieba()
    if folder is None:
        raise ImportError("jieba was there when the tokenizer was made, and is not any more")
    return folder


def read_dictionary(path: str | os.PathLike[str]) -> tuple[dict[str, int], int]:
    """Words with their frequencies, and the sum over all lines."""
    words: dict[str, int] = {}
    total = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                word, text = line.strip().decode().split(" ")[:2]
                frequency = int(text)
            except ValueError:
                frequency = -1
            if frequency < 0:
                where = _validate.clip(os.fsdecode(path))
                raise ValueError(f"dictionary {where}: line {number} must be a word, a space and a frequency") from None
            words[word] = frequency
            total += frequency
    if total == 0:
        raise ValueError(f"dictionary {_validate.clip(os.fsdecode(path))} holds no word with a frequency")
    return words, total


def _read_table(path: Path) -> Any:
    """The literal that one of jieba's modules assigns to P; nothing is executed."""
    text = path.read_text(encoding="utf-8").partition("P=")[2]
    try:
        return json.loads(text.replace("'", '"'))
    except ValueError:
        return ast.literal_eval(text.strip())


def _read_states() -> States:
    folder = _installed_jieba() / "finalseg"
    return States(*(_read_table(folder / f"prob_{name}.py") for name in ("start", "trans", "emit")))


@lru_cache(2)
def _reference(key: _Key) -> Dictionary:
    path, hmm, user_words = key
    words, total = read_dictionary(path or _installed_jieba() / "dict.txt")
    dictionary = Dictionary(words, total, _read_states() if hmm else None)
    for word, frequency in user_words:
        dictionary.add(word, frequency)
    return dictionary


def _state_tables(states: States) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    start = np.array([states.start[state] for state in _LETTERS])
    trans = np.array([states.trans[state].get(after, LOWEST) for state in _LETTERS for after in _LETTERS])
    emit = np.full((_LAST_HAN - _FIRST_HAN + 1, len(_LETTERS)), LOWEST)
    for column, state in enumerate(_LETTERS):
        for character, value in states.emit[state].items():
            if _FIRST_HAN <= ord(character) <= _LAST_HAN:
                emit[ord(character) - _FIRST_HAN, column] = value
    return start, trans, emit.ravel()


def native_model(tokenizer: ZhTokenizer) -> Any:
    """The compiled dictionary (`_core.ZhModel`), one for all tokenizers with equal arguments; ImportError without `_core`."""
    from . import _core

    with _building:
        return _native(_core.ZhModel, tokenizer._key)


@lru_cache(2)
def _native(model: Any, key: _Key) -> Any:
    path, hmm, user_words = key
    split: set[str] = set()
    if user_words:
        dictionary = _reference(key)
        words, total, split = dictionary.words, dictionary.total, dictionary.split
        # The others occur in no run of word characters.
        words = {word: frequency for word, frequency in words.items() if _RUN.fullmatch(word)}
    else:
        words, total = read_dictionary(path or _installed_jieba() / "dict.txt")
    words = {word: frequency for word, frequency in words.items() if frequency}
    frequencies = sorted(set(words.values()))
    log_total = log(total)
    weights = np.array([log(frequency) - log_total for frequency in [1, *frequencies]])
    number = {frequency: i for i, frequency in enumerate(frequencies, 1)}
    numbers = np.fromiter(map(number.__getitem__, words.values()), np.uint32, len(words))
    text = "".join(f"{word}\n" for word in words).encode()
    hidden = [word.encode() for word in split if _RUN.fullmatch(word)]
    return model(text, numbers, weights, _state_tables(_read_states()) if hmm else None, hidden)
