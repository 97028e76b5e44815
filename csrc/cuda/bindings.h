#pragma once

#include <pybind11/pybind11.h>

namespace fastppo {

// Makes the submodule `cuda` of m, with the names of the CPU functions and a stream in place of the threads.
void bind_cuda(pybind11::module_& m);

}  // namespace fastppo
