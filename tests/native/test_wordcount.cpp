// SPDX-License-Identifier: BSD-3-Clause
// Word counting through the C interface, and the scan of every level, against scalar code: texts cut at every place,
// any number of threads, tables that spill, counts near their bound, containers that lie. Built three times: as it is,
// with blocks of 64 bytes and tables of 4 slots (FASTOPS_TEST_TINY), and with all keys in one slot
// (FASTOPS_TEST_COLLISIONS).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "check.h"
#include "core/cpuid.h"
#include "core/dispatch.h"
#include "wordcount/wordcount_kernels.h"
#include "wordcount/wordcount_table.h"
#include "wordcount/wordcount_utf8.h"
#include "word_model.h"

namespace {

using model::Result;
using std::string;
using Words = std::unique_ptr<fastops_words, decltype(&fastops_words_destroy)>;
using Counter = std::unique_ptr<fastops_word_counter, decltype(&fastops_word_counter_destroy)>;
constexpr fastops_poll kNoPoll = {nullptr, nullptr};
const std::set<string> kNoStopWords;

Random source{7};
std::size_t below(std::size_t n) { return std::size_t(source.next() % n); }

Words own(fastops_words* words) { return {words, &fastops_words_destroy}; }
Counter counter(const fastops_word_rule& rule, unsigned workers = 1, std::size_t memory_limit = 0,
                std::size_t approximate = 0) {
  return {fastops_word_counter_create(&rule, workers, memory_limit, approximate), &fastops_word_counter_destroy};
}
fastops_status feed(const Counter& c, const string& text) {
  return fastops_word_counter_feed(c.get(), text.data(), text.size(), kNoPoll);
}
fastops_status end(const Counter& c) { return fastops_word_counter_end(c.get(), kNoPoll); }
Words finish(const Counter& c) {
  fastops_words* words = nullptr;
  const fastops_status status = fastops_word_counter_finish(c.get(), kNoPoll, &words);
  CHECK(status == FASTOPS_OK, "finish: status %d", int(status));
  return own(words);
}
fastops_word_error error_of(const Counter& c) {
  fastops_word_error error{};
  fastops_word_counter_error(c.get(), &error);
  return error;
}
Result wanted_of(const fastops_word_rule& rule, const string& text) {
  Result result;
  model::count_text(rule, kNoStopWords, text, result);
  return result;
}
string name_of(const fastops_word_rule& r) {
  char text[120];
  std::snprintf(text, sizeof text, "%s: tokenizer %d, case %d, errors %d, lines %d, documents %d, %u-%u-grams",
                fastops_get_target(), r.tokenizer, r.lowercase, r.errors, r.lines, r.doc_freq, r.ngram_low,
                r.ngram_high);
  return text;
}
void compare(const fastops_word_rule& rule, const Words& words, const Result& wanted, const string& how) {
  if (words == nullptr) return;
  const string difference = model::difference(model::contents(words.get()), wanted);
  CHECK(difference.empty(), "%s, %s: %s", name_of(rule).c_str(), how.c_str(), difference.c_str());
}

// --- The scan of every level.

bool in_word(int kind, std::uint8_t c) {
  if (kind == fastops::kNotUnicodeSpace) return !((c >= 9 && c <= 13) || (c >= 28 && c <= 32));
  if (kind == fastops::kNotAsciiSpace) return !((c >= 9 && c <= 13) || c == 32);
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' || c >= 0x80;
}

void scans() {
#define FASTOPS_LEVEL_TABLE(level) &fastops::level::kWordKernels,
  const fastops::WordKernels* const levels[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_LEVEL_TABLE)};
#undef FASTOPS_LEVEL_TABLE
  for (int level = 0; level < fastops::kLevels; ++level) {
    if (fastops_target_runs(fastops_compiled_target(level)) != 1) {
      printf("scan of %s: not run, the CPU lacks it\n", fastops_compiled_target(level));
      continue;
    }
    for (int kind = 0; kind < fastops::kWordByteKinds; ++kind)
      for (const bool lower : {false, true})
        for (std::size_t blocks = 0; blocks < 5; ++blocks)
          for (std::size_t offset = 0; offset < 64; offset += offset < 9 ? 1 : 11) {
            const std::size_t n = 64 * blocks;
            // All 256 bytes in turn, then random ones.
            std::vector<std::uint8_t> in(offset + n), out(offset + n + 64, 0xee);
            for (std::size_t i = 0; i < n; ++i)
              in[offset + i] = std::uint8_t(blocks == 4 ? i + offset : source.next() >> 20);
            std::vector<std::uint64_t> words(blocks + 1, 7), high(blocks + 1, 7);
            const std::size_t lines = levels[level]->scan[kind][lower](in.data() + offset, blocks, out.data() + offset,
                                                                       words.data(), high.data());
            std::size_t newlines = 0;
            bool right = words[blocks] == 7 && high[blocks] == 7 && out[offset + n] == 0xee;
            for (std::size_t i = 0; i < offset; ++i) right = right && out[i] == 0xee;
            for (std::size_t i = 0; i < n; ++i) {
              const std::uint8_t c = in[offset + i];
              newlines += c == '\n';
              right = right && out[offset + i] == (lower && c >= 'A' && c <= 'Z' ? c + 32 : c) &&
                      (words[i / 64] >> i % 64 & 1) == std::uint64_t(in_word(kind, c)) &&
                      (high[i / 64] >> i % 64 & 1) == std::uint64_t(c >= 0x80);
            }
            CHECK(right && lines == newlines, "%s: kind %d, lower %d, %zu blocks at %zu: %zu lines, wanted %zu",
                  fastops_compiled_target(level), kind, lower, blocks, offset, lines, newlines);
          }
  }
}

// Every lead byte with every second one, and what stands at the bounds of the ranges behind them, cut short and whole.
void decoding() {
  const std::uint8_t later[] = {0, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff};
  std::uint8_t p[4];
  for (unsigned both = 0; both < 0x10000; ++both)
    for (const std::uint8_t third : later)
      for (const std::uint8_t fourth : later)
        for (std::size_t size = 1; size <= 4; ++size) {
          p[0] = std::uint8_t(both >> 8);
          p[1] = std::uint8_t(both);
          p[2] = third;
          p[3] = fourth;
          std::size_t n = 0;
          while (n < size && model::begins(p, n + 1)) ++n;
          const std::size_t whole = p[0] < 0x80 ? 1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
          std::uint32_t code = 0;
          unsigned subpart = 1;
          const unsigned length = fastops::decode(p, p + size, &code, &subpart);
          const bool right = n == whole ? length == n && model::encoded(code) == string(p, p + n)
                                        : length == 0 && subpart == (n == 0 ? 1 : n);
          CHECK(right, "%02x %02x %02x %02x, %zu bytes: length %u, subpart %u", p[0], p[1], p[2], p[3], size, length,
                subpart);
          if (p[0] < 0x80 || (p[0] < 0xe0 && size > 2)) break;
        }
}

