// Byte masks (0 or 1, as torch.bool lies in memory) beside sixteen-lane vectors.
#pragma once

#include "simd.h"

namespace fastppo::FASTPPO_ISA {

// Sixteen bytes as integers.
FASTPPO_INLINE vint load_bytes(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kRegisterBytes / 4)));  // as many elements as one register of integers
  typedef uint16_t Shorts __attribute__((vector_size(kRegisterBytes / 2)));
  vint lanes;
  for (int i = 0; i < vint::kParts; ++i) {
    Bytes bytes;
    std::memcpy(&bytes, p + i * sizeof bytes, sizeof bytes);
    // In two steps: GCC 12 takes one from bytes to integers apart into scalars.
    lanes.part[i] = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), vint::Register);
  }
  return lanes;
}

// All bits of a lane set where its byte is not 0.
FASTPPO_INLINE vint load_mask(const uint8_t* p) { return load_bytes(p) != 0; }

// The first `count` <= 16 bytes at p; the lanes beyond are false. A null pointer is a mask that leaves nothing out.
FASTPPO_INLINE vint load_mask(const uint8_t* p, int count) {
  if (p && count == kLanes) return load_mask(p);
  uint8_t bytes[kLanes] = {};
  if (p) std::memcpy(bytes, p, count);
  else std::memset(bytes, 1, count);
  return load_mask(bytes);
}

}  // namespace fastppo::FASTPPO_ISA
