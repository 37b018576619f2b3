// The row movers on device memory: the maps of row_map.h, one launch each.
//
// Traffic: each row is read once and written once, plus 4 bytes of map per row; nothing is computed, so
// the copy bandwidth of the device is the floor.
// Accesses: 16 bytes where every address and stride and the row size are multiples of that. Otherwise
// each row is split as row_split.h has it, by its own two addresses.
// Grid: one-dimensional. A row is given a power of two of neighbouring threads, enough that each has
// about kUnroll accesses; short rows share a block of kBlock threads.
#include "cuda_device.h"
#include "row_movers.h"
#include "row_split.h"

namespace tokenflex {
namespace {

constexpr int kBlock = 256;

template <bool kSplit, class Map>
__global__ void __launch_bounds__(kBlock)
    copy_rows(Map map, int64_t rows, int64_t row_bytes, int threads_per_row) {
  const int rows_per_block = kBlock / threads_per_row;
  const int64_t row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  if (row >= rows) return;
  const RowCopy copy = map(row);
  const int lane = threadIdx.x % threads_per_row;
  if (kSplit) {
    copy_split(copy, row_bytes, lane, threads_per_row);
  } else {
    copy_accesses<16>(copy.from, copy.to, row_bytes / 16, lane, threads_per_row);
  }
}

int threads_for(int64_t accesses) {
  int threads = 1;
  while (threads < kBlock && int64_t(threads) * kUnroll < accesses) threads *= 2;
  return threads;
}

}  // namespace

template <class Map>
void move_rows_cuda(const Map& map, int64_t rows, int64_t row_bytes, int device,
                    uintptr_t stream_handle) {
  if (rows <= 0 || row_bytes <= 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  // The narrowest accesses of any row, and so the most of them.
  const int narrowest = access_bytes(map.alignment_bits());
  const int threads_per_row = threads_for(row_bytes / narrowest);
  const int64_t rows_per_block = kBlock / threads_per_row;
  // At most one block per row, and rows are counted in int32: within the limit of a grid's x.
  const auto blocks = unsigned((rows + rows_per_block - 1) / rows_per_block);
  if (narrowest == 16 && row_bytes % 16 == 0) {
    copy_rows<false><<<blocks, kBlock, 0, stream>>>(map, rows, row_bytes, threads_per_row);
  } else {
    copy_rows<true><<<blocks, kBlock, 0, stream>>>(map, rows, row_bytes, threads_per_row);
  }
  check_cuda(cudaGetLastError(), "the row mover's launch");
}

template void move_rows_cuda(const PackMap&, int64_t, int64_t, int, uintptr_t);
template void move_rows_cuda(const GatherMap&, int64_t, int64_t, int, uintptr_t);

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // "no driver" and "no device" are answers here: leave no error behind
  return 0;
}

}  // namespace tokenflex
