// Kernels with one fault each, which the emulator must notice, and one without.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/launch.h"

namespace py = pybind11;

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 64;

// out[i] = sum of all i of the block, and what dynamic shared memory held.
__global__ void sound_kernel(float* out) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float other = values[kThreads - 1 - threadIdx.x];
  out[threadIdx.x] = block_reduce<kThreads>(other, Add{});
}

__global__ void missing_barrier_kernel(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void uninitialised_shared_kernel(float* out) {
  float* values = dynamic_shared<float>();
  __shared__ float fixed[kThreads];
  if (threadIdx.x < kThreads / 2) fixed[threadIdx.x] = values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = threadIdx.x % 2 ? values[threadIdx.x] : fixed[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void different_barriers_kernel(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (threadIdx.x % 32 != 5) out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
}

__global__ void absent_source_kernel(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void beyond_the_tensor_kernel(float* out) { out[threadIdx.x + 1] = 0; }

__global__ void beyond_shared_kernel(float* out) {
  __shared__ float values[kThreads];
  volatile int i = threadIdx.x + 1;
  values[i] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void beyond_dynamic_shared_kernel(float* out) {
  dynamic_shared<float>()[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}

__global__ void misaligned_kernel(float* out) { *reinterpret_cast<float2*>(out + 1) = make_float2(1, 2); }

void run(const std::string& name, uintptr_t out) {
  void (*kernel)(float*) = name == "sound"                   ? sound_kernel
                           : name == "missing_barrier"       ? missing_barrier_kernel
                           : name == "uninitialised_shared"  ? uninitialised_shared_kernel
                           : name == "divergent_barrier"     ? divergent_barrier_kernel
                           : name == "different_barriers"    ? different_barriers_kernel
                           : name == "divergent_shuffle"     ? divergent_shuffle_kernel
                           : name == "absent_source"         ? absent_source_kernel
                           : name == "beyond_the_tensor"     ? beyond_the_tensor_kernel
                           : name == "beyond_shared"         ? beyond_shared_kernel
                           : name == "beyond_dynamic_shared" ? beyond_dynamic_shared_kernel
                           : name == "misaligned"            ? misaligned_kernel
                                                             : nullptr;
  if (!kernel) throw std::invalid_argument(name);
  const cudaError_t error = launch(kernel, 1, kThreads, kThreads * sizeof(float), nullptr, reinterpret_cast<float*>(out));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace
}  // namespace fastppo::cuda

namespace emulator_faults {

void bind(py::module_& m) { m.def("fault", &fastppo::cuda::run); }

}  // namespace emulator_faults
