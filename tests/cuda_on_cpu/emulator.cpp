#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define NO_SANITIZE __attribute__((no_sanitize("address")))
#else
#define NO_SANITIZE
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer to *from, and goes on where `to` was saved. ucontext does it too, with two system calls.
asm(R"(
.pushsection .text
.globl fastppo_emulator_switch
.hidden fastppo_emulator_switch
.type fastppo_emulator_switch, @function
fastppo_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastppo_emulator_switch, .-fastppo_emulator_switch
.popsection
)");
extern "C" void fastppo_emulator_switch(void** from, void* to);
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedAlignment = 128;
constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure

// Where a fiber, or the scheduler, goes on.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

void switch_contexts(Context& from, Context& to, bool from_ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  fastppo_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Thread {
  Context context;
  unsigned char* stack;
  State state;
  dim3 index;
  Site site;
  bool predicate;
  WarpOp op;
  unsigned mask;
  int source;
  uint64_t bits, result;
  uint64_t* all;
  std::vector<Copy> copies;
};

struct Failure {
  std::string what;
};

std::mutex one_launch;
std::string error_text;
int64_t launch_count = 0;
std::vector<SharedVariable> shared_variables;

Context scheduler;
std::vector<Thread> pool;  // [kMaxThreads], made at the first launch
int thread_count = 0, current = -1;
Vote vote;
const std::function<void()>* body = nullptr;
unsigned char* dynamic_memory = nullptr;
std::string trapped;

std::string name(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void suspend(bool ends = false) { switch_contexts(pool[current].context, scheduler, ends); }

// The first frame of a fiber. It never returns: what it left on its stack is overwritten by the next block's.
NO_SANITIZE void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  (*body)();
  pool[current].state = State::kDone;
  suspend(true);
}

void make_pool() {
  pool.resize(kMaxThreads);
  for (Thread& thread : pool) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kGuardBytes, PROT_NONE);
    thread.stack = static_cast<unsigned char*>(memory) + kGuardBytes;
  }
}

NO_SANITIZE void prepare(Thread& thread) {
  thread.context = {};
  thread.context.bottom = thread.stack;
  thread.context.size = kStackBytes;
  thread.state = State::kReady;
#if defined(__x86_64__)
  // Six registers, the address that `ret` takes, and the return address that `enter` expects above it: the stack is aligned as after a call.
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&enter);
  thread.context.stack_pointer = top;
#else
  getcontext(&thread.context.context);
  thread.context.context.uc_stack.ss_sp = thread.stack;
  thread.context.context.uc_stack.ss_size = kStackBytes;
  makecontext(&thread.context.context, enter, 0);
#endif
}

void run(int index) {
  current = index;
  threadIdx = pool[index].index;
  switch_contexts(scheduler, pool[index].context, false);
  current = -1;
  if (!trapped.empty()) throw Failure{trapped};
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// All lanes that the mask names wait here: gives each its result and lets it go on.
bool complete_warp(int first_thread, Thread& asking) {
  Thread* lanes = &pool[first_thread];
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(asking.mask >> i & 1)) continue;
    const Thread& lane = lanes[i];
    if (lane.state != State::kAtWarp || lane.op != asking.op || lane.mask != asking.mask || !same(lane.site, asking.site)) return false;
  }
  uint64_t brought[kWarpSize] = {};
  for (int i = 0; i < kWarpSize; ++i)
    if (asking.mask >> i & 1) brought[i] = lanes[i].bits;
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(asking.mask >> i & 1)) continue;
    Thread& lane = lanes[i];
    if (lane.op == WarpOp::kShuffle && !(lane.mask >> lane.source & 1))
      throw Failure{"lane " + std::to_string(i) + " reads from lane " + std::to_string(lane.source) + ", which takes no part, at " + name(lane.site)};
    if (lane.op == WarpOp::kShuffle) lane.result = brought[lane.source];
    if (lane.op == WarpOp::kCollect) std::memcpy(lane.all, brought, sizeof brought);
    lane.state = State::kReady;
  }
  return true;
}

bool complete_barrier() {
  vote = {0, 0};
  for (int i = 0; i < thread_count; ++i) {
    if (pool[i].state != State::kAtBarrier || !same(pool[i].site, pool[0].site)) return false;
    ++vote.threads;
    vote.set += pool[i].predicate;
  }
  for (int i = 0; i < thread_count; ++i) pool[i].state = State::kReady;
  return true;
}

// What each thread waits for, when none can go on: one line for all that wait at the same place.
std::string describe_deadlock() {
  std::string text = "threads of a block do not meet:";
  std::vector<std::pair<std::string, std::pair<int, int>>> groups;  // place, (first thread, how many)
  for (int i = 0; i < thread_count; ++i) {
    const Thread& thread = pool[i];
    std::string place = thread.state == State::kDone ? "has exited" : thread.state == State::kAtBarrier ? "waits for the block at " : "waits for its warp at ";
    if (thread.state != State::kDone) place += name(thread.site);
    if (groups.empty() || groups.back().first != place) groups.push_back({place, {i, 0}});
    ++groups.back().second.second;
  }
  for (size_t g = 0; g < groups.size() && g < 8; ++g)
    text += (g ? "; " : " ") + std::to_string(groups[g].second.second) + " from thread " + std::to_string(groups[g].second.first) + ": " + groups[g].first;
  return text;
}

