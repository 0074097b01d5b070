// SPDX-License-Identifier: BSD-3-Clause
// Zeroed memory that grows in place where the system can, from the system or from an unlinked file.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_REGION_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_REGION_H

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace fastops {

// A file without a name in the folder for temporary files; -1 with errno where there is none. wordcount_spill.cpp
int open_anonymous_file() noexcept;

class Region {
 public:
  Region() noexcept = default;
  ~Region() { release(); }
  Region(Region&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        fd_(std::exchange(other.fd_, -1)) {}
  Region& operator=(Region&& other) noexcept {
    if (this != &other) {
      release();
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Pages of a file in place of the system's memory: they can be written back when memory is short.
  bool back_by_file() noexcept {
    fd_ = open_anonymous_file();
    return fd_ >= 0;
  }

  // At least `bytes` bytes, the old ones kept, new ones zero; false with the old ones kept where there is no memory.
  bool grow(std::size_t bytes) noexcept {
    if (bytes <= bytes_) return true;
    if (bytes > static_cast<std::size_t>(-1) / 4) return false;
    bytes = (bytes + kPage - 1) / kPage * kPage;
    // With blocks on the disk: a page without one would end the process when it is written to. errno says why not.
    if (fd_ >= 0) {
      int error = EINTR;
      while (error == EINTR) error = posix_fallocate(fd_, 0, static_cast<off_t>(bytes));
      errno = error;
      if (error != 0) return false;
    }
    void* memory = MAP_FAILED;
#if defined(__linux__)
    if (data_ != nullptr) memory = mremap(data_, bytes_, bytes, MREMAP_MAYMOVE);
#endif
    if (memory == MAP_FAILED) {
      const int flags = fd_ >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
      memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd_, 0);
      if (memory == MAP_FAILED) return false;
      if (data_ != nullptr) {
        if (fd_ < 0) std::memcpy(memory, data_, bytes_);
        munmap(data_, bytes_);
      }
    }
#if defined(MADV_HUGEPAGE)
    if (bytes >= kHuge && fd_ < 0) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    data_ = memory;
    bytes_ = bytes;
    return true;
  }
  // Makes the pages of some bytes present and writable at once. A page that is read first and written later costs two
  // faults, the second of which interrupts every thread of the process.
  void populate(std::size_t offset, std::size_t bytes) noexcept {
#if defined(MADV_POPULATE_WRITE)
    const std::size_t first = offset / kPage * kPage;
    // Refused by Linux before 5.14: then by faults.
    if (bytes > 0) madvise(get<char>() + first, offset + bytes - first, MADV_POPULATE_WRITE);
#else
    (void)offset, (void)bytes;
#endif
  }
  // Gives the memory of the bytes from `offset` to `stop` back, and what is in them is lost. To whole huge pages only,
  // as a piece of one would stay.
  void discard(std::size_t offset, std::size_t stop) noexcept {
    const auto cut = [this](std::size_t at) noexcept {
      const std::uintptr_t address = (reinterpret_cast<std::uintptr_t>(data_) + at) / kHugePage * kHugePage;
      return std::max(address, reinterpret_cast<std::uintptr_t>(data_)) - reinterpret_cast<std::uintptr_t>(data_);
    };
    if (fd_ < 0 && cut(stop) > cut(offset)) madvise(get<char>() + cut(offset), cut(stop) - cut(offset), MADV_DONTNEED);
  }
  void release() noexcept {
    if (data_ != nullptr) munmap(data_, bytes_);
    if (fd_ >= 0) close(fd_);
    data_ = nullptr;
    bytes_ = 0;
    fd_ = -1;
  }
  std::size_t bytes() const noexcept { return bytes_; }
  template <class T> T* get() const noexcept { return static_cast<T*>(data_); }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20, kHuge = 2 * kHugePage;

  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  int fd_ = -1;
};

}  // namespace fastops
#endif
