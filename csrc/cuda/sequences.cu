// Offsets of packed sequences are checked on the device, before any kernel follows them into memory.
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 512;

// out [count + 1]: the offsets, or kBadOffset everywhere when any is wrong. One block: all of them decide.
template <class Offset>
__global__ void __launch_bounds__(kThreads) check_offsets_kernel(const Offset* __restrict__ offsets, int64_t count, int64_t tokens, int64_t* __restrict__ out) {
  bool bad = false;
  for (int64_t i = threadIdx.x; i <= count; i += kThreads) {
    const int64_t offset = offsets[i], previous = i > 0 ? offsets[i - 1] : 0;
    bad |= offset < previous || offset > tokens || (i == 0 && offset != 0) || (i == count && offset != tokens);
  }
  bad = __syncthreads_or(bad);
  for (int64_t i = threadIdx.x; i <= count; i += kThreads) out[i] = bad ? kBadOffset : static_cast<int64_t>(offsets[i]);
}

}  // namespace

cudaError_t check_offsets(const void* offsets, bool are_int64, int64_t count, int64_t tokens, int64_t* out, cudaStream_t stream) {
  if (are_int64) return launch(check_offsets_kernel<int64_t>, 1, kThreads, 0, stream, static_cast<const int64_t*>(offsets), count, tokens, out);
  return launch(check_offsets_kernel<int32_t>, 1, kThreads, 0, stream, static_cast<const int32_t*>(offsets), count, tokens, out);
}

}  // namespace fastppo::cuda
