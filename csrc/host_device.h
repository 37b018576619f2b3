#pragma once

// Marks functions that host and device share, so that the CPU tests exercise the very index
// arithmetic the kernels run; and loops of theirs to be unrolled. To a plain C++ compiler the marks are
// nothing.
#ifdef __CUDACC__
#define TOKENFLEX_HOST_DEVICE __host__ __device__
#define TOKENFLEX_UNROLL _Pragma("unroll")
#else
#define TOKENFLEX_HOST_DEVICE
#define TOKENFLEX_UNROLL
#endif
