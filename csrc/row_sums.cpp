// Sums of rows on host memory.
//
// Traffic: each row is read once and each sum written once; a piece that waits for others, one in a tile
// at most, is written and read in between as a row of sums. Threads share the tiles first, and then the
// columns, so that one long segment is the work of all of them both times.
#include "row_sums.h"

#include <algorithm>

#include "refuse.h"
#include "threads.h"

namespace tokenflex {
namespace {

// Columns that are summed at a time: few enough that the sums stay in the first cache.
constexpr int64_t kColumns = 1024;

struct Columns {
  int64_t begin;
  int64_t count;
};

template <class T>
const T* elements(const ConstRows& rows, int64_t row, Columns columns) {
  return reinterpret_cast<const T*>(rows.row(row)) + columns.begin;
}

template <class T>
T* elements(const Rows& rows, int64_t row, Columns columns) {
  return reinterpret_cast<T*>(rows.row(row)) + columns.begin;
}

template <class T, class Sum>
void add(const T* row, Columns columns, Sum* sums) {
  for (int64_t c = 0; c < columns.count; ++c) sums[c] += widened(row[c]);
}

template <class T, class Sum>
void write(const Sum* sums, Columns columns, T* row) {
  for (int64_t c = 0; c < columns.count; ++c) row[c] = rounded<T>(sums[c]);
}

template <class T, class Sum>
void sum_piece(const RowSums& job, int64_t begin, int64_t end, Columns columns, Sum* sums) {
  std::fill_n(sums, columns.count, Sum(0));
  for (int64_t at = begin; at < end; ++at) {
    add(elements<T>(job.grad, job.segments.rows[at], columns), columns, sums);
  }
}

template <class T>
void sum_tile(const RowSums& job, int64_t tile, Columns columns) {
  using Sum = SumOf<T>;
  const Segments& segments = job.segments;
  const int64_t tile_end = segments.tile_end(tile);
  for (int64_t begin = segments.tile_begin(tile), end; begin < tile_end; begin = end) {
    end = begin + 1;
    while (!segments.piece_ends(end, tile_end)) ++end;
    const Piece piece = segments.piece(begin, end);
    if (piece == Piece::kFirst) continue;
    Sum sums[kColumns];
    sum_piece<T>(job, begin, end, columns, sums);
    if (piece == Piece::kOther) {
      write(sums, columns, elements<Sum>(job.partials, tile, columns));
    } else {
      write(sums, columns, elements<T>(job.sums, segments.slots[begin], columns));
    }
  }
}

// The segment that begins in `tile` and goes on after it, if there is one.
template <class T>
void sum_outgoing(const RowSums& job, int64_t tile, Columns columns) {
  using Sum = SumOf<T>;
  const Segments& segments = job.segments;
  const int64_t begin = segments.outgoing(tile);
  if (begin < 0) return;
  const int32_t slot = segments.slots[begin];
  Sum sums[kColumns];
  sum_piece<T>(job, begin, segments.tile_end(tile), columns, sums);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    Sum lane_sums[kColumns];
    std::fill_n(lane_sums, columns.count, Sum(0));
    for (int64_t turn = 0;; ++turn) {
      const int64_t other = Segments::dealt(tile, lane, turn);
      if (!segments.reaches(other, slot)) break;
      add(elements<Sum>(job.partials, other, columns), columns, lane_sums);
    }
    add(lane_sums, columns, sums);
  }
  write(sums, columns, elements<T>(job.sums, slot, columns));
}

template <class Work>
void in_columns(int64_t begin, int64_t end, const Work& work) {
  for (int64_t column = begin; column < end; column += kColumns) {
    work(Columns{column, std::min(kColumns, end - column)});
  }
}

template <class T>
void sum_rows_of(const RowSums& job, int threads) {
  const int64_t tiles = job.segments.tiles();
  const int64_t bytes = job.segments.num * job.width * int64_t(sizeof(T));
  in_parts(tiles, worthwhile_parts(tiles, bytes, threads), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      in_columns(0, job.width, [&](Columns columns) { sum_tile<T>(job, tile, columns); });
    }
  });
  const int64_t partial_bytes = tiles * job.width * int64_t(sizeof(SumOf<T>));
  const int64_t parts = worthwhile_parts(job.width, partial_bytes, threads);
  in_parts(job.width, parts, [&](int64_t begin, int64_t end) {
    in_columns(begin, end, [&](Columns columns) {
      for (int64_t tile = 0; tile < tiles; ++tile) sum_outgoing<T>(job, tile, columns);
    });
  });
}

constexpr int kDigitBits = 8;

// Sorts by the digit of the ids at `shift`; equal digits keep their order.
TextRows sorted_by_digit(const TextRows& text, int shift) {
  const size_t count = text.ids.size();
  const auto digit = [&](size_t at) { return uint32_t(text.ids[at]) >> shift & 0xff; };
  size_t ends[1 << kDigitBits] = {};
  for (size_t at = 0; at < count; ++at) ++ends[digit(at)];
  for (int d = 1; d < 1 << kDigitBits; ++d) ends[d] += ends[d - 1];
  TextRows sorted = {std::vector<int32_t>(count), std::vector<int64_t>(count)};
  for (size_t at = count; at-- > 0;) {
    const size_t to = --ends[digit(at)];
    sorted.ids[to] = text.ids[at];
    sorted.rows[to] = text.rows[at];
  }
  return sorted;
}

}  // namespace

TextRows text_by_id(const int32_t* source, int64_t rows, int64_t num_vision) {
  TextRows text;
  text.ids.reserve(size_t(rows));
  text.rows.reserve(size_t(rows));
  int32_t bits = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (is_vision(source[row])) continue;
    text.ids.push_back(source[row]);
    text.rows.push_back(row);
    bits |= source[row];
  }
  const int64_t vision = rows - int64_t(text.ids.size());
  if (vision != num_vision) {
    refuse("source must have one vision row per entry of vision_rows, ", num_vision, ", but has ",
           vision);
  }
  for (int shift = 0; shift < 32 && bits >> shift != 0; shift += kDigitBits) {
    text = sorted_by_digit(text, shift);
  }
  return text;
}

void sum_rows(const RowSums& job, const std::string& dtype, int threads) {
  if (job.segments.num <= 0 || job.width <= 0) return;
  with_dtype(dtype, [&](auto element) { sum_rows_of<decltype(element)>(job, threads); });
}

void check_slots(const Segments& segments, int64_t num_slots) {
  if (segments.num <= 0) return;
  const int32_t low = segments.slots[0], high = segments.slots[segments.num - 1];  // ascending
  if (low >= 0 && high < num_slots) return;
  refuse("source must have its text rows in [0, ", num_slots, "), got ", low < 0 ? low : high);
}

}  // namespace tokenflex
