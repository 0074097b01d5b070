// SPDX-License-Identifier: BSD-3-Clause
// The C interface of word counting.
#include <algorithm>
#include <new>

#include "core/parallel.h"
#include "wordcount/wordcount_container.h"
#include "wordcount/wordcount_counter.h"

namespace fastops {
namespace {

const std::uint8_t* bytes_of(const void* p) noexcept { return static_cast<const std::uint8_t*>(p); }

int compare_keys(const Table& table, const Table::Slot& a, const Table::Slot& b) noexcept {
  const std::size_t n = std::min(a.size1, b.size1) - 1;
  const int order = n == 0 ? 0 : std::memcmp(table.key_of(a), table.key_of(b), n);
  return order != 0 ? order : a.size1 < b.size1 ? -1 : a.size1 > b.size1;
}

#if defined(FASTOPS_TEST_TINY)
constexpr std::size_t kRun = 8;
#else
constexpr std::size_t kRun = std::size_t{1} << 14;  // slots, some milliseconds of work: then the poll is asked
#endif

// A slot on its way to its place, with the beginning of what it is sorted by: few comparisons need the slot itself.
struct Ranked {
  std::uint64_t order;  // the count's complement and the first four bytes of the key; 0 for counts beyond 32 bits
  std::size_t slot;
};

// The most frequent first, equal ones by their bytes.
class Ranking {
 public:
  explicit Ranking(const Table& table) noexcept : table_(table) {}
  Ranked at(std::size_t i) const noexcept {
    constexpr std::uint64_t kMost = 0xffffffffu;
    const Table::Slot& slot = table_.slots()[i];
    if (slot.count >= kMost) return {0, i};
    const std::uint8_t* const key = table_.key_of(slot);
    const std::size_t size = slot.size1 - 1;
    std::uint64_t order = kMost - slot.count;
    for (std::size_t k = 0; k < 4; ++k) order = order << 8 | (k < size ? key[k] : 0u);
    return {order, i};
  }
  bool operator()(const Ranked& a, const Ranked& b) const noexcept {
    if (a.order != b.order) return a.order < b.order;
    const Table::Slot &left = table_.slots()[a.slot], &right = table_.slots()[b.slot];
    return left.count != right.count ? left.count > right.count : compare_keys(table_, left, right) < 0;
  }

