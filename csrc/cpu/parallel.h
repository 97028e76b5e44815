// Loops over rows on torch's own OpenMP threads.
#pragma once

#include <cstdint>
#include <exception>

#include "simd.h"

namespace fastppo::FASTPPO_ISA {

// Calls body(first, last) on contiguous ranges of [0, count). Which rows share a thread never changes a result: a row belongs to one thread.
// What a body throws, std::bad_alloc say, is thrown here once all threads are done: out of a thread it would end the process.
// `threads` is torch.get_num_threads(); the extension links the libgomp that torch has loaded, so both use one pool.
template <class Body>
FASTPPO_INLINE void parallel_ranges(int64_t count, int threads, int64_t grain, const Body& body) {
  const int64_t useful = (count + grain - 1) / grain;
  const int workers = useful < threads ? static_cast<int>(useful) : threads;
  if (workers <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker) {
    try {
      body(count * worker / workers, count * (worker + 1) / workers);
    } catch (...) {
#pragma omp critical(fastppo_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastppo::FASTPPO_ISA