// --- Tables.

string random_key(std::size_t size) {
  string key(size, '\0');
  for (char& c : key) c = char(below(3) == 0 ? 0 : below(256));
  return key;
}

std::uint64_t fnv(const string& key) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : key) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

void tables() {
  for (const bool documents : {false, true}) {
    const Words words = own(fastops_words_create(documents));
    Result wanted;
    std::vector<string> keys;
    for (std::size_t size = 0; size <= 40; ++size)
      for (int i = 0; i < 3; ++i) keys.push_back(random_key(size));
    // Equal but for trailing zeros, and but for the last byte.
    for (std::size_t size = 0; size <= 20; ++size) keys.push_back(string(size, '\0'));
    keys.push_back(random_key(70000));
    keys.push_back(keys.back());
    keys.back().back() ^= 1;
    for (int round = 0; round < 2000; ++round) {
      const string& key = keys[below(keys.size())];
      const std::uint64_t count = below(5), held = documents ? below(count + 1) : 0;
      CHECK(fastops_words_add(words.get(), key.data(), key.size(), count, held) == FASTOPS_OK, "round %d", round);
      if (count == 0) continue;
      wanted.counts[key].first += count;
      wanted.counts[key].second += held;
    }
    fastops_words_annotate(words.get(), 12, 3);
    wanted.documents = 12;
    CHECK(model::difference(model::contents(words.get()), wanted).empty(), "%s",
          model::difference(model::contents(words.get()), wanted).c_str());
    for (const string& key : keys) {
      std::uint64_t count = 9, held = 9;
      const int there = fastops_words_get(words.get(), key.data(), key.size(), &count, &held);
      const auto at = wanted.counts.find(key);
      const auto expected = at == wanted.counts.end() ? std::pair<std::uint64_t, std::uint64_t>{0, 0} : at->second;
      CHECK(there == (at != wanted.counts.end()) && count == expected.first && held == expected.second, "%s",
            model::quoted(key).c_str());
    }
    // The order of rank, whole and cut short.
    std::vector<std::pair<string, std::uint64_t>> order;
    for (const auto& [key, pair] : wanted.counts) order.emplace_back(key, pair.first);
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
    for (const std::size_t k : {std::size_t{0}, std::size_t{1}, order.size() / 2, order.size()}) {
      std::vector<std::size_t> entries(k);
      std::size_t bytes = 0;
      CHECK(fastops_words_rank(words.get(), k, entries.data(), &bytes, kNoPoll) == FASTOPS_OK, "rank of %zu", k);
      string found(bytes, '\0');
      std::vector<std::uint64_t> offsets(k + 1, 99), counts(k);
      fastops_words_read(words.get(), entries.data(), k, found.data(), offsets.data(), counts.data(), nullptr);
      CHECK(offsets[0] == 0 && offsets[k] == bytes, "offsets of %zu", k);
      for (std::size_t i = 0; i < k; ++i)
        CHECK(found.substr(offsets[i], offsets[i + 1] - offsets[i]) == order[i].first && counts[i] == order[i].second,
              "place %zu of %zu", i, k);
    }
    std::size_t bytes = 0;
    CHECK(fastops_words_rank(words.get(), order.size() + 1, nullptr, &bytes, kNoPoll) == FASTOPS_INVALID,
          "more than all");
    // Parts by the hash that is promised, which together are the whole; and merging with oneself.
    for (const std::size_t parts : {1, 2, 7}) {
      std::vector<fastops_words*> made(parts);
      CHECK(fastops_words_split(words.get(), parts, kNoPoll, made.data()) == FASTOPS_OK, "%zu parts", parts);
      const Words whole = own(fastops_words_create(documents));
      for (std::size_t p = 0; p < parts; ++p) {
        for (const auto& [key, pair] : model::contents(made[p]).counts)
          CHECK(fnv(key) % parts == p, "%s in part %zu of %zu", model::quoted(key).c_str(), p, parts);
        CHECK(fastops_words_merge(whole.get(), made[p]) == FASTOPS_OK, "part %zu", p);
        fastops_words_destroy(made[p]);
      }
      Result sum = wanted;
      sum.documents = 0;
      CHECK(model::difference(model::contents(whole.get()), sum).empty(), "%zu parts", parts);
      CHECK(fastops_words_merge(whole.get(), whole.get()) == FASTOPS_OK, "with itself");
      for (auto& [key, pair] : sum.counts) pair = {2 * pair.first, 2 * pair.second};
      CHECK(model::difference(model::contents(whole.get()), sum).empty(), "twice");
    }
    // Closed ranges.
    fastops_words* chosen = nullptr;
    CHECK(fastops_words_select(words.get(), 10, 20, 2, 12, nullptr, kNoPoll, &chosen) == FASTOPS_OK, "select");
    Result some = wanted;
    for (auto at = some.counts.begin(); at != some.counts.end();) {
      const auto [count, held] = at->second;
      at = count >= 10 && count <= 20 && held >= 2 && held <= 12 ? std::next(at) : some.counts.erase(at);
    }
    CHECK(model::difference(model::contents(chosen), some).empty(), "select");
    fastops_words_destroy(chosen);
    CHECK(fastops_words_select(words.get(), 1, ~std::uint64_t{0}, 0, ~std::uint64_t{0}, words.get(), kNoPoll,
                               &chosen) == FASTOPS_OK,
          "without all");
    CHECK(model::contents(chosen).counts.empty(), "without all");
    fastops_words_destroy(chosen);
  }
}

