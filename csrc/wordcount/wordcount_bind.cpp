// SPDX-License-Identifier: BSD-3-Clause
// Word counting for Python: bytes to pointers, the GIL released, one call; failures with names and places.
#include "wordcount/wordcount_bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "core/python_call.h"
#include "fastops/fastops.h"
#include "wordcount/wordcount_zh.h"

namespace fastops {
namespace {

namespace py = pybind11;

constexpr std::uint64_t kEndOfCounts = std::uint64_t{1} << 63;
constexpr std::size_t kAtATime = 4096;  // words, between two looks at signals

template <auto Destroy> struct Destroyer {
  template <class T> void operator()(T* p) const noexcept { Destroy(p); }
};
using WordsPtr = std::unique_ptr<fastops_words, Destroyer<&fastops_words_destroy>>;
using CounterPtr = std::unique_ptr<fastops_word_counter, Destroyer<&fastops_word_counter_destroy>>;
using ReaderPtr = std::unique_ptr<fastops_word_reader, Destroyer<&fastops_word_reader_destroy>>;

template <class T> T* or_no_memory(T* p) {
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// Contiguous bytes of any object that offers them.
class Bytes {
 public:
  explicit Bytes(const py::handle& object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

struct Span {
  const char* data;
  std::size_t size;
};
Span bytes_span(const py::bytes& key) {
  return {PyBytes_AS_STRING(key.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(key.ptr()))};
}

class WordRule;
class WordTable;

// Looks tokens up in a table; made of all its words in their order, which takes a while.
struct Lookups {
  std::shared_ptr<WordRule> rule;
  ReaderPtr reader;
  std::uint64_t version = 0;
};

// A table that several threads may read and write. Who holds its lock never waits for the GIL, so that one may wait for
// the lock with the GIL held.
class WordTable {
 public:
  explicit WordTable(bool docs) : words_(or_no_memory(fastops_words_create(docs ? 1 : 0))) {}
  explicit WordTable(WordsPtr words) : words_(std::move(words)) {}
  const fastops_words* get() const { return words_.get(); }

  std::shared_lock<std::shared_mutex> reading() const { return std::shared_lock<std::shared_mutex>(*lock_); }

  std::uint64_t version() const { return version_; }

  // f(poll) without the GIL and with the lock, which the poll leaves while it waits for the GIL; again from the start
  // where the table was written to meanwhile.
  template <class F> fastops_status polled(F&& f) const {
    for (;;) {
      bool changed = false;
      const fastops_status status = unlocked([&](fastops_poll inner) noexcept {
        std::shared_lock<std::shared_mutex> hold = reading();
        Asking asking{inner, &hold, &version_, version_, &changed};
        try {
          return f(inner.function == nullptr ? inner : fastops_poll{&ask, &asking});
        } catch (const std::bad_alloc&) {
          return FASTOPS_NO_MEMORY;
        }
      });
      if (!changed) return status;
    }
  }

  // The lookups of the call before, for the next one with the same rule; under the GIL.
  std::unique_ptr<Lookups> take_lookups(const std::shared_ptr<WordRule>& rule) const {
    std::unique_ptr<Lookups> kept = std::move(lookups_);
    return kept != nullptr && kept->rule == rule ? std::move(kept) : nullptr;
  }
  void keep_lookups(std::unique_ptr<Lookups> lookups) const { lookups_ = std::move(lookups); }

  fastops_words_info info() const {
    const auto hold = reading();
    return describe();
  }
  py::object total() const {
    const fastops_words_info found = info();
    const py::int_ low(found.total_low);
    return found.total_high == 0 ? py::object(low) : (py::int_(found.total_high) << py::int_(64)) + low;
  }
  py::tuple find(const py::bytes& key) const {
    std::uint64_t count = 0, documents = 0;
    const Span span = bytes_span(key);
    {
      const auto hold = reading();
      fastops_words_get(words_.get(), span.data, span.size, &count, &documents);
    }
    return py::make_tuple(count, documents);
  }
  void add(const py::bytes& key, const py::int_& count, const py::int_& docs) {
    const std::string text = py::str(count).cast<std::string>() + " and " + py::str(docs).cast<std::string>();
    if (count < py::int_(1) || docs < py::int_(0) || docs > count)
      throw py::value_error("count must be >= 1 and >= docs >= 0, got " + text);
    const Span span = bytes_span(key);
    if (count >= py::int_(kEndOfCounts)) too_many();
    const auto number = count.cast<std::uint64_t>(), documents = docs.cast<std::uint64_t>();
    fastops_status status = FASTOPS_OK;
    {
      const std::unique_lock<std::shared_mutex> hold(*lock_);
      status = own();
      ++version_;
      if (status == FASTOPS_OK) status = fastops_words_add(words_.get(), span.data, span.size, number, documents);
    }
    raise_overflow(status);
  }
  void merge(const WordTable& other) {
    const bool mine = info().doc_freq != 0, theirs = other.info().doc_freq != 0;
    if (mine != theirs)
      throw py::value_error(std::string("other must have has_docs=") + (mine ? "True" : "False") + ", got " +
                            (theirs ? "True" : "False"));
    fastops_status status = FASTOPS_OK;
    {
      py::gil_scoped_release released;
      std::unique_lock<std::shared_mutex> mine_held(*lock_, std::defer_lock);
      std::shared_lock<std::shared_mutex> theirs_held(*other.lock_, std::defer_lock);
      if (this == &other)
        mine_held.lock();
      else
        std::lock(mine_held, theirs_held);
      status = own();
      ++version_;
      if (status == FASTOPS_OK) status = fastops_words_merge(words_.get(), other.get());
    }
    raise_overflow(status);
  }
  WordTable select(std::uint64_t min_count, std::optional<std::uint64_t> max_count, std::uint64_t min_docs,
                   std::optional<std::uint64_t> max_docs, const WordTable* without) const {
    fastops_words* selected = nullptr;
    raise_unless_ok(polled([&](fastops_poll poll) {
      return fastops_words_select(words_.get(), min_count, max_count.value_or(kEndOfCounts), min_docs,
                                  max_docs.value_or(kEndOfCounts), without == nullptr ? nullptr : without->get(), poll,
                                  &selected);
    }));
    return WordTable(WordsPtr(selected));
  }
  py::list split(std::size_t k) const {
    if (k < 1) throw py::value_error("k must be >= 1, got 0");
    std::vector<fastops_words*> parts(k);
    fastops_words_info found{};
    raise_unless_ok(polled([&](fastops_poll poll) {
      found = describe();
      return fastops_words_split(words_.get(), k, poll, parts.data());
    }));
    std::vector<WordsPtr> owned(parts.begin(), parts.end());
    for (WordsPtr& part : owned) fastops_words_annotate(part.get(), found.documents, found.error_bound);
    py::list result;
    for (WordsPtr& part : owned) result.append(WordTable(std::move(part)));
    return result;
  }
  // The entries of these keys alone.
  WordTable only(const std::vector<py::bytes>& keys) const {
    const fastops_words_info found = info();
    WordTable result(found.doc_freq != 0);
    for (std::size_t i = 0; i < keys.size();) {
      fastops_status status = FASTOPS_OK;
      {
        const auto hold = reading();
        const std::size_t stop = std::min(i + kAtATime, keys.size());
        for (; i < stop && status == FASTOPS_OK; ++i) {
          std::uint64_t count = 0, documents = 0, before = 0;
          const Span span = bytes_span(keys[i]);
          if (fastops_words_get(words_.get(), span.data, span.size, &count, &documents) == 0) continue;
          if (fastops_words_get(result.get(), span.data, span.size, &before, &before) == 0)
            status = fastops_words_add(result.words_.get(), span.data, span.size, count, documents);
        }
      }
      raise_unless_ok(status);
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    result.annotate(found.documents, found.error_bound);
    return result;
  }
  // Those of all other keys.
  WordTable without(const std::vector<py::bytes>& keys) const {
    WordTable gone(false);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const Span span = bytes_span(keys[i]);
      raise_unless_ok(fastops_words_add(gone.words_.get(), span.data, span.size, 1, 0));
      if (i % kAtATime == kAtATime - 1 && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    return select(1, std::nullopt, 0, std::nullopt, &gone);
  }
  void shrink(std::size_t kept) {
    fastops_status status = FASTOPS_OK;
    {
      py::gil_scoped_release released;
      const std::unique_lock<std::shared_mutex> hold(*lock_);
      status = own();
      ++version_;
      if (status == FASTOPS_OK) status = fastops_words_shrink(words_.get(), kept);
    }
    raise_unless_ok(status);
  }
  py::tuple top(const std::optional<std::size_t>& k) const {
    for (;;) {
      fastops_words_info found{};
      std::vector<std::size_t> entries;
      std::size_t n = 0, key_bytes = 0;
      std::uint64_t version = 0;
      raise_unless_ok(polled([&](fastops_poll poll) {
        version = version_;
        found = describe();
        n = k.has_value() && *k < found.entries ? *k : found.entries;
        entries.resize(n);
        return fastops_words_rank(words_.get(), n, entries.data(), &key_bytes, poll);
      }));
      const py::bytes keys = room(key_bytes);
      py::array_t<std::uint64_t> offsets(static_cast<py::ssize_t>(n + 1)), counts(static_cast<py::ssize_t>(n)),
          docs(static_cast<py::ssize_t>(found.doc_freq != 0 ? n : 0));
      char* const key_room = PyBytes_AS_STRING(keys.ptr());
      std::uint64_t *const offset_room = offsets.mutable_data(), *const count_room = counts.mutable_data(),
                           *const docs_room = found.doc_freq != 0 ? docs.mutable_data() : nullptr;
      offset_room[0] = 0;
      bool changed = false;
      for (std::size_t i = 0; i < n && !changed; i += kAtATime) {
        const std::size_t some = std::min(kAtATime, n - i);
        const std::uint64_t begin = offset_room[i];
        {
          const auto hold = reading();
          changed = version != version_;  // written meanwhile
          if (!changed)
            fastops_words_read(words_.get(), entries.data() + i, some, key_room + begin, offset_room + i,
                               count_room + i, docs_room == nullptr ? nullptr : docs_room + i);
        }
        for (std::size_t j = i; j <= i + some; ++j) offset_room[j] += begin;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      }
      if (changed) continue;
      return py::make_tuple(keys, offsets, counts, found.doc_freq != 0 ? py::object(docs) : py::none());
    }
  }
  py::bytes to_bytes() const {
    for (;;) {
      std::size_t size = 0;
      {
        const auto hold = reading();
        size = fastops_words_packed_size(words_.get());
      }
      py::bytes result = room(size);
      char* const to = PyBytes_AS_STRING(result.ptr());
      py::gil_scoped_release released;
      const auto hold = reading();
      if (fastops_words_packed_size(words_.get()) != size) continue;  // written meanwhile
      fastops_words_pack(words_.get(), to);
      return result;
    }
  }
  void annotate(std::uint64_t documents, std::uint64_t error_bound) {
    const std::unique_lock<std::shared_mutex> hold(*lock_);
    fastops_words_annotate(words_.get(), documents, error_bound);
  }

 private:
  struct Asking {
    fastops_poll inner;
    std::shared_lock<std::shared_mutex>* hold;
    const std::uint64_t* version;
    std::uint64_t before;
    bool* changed;
  };
  static int ask(void* context) {
    const auto* const asking = static_cast<const Asking*>(context);
    asking->hold->unlock();
    const int answer = asking->inner.function(asking->inner.context);
    asking->hold->lock();
    if (answer == 0) *asking->changed = *asking->version != asking->before;
    return answer != 0 || *asking->changed ? 1 : 0;
  }
  fastops_words_info describe() const {
    fastops_words_info found;
    fastops_words_describe(words_.get(), &found);
    return found;
  }
  // Memory of this process alone: pages of a file are shared with the process that forked this one.
  fastops_status own() noexcept {
    if (born_ == getpid()) return FASTOPS_OK;
    fastops_words* copy = nullptr;
    const fastops_status status =
        fastops_words_select(words_.get(), 1, kEndOfCounts, 0, kEndOfCounts, nullptr, {nullptr, nullptr}, &copy);
    if (status != FASTOPS_OK) return status;
    words_.reset(copy);
    born_ = getpid();
    return FASTOPS_OK;
  }
  // Bytes to be written.
  static py::bytes room(std::size_t size) {
    auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
    if (!bytes) throw py::error_already_set();
    return bytes;
  }
  [[noreturn]] static void too_many() {
    PyErr_SetString(PyExc_OverflowError, "count must stay below 2**63, got more");
    throw py::error_already_set();
  }
  static void raise_overflow(fastops_status status) {
    if (status == FASTOPS_INVALID) too_many();
    raise_unless_ok(status);
  }

  WordsPtr words_;
  // A pointer, for tables are moved.
  std::unique_ptr<std::shared_mutex> lock_ = std::make_unique<std::shared_mutex>();
  std::uint64_t version_ = 0;
  pid_t born_ = getpid();
  // Changes nothing that can be seen.
  mutable std::unique_ptr<Lookups> lookups_;
};

WordTable table_from_bytes(const py::object& buffer) {
  const Bytes bytes(buffer);
  fastops_words* words = nullptr;
  const char* why = "";
  fastops_status status = FASTOPS_OK;
  {
    py::gil_scoped_release released;
    status = fastops_words_unpack(bytes.data(), bytes.size(), &words, &why);
  }
  if (status == FASTOPS_INVALID)
    throw py::value_error(std::string("counts must be a container of fastops, got bytes of which ") + why);
  raise_unless_ok(status);
  return WordTable(WordsPtr(words));
}

// A rule with the tables that it points to.
class WordRule {
 public:
  WordRule(int tokenizer, int lowercase, int errors, bool lines, bool doc_freq, std::pair<unsigned, unsigned> ngrams,
           std::size_t max_token_bytes, std::shared_ptr<WordTable> stop_words, const py::dict& tables)
      : stop_words_(std::move(stop_words)) {
    rule_.tokenizer = tokenizer;
    rule_.lowercase = lowercase;
    rule_.errors = errors;
    rule_.lines = lines ? 1 : 0;
    rule_.doc_freq = doc_freq ? 1 : 0;
    rule_.ngram_low = ngrams.first;
    rule_.ngram_high = ngrams.second;
    rule_.max_token_bytes = max_token_bytes;
    rule_.stop_words = stop_words_ == nullptr ? nullptr : stop_words_->get();
    rule_.class_pages = array<std::uint16_t>(tables, "class_pages");
    rule_.classes = array<std::uint8_t>(tables, "classes");
    rule_.case_pages = array<std::uint16_t>(tables, "case_pages");
    rule_.cases = array<std::int32_t>(tables, "cases");
    rule_.case_several = array<std::uint32_t>(tables, "case_several");
    rule_.break_pages = array<std::uint16_t>(tables, "break_pages");
    rule_.break_classes = array<std::uint8_t>(tables, "break_classes");
    if (tables.contains("zh")) {
      kept_.push_back(tables["zh"]);
      rule_.zh = reinterpret_cast<const fastops_zh_model*>(&tables["zh"].cast<const ZhModel&>());
    }
    if ((lowercase >= FASTOPS_CASE_UNICODE && (rule_.case_pages == nullptr || rule_.class_pages == nullptr)) ||
        (tokenizer == FASTOPS_WORDS_UNICODE && rule_.break_pages == nullptr) ||
        (tokenizer == FASTOPS_WORDS_ZH && rule_.zh == nullptr) || ngrams.first < 1 || ngrams.second < ngrams.first)
      throw py::value_error("the rule lacks a table, or its n-grams are none");
  }
  const fastops_word_rule& get() const { return rule_; }

 private:
  // Kept alive here; null where the rule needs none.
  template <class T> const T* array(const py::dict& tables, const char* name) {
    if (!tables.contains(name)) return nullptr;
    auto values = tables[name].cast<py::array_t<T, py::array::c_style>>();
    const T* const data = values.data();
    kept_.push_back(std::move(values));
    return data;
  }

  fastops_word_rule rule_{};
  std::shared_ptr<WordTable> stop_words_;
  std::vector<py::object> kept_;
};

// An exception of fastops/_rule.py.
[[noreturn]] void raise_named(const char* name, const std::string& text) {
  const py::object type = py::module_::import("fastops._rule").attr(name);
  PyErr_SetString(type.ptr(), text.c_str());
  throw py::error_already_set();
}

constexpr std::uint64_t kNoPlace = ~std::uint64_t{0};
// CPython's words, in the order of why_invalid().
constexpr const char* kWhyInvalid[4] = {"invalid start byte", "invalid continuation byte", "unexpected end of data",
                                        ""};

std::string hexadecimal(int byte) {
  constexpr char digits[] = "0123456789abcdef";
  return {'0', 'x', digits[byte >> 4 & 15], digits[byte & 15]};
}

[[noreturn]] void raise_error(const fastops_word_error& error, const py::object& name, const fastops_word_rule& rule) {
  const std::string text = py::str(name).cast<std::string>();
  const std::string place = std::to_string(error.offset);
  switch (error.failure) {
    case FASTOPS_WORDS_BAD_BYTE:
      raise_named("DecodeError", text + " must be UTF-8, got " + hexadecimal(error.error_number) + " at byte " + place +
                                     " (" + kWhyInvalid[error.error_number >> 8 & 3] + ")");
    case FASTOPS_WORDS_ENCODING:
      raise_named("DecodeError", text + " must be UTF-8, got a byte order mark of UTF-16 or UTF-32 at byte 0");
    case FASTOPS_WORDS_LONG_TOKEN:
      raise_named("TokenTooLong",
                  text + " must have no token of more than " + std::to_string(rule.max_token_bytes) +
                      " bytes, got one " +
                      (error.offset == kNoPlace ? "from the tokenizer" : "that begins at byte " + place));
    case FASTOPS_WORDS_READ:
    case FASTOPS_WORDS_SPILL: {
      py::object file = name;
      if (error.failure == FASTOPS_WORDS_SPILL) {
        const py::object folder = py::module_::import("os").attr("environ").attr("get")("TMPDIR");
        file = py::str("a temporary file in ") +
               (folder.is_none() || py::len(folder) == 0 ? py::str("/tmp") : py::str(folder));
      }
      errno = error.error_number;
      PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, file.ptr());
      throw py::error_already_set();
    }
    default:
      throw std::runtime_error("the counter was used after it had failed");
  }
}

class WordCounter {
 public:
  WordCounter(std::shared_ptr<WordRule> rule, unsigned workers, std::size_t memory_limit, std::size_t approx)
      : rule_(std::move(rule)),
        name_(py::str("<text>")),
        counter_(or_no_memory(fastops_word_counter_create(&rule_->get(), workers, memory_limit, approx))) {}

  void feed(const py::object& data) {
    const Bytes bytes(data);
    check(stoppable([&](fastops_poll poll) {
      return fastops_word_counter_feed(counter_.get(), bytes.data(), bytes.size(), poll);
    }));
  }
  void end() {
    check(stoppable([&](fastops_poll poll) { return fastops_word_counter_end(counter_.get(), poll); }));
  }
  void documents(const py::object& texts) {
    const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(texts.ptr(), "texts must be a list of bytes"));
    if (!list) throw py::error_already_set();
    const auto n = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(list.ptr()));
    // Copied references keep the bytes alive whatever happens to the list.
    std::vector<py::object> kept(n);
    std::vector<const void*> data(n);
    std::vector<std::size_t> sizes(n);
    for (std::size_t i = 0; i < n; ++i) {
      PyObject* const item = PySequence_Fast_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
      if (!PyBytes_Check(item)) throw py::type_error("texts must be a list of bytes");
      kept[i] = py::reinterpret_borrow<py::object>(item);
      data[i] = PyBytes_AS_STRING(item);
      sizes[i] = static_cast<std::size_t>(PyBytes_GET_SIZE(item));
    }
    check(stoppable([&](fastops_poll poll) {
      return fastops_word_counter_texts(counter_.get(), data.data(), sizes.data(), n, poll);
    }));
  }
  void tokens(const py::iterable& tokens) {
    for (const py::handle token : tokens) {
      if (!PyUnicode_Check(token.ptr()))
        throw py::type_error("the tokenizer must give strings, got an object of type " +
                             std::string(Py_TYPE(token.ptr())->tp_name));
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(token.ptr(), &size);
      py::object escaped;
      if (text == nullptr) {
        // Lone surrogates: bytes that were no UTF-8.
        PyErr_Clear();
        escaped = py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(token.ptr(), "utf-8", "surrogateescape"));
        if (!escaped) throw py::error_already_set();
        text = PyBytes_AS_STRING(escaped.ptr());
        size = PyBytes_GET_SIZE(escaped.ptr());
      }
      check(fastops_word_counter_token(counter_.get(), text, static_cast<std::size_t>(size)));
    }
    check(fastops_word_counter_end_document(counter_.get()));
  }
  void file(int fd, std::uint64_t start, std::uint64_t stop) {
    check(
        stoppable([&](fastops_poll poll) { return fastops_word_counter_file(counter_.get(), fd, start, stop, poll); }));
  }
  WordTable finish() {
    fastops_words* words = nullptr;
    check(stoppable([&](fastops_poll poll) { return fastops_word_counter_finish(counter_.get(), poll, &words); }));
    return WordTable(WordsPtr(words));
  }
  // From another thread: what this counter is doing ends soon, with Stopped of fastops/_sources.py.
  void stop() { stopped_.store(true, std::memory_order_relaxed); }
  const py::object& name() const { return name_; }
  void set_name(const py::object& name) { name_ = name; }

 private:
  struct Poll {
    const std::atomic<bool>* stopped;
    fastops_poll inner;
  };
  template <class F> fastops_status stoppable(F&& f) {
    return unlocked([&](fastops_poll inner) {
      Poll both{&stopped_, inner};
      const auto ask = [](void* context) -> int {
        const auto* const poll = static_cast<const Poll*>(context);
        if (poll->stopped->load(std::memory_order_relaxed)) return 1;
        return poll->inner.function != nullptr ? poll->inner.function(poll->inner.context) : 0;
      };
      return f(fastops_poll{ask, &both});
    });
  }
  void check(fastops_status status) {
    if (status == FASTOPS_INVALID) {
      fastops_word_error error{};
      fastops_word_counter_error(counter_.get(), &error);
      raise_error(error, name_, rule_->get());
    }
    if (status == FASTOPS_INTERRUPTED && PyErr_Occurred() == nullptr && stopped_.load(std::memory_order_relaxed)) {
      PyErr_SetNone(py::module_::import("fastops._sources").attr("Stopped").ptr());
      throw py::error_already_set();
    }
    raise_unless_ok(status);
  }

  std::shared_ptr<WordRule> rule_;
  py::object name_;
  CounterPtr counter_;
  std::atomic<bool> stopped_{false};
};

py::tuple encode(const WordTable& table, const py::object& said, const std::vector<py::bytes>& documents) {
  // `said` is a Rule of fastops/_rule.py.
  const auto rule =
      py::module_::import("fastops.native.wordcount").attr("native_rule")(said).cast<std::shared_ptr<WordRule>>();
  std::unique_ptr<Lookups> lookups = table.take_lookups(rule);
  bool changed = false;
  const fastops_status made = table.polled([&](fastops_poll poll) {
    if (lookups == nullptr || lookups->reader == nullptr || lookups->version != table.version())
      lookups = std::make_unique<Lookups>(
          Lookups{rule, ReaderPtr(fastops_word_reader_create(&rule->get(), table.get(), poll)), table.version()});
    return lookups->reader == nullptr ? FASTOPS_NO_MEMORY : FASTOPS_OK;
  });
  // Also null where a signal's handler raised.
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  raise_unless_ok(made);
  std::vector<std::int64_t> all;
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(documents.size() + 1));
  offsets.mutable_data()[0] = 0;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const std::int64_t* ids = nullptr;
    std::size_t count = 0;
    fastops_word_error error{};
    const Span text = bytes_span(documents[i]);
    const fastops_status status = unlocked([&](fastops_poll) {
      const auto hold = table.reading();
      changed = table.version() != lookups->version;
      if (changed) return FASTOPS_OK;
      return fastops_word_reader_read(lookups->reader.get(), text.data, text.size, &ids, &count, &error);
    });
    if (changed) throw std::runtime_error("counts were changed while texts were encoded with them");
    if (status == FASTOPS_INVALID) raise_error(error, py::str("<text " + std::to_string(i) + ">"), rule->get());
    raise_unless_ok(status);
    if (count > 0) all.insert(all.end(), ids, ids + count);
    offsets.mutable_data()[i + 1] = static_cast<std::int64_t>(all.size());
    if (i % 4096 == 4095 && PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  table.keep_lookups(std::move(lookups));
  return py::make_tuple(py::array_t<std::int64_t>(static_cast<py::ssize_t>(all.size()), all.data()), offsets);
}

}  // namespace

void bind_wordcount(py::module_& m) {
  py::class_<WordTable, std::shared_ptr<WordTable>>(m, "WordTable")
      .def(py::init<bool>(), py::arg("docs") = false)
      .def("__len__", [](const WordTable& t) { return t.info().entries; })
      .def("total", &WordTable::total)
      .def_property_readonly("has_docs", [](const WordTable& t) { return t.info().doc_freq != 0; })
      .def_property_readonly("nbytes", [](const WordTable& t) { return t.info().bytes; })
      .def_property(
          "documents", [](const WordTable& t) { return t.info().documents; },
          [](WordTable& t, std::uint64_t n) { t.annotate(n, t.info().error_bound); })
      .def_property(
          "error_bound", [](const WordTable& t) { return t.info().error_bound; },
          [](WordTable& t, std::uint64_t n) { t.annotate(t.info().documents, n); })
      .def("get", &WordTable::find, py::arg("key"))
      .def("add", &WordTable::add, py::arg("key"), py::arg("count"), py::arg("docs") = py::int_(0))
      .def("merge", &WordTable::merge, py::arg("other"))
      .def("copy", [](const WordTable& t) { return t.select(1, std::nullopt, 0, std::nullopt, nullptr); })
      .def(
          "select",
          [](const WordTable& t, std::uint64_t min_count, std::optional<std::uint64_t> max_count,
             std::uint64_t min_docs, std::optional<std::uint64_t> max_docs) {
            return t.select(min_count, max_count, min_docs, max_docs, nullptr);
          },
          py::arg("min_count") = 1, py::arg("max_count") = py::none(), py::arg("min_docs") = 0,
          py::arg("max_docs") = py::none())
      .def("only", &WordTable::only, py::arg("keys"))
      .def("without", &WordTable::without, py::arg("keys"))
      .def("shrink", &WordTable::shrink, py::arg("kept"))
      .def("split", &WordTable::split, py::arg("k"))
      .def("top", &WordTable::top, py::arg("k") = py::none())
      .def("to_bytes", &WordTable::to_bytes)
      .def("encode", &encode, py::arg("rule"), py::arg("documents"))
      .def("__reduce__", [m = py::handle(m)](const WordTable& t) {
        return py::make_tuple(m.attr("table_from_bytes"), py::make_tuple(t.to_bytes()));
      });
  m.def("table_from_bytes", &table_from_bytes, py::arg("buffer"));
  py::class_<WordRule, std::shared_ptr<WordRule>>(m, "WordRule")
      .def(py::init<int, int, int, bool, bool, std::pair<unsigned, unsigned>, std::size_t, std::shared_ptr<WordTable>,
                    const py::dict&>(),
           py::arg("tokenizer"), py::arg("lowercase"), py::arg("errors"), py::arg("lines"), py::arg("doc_freq"),
           py::arg("ngrams"), py::arg("max_token_bytes"), py::arg("stop_words").none(true), py::arg("tables"));
  py::class_<WordCounter>(m, "WordCounter")
      .def(py::init<std::shared_ptr<WordRule>, unsigned, std::size_t, std::size_t>(), py::arg("rule"),
           py::arg("workers") = 1, py::arg("memory_limit") = 0, py::arg("approx") = 0)
      .def_property("name", &WordCounter::name, &WordCounter::set_name)
      .def("feed", &WordCounter::feed, py::arg("data"))
      .def("end", &WordCounter::end)
      .def("documents", &WordCounter::documents, py::arg("texts"))
      .def("tokens", &WordCounter::tokens, py::arg("tokens"))
      .def("file", &WordCounter::file, py::arg("fd"), py::arg("start"), py::arg("stop"))
      .def("finish", &WordCounter::finish)
      .def("stop", &WordCounter::stop);
}

}  // namespace fastops
