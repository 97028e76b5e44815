// The CUDA kernels of csrc/cuda, executed by the emulator, as a Python module with the same submodule `cuda` as fastppo._C.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "../../csrc/cuda/bindings.h"
#include "emulator.h"

namespace py = pybind11;

namespace {

// (offset in this library, size) of each `__shared__` variable, as build.py reads them from its symbols.
void set_shared_variables(const std::vector<std::pair<uintptr_t, size_t>>& symbols) {
  Dl_info library;
  dladdr(reinterpret_cast<void*>(&set_shared_variables), &library);
  std::vector<emulator::SharedVariable> variables;
  for (const auto& [offset, size] : symbols) variables.push_back({static_cast<unsigned char*>(library.dli_fbase) + offset, size});
  emulator::set_shared_variables(std::move(variables));
}

}  // namespace

namespace emulator_faults {
void bind(py::module_& m);
}

PYBIND11_MODULE(fastppo_cuda_on_cpu, m) {
  fastppo::bind_cuda(m);
  emulator_faults::bind(m);
  m.def("set_shared_variables", &set_shared_variables);
  m.def("launches", &emulator::launches);
}
