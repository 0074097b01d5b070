# SPDX-License-Identifier: BSD-3-Clause
"""Chinese words as jieba 0.42.1 cuts them, in plain Python: the oracle of tokenizer="zh".

A dictionary gives every word a frequency; of all ways through a run of word characters the one of largest probability is
taken. Runs of single characters that remain go through a hidden Markov model (begin, middle, end, single).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import log

# Runs that the dictionary is asked about, and what is white space between them.
_RUN = re.compile(r"([\u4E00-\u9FD5a-zA-Z0-9+#&._%\-]+)")
_SPACE = re.compile(r"(\r\n|\s)")
_HAN = re.compile(r"([\u4E00-\u9FD5]+)")
_ENGLISH = re.compile(r"([a-zA-Z0-9]+(?:\.\d+)?%?)")
_ALNUM = re.compile(r"[a-zA-Z0-9]")
# The probability of what the tables do not hold; sums of it absorb all else, and then the letters decide.
LOWEST = -3.14e100
_BEFORE = {"B": "ES", "M": "MB", "S": "SE", "E": "BM"}


@dataclass(frozen=True)
class States:
    """Logarithms of the model's probabilities, by state and character."""

    start: Mapping[str, float]
    trans: Mapping[str, Mapping[str, float]]
    emit: Mapping[str, Mapping[str, float]]


@dataclass
class Dictionary:
    """Frequencies of words, and 0 for what only begins words; `total` is the sum over all lines and additions."""

    words: dict[str, int]
    total: int
    states: States | None
    split: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        frequency = dict(self.words)
        for word in self.words:
            for end in range(1, len(word)):
                frequency.setdefault(word[:end], 0)
        self.words = frequency

    def add(self, word: str, frequency: int | None) -> None:
        """A word more; without a frequency it gets one that suffices to keep it whole. 0: the word is taken apart."""
        if frequency is None:
            frequency = self._suggest(word)
        self.words[word] = frequency
        self.total += frequency
        for end in range(1, len(word)):
            self.words.setdefault(word[:end], 0)
        if frequency == 0:
            self.split.add(word)

    def _suggest(self, word: str) -> int:
        total = float(self.total)
        share = 1.0
        for part in self.cut(word, hmm=False):
            share *= self.words.get(part, 1) / total
        return max(int(share * self.total) + 1, self.words.get(word, 1))

    def cut(self, text: str, *, hmm: bool = True) -> list[str]:
        """Tokens of a text; joined they are the text again."""
        found: list[str] = []
        for run in _RUN.split(text):
            if _RUN.match(run):
                found.extend(self._cut_run(run) if hmm else self._cut_without_states(run))
                continue
            for piece in _SPACE.split(run):
                if _SPACE.match(piece):
                    found.append(piece)
                else:
                    found.extend(piece)
        return found

    def _ends(self, run: str, begin: int) -> list[int]:
        """Where the words that begin at `begin` end; the character alone if there are none."""
        ends = []
        end = begin + 1
        while end <= len(run) and run[begin:end] in self.words:
            if self.words[run[begin:end]]:
                ends.append(end)
            end += 1
        return ends or [begin + 1]

    def _route(self, run: str) -> list[int]:
        """For every character the end of the best word that begins there; of equal ones the longest."""
        log_total = log(self.total)
        best: list[tuple[float, int]] = [(0.0, 0)] * (len(run) + 1)
        for begin in range(len(run) - 1, -1, -1):
            best[begin] = max(
                (log(self.words.get(run[begin:end]) or 1) - log_total + best[end][0], end)
                for end in self._ends(run, begin)
            )
        return [end for _, end in best]

    def _cut_run(self, run: str) -> Iterator[str]:
        route = self._route(run)
        waiting = ""
        begin = 0
        while begin < len(run):
            end = route[begin]
            if end - begin == 1:
                waiting += run[begin]
            else:
                yield from self._cut_singles(waiting)
                waiting = ""
                yield run[begin:end]
            begin = end
        yield from self._cut_singles(waiting)

    def _cut_singles(self, run: str) -> Iterator[str]:
        """Characters that the dictionary left alone."""
        if len(run) < 2 or self.words.get(run):
            yield from run
            return
        for piece in _HAN.split(run):
            if not _HAN.match(piece):
                yield from filter(None, _ENGLISH.split(piece))
                continue
            for word in self._cut_han(piece):
                yield from word if word in self.split else [word]

    def _cut_han(self, run: str) -> Iterator[str]:
        begin = 0
        for i, state in enumerate(self._most_probable(run)):
            if state == "B":
                begin = i
            elif state == "E":
                yield run[begin : i + 1]
            elif state == "S":
                yield run[i]

    def _most_probable(self, run: str) -> str:
        """The model's most probable states (Viterbi 1967); of equal ones the letter that sorts last."""
        assert self.states is not None
        start, trans, emit = self.states.start, self.states.trans, self.states.emit
        score = {state: start[state] + emit[state].get(run[0], LOWEST) for state in "BMES"}
        path = {state: state for state in "BMES"}
        for character in run[1:]:
            best = {
                state: max(
                    (score[before] + trans[before].get(state, LOWEST) + emit[state].get(character, LOWEST), before)
                    for before in _BEFORE[state]
                )
                for state in "BMES"
            }
            score = {state: best[state][0] for state in "BMES"}
            path = {state: path[best[state][1]] + state for state in "BMES"}
        return path[max((score[state], state) for state in "ES")[1]]

    def _cut_without_states(self, run: str) -> Iterator[str]:
        route = self._route(run)
        waiting = ""
        begin = 0
        while begin < len(run):
            end = route[begin]
            word = run[begin:end]
            if len(word) == 1 and _ALNUM.match(word):
                waiting += word
            else:
                if waiting:
                    yield waiting
                    waiting = ""
                yield word
            begin = end
        if waiting:
            yield waiting
