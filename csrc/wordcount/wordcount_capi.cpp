// SPDX-License-Identifier: BSD-3-Clause
// The C interface of word counting.
#include <algorithm>
#include <new>

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

// The most frequent first, equal ones by their bytes.
class Ranking {
 public:
  explicit Ranking(const Table& table) noexcept : table_(table) {}
  bool operator()(std::size_t a, std::size_t b) const noexcept {
    const Table::Slot &left = table_.slots()[a], &right = table_.slots()[b];
    return left.count != right.count ? left.count > right.count : compare_keys(table_, left, right) < 0;
  }

 private:
  const Table& table_;
};

// The slots of the `count` first ones in order.
bool rank(const Table& table, std::size_t count, std::size_t* entries) noexcept {
  Region room;
  std::size_t* all = entries;
  if (count < table.size()) {
    if (!room.grow(table.size() * sizeof(std::size_t))) return false;
    all = room.get<std::size_t>();
  }
  std::size_t n = 0;
  for (std::size_t i = 0; i < table.capacity(); ++i)
    if (table.slots()[i].size1 != 0) all[n++] = i;
  const Ranking before(table);
  if (count < n) {
    std::nth_element(all, all + count, all + n, before);
    std::copy(all, all + count, entries);
  }
  std::sort(entries, entries + count, before);
  return true;
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
                                    fastops_words** selected) noexcept {
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
  for (std::size_t i = 0; i < table.capacity(); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (!wanted(slot)) continue;
    ++entries;
    if (slot.size1 - 1 > fastops::kInlineKey) long_bytes += slot.size1 - 1;
  }
  bool made = entries == 0 || result->table.reserve(entries, long_bytes);
  for (std::size_t i = 0; made && i < table.capacity(); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (wanted(slot))
      made = result->table.add(table.key_at(slot), slot.count, table.documents_of(slot)) == Added::kDone;
  }
  if (!made) {
    delete result;
    return FASTOPS_NO_MEMORY;
  }
  *selected = result;
  return FASTOPS_OK;
}

fastops_status fastops_words_split(const fastops_words* words, size_t parts, fastops_words** tables) noexcept {
  if (parts == 0) return FASTOPS_INVALID;
  const Table& table = words->table;
  bool made = true;
  for (std::size_t i = 0; i < parts; ++i) {
    tables[i] = fastops_words_create(table.with_documents() ? 1 : 0);
    // About what each will hold; as in fastops_words_select.
    made = made && tables[i] != nullptr && tables[i]->table.reserve(table.size() / parts, 0);
  }
  for (std::size_t i = 0; made && i < table.capacity(); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (slot.size1 == 0) continue;
    const fastops::Key key = table.key_at(slot);
    std::uint64_t hash = 0xcbf29ce484222325u;
    for (std::uint32_t k = 0; k < key.size; ++k) hash = (hash ^ key.data[k]) * 0x100000001b3u;
    made = tables[hash % parts]->table.add(key, slot.count, table.documents_of(slot)) == Added::kDone;
  }
  if (made) return FASTOPS_OK;
  for (std::size_t i = 0; i < parts; ++i) {
    delete tables[i];
    tables[i] = nullptr;
  }
  return FASTOPS_NO_MEMORY;
}

fastops_status fastops_words_rank(const fastops_words* words, size_t count, size_t* entries,
                                  size_t* key_bytes) noexcept {
  const Table& table = words->table;
  if (count > table.size()) return FASTOPS_INVALID;
  if (!fastops::rank(table, count, entries)) return FASTOPS_NO_MEMORY;
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

fastops_word_reader* fastops_word_reader_create(const fastops_word_rule* rule, const fastops_words* words) noexcept {
  if (!fastops::sensible(*rule)) return nullptr;
  const Table& table = words->table;
  fastops::Region order, ranks;
  if (!order.grow(table.size() * sizeof(std::size_t)) || !ranks.grow(table.capacity() * sizeof(std::int64_t)) ||
      !fastops::rank(table, table.size(), order.get<std::size_t>()))
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