void bounds_of_counts() {
  constexpr std::uint64_t kMost = (std::uint64_t{1} << 63) - 1;
  const Words words = own(fastops_words_create(1)), more = own(fastops_words_create(1));
  std::uint64_t count = 0, documents = 0;
  CHECK(fastops_words_add(words.get(), "k", 1, kMost + 1, 0) == FASTOPS_INVALID, "2^63");
  CHECK(fastops_words_add(words.get(), "k", 1, ~std::uint64_t{0}, 0) == FASTOPS_INVALID, "2^64 - 1");
  CHECK(fastops_words_add(words.get(), "k", 1, 1, 2) == FASTOPS_INVALID, "more documents than occurrences");
  CHECK(fastops_words_add(words.get(), "k", std::size_t{0xfffffffe}, 1, 0) == FASTOPS_INVALID, "a key of 2^32 - 2");
  CHECK(fastops_words_get(words.get(), "k", std::size_t{0xfffffffe}, &count, &documents) == 0, "a key of 2^32 - 2");
  CHECK(fastops_words_get(words.get(), "k", 1, &count, &documents) == 0, "nothing was added");
  CHECK(fastops_words_add(words.get(), "k", 1, kMost - 1, kMost - 1) == FASTOPS_OK, "2^63 - 2");
  CHECK(fastops_words_add(words.get(), "k", 1, 2, 0) == FASTOPS_INVALID, "2^63 in all");
  CHECK(fastops_words_add(words.get(), "k", 1, 1, 1) == FASTOPS_OK, "2^63 - 1 in all");
  CHECK(fastops_words_add(words.get(), "l", 1, kMost, 0) == FASTOPS_OK, "another key");
  fastops_words_info info{};
  fastops_words_describe(words.get(), &info);
  CHECK(info.total_high == 0 && info.total_low == 2 * kMost, "total");
  CHECK(fastops_words_add(words.get(), "m", 1, kMost, 0) == FASTOPS_OK, "a third");
  fastops_words_describe(words.get(), &info);
  CHECK(info.total_high == 1 && info.total_low == kMost - 2, "total of %llx %llx", (unsigned long long)info.total_high,
        (unsigned long long)info.total_low);
  // Merging adds all or nothing.
  for (int i = 0; i < 100; ++i) {
    const string key = "new" + std::to_string(i);
    fastops_words_add(more.get(), key.data(), key.size(), 1, 1);
  }
  fastops_words_add(more.get(), "k", 1, 1, 1);
  fastops_words_annotate(more.get(), 5, 5);
  CHECK(fastops_words_merge(words.get(), more.get()) == FASTOPS_INVALID, "2^63");
  CHECK(fastops_words_get(words.get(), "new0", 4, &count, &documents) == 0, "a part was merged");
  CHECK(fastops_words_get(words.get(), "k", 1, &count, &documents) == 1 && count == kMost && documents == kMost,
        "kept");
  CHECK(fastops_words_merge(words.get(), words.get()) != FASTOPS_OK, "twice");
  CHECK(fastops_words_get(words.get(), "l", 1, &count, &documents) == 1 && count == kMost, "kept");
}

// Keys of 16 bytes whose second half cancels a constant of the hash would all meet in one slot.
void no_chosen_collisions() {
#if !defined(FASTOPS_TEST_COLLISIONS)
  for (const std::uint64_t constant : {0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu})
    for (std::size_t size = 9; size <= 16; ++size) {
      std::set<std::uint32_t> hashes;
      for (std::uint64_t i = 0; i < 64; ++i) {
        std::uint8_t key[16] = {};
        const std::uint64_t high = constant ^ size;
        std::memcpy(key, &i, 8);
        std::memcpy(key + 8, &high, 8);
        hashes.insert(fastops::make_key(key, size).hash);
      }
      CHECK(hashes.size() > 60, "%zu hashes of 64 keys of %zu bytes", hashes.size(), size);
    }
#endif
}

// --- Containers.

std::uint32_t crc32(const string& s, std::size_t from, std::size_t to, std::uint32_t crc = 0) {
  crc = ~crc;
  for (std::size_t i = from; i < to; ++i) {
    crc ^= static_cast<unsigned char>(s[i]);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
  }
  return ~crc;
}
template <class T> void put(string& s, std::size_t at, T value) { std::memcpy(s.data() + at, &value, sizeof value); }
template <class T> void append(string& s, T value) { s.append(reinterpret_cast<const char*>(&value), sizeof value); }

struct Entry {
  string key;
  std::uint64_t count, documents;
};
string packed(const std::vector<Entry>& entries, bool documents) {
  string s("FOWC\r\n\x1a\n", 8);
  append(s, std::uint32_t{1});
  append(s, std::uint32_t(documents));
  append(s, std::uint64_t(entries.size()));
  std::uint64_t bytes = 0;
  for (const Entry& e : entries) bytes += e.key.size();
  for (const std::uint64_t n : {bytes, std::uint64_t{3}, std::uint64_t{12}, std::uint64_t{0}}) append(s, n);
  append(s, std::uint64_t{0});  // the sum, which sign() writes
  for (const Entry& e : entries) append(s, e.count);
  if (documents)
    for (const Entry& e : entries) append(s, e.documents);
  for (const Entry& e : entries) append(s, std::uint32_t(e.key.size()));
  for (const Entry& e : entries) s += e.key;
  return s;
}
string sign(string s) {
  put(s, 56, crc32(s, 64, s.size(), crc32(s, 0, 56)));
  return s;
}
// From memory of exactly that size, so that reading past it is seen under the sanitizers.
Words unpacked(const string& s, string* why) {
  const std::unique_ptr<char[]> exact(new char[s.size()]);
  std::memcpy(exact.get(), s.data(), s.size());
  fastops_words* words = nullptr;
  const char* text = nullptr;
  const fastops_status status = fastops_words_unpack(exact.get(), s.size(), &words, &text);
  *why = text;
  CHECK((status == FASTOPS_OK) == (words != nullptr) && (status == FASTOPS_INVALID) == !why->empty(), "status %d: %s",
        int(status), text);
  return own(words);
}
string pack(const fastops_words* words) {
  string s(fastops_words_packed_size(words), '?');
  fastops_words_pack(words, s.data());
  return s;
}

