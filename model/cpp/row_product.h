// The product of a single row with a matrix in bf16, as a step of decoding for one client takes it: each weight is read
// once, so the memory bounds it, and what a library does around such a product weighs as much as the product.
//
// Weights lie as oneDNN lays them out for its own kernels (BA16a64b2a), so that they are there once: blocks of 64
// outputs one after the other, in each the inputs by pairs, in each pair the outputs, with both inputs side by side.
#pragma once
#include <cstdint>

#include "attention.h"

namespace lathe {

/// Outputs of a block; behind the last output there are zeros.
constexpr int64_t BLOCK = 64;
/// Inputs come in whole groups of this many.
constexpr int64_t INPUT_MULTIPLE = 32;

struct RowProduct {
  const BFloat16 *x, *weight;
  /// May be null.
  const BFloat16* bias;
  BFloat16* y;
  int64_t inputs, outputs;
};

#ifdef __x86_64__
/// The outputs of the blocks from `begin` to `end`. For processors with AVX512_BF16.
void row_product(const RowProduct& product, int64_t begin, int64_t end);
#endif

}  // namespace lathe
