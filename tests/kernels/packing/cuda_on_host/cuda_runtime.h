// As much of CUDA as csrc/*.cu use, for a C++ compiler: a block's threads are threads of the host, and
// __syncthreads is a barrier that all of them reach, but those that returned. Blocks run one by one.
//
// A launch, kernel<<<grid, block, 0, stream>>>(arguments), is rewritten to a call of launch_on_host
// before it is compiled.
#pragma once

#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 blockIdx, threadIdx;
inline dim3 gridDim, blockDim;
inline thread_local std::barrier<>* block_barrier = nullptr;

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one by one, so that one copy is enough
#define __launch_bounds__(...)

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// Runs work() for each thread of each block. Threads of the host are started where the kernel has
// barriers; without them, the order of threads makes no difference, and one thread is faster.
template <class Work>
void launch_on_host(dim3 grid, dim3 block, bool has_barriers, const Work& work) {
  gridDim = grid;
  blockDim = block;
  const unsigned threads = block.x * block.y * block.z;
  const auto run = [&](unsigned thread, unsigned number) {
    blockIdx = dim3(number, 0, 0);
    threadIdx = dim3(thread % block.x, thread / block.x % block.y, thread / block.x / block.y);
    work();
  };
  if (!has_barriers) {
    for (unsigned number = 0; number < grid.x; ++number) {
      for (unsigned thread = 0; thread < threads; ++thread) run(thread, number);
    }
    return;
  }
  std::vector<std::unique_ptr<std::barrier<>>> barriers;
  for (unsigned i = 0; i < grid.x; ++i) barriers.push_back(std::make_unique<std::barrier<>>(threads));
  std::barrier<> next_block(threads);
  std::vector<std::thread> team;
  for (unsigned thread = 0; thread < threads; ++thread) {
    team.emplace_back([&, thread] {
      for (unsigned number = 0; number < grid.x; ++number) {
        block_barrier = barriers[number].get();
        run(thread, number);
        block_barrier->arrive_and_drop();
        next_block.arrive_and_wait();
      }
    });
  }
  for (auto& member : team) member.join();
}