void containers() {
  string why;
  for (const bool documents : {false, true}) {
    std::vector<Entry> entries = {{"", 1, 1},
                                  {string("\0", 1), 7, 2},
                                  {"word", (std::uint64_t{1} << 63) - 1, 5},
                                  {"exactly sixteen!", 3, 0},
                                  {"seventeen letters", 9, 9},
                                  {random_key(5000), 2, 1}};
    const string good = sign(packed(entries, documents));
    const Words words = unpacked(good, &why);
    Result wanted;
    wanted.documents = 12;
    for (const Entry& e : entries) wanted.counts[e.key] = {e.count, documents ? e.documents : 0};
    CHECK(words != nullptr, "refused: %s", why.c_str());
    if (words == nullptr) continue;
    CHECK(model::difference(model::contents(words.get()), wanted).empty(), "container");
    fastops_words_info info{};
    fastops_words_describe(words.get(), &info);
    CHECK(info.error_bound == 3 && info.documents == 12 && info.doc_freq == documents, "head");
    const string again = pack(words.get());
    const Words same = unpacked(again, &why);
    CHECK(again.size() == good.size() && same != nullptr, "packed again: %s", why.c_str());
    if (same != nullptr) CHECK(model::difference(model::contents(same.get()), wanted).empty(), "packed again");

    for (std::size_t size = 0; size < good.size(); size += size < 400 ? 1 : 37)
      CHECK(unpacked(good.substr(0, size), &why) == nullptr, "the first %zu bytes", size);
    CHECK(unpacked(good + '\0', &why) == nullptr, "a byte more");
    for (std::size_t at = 0; at < good.size(); at += at < 400 ? 1 : 37)
      for (const int bit : {0, 3, 7}) {
        string bad = good;
        bad[at] = char(bad[at] ^ 1 << bit);
        CHECK(unpacked(bad, &why) == nullptr, "bit %d of byte %zu", bit, at);
      }
    // Lies with a right checksum. The offsets are those of the head.
    const auto refused = [&](string bad, const char* text) {
      CHECK(unpacked(sign(std::move(bad)), &why) == nullptr && why.find(text) != string::npos, "'%s', wanted '%s'",
            why.c_str(), text);
    };
    const auto lie = [&](std::size_t at, std::uint64_t value, std::size_t size, const char* text) {
      string bad = good;
      std::memcpy(bad.data() + at, &value, size);
      refused(bad, text);
    };
    lie(0, 'f', 1, "mark");
    lie(8, 2, 4, "version");
    lie(12, 2 | documents, 4, "flags");
    lie(48, 1, 8, "flags");
    lie(60, 1, 4, "flags");
    for (const std::uint64_t n : {std::uint64_t{0}, std::uint64_t{7}, std::uint64_t{1} << 32, std::uint64_t{1} << 60,
                                  std::uint64_t{1} << 63, ~std::uint64_t{0}, (~std::uint64_t{0} / 12) + 1 + 6}) {
      lie(16, n, 8, "size");
      lie(24, n, 8, "size");
    }
    const std::size_t sizes = 64 + entries.size() * (documents ? 16 : 8);
    lie(sizes, 1, 4, "add up");
    lie(sizes, 0xffffffffu, 4, "too long");
    lie(sizes, 0xfffffffeu, 4, "too long");
    lie(sizes + 4, 0xf0000000u, 4, "add up");
    lie(64, 0, 8, "out of range");
    lie(64, std::uint64_t{1} << 63, 8, "out of range");
    if (documents) lie(64 + entries.size() * 8, 2, 8, "out of range");
    for (const string& twice : {string(), string("word"), string("seventeen letters")}) {
      std::vector<Entry> doubled = entries;
      doubled.push_back({twice, 1, 0});
      refused(packed(doubled, documents), "twice");
    }
  }
  const Words empty = unpacked(pack(own(fastops_words_create(0)).get()), &why);
  CHECK(empty != nullptr && model::contents(empty.get()).counts.empty(), "no words: %s", why.c_str());
}

// --- Counting.

// Every kind of byte and character that a rule treats in its own way; short, for the sake of the number of cuts.
const string kHostile =
    "\xef\xbb\xbf"
    "The the\tTHE a.b a.5,5.a x_y\r\n"
    "\r\n\n x\xc3\xa9 X\xc3\x89 \xce\xa3\xce\x91\xce\xa3 \xce\x91\xce\xa3.\xce\xa3 \xce\x91\xce\xa3\xcc\x88\n"
    "\xce\x91\xce\xa3^b x\xc2\xa0y\xe2\x80\xa8z\xe3\x80\x80w\x1c\x1f\xc2\x85q \xef\xbe\x9e (\xe2\x80\x8d\n"
    "bad\xff\xfe\x80 \xe2\x80 \xed\xa0\x80 \xf0\x9f\x98 \xc0\xaf \xf4\x90\x80\x80 \xe2\xff"
    "end\xe2\x82\r\n"
    "\xe4\xb8\x80\xe4\xb8\x81\xe4\xb8\x83\xe4\xb8\x80\xe3\x80\x82\xe4\xb8\x83\xe4\xb8\x83\xe4\xb8\x83"
    "a\xe4\xb8\x80 C++3.5%\xe4\xb8\x80.\n"
    "\xf0\x9f\x87\xa6\xf0\x9f\x87\xa7\xf0\x9f\x87\xa6 \xe2\x9d\xa4\xef\xb8\x8f\xe2\x80\x8d\xf0\x9f\x94\xa5 can't "
    "\xd7\x90\"\xd7\x91'\n"
    "\xc4\xb0I\xcc\x87 \xc3\x9f\xe1\xba\x9e \xe2\x84\xaa \xce\x90 \xef\xac\x83 0123456789abcdef 0123456789abcdefg "
    "\xe1\xbe\x80\xcd\x85 a\0b\rno end of line";
string hostile() { return string(kHostile.data(), kHostile.size()) + string("\0\xe3\x82\xa2_\xe3\x82\xa2\xff", 9); }

// How long a long text is, and how few rules there is time for; fewer still in slow surroundings.
#if defined(FASTOPS_TEST_SHORT)
constexpr int kLess = 13;
#else
constexpr int kLess = 1;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kLong = 3000;
constexpr int kFew = 37;
constexpr bool kTiny = true, kThreadSanitizer = true;
#elif defined(FASTOPS_TEST_TINY)
constexpr std::size_t kLong = 3000;
constexpr int kFew = 5;
constexpr bool kTiny = true, kThreadSanitizer = false;
#elif defined(FASTOPS_TEST_COLLISIONS)
constexpr std::size_t kLong = 6000;
constexpr int kFew = 11;
constexpr bool kTiny = false, kThreadSanitizer = false;
#else
constexpr std::size_t kLong = kLess > 1 ? 100000 : 600000;
constexpr int kFew = 29;
constexpr bool kTiny = false, kThreadSanitizer = false;
#endif

