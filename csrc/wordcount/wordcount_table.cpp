// SPDX-License-Identifier: BSD-3-Clause
// Growth, merging and shrinking of the word table.
#include "wordcount/wordcount_table.h"

#include <sys/random.h>
#include <time.h>

#include <algorithm>
#include <functional>

namespace fastops {
namespace {

#if defined(FASTOPS_TEST_TINY)
constexpr std::size_t kFirstCapacity = 4, kSweep = 2;
#else
constexpr std::size_t kFirstCapacity = 4096;
constexpr std::size_t kSweep = std::size_t{1} << 18;  // slots of a table that grows, 8 MiB
#endif
// The entries that a table of so many slots holds before it grows.
std::size_t most_of(std::size_t capacity) noexcept { return capacity / 5 * 3 + capacity % 5 * 3 / 5; }

std::uint64_t choose_seed(std::uint64_t number) noexcept {
  std::uint64_t seed = 0;
  if (getentropy(&seed, sizeof seed) != 0) {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    seed =
        (static_cast<std::uint64_t>(now.tv_nsec) + number) * 0x9e3779b97f4a7c15u ^ static_cast<std::uint64_t>(getpid());
  }
  return seed | 1;
}

}  // namespace

const std::uint64_t kHashSeeds[2] = {choose_seed(0), choose_seed(1)};

std::uint64_t hash_long(const std::uint8_t* data, std::size_t size) noexcept {
  std::uint64_t hash = kHashSeeds[0] ^ size;
  std::uint64_t word;
  for (; size >= 8; data += 8, size -= 8) {
    std::memcpy(&word, data, 8);
    hash = mix(hash ^ word, 0xa0761d6478bd642fu);
  }
  word = 0;
  if (size > 0) std::memcpy(&word, data, size);
  return mix(hash ^ word, 0xe7037ed1a0b428dbu);
}

std::size_t Table::capacity_for(std::size_t entries) const noexcept {
  std::size_t capacity = slots() == nullptr ? kFirstCapacity : mask_ + 1;
  while (entries > most_of(capacity)) {
    if (capacity > static_cast<std::size_t>(-1) / sizeof(Slot) / 8) return 0;
    capacity *= 2;
  }
  return capacity;
}

std::size_t Table::needed(std::size_t entries, std::size_t long_bytes) const noexcept {
  std::size_t bytes = 0;
  const std::size_t wanted = capacity_for(entries_ + entries);
  const std::size_t slot = sizeof(Slot) + (with_documents_ ? sizeof(Documents) : 0);
  if (wanted == 0) return static_cast<std::size_t>(-1) / 4;
  // The old slots stay until the new ones are filled.
  if (slots() == nullptr || wanted > mask_ + 1) bytes += wanted * slot;
  if (arena_used_ + long_bytes > arena_.bytes())
    bytes += std::max(arena_used_ + long_bytes, 2 * arena_.bytes()) - arena_.bytes();
  return bytes;
}

bool Table::reserve(std::size_t entries, std::size_t long_bytes) noexcept {
  const std::size_t wanted = capacity_for(entries_ + entries);
  if (wanted == 0) return false;
  if (arena_used_ + long_bytes > arena_.bytes()) {
    if (file_backed_ && arena_.bytes() == 0 && !arena_.back_by_file()) return false;
    if (!arena_.grow(std::max(arena_used_ + long_bytes, 2 * arena_.bytes())) && !arena_.grow(arena_used_ + long_bytes))
      return false;
  }
  if (slots() != nullptr && wanted <= mask_ + 1) return true;
  return rebuild(wanted);
}

bool Table::fit(std::size_t entries, std::size_t long_bytes) noexcept {
  std::size_t capacity = 2;
  while (entries > most_of(capacity)) {
    if (capacity > static_cast<std::size_t>(-1) / sizeof(Slot) / 8) return false;
    capacity *= 2;
  }
  return (long_bytes == 0 || arena_.grow(long_bytes)) && rebuild(capacity);
}

bool Table::rebuild(std::size_t capacity) noexcept {
  Region slots, documents;
  if (file_backed_ && (!slots.back_by_file() || (with_documents_ && !documents.back_by_file()))) return false;
  if (!slots.grow(capacity * sizeof(Slot))) return false;
  if (with_documents_ && !documents.grow(capacity * sizeof(Documents))) return false;
  const std::size_t before = this->capacity();
  std::swap(slots, slots_);
  std::swap(documents, documents_);
  mask_ = capacity - 1;
  most_ = most_of(capacity);
  shift_ = 32;
  for (std::size_t c = capacity; c > 1 && shift_ > 0; c /= 2) --shift_;
  const Slot* const old = slots.get<Slot>();
  Slot* const all = this->slots();
  // In sweeps: what was moved gives its memory back before the next slots take theirs.
  const std::size_t sweeps = std::max<std::size_t>(before / kSweep, 1);
  for (std::size_t sweep = 0; sweep < sweeps; ++sweep) {
    const std::size_t first = before / sweeps * sweep, stop = before / sweeps * (sweep + 1);
    const std::size_t room = capacity / sweeps;
    slots_.populate(room * sweep * sizeof(Slot), room * sizeof(Slot));
    if (with_documents_) documents_.populate(room * sweep * sizeof(Documents), room * sizeof(Documents));
    for (std::size_t i = first; i < stop; ++i) {
      if (old[i].size1 == 0) continue;
      std::size_t j = home(old[i].hash);
      while (all[j].size1 != 0) j = (j + 1) & mask_;
      all[j] = old[i];
      if (with_documents_) documents_.get<Documents>()[j] = documents.get<Documents>()[i];
    }
    slots.discard(first * sizeof(Slot), stop * sizeof(Slot));
    if (with_documents_) documents.discard(first * sizeof(Documents), stop * sizeof(Documents));
  }
  return true;
}

Added Table::add(const Key& key, std::uint64_t count, std::uint64_t documents) noexcept {
  if (!reserve(1, key.size > kInlineKey ? key.size : 0)) return Added::kNoMemory;
  Slot& slot = find(key);
  const std::uint64_t before = slot.size1 == 0 ? 0 : slot.count;
  if (count >= kMaxCount - before) return Added::kTooMany;
  if (slot.size1 == 0) insert(slot, key);
  slot.count = before + count;
  if (with_documents_) documents_.get<Documents>()[&slot - slots()].count += documents;
  return Added::kDone;
}

Added Table::add(const Table& other) noexcept {
  constexpr std::size_t kAhead = 16;
  const std::size_t n = other.capacity();
  // In order of hashes, as both lie in memory; the check first, so that nothing is added where something cannot be, and
  // the room for all: what comes in order of hashes would crowd the first slots of a table that has yet to grow.
  std::size_t more = 0, long_bytes = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const Slot& slot = other.slots()[i];
    if (slot.size1 == 0) continue;
    const Slot* const mine = get(other.key_at(slot));
    if (mine != nullptr && slot.count >= kMaxCount - mine->count) return Added::kTooMany;
    more += mine == nullptr;
    if (mine == nullptr && slot.size1 - 1 > kInlineKey) long_bytes += slot.size1 - 1;
  }
  if (!reserve(more, long_bytes)) return Added::kNoMemory;
  for (std::size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch(other.slots()[i + kAhead].hash);
    const Slot& slot = other.slots()[i];
    if (slot.size1 == 0) continue;
    const Added added = add(other.key_at(slot), slot.count, other.documents_of(slot));
    if (added != Added::kDone) return added;
  }
  return Added::kDone;
}

