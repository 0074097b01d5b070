// SPDX-License-Identifier: BSD-3-Clause
// Temporary files that nobody else can name, and the tables in them.
#include "wordcount/wordcount_spill.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace fastops {
namespace {

// A record: this, then the key.
struct Record {
  std::uint64_t count, documents;
  std::uint32_t size, hash;
};

#if defined(FASTOPS_TEST_TINY)
constexpr std::size_t kChunk = 256;
#else
constexpr std::size_t kChunk = 65536;
#endif

unsigned part_of(std::uint32_t hash) noexcept { return hash >> 24; }
std::uint32_t turned(std::uint32_t hash) noexcept { return hash << 8 | hash >> 24; }
std::uint32_t turned_back(std::uint32_t hash) noexcept { return hash >> 8 | hash << 24; }

}  // namespace

int open_anonymous_file() noexcept {
  const char* folder = std::getenv("TMPDIR");  // NOLINT(concurrency-mt-unsafe): nobody here changes the environment
  if (folder == nullptr || folder[0] == 0) folder = "/tmp";
#if defined(O_TMPFILE)
  const int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
#endif
  // File systems without nameless files: a name that did not exist (O_EXCL, mode 0600), gone at once.
  char name[4096];
  if (static_cast<std::size_t>(std::snprintf(name, sizeof name, "%s/fastops-XXXXXX", folder)) >= sizeof name) {
    errno = ENAMETOOLONG;
    return -1;
  }
  const int named = mkostemp(name, O_CLOEXEC);
  if (named >= 0) unlink(name);
  return named;
}

bool read_all(int fd, void* to, std::size_t bytes, std::uint64_t offset) noexcept {
  auto* p = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n = pread(fd, p, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0) errno = 0;
      return false;
    }
    p += n;
    bytes -= static_cast<std::size_t>(n);
    offset += static_cast<std::uint64_t>(n);
  }
  return true;
}

bool write_all(int fd, const void* from, std::size_t bytes, std::uint64_t offset) noexcept {
  const auto* p = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t n = pwrite(fd, p, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0) errno = ENOSPC;
      return false;
    }
    p += n;
    bytes -= static_cast<std::size_t>(n);
    offset += static_cast<std::uint64_t>(n);
  }
  return true;
}

void Spill::reset() noexcept {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
  end_ = 0;
  chunks_ = 0;
  tables_ = 0;
  list_.release();
  error_ = 0;
}

bool Spill::append(unsigned part, const std::uint8_t* data, std::size_t bytes, std::size_t records,
                   std::uint32_t table) noexcept {
  if (bytes == 0) return true;
  std::uint64_t offset = 0;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    if (fd_ < 0 && (fd_ = open_anonymous_file()) < 0) return fail(errno);
    if (!list_.grow((chunks_ + 1) * sizeof(Chunk) > list_.bytes() ? 2 * list_.bytes() + 4096 : 0)) return fail(0);
    offset = end_;
    end_ += bytes;
    list_.get<Chunk>()[chunks_++] = {offset, static_cast<std::uint32_t>(bytes), part,
                                     static_cast<std::uint32_t>(records), table};
  }
  return write_all(fd_, data, bytes, offset) || fail(errno);
}

bool Spill::write(const Table& table) noexcept {
  Region buffer;
  if (!buffer.grow(kChunk)) return fail(0);
  std::size_t used = 0, records = 0;
  std::uint32_t number = 0;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    number = tables_++;
  }
  unsigned part = 0;
  // Slots lie in order of their hashes, so that a part's entries come together, but for the few that were pushed on.
  for (std::size_t i = 0; i < table.capacity(); ++i) {
    const Table::Slot& slot = table.slots()[i];
    if (slot.size1 == 0 || slot.count == 0) continue;
    const std::size_t size = slot.size1 - 1;
    const std::size_t bytes = sizeof(Record) + size;
    if (part_of(slot.hash) != part || used + bytes > kChunk) {
      if (!append(part, buffer.get<std::uint8_t>(), used, records, number)) return false;
      part = part_of(slot.hash);
      used = records = 0;
    }
    if (!buffer.grow(bytes)) return fail(0);
    const Record record = {slot.count, table.documents_of(slot), static_cast<std::uint32_t>(size), slot.hash};
    std::memcpy(buffer.get<std::uint8_t>() + used, &record, sizeof record);
    std::memcpy(buffer.get<std::uint8_t>() + used + sizeof record, table.key_of(slot), size);
    used += bytes;
    ++records;
  }
  return append(part, buffer.get<std::uint8_t>(), used, records, number);
}

bool Spill::read(unsigned part, Table* table) noexcept {
  // First into a table of this part alone: its hashes all begin alike, so that they are turned by what they share.
  // Those of one table come in order, which is why there must be room for as many before.
  Table alone(table->with_documents());
  Region held;
  if (!held.grow((tables_ + 1) * sizeof(std::size_t))) return fail(0);
  std::size_t most = 0;
  for (std::size_t i = 0; i < chunks_; ++i) {
    const Chunk& chunk = list_.get<Chunk>()[i];
    if (chunk.part == part) most = std::max(most, held.get<std::size_t>()[chunk.table] += chunk.records);
  }
  if (most == 0) return true;
  if (!alone.reserve(most, 0)) return fail(0);
  Region buffer;
  for (std::size_t i = 0; i < chunks_; ++i) {
    const Chunk& chunk = list_.get<Chunk>()[i];
    if (chunk.part != part) continue;
    if (!buffer.grow(chunk.bytes)) return fail(0);
    const auto* p = buffer.get<std::uint8_t>();
    if (!read_all(fd_, buffer.get<std::uint8_t>(), chunk.bytes, chunk.offset)) return fail(errno != 0 ? errno : EIO);
    for (const std::uint8_t* const end = p + chunk.bytes; p < end;) {
      Record record;
      std::memcpy(&record, p, sizeof record);
      p += sizeof record;
      Key key = make_key(p, record.size);
      key.hash = turned(key.hash);
      if (alone.add(key, record.count, record.documents) != Added::kDone) return fail(0);
      p += record.size;
    }
  }
  // The parts to come are as large as those that came.
  errno = 0;  // memory of the system leaves it as it is, a file of the table says what it lacks
  const std::size_t now = table->size() + alone.size();
  if (!table->has_room(alone.size(), 0) &&
      !table->reserve(static_cast<std::size_t>(static_cast<double>(now) * kParts / (part + 1)) - table->size(), 0))
    return fail(errno);
  const Table& whole = alone;
  for (std::size_t i = 0; i < whole.capacity(); ++i) {
    const Table::Slot& slot = whole.slots()[i];
    if (slot.size1 == 0) continue;
    Key key = whole.key_at(slot);
    key.hash = turned_back(key.hash);
    if (table->add(key, slot.count, whole.documents_of(slot)) != Added::kDone) return fail(errno);
  }
  return true;
}

}  // namespace fastops
