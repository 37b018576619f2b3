// The row movers on device memory: the maps of row_map.h, one launch each.
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

template <bool kWide, class Map>
__global__ void __launch_bounds__(kMoverBlock)
    copy_rows(Map map, int64_t rows, int64_t row_bytes, int threads_per_row) {
  move_as_thread<kWide>(map, rows, row_bytes, threads_per_row, blockIdx.x, threadIdx.x);
}

}  // namespace

template <class Map>
void move_rows_cuda(const Map& map, int64_t rows, int64_t row_bytes, int device,
                    uintptr_t stream_handle) {
  if (rows <= 0 || row_bytes <= 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const MoverGrid grid = mover_grid(map.alignment_bits(), rows, row_bytes);
  const auto kernel = grid.wide ? copy_rows<true, Map> : copy_rows<false, Map>;
  kernel<<<unsigned(grid.blocks), kMoverBlock, 0, stream>>>(map, rows, row_bytes,
                                                            grid.threads_per_row);
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