uint64_t mixed(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ x >> 33;
}

void run_block(uint64_t seed) {
  for (const SharedVariable& variable : shared_variables) std::memset(variable.data, 0xff, variable.size);
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = pool[i];
    prepare(thread);
    thread.copies.clear();
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  }
  for (uint64_t round = 0;; ++round) {
    // Onwards or backwards from anywhere.
    const uint64_t order = mixed(seed + round);
    const int start = static_cast<int>((order >> 1) % thread_count);
    int done = 0;
    bool progress = false;
    for (int k = 0; k < thread_count; ++k) {
      const int i = order & 1 ? (start + k) % thread_count : (start + thread_count - k) % thread_count;
      Thread& thread = pool[i];
      if (thread.state == State::kReady) run(i), progress = true;
      if (thread.state == State::kAtWarp) progress |= complete_warp(i / kWarpSize * kWarpSize, thread);
      done += thread.state == State::kDone;
    }
    if (done == thread_count) return;
    if (!progress && !complete_barrier()) throw Failure{describe_deadlock()};
  }
}

Thread& wait(State state, Site site) {
  Thread& thread = pool[current];
  thread.site = site;
  thread.state = state;
  suspend();
  return thread;
}

Thread& wait_at_warp(WarpOp op, unsigned mask, uint64_t bits, int source, uint64_t* all, Site site) {
  Thread& thread = pool[current];
  if (!(mask >> lane() & 1)) trap("a lane that its mask does not name takes part", site);
  thread.op = op, thread.mask = mask, thread.bits = bits, thread.source = source, thread.all = all;
  return wait(State::kAtWarp, site);
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  size_t used = shared_bytes;
  if (threads == 0 || threads > kMaxThreads || threads % kWarpSize) throw Failure{"a block of " + std::to_string(threads) + " threads"};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Failure{"a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z)};
  if (used > kMaxSharedBytes) throw Failure{std::to_string(used) + " bytes of shared memory"};
}

// The fibers of a launch that failed never left their frames.
void forget_frames() {
#ifdef __SANITIZE_ADDRESS__
  for (const Thread& thread : pool) __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  check_launch(grid, block, shared_bytes);
  if (pool.empty()) make_pool();
  gridDim = grid, blockDim = block;
  thread_count = static_cast<int>(block.x * block.y * block.z);
  trapped.clear();
  // On the heap at its exact size: AddressSanitizer sees what reaches past it.
  void* allocated = nullptr;
  if (posix_memalign(&allocated, kSharedAlignment, shared_bytes)) throw Failure{"no memory"};
  const std::unique_ptr<void, void (*)(void*)> memory(allocated, std::free);
  dynamic_memory = static_cast<unsigned char*>(allocated);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(dynamic_memory, 0xff, shared_bytes);
        run_block(mixed(launch_count) + x + uint64_t{y} * grid.x + uint64_t{z} * grid.x * grid.y);
      }
}

}  // namespace

Vote wait_for_block(bool predicate, Site site) {
  pool[current].predicate = predicate;
  wait(State::kAtBarrier, site);
  return vote;
}

uint64_t shuffle(unsigned mask, uint64_t bits, int source, Site site) {
  return wait_at_warp(WarpOp::kShuffle, mask, bits, source, nullptr, site).result;
}

void collect(unsigned mask, uint64_t bits, uint64_t* all, Site site) { wait_at_warp(WarpOp::kCollect, mask, bits, 0, all, site); }

void wait_for_warp(unsigned mask, Site site) { wait_at_warp(WarpOp::kSync, mask, 0, 0, nullptr, site); }

void copy_async(void* to, const void* from, size_t size) {
  std::memset(to, 0xff, size);
  pool[current].copies.push_back({to, from, size});
}

void wait_for_copies() {
  for (const Copy& copy : pool[current].copies) std::memcpy(copy.to, copy.from, copy.size);
  pool[current].copies.clear();
}

void yield() { wait(State::kReady, {}); }

int lane() { return current % kWarpSize; }

unsigned char* dynamic_shared() { return dynamic_memory; }

void trap(const char* what, Site site) {
  trapped = std::string(what) + " at " + name(site);
  for (;;) suspend();
}

int launch(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++launch_count;
  body = &kernel;
  try {
    run_grid(grid, block, shared_bytes);
  } catch (const Failure& failure) {
    error_text = failure.what;
    forget_frames();
    return kLaunchFailure;
  }
  return 0;
}

const char* last_error() { return error_text.c_str(); }

int64_t launches() { return launch_count; }

void set_shared_variables(std::vector<SharedVariable> variables) { shared_variables = std::move(variables); }

}  // namespace emulator