 private:
  const Table& table_;
};

// Sorts all[0 .. n): short runs, which are merged into `other` and back again. Answers where they lie in the end,
// null where the poll said no.
Ranked* sorted(const Ranking& before, Ranked* all, Ranked* other, std::size_t n, fastops_poll poll) noexcept {
  for (std::size_t i = 0; i < n; i += kRun) {
    std::sort(all + i, all + std::min(i + kRun, n), before);
    if (interrupted(poll)) return nullptr;
  }
  for (std::size_t width = kRun; width < n; width *= 2) {
    std::size_t out = 0;
    for (std::size_t i = 0; i < n; i += 2 * width) {
      std::size_t a = i, b = std::min(i + width, n);
      const std::size_t a_end = b, b_end = std::min(i + 2 * width, n);
      while (a < a_end || b < b_end) {
        const bool right = a == a_end || (b < b_end && before(all[b], all[a]));
        other[out++] = all[right ? b++ : a++];
        if (out % kRun == 0 && interrupted(poll)) return nullptr;
      }
    }
    std::swap(all, other);
  }
  return all;
}

// The slots of the `count` first ones in order.
fastops_status rank(const Table& table, std::size_t count, std::size_t* entries, fastops_poll poll) noexcept {
  const Ranking before(table);
  // Of few the worst stands on top of a heap; of many all are sorted.
  const bool few = count < table.size() / 16 && count <= std::size_t{1} << 16;
  Region room, more;
  if (!room.grow((few ? count : table.size()) * sizeof(Ranked)) || (!few && !more.grow(table.size() * sizeof(Ranked))))
    return FASTOPS_NO_MEMORY;
  auto* all = room.get<Ranked>();
  std::size_t n = 0;
  for (std::size_t i = 0; count > 0 && i < table.capacity(); ++i) {
    if (i % kRun == kRun - 1 && interrupted(poll)) return FASTOPS_INTERRUPTED;
    if (table.slots()[i].size1 == 0) continue;
    const Ranked next = before.at(i);
    if (!few) {
      all[n++] = next;
    } else if (n < count) {
      all[n++] = next;
      std::push_heap(all, all + n, before);
    } else if (before(next, all[0])) {
      std::pop_heap(all, all + n, before);
      all[n - 1] = next;
      std::push_heap(all, all + n, before);
    }
  }
  if (few) {
    std::sort_heap(all, all + n, before);
  } else if (n > 0) {
    all = sorted(before, all, more.get<Ranked>(), n, poll);
    if (all == nullptr) return FASTOPS_INTERRUPTED;
  }
  for (std::size_t i = 0; i < count; ++i) entries[i] = all[i].slot;
  return FASTOPS_OK;
}

// Whether a rule says what it means and has the tables that it needs.
bool sensible(const fastops_word_rule& rule) noexcept {
  const auto within = [](int value, int last) { return value >= 0 && value <= last; };
  if (!within(rule.tokenizer, FASTOPS_WORDS_ZH) || !within(rule.lowercase, FASTOPS_CASE_FOLD) ||
      !within(rule.errors, FASTOPS_ERRORS_ESCAPE))
    return false;
  if (rule.ngram_low < 1 || rule.ngram_high < rule.ngram_low || rule.max_token_bytes < 1) return false;
  if (rule.class_pages != nullptr && rule.classes == nullptr) return false;
  if (rule.lowercase >= FASTOPS_CASE_UNICODE && (rule.class_pages == nullptr || rule.case_pages == nullptr ||
                                                 rule.cases == nullptr || rule.case_several == nullptr))
    return false;
  if (rule.tokenizer == FASTOPS_WORDS_UNICODE && (rule.break_pages == nullptr || rule.break_classes == nullptr))
    return false;
  return rule.tokenizer != FASTOPS_WORDS_ZH || rule.zh != nullptr;
}

}  // namespace
}  // namespace fastops

// Reads texts by a rule and looks their tokens up.
struct fastops_word_reader {
  fastops_word_reader(const fastops_word_rule& asked, const fastops_words* words, const std::int64_t* ranks) noexcept
      : rule(asked),
        lookup(words->table, ranks),
        stream(rule, rule.stop_words == nullptr ? nullptr : &rule.stop_words->table, lookup) {}
  fastops_word_rule rule;
  fastops::Lookup lookup;
  fastops::Stream<fastops::Lookup> stream;
  fastops::Region ranks;
};
struct fastops_word_counter : fastops::WordCounter {
  using fastops::WordCounter::WordCounter;
};

using fastops::Added;
using fastops::bytes_of;
using fastops::Table;

