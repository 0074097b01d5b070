// SPDX-License-Identifier: BSD-3-Clause
// Tables written to an unlinked file in pieces by the hash of their keys, and read back piece by piece.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_SPILL_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_SPILL_H

#include <atomic>
#include <cerrno>
#include <mutex>

#include "wordcount/wordcount_table.h"

namespace fastops {

class Spill {
 public:
  static constexpr unsigned kParts = 256;

  ~Spill() { reset(); }
  // Forgets everything; the file is gone.
  void reset() noexcept;
  // Appends a table; several threads may. False with error_number() where the file cannot be written, or with 0 where
  // there is no memory.
  bool write(const Table& table) noexcept;
  // Adds what was written of one part to the table, part after part.
  bool read(unsigned part, Table* table) noexcept;
  bool used() const noexcept { return chunks_ > 0; }
  int error_number() const noexcept { return error_; }

 private:
  struct Chunk {
    std::uint64_t offset;
    std::uint32_t bytes, part, records, table;
  };
  bool append(unsigned part, const std::uint8_t* data, std::size_t bytes, std::size_t records,
              std::uint32_t table) noexcept;
  bool fail(int error) noexcept {
    error_ = error == ENOMEM ? 0 : error;
    return false;
  }

  std::mutex lock_;
  int fd_ = -1;
  std::uint64_t end_ = 0;
  std::size_t chunks_ = 0;
  std::uint32_t tables_ = 0;
  Region list_;
  std::atomic<int> error_{0};
};

// pread and pwrite of all of it, again after a signal; false with errno. A short file ends with errno 0.
bool read_all(int fd, void* to, std::size_t bytes, std::uint64_t offset) noexcept;
bool write_all(int fd, const void* from, std::size_t bytes, std::uint64_t offset) noexcept;

}  // namespace fastops
#endif
