// Pages of 2 MiB for large results. Memory that the allocator takes from the system comes without pages,
// and the first write to each of 4 KiB costs more than to fill it: up to half of the time of a result of
// some megabytes. Where Linux gives huge pages to those who ask ("madvise", the usual setting), the whole
// pages of a new result are asked for; memory that has its pages already is left as it is.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tokenflex {

constexpr int64_t kHugePage = 1 << 21;

// `data` is about to be written, all `bytes` of it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(kHugePage);
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (address + uintptr_t(bytes)) & ~(kPage - 1);
  // Where it is refused, pages stay small.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace tokenflex