// One of every `step` rules.
std::vector<fastops_word_rule> rules(int step) {
  std::vector<fastops_word_rule> made;
  for (int tokenizer = 0; tokenizer <= FASTOPS_WORDS_ZH; ++tokenizer)
    for (int lowercase = 0; lowercase < 4; ++lowercase)
      for (int errors = 0; errors < 4; ++errors)
        for (const bool lines : {false, true}) {
          if (errors == FASTOPS_ERRORS_STRICT) continue;
          if ((5 * tokenizer + 7 * lowercase + 3 * errors + lines) % step != 0) continue;
          fastops_word_rule r = model::rule(tokenizer, lowercase, errors, lines);
          const unsigned which = unsigned(tokenizer + 3 * lowercase + 5 * errors + 7 * lines);
          r.doc_freq = which % 4 >= 2;
          r.ngram_high = which % 3 == 1 ? 3 : 1;
          r.ngram_low = which % 9 == 1 ? 2 : 1;
          r.zh = model::zh(which % 2 == 0);
          if (tokenizer == FASTOPS_WORDS_WHITESPACE && lowercase <= FASTOPS_CASE_ASCII && which % 4 == 3)
            r.class_pages = nullptr;
          made.push_back(r);
        }
  return made;
}

void every_split(int step) {
  const string text = hostile();
  for (const fastops_word_rule& rule : rules(step)) {
    const Result wanted = wanted_of(rule, text);
    const Counter c = counter(rule);
    // Code points are counted in an array of millions of bytes: fewer cuts.
    const bool array = rule.tokenizer == FASTOPS_WORDS_CHAR && rule.doc_freq == 0 && rule.ngram_high == 1;
    for (std::size_t cut = 0; cut <= text.size(); cut += array ? 31 : 1) {
      feed(c, text.substr(0, cut));
      if (cut % 5 == 0) feed(c, "");
      feed(c, text.substr(cut));
      const fastops_status status = end(c);
      CHECK(status == FASTOPS_OK, "%s: cut at %zu: status %d", name_of(rule).c_str(), cut, int(status));
      if (status != FASTOPS_OK) break;
      compare(rule, finish(c), wanted, "cut at " + std::to_string(cut));
    }
    // Byte by byte, without the end being said.
    for (const char byte : text) feed(c, string(1, byte));
    compare(rule, finish(c), wanted, "byte by byte");
    // Two texts, which do not touch.
    Result both = wanted;
    model::count_text(rule, kNoStopWords, text.substr(40), both);
    feed(c, text);
    end(c);
    feed(c, text.substr(40));
    end(c);
    compare(rule, finish(c), both, "two texts");
  }
}

// Long enough for all workers and all sizes of blocks; lines, and runs without white space, of any length.
string long_text(std::size_t size) {
  const string piece = hostile();
  string text;
  while (text.size() < size) {
    const std::size_t from = below(piece.size());
    text += piece.substr(from, below(60));
    if (below(4) == 0) text += "\n";
    if (below(4) == 0) text += "word" + std::to_string(below(5000)) + " ";
    if (below(40) == 0) text += string(below(300), char('a' + below(3)));
    if (below(40) == 0) text += string(below(80), ' ');
  }
  return text;
}

void threads_and_spills() {
  const string text = long_text(kLong);
  const unsigned most = fastops_get_num_threads();
  unsigned which = 0;
  for (const fastops_word_rule& rule : rules(kFew * kLess)) {
    const Result wanted = wanted_of(rule, text);
    for (unsigned workers = 1; workers <= 16; workers += 1 + below(7)) {
      fastops_set_num_threads(workers);
      const std::size_t limits[] = {0, 1, 100000};
      const std::size_t limit = limits[which++ % 3];
      const Counter c = counter(rule, workers, limit);
      const string how = std::to_string(workers) + " workers, limit " + std::to_string(limit);
      feed(c, text);
      compare(rule, finish(c), wanted, how);
      // Cut at some places, so that lines and documents go over from one call to the next.
      for (std::size_t at = 0; at < text.size();) {
        const std::size_t n = std::min(text.size() - at, below(text.size() / 2) + 1);
        feed(c, text.substr(at, n));
        at += n;
      }
      end(c);
      compare(rule, finish(c), wanted, how + ", fed in pieces");
    }
  }
  fastops_set_num_threads(most);
}

// A line that begins in one call and whose beginning was already worked on ends in another, which has many lines.
void open_lines() {
  const unsigned most = fastops_get_num_threads();
  fastops_set_num_threads(4);
  for (const int tokenizer : {FASTOPS_WORDS_WHITESPACE, FASTOPS_WORDS_UNICODE})
    for (const bool grams : {false, true}) {
      fastops_word_rule rule = model::rule(tokenizer, FASTOPS_CASE_KEEP, FASTOPS_ERRORS_REPLACE, true);
      rule.doc_freq = 1;
      rule.ngram_high = grams ? 2 : 1;
      string first, rest = "e\n";
      while (first.size() < kLong) first += "open" + std::to_string(below(9)) + " line ";
      while (rest.size() < 2 * kLong) rest += "x" + std::to_string(below(50)) + " y\n";
      const Result wanted = wanted_of(rule, first + rest);
      for (int round = 0; round < 5; ++round) {
        const Counter c = counter(rule, 4);
        feed(c, first);
        feed(c, rest);
        compare(rule, finish(c), wanted, "an open line");
      }
    }
  fastops_set_num_threads(most);
}

void whole_texts() {
  const string piece = hostile();
  for (fastops_word_rule rule : rules(kFew * kLess)) {
    std::vector<string> texts;
    for (int i = 0; i < 150; ++i) {
      const std::size_t from = below(piece.size());
      texts.push_back(piece.substr(from, below(5) == 0 ? below(300) : below(20)));
      if (below(10) == 0) texts.back() = "\xef\xbb\xbf" + texts.back();
      if (texts.back().compare(0, 2, "\xff\xfe") == 0) texts.back().clear();
    }
    Result wanted;
    std::vector<const void*> data;
    std::vector<std::size_t> sizes;
    for (const string& text : texts) {
      model::count_text(rule, kNoStopWords, text, wanted);
      data.push_back(text.data());
      sizes.push_back(text.size());
    }
    for (const unsigned workers : {1u, 3u}) {
      const Counter c = counter(rule, workers);
      CHECK(fastops_word_counter_texts(c.get(), data.data(), sizes.data(), data.size(), kNoPoll) == FASTOPS_OK,
            "texts");
      compare(rule, finish(c), wanted, "whole texts");
    }
  }
}

