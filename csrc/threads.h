// Sharing work between host threads.
//
// The threads are those of PyTorch's own OpenMP team, if the process has one: a second team would
// compete with it for the same cores, because its threads spin for a while after each parallel region.
// The runtime is found when it is first needed, so that neither building nor linking needs torch.
// Elsewhere, and in a forked process, whose team is gone, threads are started for the call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tokenflex {

constexpr int64_t kBytesPerThread = 1 << 18;  // some tens of microseconds, to wake a thread takes five

// Into how many parts to divide `count` items that move `bytes` bytes in all, for at most `threads`.
inline int64_t worthwhile_parts(int64_t count, int64_t bytes, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>({threads, bytes / kBytesPerThread, count}));
}

// Calls work(context, begin, end) for `parts` nearly equal ranges that make up [0, count), and returns
// when all are done. Within a parallel region of the team's, one thread does them all.
// `work` must not throw.
using RangeWork = void (*)(const void* context, int64_t begin, int64_t end);
void run_in_parts(int64_t count, int64_t parts, RangeWork work, const void* context);

// The same for a callable work(begin, end).
template <class Work>
void in_parts(int64_t count, int64_t parts, const Work& work) {
  if (parts <= 1) return work(0, count);
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Work*>(context))(begin, end);
  };
  run_in_parts(count, parts, call, &work);
}

// Whether PyTorch's team does the work here. For tests, and for ThreadSanitizer, which knows nothing of
// OpenMP: `allow_torch_team(false)` starts threads for each call.
bool has_torch_team();
void allow_torch_team(bool allowed);

}  // namespace tokenflex
