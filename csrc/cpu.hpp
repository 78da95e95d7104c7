// Which instruction sets this processor and its operating system run.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace specache {

// Slowest first; the first is always "generic".
std::vector<const Kernels*> available_kernels();

}  // namespace specache