struct File {
  FILE* file = std::tmpfile();
  explicit File(const string& text) {
    if (file != nullptr) std::fwrite(text.data(), 1, text.size(), file);
    if (file != nullptr) std::fflush(file);
  }
  ~File() {
    if (file != nullptr) std::fclose(file);
  }
  int fd() const { return fileno(file); }
};

void files() {
  const string text = "\xef\xbb\xbf" + long_text(kLong);
  const File file(text);
  CHECK(file.file != nullptr, "no temporary file");
  if (file.file == nullptr) return;
  for (const fastops_word_rule& rule : rules(kFew * kLess)) {
    const Result wanted = wanted_of(rule, text);
    const bool parts = rule.lines != 0 || (rule.doc_freq == 0 && rule.ngram_high == 1);
    for (const unsigned workers : {1u, 4u})
      for (int round = 0; round < (parts ? 3 : 1); ++round) {
        const Counter c = counter(rule, workers, round == 1 ? 1 : 0);
        // Ranges that lie side by side: each line is counted in the one where it begins.
        std::uint64_t start = 0;
        while (start < text.size()) {
          std::uint64_t stop = round == 0 ? text.size() : std::min(text.size(), start + 1 + below(text.size() / 2));
          const fastops_status status = fastops_word_counter_file(c.get(), file.fd(), start, stop, kNoPoll);
          CHECK(status == FASTOPS_OK, "%s: bytes %zu to %zu: status %d", name_of(rule).c_str(), std::size_t(start),
                std::size_t(stop), int(status));
          start = stop;
        }
        compare(rule, finish(c), wanted, "file");
      }
  }
  const fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE);
  const Counter c = counter(rule);
  CHECK(fastops_word_counter_file(c.get(), file.fd(), 2, 1, kNoPoll) == FASTOPS_INVALID, "stop before start");
  const Counter closed = counter(rule);
  CHECK(fastops_word_counter_file(closed.get(), -1, 0, 10, kNoPoll) == FASTOPS_INVALID, "no file");
  CHECK(error_of(closed).failure == FASTOPS_WORDS_READ && error_of(closed).error_number != 0, "failure %d",
        error_of(closed).failure);
}

// Many keys of every size through a limit that lets no table grow, in several threads.
void spills() {
  fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE, FASTOPS_CASE_KEEP, FASTOPS_ERRORS_ESCAPE, true);
  rule.doc_freq = 1;
  string text;
  while (text.size() < kLong) {
    text += std::to_string(source.next() % 3000);
    text += string(below(40) == 0 ? below(400) : 0, 'k');
    text += below(5) == 0 ? '\n' : ' ';
  }
  for (const bool bigrams : {false, true}) {
    if (bigrams) rule.ngram_high = 2;
    const Result wanted = wanted_of(rule, text);
    for (const unsigned workers : {1u, 5u}) {
      fastops_set_num_threads(workers);
      const Counter c = counter(rule, workers, 1);
      for (int round = 0; round < 2; ++round) {
        feed(c, text);
        compare(rule, finish(c), wanted, "spilled");
      }
    }
  }
  fastops_set_num_threads(2);
  // One document that goes on while the table is forgotten again and again is one document.
  rule.lines = 0;
  const Result wanted = wanted_of(rule, text);
  const Counter c = counter(rule, 1, 1);
  feed(c, text);
  compare(rule, finish(c), wanted, "one document");
}

// Misra and Gries: no count above the truth, none below it by more than the bound, nothing frequent lost.
void approximate() {
  const fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE);
  string text;
  for (int i = 0; i < 20000; ++i) text += std::to_string(below(1 + below(3000))) + (i % 7 == 0 ? '\n' : ' ');
  const Result exact = wanted_of(rule, text);
  for (const unsigned workers : {1u, 3u}) {
    fastops_set_num_threads(workers);
    const Counter c = counter(rule, workers, 0, 100);
    feed(c, text);
    const Words words = finish(c);
    fastops_words_info info{};
    fastops_words_describe(words.get(), &info);
    const Result got = model::contents(words.get());
    CHECK(got.counts.size() <= 100 && info.error_bound > 0 && info.error_bound <= 20000 / 50, "%zu keys, bound %llu",
          got.counts.size(), (unsigned long long)info.error_bound);
    for (const auto& [key, pair] : exact.counts) {
      const auto at = got.counts.find(key);
      const std::uint64_t found = at == got.counts.end() ? 0 : at->second.first;
      CHECK(found <= pair.first && pair.first - found <= info.error_bound, "%s: %llu of %llu", key.c_str(),
            (unsigned long long)found, (unsigned long long)pair.first);
    }
  }
  fastops_set_num_threads(2);
}

