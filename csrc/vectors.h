// Loops that become vector instructions on every CPU, from one build.
//
// A function that is marked TOKENFLEX_VERSIONS is compiled for each level of x86-64, and the loader takes
// the highest that the CPU has. What it calls must be TOKENFLEX_INLINE: a function that is not inlined
// stays at the lowest level. Other processors have vectors at their lowest level already, and sanitizers
// cannot run the loader's choice.
#pragma once

#include <cstdint>  // and with it __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TOKENFLEX_VERSIONS                                                               \
  __attribute__((target_clones("default", "arch=x86-64-v2", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TOKENFLEX_VERSIONS
#endif
#define TOKENFLEX_INLINE inline __attribute__((always_inline))
