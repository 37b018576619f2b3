// The bytes of one row in accesses as wide as its two addresses allow.
//
// Wide accesses need addresses that are multiples of their width. Two addresses that differ by a
// multiple of 16 reach one together, after the same number of bytes: the row is a head of single bytes up
// to there, a body of 16-byte accesses, and a tail of single bytes. Where they differ by less, the body's
// accesses are as wide as the difference allows.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "row_map.h"

namespace tokenflex {

// An access of N bytes.
template <int N>
struct AccessOf;
template <>
struct AccessOf<1> {
  using type = uint8_t;
};
template <>
struct AccessOf<2> {
  using type = uint16_t;
};
template <>
struct AccessOf<4> {
  using type = uint32_t;
};
template <>
struct AccessOf<8> {
  using type = uint64_t;
};
template <>
struct AccessOf<16> {
  struct alignas(16) type {
    uint64_t halves[2];
  };
};

struct RowSplit {
  int width;     // bytes of an access of the body: 16, 8, 4, 2 or 1
  int64_t head;  // bytes before the body, fewer than `width`
  int64_t body;  // accesses
  int64_t tail;  // bytes after the body, fewer than `width`

  // Where in the row byte `index` of head and tail is, counted as one.
  TOKENFLEX_HOST_DEVICE int64_t edge(int64_t index) const {
    return index < head ? index : index + body * width;
  }
};

TOKENFLEX_HOST_DEVICE inline RowSplit split_row(const void* from, const void* to, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  RowSplit split;
  split.width = access_bytes(reinterpret_cast<uintptr_t>(from) ^ address);
  split.head = int64_t((~address + 1) & uintptr_t(split.width - 1));
  if (split.head > bytes) split.head = bytes;
  split.body = (bytes - split.head) / split.width;
  split.tail = bytes - split.head - split.body * split.width;
  return split;
}

constexpr int kUnroll = 4;

// Lane `lane` of `lanes` moves its part of `count` accesses. It has kUnroll loads in flight before it
// stores, which is what hides the latency of device memory.
template <int N>
TOKENFLEX_HOST_DEVICE void copy_accesses(const char* from_bytes, char* to_bytes, int64_t count,
                                         int lane, int lanes) {
  using Access = typename AccessOf<N>::type;
  const Access* from = reinterpret_cast<const Access*>(from_bytes);
  Access* to = reinterpret_cast<Access*>(to_bytes);
  const int64_t step = int64_t(kUnroll) * lanes;
  for (int64_t first = lane; first < count; first += step) {
    Access held[kUnroll] = {};
    TOKENFLEX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t(u) * lanes;
      if (at < count) held[u] = from[at];
    }
    TOKENFLEX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t(u) * lanes;
      if (at < count) to[at] = held[u];
    }
  }
}

// Lane `lane` of `lanes` moves its part of a row of any addresses and size.
TOKENFLEX_HOST_DEVICE inline void copy_split(const RowCopy& copy, int64_t bytes, int lane, int lanes) {
  const RowSplit split = split_row(copy.from, copy.to, bytes);
  for (int64_t index = lane; index < split.head + split.tail; index += lanes) {
    const int64_t at = split.edge(index);
    copy.to[at] = copy.from[at];
  }
  const char* from = copy.from + split.head;
  char* to = copy.to + split.head;
  switch (split.width) {
    case 16: return copy_accesses<16>(from, to, split.body, lane, lanes);
    case 8: return copy_accesses<8>(from, to, split.body, lane, lanes);
    case 4: return copy_accesses<4>(from, to, split.body, lane, lanes);
    case 2: return copy_accesses<2>(from, to, split.body, lane, lanes);
    default: return copy_accesses<1>(from, to, split.body, lane, lanes);
  }
}

}  // namespace tokenflex