void stop_words_and_tokens() {
  const std::set<string> stop = {"the", "0123456789abcdefg", "a.b", "\xe4\xb8\x80"};
  const Words words = own(fastops_words_create(0));
  for (const string& word : stop) fastops_words_add(words.get(), word.data(), word.size(), 1, 0);
  const string text = hostile();
  for (fastops_word_rule rule : rules(kFew * kLess)) {
    rule.stop_words = words.get();
    Result wanted;
    model::count_text(rule, stop, text, wanted);
    const Counter c = counter(rule);
    feed(c, text);
    compare(rule, finish(c), wanted, "stop words");
    // The ids of the text's tokens add up to its counts.
    const Words counted = [&] {
      feed(c, text);
      return finish(c);
    }();
    const std::unique_ptr<fastops_word_reader, decltype(&fastops_word_reader_destroy)> reader(
        fastops_word_reader_create(&rule, counted.get(), kNoPoll), &fastops_word_reader_destroy);
    for (int round = 0; round < 2; ++round) {
      const std::int64_t* ids = nullptr;
      std::size_t n = 0;
      fastops_word_error error{};
      CHECK(fastops_word_reader_read(reader.get(), text.data(), text.size(), &ids, &n, &error) == FASTOPS_OK, "reader");
      fastops_words_info info{};
      fastops_words_describe(counted.get(), &info);
      std::vector<std::uint64_t> times(info.entries), counts(info.entries), offsets(info.entries + 1);
      for (std::size_t i = 0; i < n; ++i) ++times[std::size_t(ids[i])];
      std::vector<std::size_t> entries(info.entries);
      std::size_t bytes = 0;
      fastops_words_rank(counted.get(), info.entries, entries.data(), &bytes, kNoPoll);
      string keys(bytes, '\0');
      fastops_words_read(counted.get(), entries.data(), info.entries, keys.data(), offsets.data(), counts.data(),
                         nullptr);
      CHECK(times == counts, "%s: ids", name_of(rule).c_str());
    }
  }
  // Tokens as they are.
  fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE);
  rule.stop_words = words.get();
  rule.doc_freq = 1;
  rule.ngram_high = 2;
  rule.max_token_bytes = 200;
  const Counter c = counter(rule);
  Result wanted;
  for (int d = 0; d < 20; ++d) {
    model::Tokens kept;
    for (int i = 0; i < 30; ++i) {
      const string token = below(9) == 0 ? "the" : random_key(below(4) == 0 ? below(200) : below(3));
      CHECK(fastops_word_counter_token(c.get(), token.data(), token.size()) == FASTOPS_OK, "token");
      if (stop.count(token) == 0) kept.push_back(token);
    }
    CHECK(fastops_word_counter_end_document(c.get()) == FASTOPS_OK, "document");
    ++wanted.documents;
    std::set<string> seen;
    for (std::size_t i = 0; i < kept.size(); ++i)
      for (const string& gram : {kept[i], i + 1 < kept.size() ? kept[i] + " " + kept[i + 1] : string("\xff no")}) {
        if (gram == "\xff no") continue;
        ++wanted.counts[gram].first;
        wanted.counts[gram].second += seen.insert(gram).second;
      }
  }
  compare(rule, finish(c), wanted, "tokens");
  const string longer(201, 'x');
  CHECK(fastops_word_counter_token(c.get(), longer.data(), longer.size()) == FASTOPS_INVALID &&
            error_of(c).failure == FASTOPS_WORDS_LONG_TOKEN,
        "a long token");
}

// The kind and the place of what is wrong with a text, wherever it is cut; afterwards the counter refuses.
void failures() {
  struct Case {
    string text;
    int errors, failure;
    std::uint64_t offset;
  };
  const string longest(100, 'x');
  const Case cases[] = {
      {"ab c\xff d", FASTOPS_ERRORS_STRICT, FASTOPS_WORDS_BAD_BYTE, 4},
      {"ab \xe2\x82", FASTOPS_ERRORS_STRICT, FASTOPS_WORDS_BAD_BYTE, 3},
      {"\xef\xbb\xbf"
       "a\n\xed\xa0\x80",
       FASTOPS_ERRORS_STRICT, FASTOPS_WORDS_BAD_BYTE, 5},
      {"\xff\xfe"
       "a\n",
       FASTOPS_ERRORS_REPLACE, FASTOPS_WORDS_ENCODING, 0},
      {"\xfe\xff", FASTOPS_ERRORS_IGNORE, FASTOPS_WORDS_ENCODING, 0},
      {string("\0\0\xfe\xff", 4), FASTOPS_ERRORS_ESCAPE, FASTOPS_WORDS_ENCODING, 0},
      {"a\nb " + longest + "y c", FASTOPS_ERRORS_REPLACE, FASTOPS_WORDS_LONG_TOKEN, 4},
      {"\xc3\xa9 " + longest + "y", FASTOPS_ERRORS_STRICT, FASTOPS_WORDS_LONG_TOKEN, 3},
  };
  for (const Case& one : cases)
    for (const int tokenizer : {FASTOPS_WORDS_WHITESPACE, FASTOPS_WORDS_WORD, FASTOPS_WORDS_UNICODE}) {
      fastops_word_rule rule = model::rule(tokenizer, FASTOPS_CASE_KEEP, one.errors);
      rule.max_token_bytes = 100;
      for (std::size_t cut = 0; cut <= one.text.size(); ++cut) {
        const Counter c = counter(rule);
        fastops_status status = feed(c, one.text.substr(0, cut));
        if (status == FASTOPS_OK) status = feed(c, one.text.substr(cut));
        if (status == FASTOPS_OK) status = end(c);
        const fastops_word_error error = error_of(c);
        CHECK(status == FASTOPS_INVALID && error.failure == one.failure && error.offset == one.offset,
              "%s, cut at %zu: status %d, failure %d at %llu", model::quoted(one.text).c_str(), cut, int(status),
              error.failure, (unsigned long long)error.offset);
        fastops_words* words = nullptr;
        CHECK(feed(c, "a") == FASTOPS_INVALID &&
                  fastops_word_counter_finish(c.get(), kNoPoll, &words) == FASTOPS_INVALID && words == nullptr,
              "the counter goes on");
      }
      const Counter c = counter(rule);
      const void* const data = one.text.data();
      const std::size_t size = one.text.size();
      CHECK(fastops_word_counter_texts(c.get(), &data, &size, 1, kNoPoll) == FASTOPS_INVALID, "texts");
      CHECK(error_of(c).failure == one.failure && error_of(c).offset == one.offset, "texts: failure %d at %llu",
            error_of(c).failure, (unsigned long long)error_of(c).offset);
    }
  // As long as allowed.
  fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE);
  rule.max_token_bytes = 100;
  const Counter c = counter(rule);
  feed(c, longest + " " + longest);
  compare(rule, finish(c), wanted_of(rule, longest + " " + longest), "the longest token");
}

// Long runs without white space whose tokens are short: nothing there is too long.
void long_runs() {
  constexpr std::size_t kRun = 2000;
  const char* const pieces[] = {"\xe3\x81\x82",                     // letters that stand alone in UAX #29
                                "\xe0\xb8\x81",                     // what is no letter here
                                "a\xe4\xb8\x80(",                   //
                                "\xce\x91\xce\xa3^b\xe3\x81\x82(",  // a circumflex does not end the word before a sigma
                                "\xe4\xb8\x80\xe4\xb8\x83\xe3\x80\x82",
                                "a,b-c/d.",
                                "\xf0\x9f\x94\xa5",
                                "\xe4\xb8\x80\xe4\xb8\x83",  // nowhere may what jieba sees be cut
                                "\xf0\x9f\x87\xa6",          // of flags every second place is a boundary: which ones?
                                "\xe2\x80\x82"};             // spaces stay together, and are no word
  for (const char* const piece : pieces)
    for (const int tokenizer : {FASTOPS_WORDS_CHAR, FASTOPS_WORDS_UNICODE, FASTOPS_WORDS_ZH})
      for (const int lowercase : {FASTOPS_CASE_KEEP, FASTOPS_CASE_UNICODE}) {
        fastops_word_rule rule = model::rule(tokenizer, lowercase);
        rule.max_token_bytes = 100;
        string text;
        while (text.size() < kRun) text += piece;
        const Counter c = counter(rule);
        CHECK(feed(c, text) == FASTOPS_OK && end(c) == FASTOPS_OK, "%s: %s: failure %d at %llu", name_of(rule).c_str(),
              model::quoted(piece).c_str(), error_of(c).failure, (unsigned long long)error_of(c).offset);
        if (error_of(c).failure == FASTOPS_WORDS_OK)
          compare(rule, finish(c), wanted_of(rule, text), "runs of " + model::quoted(piece));
      }
}

