// PyTorch's OpenMP team, called through the interface that GCC's runtime and LLVM's both have.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace tokenflex {
namespace {

#ifdef __APPLE__
constexpr const char* kTorchLibrary = "@rpath/libtorch_cpu.dylib";
#else
constexpr const char* kTorchLibrary = "libtorch_cpu.so";
#endif

std::atomic<bool> team_is_usable{true};

// Registered as the library is loaded: PyTorch may have started its team before we ever use it.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { team_is_usable = false; });

struct Team {
  void (*parallel)(void (*work)(void*), void* job, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
  int (*in_parallel)();

  bool complete() const { return parallel && thread_num && num_threads && in_parallel; }
};

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

// Looks through the libraries that PyTorch depends on; those of the process would include OpenMP
// runtimes of other packages.
Team find_team() {
  Team team = {};
  void* torch = dlopen(kTorchLibrary, RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return team;
  find(torch, "GOMP_parallel", team.parallel);
  find(torch, "omp_get_thread_num", team.thread_num);
  find(torch, "omp_get_num_threads", team.num_threads);
  find(torch, "omp_in_parallel", team.in_parallel);
  return team;
}

const Team* torch_team() {
  static const Team team = find_team();
  return team.complete() && team_is_usable ? &team : nullptr;
}

struct Job {
  int64_t count;
  int64_t parts;
  RangeWork work;
  const void* context;
  const Team* team;

  void run(int64_t part) const {
    work(context, count * part / parts, count * (part + 1) / parts);
  }
};

// Joins on every way out: a std::thread that is destroyed unjoined ends the process.
struct Workers {
  std::vector<std::thread> threads;
  ~Workers() {
    for (std::thread& thread : threads) thread.join();
  }
};

void run_in_threads(const Job& job) {
  Workers workers;
  workers.threads.reserve(size_t(job.parts - 1));
  int64_t part = 1;
  try {
    for (; part < job.parts; ++part) {
      workers.threads.emplace_back([&job, part] { job.run(part); });
    }
  } catch (const std::system_error&) {  // no more threads may be started
  }
  job.run(0);
  for (; part < job.parts; ++part) job.run(part);
}

// The team may have fewer threads than were asked for.
void run_member(void* context) {
  const Job& job = *static_cast<const Job*>(context);
  for (int64_t part = job.team->thread_num(); part < job.parts; part += job.team->num_threads()) {
    job.run(part);
  }
}

}  // namespace

void run_in_parts(int64_t count, int64_t parts, RangeWork work, const void* context) {
  const Team* team = torch_team();
  Job job = {count, parts, work, context, team};
  if (!team) return run_in_threads(job);
  if (team->in_parallel()) return work(context, 0, count);
  team->parallel(run_member, &job, unsigned(parts), 0);
}

bool has_torch_team() { return torch_team() != nullptr; }

void allow_torch_team(bool allowed) { team_is_usable = allowed; }

}  // namespace tokenflex