extern "C" {

fastops_words* fastops_words_create(int doc_freq) noexcept { return new (std::nothrow) fastops_words(doc_freq != 0); }

void fastops_words_destroy(fastops_words* words) noexcept { delete words; }

fastops_status fastops_words_add(fastops_words* words, const char* key, size_t size, uint64_t count,
                                 uint64_t documents) noexcept {
  if (size >= fastops::kMaxKey || documents > count) return FASTOPS_INVALID;
  if (count == 0) return FASTOPS_OK;
  const Added added = words->table.add(fastops::make_key(bytes_of(key), size), count, documents);
  if (added == Added::kDone && words->total_known) words->set_total(words->total() + count);
  return added == Added::kDone ? FASTOPS_OK : added == Added::kNoMemory ? FASTOPS_NO_MEMORY : FASTOPS_INVALID;
}

int fastops_words_get(const fastops_words* words, const char* key, size_t size, uint64_t* count,
                      uint64_t* documents) noexcept {
  *count = *documents = 0;
  if (size >= fastops::kMaxKey) return 0;
  const Table::Slot* const slot = words->table.get(fastops::make_key(bytes_of(key), size));
  if (slot == nullptr) return 0;
  *count = slot->count;
  *documents = words->table.documents_of(*slot);
  return 1;
}

void fastops_words_describe(const fastops_words* words, fastops_words_info* info) noexcept {
  const Table& table = words->table;
  const unsigned __int128 total = words->total();
  info->entries = table.size();
  info->bytes = table.bytes();
  info->total_low = static_cast<std::uint64_t>(total);
  info->total_high = static_cast<std::uint64_t>(total >> 64);
  info->documents = words->documents;
  info->error_bound = words->error_bound;
  info->doc_freq = table.with_documents() ? 1 : 0;
}

void fastops_words_annotate(fastops_words* words, uint64_t documents, uint64_t error_bound) noexcept {
  words->documents = documents;
  words->error_bound = error_bound;
}

fastops_status fastops_words_merge(fastops_words* words, const fastops_words* from) noexcept {
  if (words == from) {
    fastops_words copy(from->table.with_documents());
    if (copy.table.add(from->table) != Added::kDone) return FASTOPS_NO_MEMORY;
    copy.documents = from->documents;
    copy.error_bound = from->error_bound;
    return fastops_words_merge(words, &copy);
  }
  const bool known = words->total_known && from->total_known;
  const unsigned __int128 sum = known ? words->total() + from->total() : 0;
  words->total_known = false;
  const Added added = words->table.add(from->table);
  if (added != Added::kDone) return added == Added::kNoMemory ? FASTOPS_NO_MEMORY : FASTOPS_INVALID;
  if (known) words->set_total(sum);
  words->documents += from->documents;
  words->error_bound += from->error_bound;
  return FASTOPS_OK;
}

fastops_status fastops_words_select(const fastops_words* words, uint64_t min_count, uint64_t max_count,
                                    uint64_t min_documents, uint64_t max_documents, const fastops_words* without,
                                    fastops_poll poll, fastops_words** selected) noexcept {
  const Table& table = words->table;
  fastops_words* const result = fastops_words_create(table.with_documents() ? 1 : 0);
  if (result == nullptr) return FASTOPS_NO_MEMORY;
  result->documents = words->documents;
  result->error_bound = words->error_bound;
  const auto wanted = [&](const Table::Slot& slot) {
    if (slot.size1 == 0 || slot.count < min_count || slot.count > max_count) return false;
    const std::uint64_t documents = table.documents_of(slot);
    if (documents < min_documents || documents > max_documents) return false;
    return without == nullptr || without->table.get(table.key_at(slot)) == nullptr;
  };
  // Room for all first: what comes in order of hashes would crowd the first slots of a table that has yet to grow.
  std::size_t entries = 0, long_bytes = 0;
  bool stopped = false;
  const auto asked = [&](std::size_t i) noexcept {
    stopped = i % fastops::kRun == fastops::kRun - 1 && fastops::interrupted(poll);
    return stopped;
  };
  for (std::size_t i = 0; i < table.capacity() && !asked(i); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (!wanted(slot)) continue;
    ++entries;
    if (slot.size1 - 1 > fastops::kInlineKey) long_bytes += slot.size1 - 1;
  }
  bool made = entries == 0 || result->table.reserve(entries, long_bytes);
  for (std::size_t i = 0; made && !stopped && i < table.capacity() && !asked(i); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (wanted(slot))
      made = result->table.add(table.key_at(slot), slot.count, table.documents_of(slot)) == Added::kDone;
  }
  if (!made || stopped) {
    delete result;
    return made ? FASTOPS_INTERRUPTED : FASTOPS_NO_MEMORY;
  }
  *selected = result;
  return FASTOPS_OK;
}

fastops_status fastops_words_shrink(fastops_words* words, size_t kept) noexcept {
  if (words->table.with_documents()) return FASTOPS_INVALID;
  const std::uint64_t less = words->table.shrink(kept);
  if (less == fastops::kMaxCount) return FASTOPS_NO_MEMORY;
  words->total_known = false;
  words->error_bound += less;
  return FASTOPS_OK;
}

fastops_status fastops_words_split(const fastops_words* words, size_t parts, fastops_poll poll,
                                   fastops_words** tables) noexcept {
  if (parts == 0) return FASTOPS_INVALID;
  const Table& table = words->table;
  struct Size {
    std::size_t entries, long_bytes;
  };
  fastops::Region sizes, part_of;  // by part; by slot
  bool made = sizes.grow(parts * sizeof(Size)) && part_of.grow((table.capacity() + 1) * sizeof(std::size_t));
  bool stopped = false;
  const auto asked = [&](std::size_t i) noexcept {
    stopped = i % fastops::kRun == fastops::kRun - 1 && fastops::interrupted(poll);
    return stopped;
  };
  for (std::size_t i = 0; made && i < table.capacity() && !asked(i); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (slot.size1 == 0) continue;
    const fastops::Key key = table.key_at(slot);
    std::uint64_t hash = 0xcbf29ce484222325u;
    for (std::uint32_t k = 0; k < key.size; ++k) hash = (hash ^ key.data[k]) * 0x100000001b3u;
    const auto part = static_cast<std::size_t>(hash % parts);
    part_of.get<std::size_t>()[i] = part;
    Size& size = sizes.get<Size>()[part];
    ++size.entries;
    if (key.size > fastops::kInlineKey) size.long_bytes += key.size;
  }
  for (std::size_t i = 0; i < parts; ++i) {
    tables[i] = nullptr;
    if (!made || stopped || asked(i)) continue;
    const Size& size = sizes.get<Size>()[i];
    tables[i] = fastops_words_create(table.with_documents() ? 1 : 0);
    // What each will hold; as in fastops_words_select.
    made = tables[i] != nullptr && (size.entries == 0 || tables[i]->table.fit(size.entries, size.long_bytes));
  }
  for (std::size_t i = 0; made && !stopped && i < table.capacity() && !asked(i); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (slot.size1 == 0) continue;
    made = tables[part_of.get<std::size_t>()[i]]->table.add(table.key_at(slot), slot.count, table.documents_of(slot)) ==
           Added::kDone;
  }
  if (made && !stopped) return FASTOPS_OK;
  for (std::size_t i = 0; i < parts; ++i) {
    delete tables[i];
    tables[i] = nullptr;
  }
  return made ? FASTOPS_INTERRUPTED : FASTOPS_NO_MEMORY;
}

fastops_status fastops_words_rank(const fastops_words* words, size_t count, size_t* entries, size_t* key_bytes,
                                  fastops_poll poll) noexcept {
  const Table& table = words->table;
  if (count > table.size()) return FASTOPS_INVALID;
  const fastops_status status = fastops::rank(table, count, entries, poll);
  if (status != FASTOPS_OK) return status;
  *key_bytes = 0;
  for (std::size_t i = 0; i < count; ++i) *key_bytes += table.slots()[entries[i]].size1 - 1;
  return FASTOPS_OK;
}

void fastops_words_read(const fastops_words* words, const size_t* entries, size_t count, char* keys, uint64_t* offsets,
                        uint64_t* counts, uint64_t* documents) noexcept {
  const Table& table = words->table;
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Table::Slot& slot = table.slots()[entries[i]];
    const std::size_t size = slot.size1 - 1;
    offsets[i] = at;
    std::memcpy(keys + at, table.key_of(slot), size);
    at += size;
    counts[i] = slot.count;
    if (documents != nullptr) documents[i] = table.documents_of(slot);
  }
  offsets[count] = at;
}

