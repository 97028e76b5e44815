// Offsets of packed sequences are checked before any kernel follows them into memory.
#include "../ops.h"

namespace fastppo::FASTPPO_ISA {

int64_t first_bad_offset(const int64_t* offsets, int64_t count, int64_t tokens) {
  if (offsets[0] != 0) return 0;
  for (int64_t i = 1; i <= count; ++i)
    if (offsets[i] < offsets[i - 1] || offsets[i] > tokens) return i;
  return offsets[count] == tokens ? -1 : count;
}

}  // namespace fastppo::FASTPPO_ISA
