// Sums of rows on device memory, in the order of segments.h: two launches, no atomics.
//
// Traffic: each row is read once and each sum written once; a piece that waits for others, one in a tile
// at most, is written and read in between as a row of sums, and a first piece is read twice.
// Accesses: 16 bytes where every address and stride and the width allow, one element otherwise.
// Grid: one-dimensional. A block of `sum_tiles` has one tile and kTileBlock accesses of columns; each of
// its threads has kUnroll rows in flight, whatever segments they belong to. A block of `sum_outgoing`
// has the one segment that may leave a tile, a warp of columns and a lane of pieces for each row of its
// threads, and is done at once where no segment leaves.
#include "cuda_device.h"
#include "row_sums.h"

namespace tokenflex {
namespace {

constexpr int kTileBlock = 64;
constexpr int kWarp = 32;
constexpr int kUnroll = 8;

// N neighbouring elements, moved by accesses as wide as the hardware has.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Elements {
  T values[N];
};

template <int N, class T, class Sum>
__device__ void add(const Elements<T, N>& elements, Sum (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] += widened(elements.values[i]);
}

template <class T, int N, class Sum>
__device__ void write(const Sum (&sums)[N], char* row, int64_t column) {
  Elements<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.values[i] = rounded<T>(sums[i]);
  *reinterpret_cast<Elements<T, N>*>(row + column * int64_t(sizeof(T))) = out;
}

template <class T, int N>
__device__ Elements<T, N> read(const char* row, int64_t column) {
  return *reinterpret_cast<const Elements<T, N>*>(row + column * int64_t(sizeof(T)));
}

template <class T, int N>
__global__ void __launch_bounds__(kTileBlock) sum_tiles(RowSums job, int64_t column_blocks) {
  using Sum = SumOf<T>;
  const Segments& segments = job.segments;
  const int64_t tile = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x % column_blocks * kTileBlock + threadIdx.x) * N;
  if (column >= job.width) return;

  const int64_t tile_end = segments.tile_end(tile);
  int64_t begin = segments.tile_begin(tile);  // of the piece that is being summed
  Sum sums[N] = {};
  for (int64_t group = begin; group < tile_end; group += kUnroll) {
    Elements<T, N> held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (group + u < tile_end) {
        held[u] = read<T, N>(job.grad.row(segments.rows[group + u]), column);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t end = group + u + 1;
      if (end > tile_end) break;
      add<N>(held[u], sums);
      if (!segments.piece_ends(end, tile_end)) continue;
      const Piece piece = segments.piece(begin, end);
      if (piece == Piece::kOther) write<Sum, N>(sums, job.partials.row(tile), column);
      if (piece == Piece::kWhole) write<T, N>(sums, job.sums.row(segments.slots[begin]), column);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = 0;
      begin = end;
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kLanes) sum_outgoing(RowSums job, int64_t column_blocks) {
  using Sum = SumOf<T>;
  const Segments& segments = job.segments;
  const int64_t tile = blockIdx.x / column_blocks;
  const int64_t begin = segments.outgoing(tile);
  if (begin < 0) return;  // as one: the threads of a block share its tile
  const int32_t slot = segments.slots[begin];
  const int64_t column = (blockIdx.x % column_blocks * kWarp + threadIdx.x) * N;
  const bool inside = column < job.width;

  // the lanes
  Sum sums[N] = {};
  for (int64_t turn = 0;
       inside && segments.reaches(Segments::dealt(tile, threadIdx.y, turn), slot);
       turn += kUnroll) {
    Elements<Sum, N> held[kUnroll];
    bool ours[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t other = Segments::dealt(tile, threadIdx.y, turn + u);
      ours[u] = segments.reaches(other, slot);
      if (ours[u]) held[u] = read<Sum, N>(job.partials.row(other), column);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (ours[u]) add<N>(held[u], sums);
    }
  }
  __shared__ Sum lanes[kLanes][N][kWarp];
#pragma unroll
  for (int i = 0; i < N; ++i) lanes[threadIdx.y][i][threadIdx.x] = sums[i];
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;

  // the first piece, and the lanes in order
  Sum total[N] = {};
#pragma unroll 4
  for (int64_t at = begin; at < segments.tile_end(tile); ++at) {
    add<N>(read<T, N>(job.grad.row(segments.rows[at]), column), total);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += lanes[lane][i][threadIdx.x];
  }
  write<T, N>(total, job.sums.row(slot), column);
}

int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// A grid's x ends at 2^31: at 2^42 elements, which is more than any device holds.
template <class T, int N>
void launch(const RowSums& job, cudaStream_t stream) {
  const int64_t tiles = job.segments.tiles();
  int64_t column_blocks = blocks_for(job.width, kTileBlock * N);
  sum_tiles<T, N><<<unsigned(tiles * column_blocks), kTileBlock, 0, stream>>>(job, column_blocks);
  check_cuda(cudaGetLastError(), "the launch that sums tiles");
  if (tiles == 1) return;
  column_blocks = blocks_for(job.width, kWarp * N);
  sum_outgoing<T, N>
      <<<unsigned(tiles * column_blocks), dim3(kWarp, kLanes), 0, stream>>>(job, column_blocks);
  check_cuda(cudaGetLastError(), "the launch that sums segments of several tiles");
}

}  // namespace

void sum_rows_cuda(const RowSums& job, const std::string& dtype, int device,
                   uintptr_t stream_handle) {
  if (job.segments.num <= 0 || job.width <= 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const uint64_t bits = job.grad.alignment_bits() | job.sums.alignment_bits() |
                          job.partials.alignment_bits() | uint64_t(job.width) * sizeof(T);
    if (access_bytes(bits) == 16) {
      launch<T, 16 / sizeof(T)>(job, stream);
    } else {
      launch<T, 1>(job, stream);
    }
  });
}

}  // namespace tokenflex
