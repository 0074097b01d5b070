// SPDX-License-Identifier: BSD-3-Clause
// A hash table from keys (byte strings) to 64-bit counts: open addressing, 32-byte slots with keys of up to 16 bytes
// inside.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_TABLE_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_TABLE_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "wordcount/wordcount_region.h"

namespace fastops {

inline constexpr std::size_t kInlineKey = 16;
// Keys are shorter than this, so that size + 1 fits a slot.
inline constexpr std::size_t kMaxKey = 0xfffffffeu;
inline constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 63;  // counts stay below

// A key as the table compares it: the bytes themselves up to 16, else the whole hash. `hash` chooses the slot.
struct Key {
  std::uint64_t low, high;
  const std::uint8_t* data;
  std::uint32_t size, hash;
};

// Differ from process to process, so that no text can be made to collide: one for each factor, since a product with a
// factor that a text makes zero says nothing of the other. wordcount_table.cpp
extern const std::uint64_t kHashSeeds[2];

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) noexcept {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint32_t slot_hash(std::uint64_t hash) noexcept {
#if defined(FASTOPS_TEST_COLLISIONS)
  (void)hash;
  return 0;
#else
  return static_cast<std::uint32_t>(hash ^ hash >> 32);
#endif
}

// Masks of the first n of 16 bytes: quicker than shifts by a variable.
struct FirstBytes {
  std::uint64_t at[kInlineKey + 1][2];
  constexpr FirstBytes() : at{} {
    for (std::size_t n = 0; n <= kInlineKey; ++n)
      for (std::size_t i = 0; i < n; ++i) at[n][i / 8] |= std::uint64_t{255} << 8 * (i % 8);
  }
};
inline constexpr FirstBytes kFirstBytes;

std::uint64_t hash_long(const std::uint8_t* data, std::size_t size) noexcept;

// The first 16 bytes at `data`, which can be read, cut to `size`.
inline Key short_key(const std::uint8_t* data, std::size_t size) noexcept {
  Key key;
  std::memcpy(&key.low, data, 8);
  std::memcpy(&key.high, data + 8, 8);
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the inline keys are written for little-endian machines"
#endif
  key.low &= kFirstBytes.at[size][0];
  key.high &= kFirstBytes.at[size][1];
  key.data = data;
  key.size = static_cast<std::uint32_t>(size);
  key.hash = slot_hash(mix(key.low ^ kHashSeeds[0], key.high ^ kHashSeeds[1] ^ size));
  return key;
}

inline Key long_key(const std::uint8_t* data, std::size_t size) noexcept {
  Key key;
  key.low = 0;
  key.high = hash_long(data, size);
  key.data = data;
  key.size = static_cast<std::uint32_t>(size);
  key.hash = slot_hash(key.high);
  return key;
}

// Of any bytes, of which none past the end is read.
inline Key make_key(const std::uint8_t* data, std::size_t size) noexcept {
  if (size > kInlineKey) return long_key(data, size);
  std::uint8_t padded[kInlineKey] = {};
  if (size > 0) std::memcpy(padded, data, size);
  Key key = short_key(padded, size);
  key.data = data;
  return key;
}

enum class Added { kDone, kNoMemory, kTooMany };

class Table {
 public:
  struct Slot {
    std::uint64_t low;   // the key, or where it lies in the arena
    std::uint64_t high;  // the key, or its whole hash
    std::uint64_t count;
    std::uint32_t size1;  // size + 1; 0: empty
    std::uint32_t hash;
  };
  // Beside a slot where documents are counted: how many, and the last one that held the key.
  struct Documents {
    std::uint64_t count, last;
  };

  explicit Table(bool with_documents = false) noexcept : with_documents_(with_documents) {}

  // Its memory comes from unlinked files from now on; the table is empty.
  void back_by_files() noexcept { file_backed_ = true; }

  // Room for `entries` more keys, of `long_bytes` bytes in those above 16. The memory it would newly take is
  // needed(...).
  bool reserve(std::size_t entries, std::size_t long_bytes) noexcept;
  std::size_t needed(std::size_t entries, std::size_t long_bytes) const noexcept;
  // The same for an empty table that will hold just these: no larger than it must be.
  bool fit(std::size_t entries, std::size_t long_bytes) noexcept;
  bool has_room(std::size_t entries, std::size_t long_bytes) const noexcept {
    return entries_ + entries <= most_ && arena_used_ + long_bytes <= arena_.bytes();
  }

  // Counts one more of the key; room is reserved.
  Slot& count(const Key& key) noexcept {
    Slot& slot = find(key);
    if (__builtin_expect(slot.size1 == 0, 0)) insert(slot, key);
    ++slot.count;
    return slot;
  }
  // The same in document `document`, which is never 0.
  void count(const Key& key, std::uint64_t document) noexcept {
    Documents& beside = documents_.get<Documents>()[&count(key) - slots()];
    beside.count += beside.last != document;
    beside.last = document;
  }
  Added add(const Key& key, std::uint64_t count, std::uint64_t documents) noexcept;
  Added add(const Table& other) noexcept;
  const Slot* get(const Key& key) const noexcept {
    if (entries_ == 0) return nullptr;
    const Slot& slot = const_cast<Table*>(this)->find(key);
    return slot.size1 == 0 ? nullptr : &slot;
  }
  void prefetch(std::uint32_t hash) const noexcept {
    __builtin_prefetch(slots() + home(hash), 1);  // of a table without slots: any address may be asked for
  }
  void clear() noexcept;
  // Empty but for the keys whose last document is `first` or a later one, which may go on: they stay with a count of 0,
  // so that it is not counted twice for them.
  bool forget_before(std::uint64_t first) noexcept;

  std::size_t size() const noexcept { return entries_; }
  std::size_t capacity() const noexcept { return slots() == nullptr ? 0 : mask_ + 1; }
  std::size_t bytes() const noexcept { return slots_.bytes() + documents_.bytes() + arena_.bytes(); }
  bool with_documents() const noexcept { return with_documents_; }
  const Slot* slots() const noexcept { return slots_.get<Slot>(); }
  const std::uint8_t* key_of(const Slot& slot) const noexcept {
    return slot.size1 - 1 <= kInlineKey ? reinterpret_cast<const std::uint8_t*>(&slot.low)
                                        : arena_.get<std::uint8_t>() + slot.low;
  }
  std::uint64_t documents_of(const Slot& slot) const noexcept {
    return with_documents_ ? documents_.get<Documents>()[&slot - slots()].count : 0;
  }
  // The slot's key as a key of any table.
  Key key_at(const Slot& slot) const noexcept {
    Key key;
    key.size = slot.size1 - 1;
    key.data = key_of(slot);
    key.low = key.size <= kInlineKey ? slot.low : 0;
    key.high = slot.high;
    key.hash = slot.hash;
    return key;
  }
  // The `kept` largest counts less the next one, nothing else (Misra and Gries 1982; Agarwal et al. 2012 for merging).
  // Answers by how much every count became smaller, or kMaxCount where there is no memory.
  std::uint64_t shrink(std::size_t kept) noexcept;

 private:
  Slot* slots() noexcept { return slots_.get<Slot>(); }
  // By the hash's high bits: a table that grows is rewritten in order, and so is one that is written in order of
  // hashes.
  std::size_t home(std::uint32_t hash) const noexcept { return static_cast<std::size_t>(hash) >> shift_ & mask_; }
  Slot& find(const Key& key) noexcept {
    Slot* const all = slots();
    std::size_t i = home(key.hash);
    if (key.size <= kInlineKey) {
      while (all[i].size1 != 0 && !(all[i].low == key.low && all[i].high == key.high && all[i].size1 == key.size + 1))
        i = (i + 1) & mask_;
    } else {
      while (all[i].size1 != 0 && !(all[i].size1 == key.size + 1 && all[i].high == key.high &&
                                    std::memcmp(arena_.get<std::uint8_t>() + all[i].low, key.data, key.size) == 0))
        i = (i + 1) & mask_;
    }
    return all[i];
  }
  void insert(Slot& slot, const Key& key) noexcept {
    slot.size1 = key.size + 1;
    slot.hash = key.hash;
    slot.low = key.low;
    slot.high = key.high;
    if (key.size > kInlineKey) {
      slot.low = arena_used_;
      std::memcpy(arena_.get<std::uint8_t>() + arena_used_, key.data, key.size);
      arena_used_ += key.size;
    }
    ++entries_;
  }
  std::size_t capacity_for(std::size_t entries) const noexcept;
  bool rebuild(std::size_t capacity) noexcept;

  Region slots_, documents_, arena_;
  std::size_t mask_ = 0, entries_ = 0, most_ = 0, arena_used_ = 0;  // most: entries before it grows
  unsigned shift_ = 0;
  bool with_documents_, file_backed_ = false;
};

}  // namespace fastops
#endif
