// Sequences of tokens shared out among threads: whole sequences, about as many tokens to each thread.
#pragma once

#include <algorithm>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {

// The first sequence that begins at or after flat position `token`.
FASTPPO_INLINE int64_t first_sequence_from(const Sequences& sequences, int64_t token) {
  if (!sequences.offsets) return (token + sequences.length - 1) / sequences.length;
  return std::lower_bound(sequences.offsets, sequences.offsets + sequences.count, token) - sequences.offsets;
}

// Calls body(first, last) on ranges of sequences that together cover every token; `grain` tokens are worth a thread.
template <class Body>
FASTPPO_INLINE void parallel_sequences(const Sequences& sequences, int threads, int64_t grain, const Body& body) {
  parallel_ranges(sequences.tokens(), threads, grain, [&](int64_t first_token, int64_t last_token) {
    const int64_t first = first_sequence_from(sequences, first_token), last = first_sequence_from(sequences, last_token);
    if (first < last) body(first, last);
  });
}

}  // namespace fastppo::FASTPPO_ISA