size_t fastops_words_packed_size(const fastops_words* words) noexcept { return fastops::packed_size(*words); }

void fastops_words_pack(const fastops_words* words, void* to) noexcept {
  fastops::pack(*words, static_cast<std::uint8_t*>(to));
}

fastops_status fastops_words_unpack(const void* from, size_t size, fastops_words** words, const char** why) noexcept {
  *why = "";
  fastops_words* const result = fastops_words_create(0);
  if (result == nullptr) return FASTOPS_NO_MEMORY;
  const fastops_status status = fastops::unpack(bytes_of(from), size, result, why);
  if (status == FASTOPS_OK)
    *words = result;
  else
    delete result;
  return status;
}

fastops_word_counter* fastops_word_counter_create(const fastops_word_rule* rule, unsigned workers, size_t memory_limit,
                                                  size_t approximate) noexcept {
  if (!fastops::sensible(*rule)) return nullptr;
  auto* const counter = new (std::nothrow) fastops_word_counter(*rule, workers, memory_limit, approximate);
  if (counter == nullptr || counter->prepare()) return counter;
  delete counter;
  return nullptr;
}

void fastops_word_counter_destroy(fastops_word_counter* counter) noexcept { delete counter; }

fastops_status fastops_word_counter_feed(fastops_word_counter* counter, const void* data, size_t size,
                                         fastops_poll poll) noexcept {
  return counter->feed(bytes_of(data), size, poll);
}

