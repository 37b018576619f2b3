// How the threads of a device share a move: rows to blocks, and the accesses of a row to neighbouring
// threads. Plain arithmetic and the work of one thread, apart from the launch, so that the CPU tests
// run all of it.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "row_map.h"
#include "row_split.h"

namespace tokenflex {

constexpr int kMoverBlock = 256;  // threads of a block

struct MoverGrid {
  bool wide;            // every access is of 16 bytes: no row needs to be split
  int threads_per_row;  // a power of two, so that a block has a whole number of rows
  int64_t blocks;       // at most one per row, and rows are counted in int32: within a grid's x
};

// For rows whose addresses and strides have these bits, or-ed together. A row is given threads enough
// that each has about kUnroll accesses, of the narrowest that any row has.
inline MoverGrid mover_grid(uint64_t alignment_bits, int64_t rows, int64_t row_bytes) {
  const int narrowest = access_bytes(alignment_bits);
  MoverGrid grid;
  grid.wide = narrowest == 16 && row_bytes % 16 == 0;
  grid.threads_per_row = 1;
  while (grid.threads_per_row < kMoverBlock &&
         int64_t(grid.threads_per_row) * kUnroll < row_bytes / narrowest) {
    grid.threads_per_row *= 2;
  }
  const int64_t rows_per_block = kMoverBlock / grid.threads_per_row;
  grid.blocks = (rows + rows_per_block - 1) / rows_per_block;
  return grid;
}

// What thread `thread` of block `block` moves.
template <bool kWide>
TOKENFLEX_HOST_DEVICE void move_as_thread(const PackMap& map, int64_t rows, int64_t row_bytes,
                                          int threads_per_row, int64_t block, int thread) {
  const int rows_per_block = kMoverBlock / threads_per_row;
  const int64_t row = block * rows_per_block + thread / threads_per_row;
  if (row >= rows || map.skips(row)) return;
  const RowCopy copy = map(row);
  const int lane = thread % threads_per_row;
  if (kWide) {
    copy_accesses<16>(copy.from, copy.to, row_bytes / 16, lane, threads_per_row);
  } else {
    copy_split(copy, row_bytes, lane, threads_per_row);
  }
}

}  // namespace tokenflex
