// How a kernel is started: `<<<>>>` under nvcc, the emulator of tests/cuda_on_cpu elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastppo::cuda {

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

// Enqueues kernel(args...) on the stream; an empty grid is no error and no launch. `shared_bytes` is what dynamic_shared() holds.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
#else
  return static_cast<cudaError_t>(emulator::launch([&] { kernel(arguments...); }, grid, block, shared_bytes));
#endif
}

// Blocks of `per_block` items each that cover `count`.
inline unsigned blocks_for(int64_t count, int64_t per_block) { return static_cast<unsigned>((count + per_block - 1) / per_block); }

}  // namespace fastppo::cuda