void Table::clear() noexcept {
  slots_.release();
  documents_.release();
  arena_.release();
  mask_ = entries_ = most_ = arena_used_ = 0;
}

bool Table::forget_before(std::uint64_t first) noexcept {
  Table kept(with_documents_);
  std::size_t left = 0, long_bytes = 0;
  for (std::size_t i = 0; with_documents_ && i < capacity(); ++i) {
    if (slots()[i].size1 == 0 || documents_.get<Documents>()[i].last < first) continue;
    ++left;
    if (slots()[i].size1 - 1 > kInlineKey) long_bytes += slots()[i].size1 - 1;
  }
  if (left > 0 && !kept.reserve(left, long_bytes)) return false;
  for (std::size_t i = 0; with_documents_ && i < capacity(); ++i) {
    const std::uint64_t last = documents_.get<Documents>()[i].last;
    if (slots()[i].size1 == 0 || last < first) continue;
    const Key key = key_at(slots()[i]);
    Slot& slot = kept.find(key);
    kept.insert(slot, key);
    kept.documents_.get<Documents>()[&slot - kept.slots()].last = last;
  }
  std::swap(*this, kept);
  return true;
}

std::uint64_t Table::shrink(std::size_t kept) noexcept {
  if (entries_ <= kept) return 0;
  Region counts;
  if (!counts.grow(entries_ * sizeof(std::uint64_t))) return kMaxCount;
  auto* const first = counts.get<std::uint64_t>();
  std::size_t n = 0;
  for (std::size_t i = 0; i < capacity(); ++i)
    if (slots()[i].size1 != 0) first[n++] = slots()[i].count;
  std::nth_element(first, first + kept, first + n, std::greater<>());
  const std::uint64_t less = first[kept];
  std::size_t long_bytes = 0, left = 0;
  for (std::size_t i = 0; i < capacity(); ++i) {
    const Slot& slot = slots()[i];
    if (slot.size1 == 0 || slot.count <= less) continue;
    ++left;
    if (slot.size1 - 1 > kInlineKey) long_bytes += slot.size1 - 1;
  }
  Table smaller(with_documents_);
  if (!smaller.reserve(left, long_bytes)) return kMaxCount;
  for (std::size_t i = 0; i < capacity(); ++i) {
    const Slot& slot = slots()[i];
    if (slot.size1 != 0 && slot.count > less) smaller.add(key_at(slot), slot.count - less, documents_of(slot));
  }
  std::swap(*this, smaller);
  return less;
}

}  // namespace fastops
