// SPDX-License-Identifier: BSD-3-Clause
// The container: a head of 64 bytes, counts, documents where they were counted, sizes of the keys, keys. Everything
// that the head says is compared with the size of the whole before memory is taken.
#include "wordcount/wordcount_container.h"

#include "core/checked.h"

namespace fastops {
namespace {

constexpr std::uint8_t kMagic[8] = {'F', 'O', 'W', 'C', '\r', '\n', 0x1a, '\n'};
constexpr std::uint32_t kVersion = 1, kWithDocuments = 1;

struct Head {
  std::uint8_t magic[8];
  std::uint32_t version, flags;
  std::uint64_t entries, key_bytes, error_bound, documents, zero;
  std::uint32_t checksum, zero32;
};
static_assert(sizeof(Head) == 64);
constexpr std::size_t kSummed = 56;  // the head's bytes that the checksum covers

// CRC-32 of IEEE 802.3 (zlib's), eight bytes at a time by eight tables.
struct CrcTables {
  std::uint32_t at[8][256];
  constexpr CrcTables() : at{} {
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
      at[0][i] = c;
    }
    for (std::uint32_t i = 0; i < 256; ++i)
      for (int t = 1; t < 8; ++t) at[t][i] = at[t - 1][i] >> 8 ^ at[0][at[t - 1][i] & 255];
  }
};
constexpr CrcTables kCrc;

std::uint32_t crc32(std::uint32_t crc, const std::uint8_t* p, std::size_t n) noexcept {
  crc = ~crc;
  for (; n >= 8; p += 8, n -= 8) {
    std::uint32_t a = 0, b = 0;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + 4, 4);
    a ^= crc;
    crc = kCrc.at[7][a & 255] ^ kCrc.at[6][a >> 8 & 255] ^ kCrc.at[5][a >> 16 & 255] ^ kCrc.at[4][a >> 24] ^
          kCrc.at[3][b & 255] ^ kCrc.at[2][b >> 8 & 255] ^ kCrc.at[1][b >> 16 & 255] ^ kCrc.at[0][b >> 24];
  }
  for (; n > 0; ++p, --n) crc = crc >> 8 ^ kCrc.at[0][(crc ^ *p) & 255];
  return ~crc;
}

std::size_t entry_bytes(bool documents) noexcept { return documents ? 20 : 12; }

template <class T> T read(const std::uint8_t* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

std::size_t packed_size(const fastops_words& words) noexcept {
  const Table& table = words.table;
  std::size_t keys = 0;
  for (std::size_t i = 0; i < table.capacity(); ++i)
    if (table.slots()[i].size1 != 0) keys += table.slots()[i].size1 - 1;
  return sizeof(Head) + table.size() * entry_bytes(table.with_documents()) + keys;
}

void pack(const fastops_words& words, std::uint8_t* to) noexcept {
  const Table& table = words.table;
  const std::size_t n = table.size();
  const bool with_documents = table.with_documents();
  std::uint8_t* counts = to + sizeof(Head);
  std::uint8_t* documents = counts + 8 * n;
  std::uint8_t* sizes = documents + (with_documents ? 8 * n : 0);
  std::uint8_t* const first = sizes + 4 * n;
  std::uint8_t* keys = first;
  for (std::size_t i = 0; i < table.capacity(); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (slot.size1 == 0) continue;
    const std::uint32_t size = slot.size1 - 1;
    std::memcpy(counts, &slot.count, 8);
    counts += 8;
    if (with_documents) {
      const std::uint64_t held = table.documents_of(slot);
      std::memcpy(documents, &held, 8);
      documents += 8;
    }
    std::memcpy(sizes, &size, 4);
    sizes += 4;
    std::memcpy(keys, table.key_of(slot), size);
    keys += size;
  }
  Head head{};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  head.flags = with_documents ? kWithDocuments : 0;
  head.entries = n;
  head.key_bytes = static_cast<std::uint64_t>(keys - first);
  head.error_bound = words.error_bound;
  head.documents = words.documents;
  std::memcpy(to, &head, sizeof head);
  head.checksum = crc32(crc32(0, to, kSummed), to + sizeof head, static_cast<std::size_t>(keys - to) - sizeof head);
  std::memcpy(to, &head, sizeof head);
}

fastops_status unpack(const std::uint8_t* from, std::size_t size, fastops_words* words, const char** why) noexcept {
  const auto refuse = [&](const char* text) noexcept {
    *why = text;
    return FASTOPS_INVALID;
  };
  if (size < sizeof(Head)) return refuse("it is shorter than a head of 64 bytes");
  Head head;
  std::memcpy(&head, from, sizeof head);
  if (std::memcmp(head.magic, kMagic, sizeof kMagic) != 0)
    return refuse("it does not begin with the mark of word counts");
  if (head.version != kVersion) return refuse("its version is not 1");
  if ((head.flags & ~kWithDocuments) != 0 || head.zero != 0 || head.zero32 != 0)
    return refuse("it has flags that are not known");
  const bool with_documents = (head.flags & kWithDocuments) != 0;
  const std::size_t left = size - sizeof head, each = entry_bytes(with_documents);
  if (head.entries > left / each || head.key_bytes != left - head.entries * each)
    return refuse("its size is not what its head says");
  if (crc32(crc32(0, from, kSummed), from + sizeof head, left) != head.checksum) return refuse("its checksum is wrong");
  const auto n = static_cast<std::size_t>(head.entries);
  const std::uint8_t* const counts = from + sizeof head;
  const std::uint8_t* const documents = counts + 8 * n;
  const std::uint8_t* const sizes = documents + (with_documents ? 8 * n : 0);
  const std::uint8_t* key = sizes + 4 * n;
  std::uint64_t sum = 0, long_bytes = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto bytes = read<std::uint32_t>(sizes + 4 * i);
    if (bytes >= kMaxKey) return refuse("a key is too long");
    sum += bytes;
    if (bytes > kInlineKey) long_bytes += bytes;
  }
  if (sum != head.key_bytes) return refuse("the sizes of its keys do not add up");
  Table table(with_documents);
  if (!table.reserve(n, static_cast<std::size_t>(long_bytes))) return FASTOPS_NO_MEMORY;
  for (std::size_t i = 0; i < n; ++i) {
    const auto bytes = read<std::uint32_t>(sizes + 4 * i);
    const auto count = read<std::uint64_t>(counts + 8 * i);
    const std::uint64_t held = with_documents ? read<std::uint64_t>(documents + 8 * i) : 0;
    if (count == 0 || count >= kMaxCount || held > count) return refuse("a count is out of range");
    const Key made = make_key(key, bytes);
    if (table.get(made) != nullptr) return refuse("a key stands in it twice");
    if (table.add(made, count, held) != Added::kDone) return FASTOPS_NO_MEMORY;
    key += bytes;
  }
  std::swap(words->table, table);
  words->documents = head.documents;
  words->error_bound = head.error_bound;
  return FASTOPS_OK;
}

}  // namespace fastops
