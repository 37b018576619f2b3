// Sharing work between host threads. There is no pool to keep alive across a fork, so DataLoader workers
// may call this freely; but a thread costs tens of microseconds to start, so there are no more of them
// than have a megabyte each to move.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace tokenflex {

constexpr int64_t kBytesPerThread = 1 << 20;

// Into how many parts to divide `count` items that move `bytes` bytes in all, for at most `threads`.
inline int64_t worthwhile_parts(int64_t count, int64_t bytes, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>({threads, bytes / kBytesPerThread, count}));
}

// Joins on every way out: a std::thread that is destroyed unjoined ends the process, and the next
// thread may fail to start.
struct Workers {
  std::vector<std::thread> threads;
  ~Workers() {
    for (std::thread& thread : threads) thread.join();
  }
};

// Calls work(begin, end) for `parts` nearly equal ranges that make up [0, count), each on a thread of
// its own; the caller's thread takes the first. Returns when all are done.
template <class Work>
void in_parts(int64_t count, int64_t parts, const Work& work) {
  const auto part_begin = [&](int64_t part) { return count * part / parts; };
  Workers workers;
  workers.threads.reserve(size_t(parts - 1));
  for (int64_t part = 1; part < parts; ++part) {
    workers.threads.emplace_back(std::cref(work), part_begin(part), part_begin(part + 1));
  }
  work(0, part_begin(1));
}

}  // namespace tokenflex