// What cuts may not tear apart: the space that a mark is written on, a sigma and the letter after an ignorable sign.
void awkward_cuts() {
  const char* const pieces[] = {" \xef\xbe\x9e",
                                "  \xef\xbe\x9e"
                                "a",
                                " \xe2\x80\x8d\xe2\x9d\xa4 a",
                                "\xce\x91\xce\xa3^b(",
                                "\xce\x91\xce\xa3^^(",
                                "\t\xef\xbe\x9e",
                                " \xff\xef\xbe\x9e",
                                "\xcd\x85"
                                "a\xe3\x80\x82",
                                "\xe2\x84\xaa"
                                "a\xe3\x80\x82\xe4\xb8\x80",
                                "\xce\x91\xce\xa3",
                                "\xc3\xa9\xce\xa3\xcc\x81(",
                                "\r\n\r",
                                "\xf0\x9f\x87\xa6",
                                "1.5,a.b:\xd7\x90\"\xd7\x90'"};
  for (const char* const piece : pieces)
    for (const fastops_word_rule& rule : rules(3)) {
      string text;
      while (text.size() < 600) text += piece;
      const Result wanted = wanted_of(rule, text);
      for (std::size_t cut = 100; cut < 140; ++cut) {
        const Counter c = counter(rule);
        feed(c, text.substr(0, cut));
        feed(c, text.substr(cut));
        compare(rule, finish(c), wanted, model::quoted(piece) + " cut at " + std::to_string(cut));
      }
    }
}

void nothing() {
  for (const fastops_word_rule& rule : rules(kFew * kLess)) {
    const Counter c = counter(rule, 3, 1);
    compare(rule, finish(c), Result{}, "no text");
    CHECK(fastops_word_counter_feed(c.get(), nullptr, 0, kNoPoll) == FASTOPS_OK, "no bytes");
    CHECK(fastops_word_counter_texts(c.get(), nullptr, nullptr, 0, kNoPoll) == FASTOPS_OK, "no texts");
    compare(rule, finish(c), Result{}, "no bytes");
    end(c);
    compare(rule, finish(c), wanted_of(rule, ""), "an empty text");
    feed(c, "\xef\xbb\xbf");
    end(c);
    compare(rule, finish(c), wanted_of(rule, ""), "a byte order mark alone");
    const File file("");
    if (file.file != nullptr)
      CHECK(fastops_word_counter_file(c.get(), file.fd(), 0, 0, kNoPoll) == FASTOPS_OK, "an empty file");
    compare(rule, finish(c), wanted_of(rule, ""), "an empty file");
  }
}

// Rules that cannot be meant are refused before anything reads through them.
void senseless_rules() {
  const auto refused = [](const char* what, auto change) {
    fastops_word_rule rule = model::rule(FASTOPS_WORDS_WHITESPACE, FASTOPS_CASE_KEEP, FASTOPS_ERRORS_REPLACE, 0);
    const Words words = own(fastops_words_create(0));
    CHECK(counter(rule).get() != nullptr, "%s: the rule before", what);
    change(rule);
    CHECK(counter(rule).get() == nullptr, "%s: a counter", what);
    fastops_word_reader* const reader = fastops_word_reader_create(&rule, words.get(), kNoPoll);
    CHECK(reader == nullptr, "%s: a reader", what);
    fastops_word_reader_destroy(reader);
  };
  refused("tokenizer", [](fastops_word_rule& r) { r.tokenizer = 5; });
  refused("case", [](fastops_word_rule& r) { r.lowercase = -1; });
  refused("errors", [](fastops_word_rule& r) { r.errors = 4; });
  refused("no n-grams", [](fastops_word_rule& r) { r.ngram_low = 0; });
  refused("n-grams", [](fastops_word_rule& r) { r.ngram_low = r.ngram_high + 1; });
  refused("token bytes", [](fastops_word_rule& r) { r.max_token_bytes = 0; });
  refused("case tables", [](fastops_word_rule& r) {
    r.lowercase = FASTOPS_CASE_UNICODE;
    r.cases = nullptr;
  });
  refused("break tables", [](fastops_word_rule& r) {
    r.tokenizer = FASTOPS_WORDS_UNICODE;
    r.break_pages = nullptr;
  });
  refused("no model", [](fastops_word_rule& r) {
    r.tokenizer = FASTOPS_WORDS_ZH;
    r.zh = nullptr;
  });
  const Words words = own(fastops_words_create(0));
  fastops_words* parts[1] = {};
  CHECK(fastops_words_split(words.get(), 0, kNoPoll, parts) == FASTOPS_INVALID, "no parts");
}

}  // namespace

int main() {
  fastops_set_num_threads(2);
  if (kThreadSanitizer) {  // what threads do
    open_lines();
    whole_texts();
    spills();
    approximate();
    threads_and_spills();
    files();
    return check_result("test_wordcount");
  }
  scans();
  decoding();
  tables();
  bounds_of_counts();
  no_chosen_collisions();
  containers();
  failures();
  senseless_rules();
  nothing();
  whole_texts();
  spills();
  approximate();
  stop_words_and_tokens();
  open_lines();
  if (kTiny) {  // elsewhere runs would have to be millions of bytes long
    long_runs();
    awkward_cuts();
  }
  for (int i = 0; const char* name = fastops_compiled_target(i); ++i) {
    if (fastops_set_target(name) != FASTOPS_OK) {
      printf("%s: not run, the CPU lacks it\n", name);
      continue;
    }
    every_split((i == 0 ? 1 : 7) * kLess);
    threads_and_spills();
    files();
  }
  return check_result("test_wordcount");
}
