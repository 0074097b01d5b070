// SPDX-License-Identifier: BSD-3-Clause
// libFuzzer target of the container of word counts: what is accepted is packed again into an equal table, and holds
// what a plain reader of the same bytes finds. The checksum is mended first, but for inputs that begin with "f".
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "word_model.h"

namespace {

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
template <class T> T at(const std::string& s, std::size_t offset) {
  T value;
  std::memcpy(&value, s.data() + offset, sizeof value);
  return value;
}

std::uint32_t crc32(const char* p, std::size_t n, std::uint32_t crc) {
  for (crc = ~crc; n > 0; ++p, --n) {
    crc ^= static_cast<unsigned char>(*p);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
  }
  return ~crc;
}

// The counts, or false where the bytes are no container.
bool plain_reader(const std::string& s, model::Result* result) {
  if (s.size() < 64 || s.compare(0, 8, "FOWC\r\n\x1a\n") != 0 || at<std::uint32_t>(s, 8) != 1) return false;
  const bool documents = at<std::uint32_t>(s, 12) == 1;
  if (at<std::uint32_t>(s, 12) > 1 || at<std::uint64_t>(s, 48) != 0 || at<std::uint32_t>(s, 60) != 0) return false;
  const std::uint64_t n = at<std::uint64_t>(s, 16), each = documents ? 20 : 12;
  if (n > (s.size() - 64) / each || at<std::uint64_t>(s, 24) != s.size() - 64 - n * each) return false;
  if (crc32(s.data() + 64, s.size() - 64, crc32(s.data(), 56, 0)) != at<std::uint32_t>(s, 56)) return false;
  result->documents = at<std::uint64_t>(s, 40);
  std::size_t key = 64 + n * each;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t count = at<std::uint64_t>(s, 64 + 8 * i);
    const std::uint64_t held = documents ? at<std::uint64_t>(s, 64 + 8 * (n + i)) : 0;
    const std::size_t size = at<std::uint32_t>(s, 64 + (documents ? 16 : 8) * n + 4 * i);
    if (size > s.size() - key || count == 0 || count >> 63 != 0 || held > count) return false;
    if (!result->counts.emplace(s.substr(key, size), std::make_pair(count, held)).second) return false;
    key += size;
  }
  return key == s.size();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string s(reinterpret_cast<const char*>(data), size);
  if (size >= 64 && data[0] != 'f') {
    const std::uint32_t sum = crc32(s.data() + 64, s.size() - 64, crc32(s.data(), 56, 0));
    std::memcpy(s.data() + 56, &sum, 4);
  }
  // In memory of exactly its size: std::string would end it with a zero.
  const std::unique_ptr<char[]> exact(new char[s.size()]);
  std::memcpy(exact.get(), s.data(), s.size());
  fastops_words* words = nullptr;
  const char* why = nullptr;
  const fastops_status status = fastops_words_unpack(exact.get(), s.size(), &words, &why);
  model::Result wanted;
  const bool valid = plain_reader(s, &wanted);
  check(status == (valid ? FASTOPS_OK : FASTOPS_INVALID) && (*why == 0) == valid, "accepted or refused wrongly");
  if (!valid) return 0;
  check(model::difference(model::contents(words), wanted).empty(), "other counts");
  fastops_words_info info{};
  fastops_words_describe(words, &info);
  check(info.error_bound == at<std::uint64_t>(s, 32) && info.doc_freq == int(at<std::uint32_t>(s, 12)), "another head");
  std::string again(fastops_words_packed_size(words), '\0');
  check(again.size() == s.size(), "another size");
  fastops_words_pack(words, again.data());
  fastops_words* same = nullptr;
  check(fastops_words_unpack(again.data(), again.size(), &same, &why) == FASTOPS_OK, "refused when packed again");
  check(model::difference(model::contents(same), wanted).empty(), "other counts when packed again");
  check(again.compare(0, 56, s, 0, 56) == 0, "another head when packed again");
  // Parts of it merged are the whole.
  fastops_words* parts[3] = {};
  fastops_words* const whole = fastops_words_create(info.doc_freq);
  check(fastops_words_split(words, 3, {nullptr, nullptr}, parts) == FASTOPS_OK, "split");
  for (fastops_words* part : parts) {
    check(fastops_words_merge(whole, part) == FASTOPS_OK, "merge");
    fastops_words_destroy(part);
  }
  fastops_words_annotate(whole, info.documents, 0);
  check(model::difference(model::contents(whole), wanted).empty(), "other counts in parts");
  for (fastops_words* made : {words, same, whole}) fastops_words_destroy(made);
  return 0;
}
