// The bytes of a row: where they come from and go to. The one place that knows.
//
// A mover copies `rows` rows of `row_bytes` bytes each. A map, called with a row number, answers with two
// addresses; the CPU and the CUDA mover run the same map:
//
//   packed[r] <- source[r] >= 0 ? table[source[r]] : vision[~source[r]]
//
// A plain gather is the same without vision rows. A map of text alone leaves the vision rows as they are:
// something else writes them.
//
// Row numbers are int32 in memory, offsets int64 in registers: a tensor may pass 2^31 elements long before
// it has 2^31 rows. Strides are in bytes and may be anything, 0 and negative included.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace tokenflex {

// An entry of the packing plan's `source`: a token id as it is, vision row v as ~v, so that its sign
// bit tells the two apart and vision row 0 is not taken for token 0.
TOKENFLEX_HOST_DEVICE inline bool is_vision(int32_t entry) { return entry < 0; }
TOKENFLEX_HOST_DEVICE inline int32_t vision_row(int32_t entry) { return ~entry; }
TOKENFLEX_HOST_DEVICE inline int32_t vision_entry(int32_t row) { return ~row; }

struct ConstRows {
  const char* data;
  int64_t stride;  // bytes

  TOKENFLEX_HOST_DEVICE const char* row(int64_t index) const { return data + index * stride; }
  uint64_t alignment_bits() const { return reinterpret_cast<uintptr_t>(data) | uint64_t(stride); }
};

struct Rows {
  char* data;
  int64_t stride;  // bytes

  TOKENFLEX_HOST_DEVICE char* row(int64_t index) const { return data + index * stride; }
  uint64_t alignment_bits() const { return reinterpret_cast<uintptr_t>(data) | uint64_t(stride); }
};

struct RowCopy {
  const char* from;
  char* to;
};

struct PackMap {
  ConstRows table;
  ConstRows vision;
  Rows packed;
  const int32_t* source;
  bool text_alone = false;

  TOKENFLEX_HOST_DEVICE bool skips(int64_t row) const {
    return text_alone && is_vision(source[row]);
  }
  TOKENFLEX_HOST_DEVICE RowCopy operator()(int64_t row) const {
    const int32_t entry = source[row];
    return {is_vision(entry) ? vision.row(vision_row(entry)) : table.row(entry), packed.row(row)};
  }
  uint64_t alignment_bits() const {
    return table.alignment_bits() | vision.alignment_bits() | packed.alignment_bits();
  }
};

// The way back of a packing whose table has a row for each packed row: vision rows to `vision`, and zeros
// in their place to `table`. Rows lie next to each other. One of the two is null where it is not wanted.
struct SplitMap {
  const char* packed;
  char* table;
  char* vision;
  const int32_t* source;
};

// The widest access in bytes, at most 16, that divides every address, stride and size whose bits were
// or-ed together: their lowest common set bit is the largest power of two that divides them all.
TOKENFLEX_HOST_DEVICE inline int access_bytes(uint64_t bits) {
  bits |= 16;
  return int(bits & (~bits + 1));
}

}  // namespace tokenflex
