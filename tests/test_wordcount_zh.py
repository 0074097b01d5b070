# SPDX-License-Identifier: BSD-3-Clause
"""Chinese words: token by token what jieba 0.42.1 gives, from the compiled code and from plain Python."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastops
from fastops import _zh
from fastops._zh import ZhTokenizer, native_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
JIEBA = "0.42.1"

HOSTILE = [
    "",
    "我来到北京清华大学",
    "小明硕士毕业于中国科学院计算所，后在日本京都大学深造",
    "他来到了网易杭研大厦。",
    "\r\n\r\n \t\u3000\u00a0\x1c\x85a\r\r\nb",
    "3.14% 1.2.3 a.b .5 5. 1.%% x%y% 100%的 a-b_c#d&e+f",
    "AT&T和C++、c#与B超，T恤，K歌，3D，4S店，γ射线",
    "ｆｕｌｌｗｉｄｔｈ １２３ Ａ",
    "é à ü 한국어 カタカナ ひらがな",
    "\u4e00\u9fd5\u9fd6\u4dff\u9fff\u3400\U00020000",
    "a\udc80中\udce4\udcb8国\udcff",
    "\ufeff中国\ufeff",
    "\x00中\x00国\x00",
    "👩\u200d🔬中国人民👍🏽",
    "的" * 50,
    "龘靐齉爩" * 20,
    "鬮龖龗\u9fa5\u9fb0啊+啊-啊.啊",
    "中华人民共和国" * 30,
    "一" * 300,
    "abc" * 200 + "中",
    "1" * 100 + "." + "2" * 100 + "%",
    "．。，、；：？！…—·ˉˇ¨〃々～‖",
]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@pytest.fixture(scope="module")
def jieba(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package itself, with the cache of its dictionary in a folder of the test's own."""
    if importlib.util.find_spec("jieba") is None:
        pytest.skip("jieba is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its patterns and pkg_resources
        module = importlib.import_module("jieba")
    if module.__version__ != JIEBA:
        pytest.skip(f"jieba is {module.__version__}, not {JIEBA}")
    module.setLogLevel(60)
    module.dt.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    return module


@pytest.fixture(scope="module", params=["native", "reference"])
def cut(request: pytest.FixtureRequest, jieba: Any) -> Callable[..., list[str]]:
    """Cuts a text by one of the two, with options of the tokenizer."""
    if request.param == "native":
        try:
            importlib.import_module("fastops._core")
        except ImportError as error:
            pytest.skip(f"fastops._core: {error}")

    def run(text: str, **options: Any) -> list[str]:
        tokenizer = ZhTokenizer(**options)
        return tokenizer.cut(text) if request.param == "native" else tokenizer.cut_reference(text)

    return run


@pytest.fixture
def no_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_zh, "_jieba", lambda: None)


@pytest.mark.parametrize("hmm", [True, False])
@pytest.mark.parametrize("text", HOSTILE)
def test_zh_tokens_equal_jiebas(text: str, hmm: bool, cut: Callable[..., list[str]], jieba: Any) -> None:
    assert cut(text, hmm=hmm) == jieba.lcut(text, HMM=hmm)


CHARACTERS = st.one_of(
    st.sampled_from(
        list(
            "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
        )
    ),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FD6),
    st.sampled_from(list("aZ09+#&._%- \r\n\t，。éＡ")),
)


@given(st.lists(CHARACTERS, max_size=60).map("".join), st.booleans())
def test_zh_random_text_equals_jiebas(cut: Callable[..., list[str]], jieba: Any, text: str, hmm: bool) -> None:
    assert cut(text, hmm=hmm) == jieba.lcut(text, HMM=hmm)


def test_zh_words_of_the_dictionary_side_by_side(cut: Callable[..., list[str]], jieba: Any) -> None:
    jieba.initialize()
    source = random.Random(1)
    words = source.sample(sorted(word for word, frequency in jieba.dt.FREQ.items() if frequency), 3000)
    for start in range(0, len(words), 50):
        text = "".join(words[start : start + 50])
        assert cut(text) == jieba.lcut(text)


