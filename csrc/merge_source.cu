// The map of a merge on device memory: one launch that fills, one that scatters. 4 bytes a row are
// written, and 4 or 8 more read for each vision row.
#include "merge_source.h"

#include <cassert>

#include "cuda_device.h"
#include "row_map.h"

namespace tokenflex {
namespace {

constexpr int kBlock = 256;

__global__ void fill(int32_t* source, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (row < rows) source[row] = int32_t(row);
}

template <class Index>
__global__ void scatter(const Index* vision_rows, int64_t num_vision, int32_t* source,
                        int64_t rows) {
  const int64_t v = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (v >= num_vision) return;
  const int64_t row = vision_rows[v];
  assert(row >= 0 && row < rows && "vision_rows must be rows of inputs_embeds");
  source[row] = vision_entry(int32_t(v));
}

// Rows and vision rows are counted in int32: within the limit of a grid's x.
unsigned blocks_for(int64_t items) { return unsigned((items + kBlock - 1) / kBlock); }

}  // namespace

template <class Index>
void fill_merge_source_cuda(const Index* vision_rows, int64_t num_vision, int32_t* source,
                            int64_t rows, int device, uintptr_t stream_handle) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (rows > 0) {
    fill<<<blocks_for(rows), kBlock, 0, stream>>>(source, rows);
    check_cuda(cudaGetLastError(), "the launch that fills a merge's map");
  }
  if (num_vision > 0) {
    scatter<<<blocks_for(num_vision), kBlock, 0, stream>>>(vision_rows, num_vision, source, rows);
    check_cuda(cudaGetLastError(), "the launch that scatters into a merge's map");
  }
}

template void fill_merge_source_cuda(const int32_t*, int64_t, int32_t*, int64_t, int, uintptr_t);
template void fill_merge_source_cuda(const int64_t*, int64_t, int32_t*, int64_t, int, uintptr_t);

}  // namespace tokenflex
