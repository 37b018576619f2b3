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

// From nowhere come zeros.
void copy_run(const char* from, char* to, int64_t bytes) {
  if (from == nullptr) {
    std::memset(to, 0, size_t(bytes));
  } else {
    std::memcpy(to, from, size_t(bytes));
  }
}

// Rows that are neighbours at both ends are copied together: a memcpy for each short row takes longer, and
// one of many rows passes the cache by.
void copy_range(const PackMap& map, int64_t begin, int64_t end, int64_t row_bytes) {
  RowCopy run = {nullptr, nullptr};
  int64_t bytes = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (map.skips(row)) continue;
    const RowCopy copy = map(row);
    const char* next = run.from == nullptr ? nullptr : run.from + bytes;
    if (bytes > 0 && copy.from == next && copy.to == run.to + bytes) {
      bytes += row_bytes;
      continue;
    }
    if (bytes > 0) copy_run(run.from, run.to, bytes);
    run = copy, bytes = row_bytes;
  }
  if (bytes > 0) copy_run(run.from, run.to, bytes);
}

void split_range(const SplitMap& map, int64_t begin, int64_t end, int64_t row_bytes) {
  for (int64_t row = begin, next; row < end; row = next) {
    const int32_t entry = map.source[row];
    const bool shows_vision = is_vision(entry);
    // Entries of vision rows that are neighbours descend.
    for (next = row + 1; next < end && is_vision(map.source[next]) == shows_vision; ++next) {
      if (shows_vision && map.source[next] != int64_t(entry) - (next - row)) break;
    }
    const char* from = map.packed + row * row_bytes;
    const int64_t bytes = (next - row) * row_bytes;
    if (shows_vision && map.vision != nullptr) {
      copy_run(from, map.vision + vision_row(entry) * row_bytes, bytes);
    }
    if (map.table != nullptr) {
      copy_run(shows_vision ? nullptr : from, map.table + row * row_bytes, bytes);
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

void clear_rows(char* to, int64_t rows, int64_t row_bytes, int threads) {
  if (rows <= 0 || row_bytes <= 0) return;
  in_parts(rows, worthwhile_parts(rows, rows * row_bytes, threads),
           [&](int64_t begin, int64_t end) {
             copy_run(nullptr, to + begin * row_bytes, (end - begin) * row_bytes);
           });
}

void split_rows(const SplitMap& map, int64_t rows, int64_t row_bytes, int threads) {
  if (rows <= 0 || row_bytes <= 0) return;
  in_parts(rows, worthwhile_parts(rows, rows * row_bytes, threads),
           [&](int64_t begin, int64_t end) { split_range(map, begin, end, row_bytes); });
}

}  // namespace tokenflex