def _lines(name: str, size: int) -> Iterator[str]:
    """Lines of a text from all its parts, `size` bytes together."""
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    lines = (DATA / name).read_bytes().splitlines(keepends=True)
    step = max(sum(map(len, lines)) // size, 1)
    for start in range(0, len(lines), 20 * step):
        yield b"".join(lines[start : start + 20]).decode()


@pytest.mark.parametrize("name", ["zh_classics_crlf.txt", "udhr_multi.txt"])
def test_zh_real_text_equals_jiebas(name: str, cut: Callable[..., list[str]], jieba: Any) -> None:
    for text in _lines(name, 400_000):
        assert cut(text) == jieba.lcut(text)


@pytest.mark.nightly
@pytest.mark.parametrize("hmm", [True, False])
@pytest.mark.parametrize("name", ["zh_classics_crlf.txt", "udhr_multi.txt"])
def test_zh_whole_real_text_equals_jiebas(name: str, hmm: bool, jieba: Any) -> None:
    tokenizer = ZhTokenizer(hmm=hmm)
    for text in _lines(name, 2**62):
        assert tokenizer.cut(text) == jieba.lcut(text, HMM=hmm)


@given(st.binary(max_size=120))
def test_zh_native_keeps_every_byte(jieba: Any, text: bytes) -> None:
    pytest.importorskip("fastops._core")
    model = native_model(ZhTokenizer())
    assert model.cut(text) == list(map(_encode, ZhTokenizer().cut_reference(text.decode("utf-8", "surrogateescape"))))


USER_WORDS: dict[str, int | None] = {
    "清华大学北门": None,
    "云计算": None,
    "来到北京": 5,
    "京": 10**9,
    "李小福": 2,
    "中国科学院": 0,
    "爩龘": 0,
    "c++": 3,
    "a b": 4,
    "换\n行": 4,
}


def test_zh_user_words_equal_jiebas(cut: Callable[..., list[str]], jieba: Any) -> None:
    finalseg = importlib.import_module("jieba.finalseg")
    peer = jieba.Tokenizer()
    peer.tmp_dir = jieba.dt.tmp_dir
    before = set(finalseg.Force_Split_Words)
    try:
        for word, frequency in USER_WORDS.items():
            peer.add_word(word, frequency)
        for text in [
            *HOSTILE,
            "李小福是创新办主任也是云计算方面的专家清华大学北门",
            "我爩龘c++",
            *_lines("zh_classics_crlf.txt", 20_000),
        ]:
            assert cut(text, user_words=USER_WORDS) == peer.lcut(text)
    finally:
        finalseg.Force_Split_Words.clear()
        finalseg.Force_Split_Words.update(before)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A dictionary with a word twice, one of frequency 0, one of characters that no run has, and ties."""
    path = tmp_path / "小.txt"
    path.write_text(
        "甲乙 3 n\n乙丙 3 n\n甲 1\n乙 1\n丙 1\n甲乙丙 0\n甲乙 2\n甲-乙 7 x y\n丁戊己庚 4\nγ射 3\nab 2\nabc 1\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("hmm", [True, False])
def test_zh_other_dictionary_equals_jiebas(
    small: Path, hmm: bool, tmp_path: Path, cut: Callable[..., list[str]], jieba: Any
) -> None:
    peer = jieba.Tokenizer(str(small))
    peer.tmp_dir = str(tmp_path)
    source = random.Random(2)
    for _ in range(200):
        text = "".join(source.choices("甲乙丙丁戊己庚-abγ射 ", k=source.randrange(20)))
        assert cut(text, dictionary=small, hmm=hmm) == peer.lcut(text, HMM=hmm)


def test_zh_threads_share_one_dictionary(jieba: Any) -> None:
    pytest.importorskip("fastops._core")
    texts = list(_lines("zh_classics_crlf.txt", 100_000))
    want = [ZhTokenizer().cut(text) for text in texts]
    models = set()

    def work(i: int) -> list[str]:
        tokenizer = ZhTokenizer(user_words=[])
        models.add(id(native_model(tokenizer)))
        return tokenizer.cut(texts[i])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(len(texts)))) == want
    assert len(models) == 1


def test_zh_tokenizer_pickles_and_compares_by_arguments(small: Path, no_jieba: None) -> None:
    one = ZhTokenizer(small, hmm=False, user_words={"己庚": 9})
    two = pickle.loads(pickle.dumps(one))
    assert one == two
    assert hash(one) == hash(two)
    assert one != ZhTokenizer(small, hmm=False)
    assert two.cut("丁戊己庚") == one.cut_reference("丁戊己庚")
    assert "小.txt" in repr(one)


def test_zh_says_that_jieba_is_missing(small: Path, no_jieba: None) -> None:
    with pytest.raises(ImportError, match=r"pip install 'fastops\[zh\]', or pass ZhTokenizer\(dictionary"):
        ZhTokenizer()
    with pytest.raises(ImportError, match=r"pip install 'fastops\[zh\]', or pass hmm=False"):
        ZhTokenizer(small)
    assert ZhTokenizer(small, hmm=False).cut("甲乙ab") == ["甲乙", "ab"]


def test_zh_does_not_import_jieba(small: Path) -> None:
    child = importlib.import_module("child")
    if importlib.util.find_spec("jieba") is None:
        pytest.skip("jieba is not installed")
    child.run(
        "import sys; from fastops._zh import ZhTokenizer, native_model; ZhTokenizer().cut('中国'); assert 'jieba' not in sys.modules"
    )


@pytest.mark.parametrize("line", ["词", "词 x", "词 -1", "词  3", " ", "\udcff 3"])
def test_zh_dictionary_names_the_bad_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xe7\x94\xb2 1\n" + _encode(line) + b"\n")
    with pytest.raises(ValueError, match="line 2 must be a word, a space and a frequency"):
        ZhTokenizer(path, hmm=False).cut("甲")


def test_zh_bad_arguments(small: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ZhTokenizer(tmp_path / "none.txt", hmm=False)
    with pytest.raises(TypeError, match="dictionary must be a path"):
        ZhTokenizer(3, hmm=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="user_words must be words"):
        ZhTokenizer(small, hmm=False, user_words="词")
    with pytest.raises(ValueError, match="user_words must be"):
        ZhTokenizer(small, hmm=False, user_words={"词": -1})
    with pytest.raises(ValueError, match="user_words must be words of one character or more"):
        ZhTokenizer(small, hmm=False, user_words=[""])
    with pytest.raises(TypeError, match="text must be a str"):
        ZhTokenizer(small, hmm=False).cut(b"")  # type: ignore[arg-type]
    (tmp_path / "empty.txt").write_text("甲 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no word with a frequency"):
        ZhTokenizer(tmp_path / "empty.txt", hmm=False).cut("甲")


@pytest.mark.parametrize("tokenizer", ["zh", "unicode"])
def test_a_run_without_a_place_to_cut_is_no_long_word(tokenizer: str, tmp_path: Path, request: Any) -> None:
    """More than the buffers hold and more than a word may have, from a file as from memory."""
    pytest.importorskip("fastops._core")
    if tokenizer == "zh":
        request.getfixturevalue("jieba")
        text = "".join(map(chr, range(0x4E00, 0x9FA6))) * 27
    else:
        text = "\U0001f1e6\U0001f1e7" * 200_000 + "\u2002" * 300_000
    path = tmp_path / "text"
    path.write_text(text + " end\n", encoding="utf-8")
    assert path.stat().st_size > 2**20 + 2**17
    got = fastops.count_files(path, tokenizer=tokenizer, document="file")
    assert got == fastops.count_words(text + " end\n", tokenizer=tokenizer)
    assert got["end"] == 1
    with pytest.raises(fastops.TokenTooLong):
        fastops.count_files(path, tokenizer="whitespace" if tokenizer == "zh" else lambda text: [text], workers=1)


class Hmm(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_double * 4),
        ("trans", ctypes.c_double * 16),
        ("emit", ctypes.POINTER(ctypes.c_double)),
    ]


class CRule(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("tokenizer", "lowercase", "errors", "lines", "doc_freq")),
        ("ngram_low", ctypes.c_uint),
        ("ngram_high", ctypes.c_uint),
        ("max_token_bytes", ctypes.c_size_t),
        *((f"table{i}", ctypes.c_void_p) for i in range(8)),
        ("zh", ctypes.c_void_p),
    ]


class Poll(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("context", ctypes.c_void_p)]


@pytest.fixture
def library() -> ctypes.CDLL:
    path = Path(fastops.__file__).parent / "lib" / "libfastops.so"
    if not path.is_file():
        pytest.skip("there is no native library")
    library = ctypes.CDLL(str(path))
    for name in ("fastops_word_counter_create", "fastops_words_create"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def made_in_c(library: ctypes.CDLL, dictionary: bytes, hmm: Hmm | None) -> ctypes.c_void_p:
    model, line = ctypes.c_void_p(), ctypes.c_size_t(99)
    status = library.fastops_zh_model_create(
        dictionary,
        ctypes.c_size_t(len(dictionary)),
        ctypes.byref(hmm) if hmm else None,
        ctypes.byref(model),
        ctypes.byref(line),
    )
    if status:
        assert not model
        raise ValueError(f"status {status}, line {line.value}")
    return model


def counted_in_c(library: ctypes.CDLL, model: ctypes.c_void_p, text: bytes) -> dict[str, int]:
    rule = CRule(tokenizer=4, ngram_low=1, ngram_high=1, max_token_bytes=2**20, zh=model)
    counter = ctypes.c_void_p(
        library.fastops_word_counter_create(ctypes.byref(rule), 1, ctypes.c_size_t(0), ctypes.c_size_t(0))
    )
    assert counter
    words = ctypes.c_void_p()
    assert library.fastops_word_counter_feed(counter, text, ctypes.c_size_t(len(text)), Poll()) == 0
    assert library.fastops_word_counter_finish(counter, Poll(), ctypes.byref(words)) == 0
    library.fastops_words_packed_size.restype = ctypes.c_size_t
    size = library.fastops_words_packed_size(words)
    room = ctypes.create_string_buffer(size)
    library.fastops_words_pack(words, room)
    library.fastops_words_destroy(words)
    library.fastops_word_counter_destroy(counter)
    return fastops.WordCounts.from_bytes(room.raw).to_dict()


@pytest.mark.parametrize("hmm", [True, False])
def test_a_model_made_in_c_cuts_as_jieba_does(hmm: bool, jieba: Any, library: ctypes.CDLL) -> None:
    tables = None
    if hmm:
        start, trans, emit = _zh._state_tables(_zh._read_states())
        tables = Hmm(
            (ctypes.c_double * 4)(*start),
            (ctypes.c_double * 16)(*trans),
            emit.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
        )
    folder = _zh._jieba()
    assert folder is not None
    model = made_in_c(library, (folder / "dict.txt").read_bytes(), tables)
    text = "\n".join(text for text in HOSTILE if text.isprintable() and text.isascii() is False)
    assert (
        counted_in_c(library, model, text.encode())
        == fastops.count_words(text, tokenizer=ZhTokenizer(hmm=hmm)).to_dict()
    )
    library.fastops_zh_model_destroy(model)
    library.fastops_zh_model_destroy(None)


def test_a_dictionary_in_c_is_checked(library: ctypes.CDLL) -> None:
    model = made_in_c(library, "中国 3 ns\r\n国人 2\n中国 5\n人 0 n\n".encode(), None)
    assert counted_in_c(library, model, "中国人,国人".encode()) == {"中国": 1, "人": 1, ",": 1, "国人": 1}
    library.fastops_zh_model_destroy(model)
    for text, line in (
        ("", 0),
        ("中国 0\n", 0),
        ("中国 3\n国人\n", 2),
        ("中国 3\n\n", 2),
        ("中国 x\n", 1),
        ("中国 -3\n", 1),
        ("中国 3x\n", 1),
        ("中国 99999999999999999999\n", 1),
    ):
        with pytest.raises(ValueError, match=rf"line {line}$"):
            made_in_c(library, text.encode(), None)