fastops_status fastops_word_counter_end(fastops_word_counter* counter, fastops_poll poll) noexcept {
  return counter->end(poll);
}

fastops_status fastops_word_counter_texts(fastops_word_counter* counter, const void* const* data, const size_t* sizes,
                                          size_t count, fastops_poll poll) noexcept {
  return counter->texts(data, sizes, count, poll);
}

fastops_status fastops_word_counter_token(fastops_word_counter* counter, const char* token, size_t size) noexcept {
  return counter->token(bytes_of(token), size);
}

fastops_status fastops_word_counter_end_document(fastops_word_counter* counter) noexcept {
  return counter->end_document();
}

fastops_status fastops_word_counter_file(fastops_word_counter* counter, int file, uint64_t start, uint64_t stop,
                                         fastops_poll poll) noexcept {
  return start <= stop ? counter->file(file, start, stop, poll) : FASTOPS_INVALID;
}

fastops_status fastops_word_counter_finish(fastops_word_counter* counter, fastops_poll poll,
                                           fastops_words** words) noexcept {
  return counter->finish(poll, words);
}

void fastops_word_counter_error(const fastops_word_counter* counter, fastops_word_error* error) noexcept {
  *error = counter->error();
}

fastops_word_reader* fastops_word_reader_create(const fastops_word_rule* rule, const fastops_words* words,
                                                fastops_poll poll) noexcept {
  if (!fastops::sensible(*rule)) return nullptr;
  const Table& table = words->table;
  fastops::Region order, ranks;
  if (!order.grow(table.size() * sizeof(std::size_t)) || !ranks.grow(table.capacity() * sizeof(std::int64_t)) ||
      fastops::rank(table, table.size(), order.get<std::size_t>(), poll) != FASTOPS_OK)
    return nullptr;
  for (std::size_t i = 0; i < table.size(); ++i)
    ranks.get<std::int64_t>()[order.get<std::size_t>()[i]] = static_cast<std::int64_t>(i);
  auto* const reader = new (std::nothrow) fastops_word_reader(*rule, words, ranks.get<std::int64_t>());
  if (reader != nullptr) reader->ranks = std::move(ranks);
  return reader;
}

void fastops_word_reader_destroy(fastops_word_reader* reader) noexcept { delete reader; }

fastops_status fastops_word_reader_read(fastops_word_reader* reader, const void* text, size_t size, const int64_t** ids,
                                        size_t* count, fastops_word_error* error) noexcept {
  reader->stream.reset();
  reader->lookup.clear();
  std::size_t skipped = 0;
  if (fastops::begins_with_mark(bytes_of(text), size, &skipped)) reader->stream.fail(FASTOPS_WORDS_ENCODING, 0);
  if (reader->stream.ok()) reader->stream.consume(bytes_of(text) + skipped, size - skipped, skipped, true);
  if (reader->stream.ok()) reader->stream.end_text();
  *error = reader->stream.error();
  *ids = reader->lookup.ids();
  *count = reader->lookup.count();
  return reader->stream.status();
}

}  // extern "C"
