// Executes a CUDA kernel on the CPU, block after block, the threads of a block as fibers of one OS thread. What a GPU would leave undefined is an
// error here: threads of a block that do not meet at the same barrier, lanes of a warp that do not meet at the same exchange, a lane that reads from
// one that takes no part. Threads run in an order that changes from round to round, so that a missing barrier shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarpSize = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;

struct Site {
  const char* file;
  int line;
};

enum class WarpOp { kSync, kShuffle, kCollect };

// What a barrier tells every thread: how many there were, and how many came with a predicate that holds.
struct Vote {
  int threads, set;
};

// A `__shared__` variable of a kernel.
struct SharedVariable {
  unsigned char* data;
  size_t size;
};

// --- for the kernels' side of the headers
Vote wait_for_block(bool predicate, Site site);
// The 8 bytes that lane `source` of the warp brings.
uint64_t shuffle(unsigned mask, uint64_t bits, int source, Site site);
// The 8 bytes of every lane in `mask`, to `all` [32].
void collect(unsigned mask, uint64_t bits, uint64_t* all, Site site);
void wait_for_warp(unsigned mask, Site site);
// Poisons `to` at once and copies when the same thread waits.
void copy_async(void* to, const void* from, size_t size);
void wait_for_copies();
void yield();
int lane();
unsigned char* dynamic_shared();
[[noreturn]] void trap(const char* what, Site site);

// --- for the host's side
int launch(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes);
// What went wrong in the last launch that failed.
const char* last_error();
int64_t launches();
void set_shared_variables(std::vector<SharedVariable> variables);

}  // namespace emulator
