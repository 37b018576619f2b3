// The row movers on device memory: the maps of row_map.h, one launch each.
//
// Traffic: each row is read once and written once, plus 4 bytes of map per row; nothing is computed, so
// the copy bandwidth of the device is the floor.
// Accesses: as wide as every address, stride and the row size allow, 16 bytes at best. A row of odd
// width falls back to 8, 4, 2 or 1 bytes for the whole launch: no scalar tail to get wrong.
// Grid: one-dimensional. A row is given a power of two of neighbouring threads, enough that each has
// about kUnroll accesses; short rows share a block of kBlock threads. Each thread has kUnroll loads in
// flight before it stores, which is what hides the latency of memory.
#include "cuda_device.h"
#include "row_movers.h"

namespace tokenflex {
namespace {

constexpr int kBlock = 256;
constexpr int kUnroll = 4;

template <class Access, class Map>
__global__ void __launch_bounds__(kBlock)
    copy_rows(Map map, int64_t rows, int64_t accesses, int threads_per_row) {
  const int rows_per_block = kBlock / threads_per_row;
  const int64_t row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  if (row >= rows) return;
  const RowCopy copy = map(row);
  const Access* from = reinterpret_cast<const Access*>(copy.from);
  Access* to = reinterpret_cast<Access*>(copy.to);

  const int lane = threadIdx.x % threads_per_row;
  const int64_t step = int64_t(kUnroll) * threads_per_row;
  for (int64_t first = lane; first < accesses; first += step) {
    Access held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t(u) * threads_per_row;
      if (at < accesses) held[u] = from[at];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t(u) * threads_per_row;
      if (at < accesses) to[at] = held[u];
    }
  }
}

int threads_for(int64_t accesses) {
  int threads = 1;
  while (threads < kBlock && int64_t(threads) * kUnroll < accesses) threads *= 2;
  return threads;
}

template <class Access, class Map>
void launch(const Map& map, int64_t rows, int64_t row_bytes, cudaStream_t stream) {
  const int64_t accesses = row_bytes / int64_t(sizeof(Access));
  const int threads_per_row = threads_for(accesses);
  const int64_t rows_per_block = kBlock / threads_per_row;
  // At most one block per row, and rows are counted in int32: within the limit of a grid's x.
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  copy_rows<Access><<<unsigned(blocks), kBlock, 0, stream>>>(map, rows, accesses, threads_per_row);
  check_cuda(cudaGetLastError(), "the row mover's launch");
}

}  // namespace

template <class Map>
void move_rows_cuda(const Map& map, int64_t rows, int64_t row_bytes, int device,
                    uintptr_t stream_handle) {
  if (rows <= 0 || row_bytes <= 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (access_bytes(map.alignment_bits() | uint64_t(row_bytes))) {
    case 16: return launch<uint4>(map, rows, row_bytes, stream);
    case 8: return launch<uint2>(map, rows, row_bytes, stream);
    case 4: return launch<uint32_t>(map, rows, row_bytes, stream);
    case 2: return launch<uint16_t>(map, rows, row_bytes, stream);
    default: return launch<uint8_t>(map, rows, row_bytes, stream);
  }
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
