#pragma once

// Marks functions that host and device share, so that the CPU tests exercise the very index
// arithmetic the kernels run. To a plain C++ compiler the mark is nothing.
#ifdef __CUDACC__
#define TOKENFLEX_HOST_DEVICE __host__ __device__
#else
#define TOKENFLEX_HOST_DEVICE
#endif
