// The row movers on host memory.
//
// Traffic: each row is read once and written once, a memcpy apiece, plus 4 bytes of map. That is bound
// by memory, so one thread is nearly enough for small moves.
#include "row_movers.h"

#include <algorithm>
#include <cstring>

#include "refuse.h"
#include "threads.h"

namespace tokenflex {
namespace {

// Rows that are neighbours at both ends are copied together: a memcpy for each short row takes longer.
void copy_range(const PackMap& map, int64_t begin, int64_t end, int64_t row_bytes) {
  RowCopy run = {nullptr, nullptr};
  int64_t bytes = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (map.skips(row)) continue;
    const RowCopy copy = map(row);
    if (bytes > 0 && copy.from == run.from + bytes && copy.to == run.to + bytes) {
      bytes += row_bytes;
      continue;
    }
    if (bytes > 0) std::memcpy(run.to, run.from, size_t(bytes));
    run = copy, bytes = row_bytes;
  }
  if (bytes > 0) std::memcpy(run.to, run.from, size_t(bytes));
}

void split_range(const SplitMap& map, int64_t begin, int64_t end, int64_t row_bytes) {
  const auto bytes = size_t(row_bytes);
  for (int64_t row = begin; row < end; ++row) {
    const char* from = map.packed.row(row);
    const bool shows_vision = is_vision(map.source[row]);
    if (shows_vision && map.vision.data != nullptr) {
      std::memcpy(map.vision.row(vision_row(map.source[row])), from, bytes);
    }
    if (map.table.data == nullptr) continue;
    if (shows_vision) {
      std::memset(map.table.row(row), 0, bytes);
    } else {
      std::memcpy(map.table.row(row), from, bytes);
    }
  }
}

// The first row whose entry is outside [least, end), or -1.
int64_t first_outside(const int32_t* entries, int64_t rows, int64_t least, int64_t end) {
  if (rows <= 0) return -1;
  // Without a way out of the loop, so that it is compiled to vector instructions.
  int32_t low = entries[0], high = entries[0];
  for (int64_t row = 1; row < rows; ++row) {
    low = std::min(low, entries[row]);
    high = std::max(high, entries[row]);
  }
  if (low >= least && high < end) return -1;
  return std::find_if(entries, entries + rows,
                      [&](int32_t entry) { return entry < least || entry >= end; }) -
         entries;
}

}  // namespace

void check_source(const int32_t* source, int64_t rows, int64_t table_rows, int64_t vision_rows) {
  const int64_t row = first_outside(source, rows, -vision_rows, table_rows);
  if (row < 0) return;
  refuse("source[", row, "] must be in [", -vision_rows, ", ", table_rows, "), for ", table_rows,
         " table and ", vision_rows, " vision rows, got ", source[row]);
}

void check_vision_rows(const int32_t* vision_rows, int64_t rows, int64_t packed_rows) {
  const int64_t v = first_outside(vision_rows, rows, 0, packed_rows);
  if (v < 0) return;
  refuse("vision_rows[", v, "] must be a packed row, in [0, ", packed_rows, "), got ",
         vision_rows[v]);
}

void move_rows(const PackMap& map, int64_t rows, int64_t row_bytes, int threads) {
  if (rows <= 0 || row_bytes <= 0) return;
  in_parts(rows, worthwhile_parts(rows, rows * row_bytes, threads),
           [&](int64_t begin, int64_t end) { copy_range(map, begin, end, row_bytes); });
}

void split_rows(const SplitMap& map, int64_t rows, int64_t row_bytes, int threads) {
  if (rows <= 0 || row_bytes <= 0) return;
  in_parts(rows, worthwhile_parts(rows, rows * row_bytes, threads),
           [&](int64_t begin, int64_t end) { split_range(map, begin, end, row_bytes); });
}

}  // namespace tokenflex
