// The row movers on device memory: the map of row_map.h, one launch.
//
// Traffic: each row is read once and written once, plus 4 bytes of map per row; nothing is computed, so
// the copy bandwidth of the device is the floor.
// Accesses: 16 bytes where every address and stride and the row size are multiples of that. Otherwise
// each row is split as row_split.h has it, by its own two addresses.
// Grid: one-dimensional, as mover_grid.h has it: a row is given a power of two of neighbouring threads,
// and short rows share a block.
#include "cuda_device.h"
#include "mover_grid.h"
#include "row_movers.h"

namespace tokenflex {
namespace {

template <bool kWide>
__global__ void __launch_bounds__(kMoverBlock)
    copy_rows(PackMap map, int64_t rows, int64_t row_bytes, int threads_per_row) {
  move_as_thread<kWide>(map, rows, row_bytes, threads_per_row, blockIdx.x, threadIdx.x);
}

}  // namespace

void move_rows_cuda(const PackMap& map, int64_t rows, int64_t row_bytes, int device,
                    uintptr_t stream_handle) {
  if (rows <= 0 || row_bytes <= 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const MoverGrid grid = mover_grid(map.alignment_bits(), rows, row_bytes);
  const auto kernel = grid.wide ? copy_rows<true> : copy_rows<false>;
  kernel<<<unsigned(grid.blocks), kMoverBlock, 0, stream>>>(map, rows, row_bytes,
                                                            grid.threads_per_row);
  check_cuda(cudaGetLastError(), "the row mover's launch");
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // "no driver" and "no device" are answers here: leave no error behind
  return 0;
}

}  // namespace tokenflex
