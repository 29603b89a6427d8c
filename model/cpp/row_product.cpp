// See row_product.h. Sums are fp32 numbers, rounded to bf16 once the bias is added.
#include "row_product.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace lathe {

void row_product(const RowProduct& product, int64_t begin, int64_t end) {
  constexpr int VECTORS = BLOCK / 16;
  const auto pair_of = [](const BFloat16* at) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(at)); };
  for (int64_t block = begin; block < end; block++) {
    const BFloat16* weight = product.weight + block * BLOCK * product.inputs;
    // Two sums of each output, for a sum waits for the one before it.
    __m512 sums[2][VECTORS] = {};
    for (int64_t input = 0; input < product.inputs; input += 4) {
      for (int pair = 0; pair < 2; pair++, weight += 2 * BLOCK) {
        const __m512bh x = pair_of(product.x + input + 2 * pair);
        for (int i = 0; i < VECTORS; i++)
          sums[pair][i] = _mm512_dpbf16_ps(sums[pair][i], x, (__m512bh)_mm512_loadu_si512(weight + 32 * i));
      }
    }
    for (int i = 0; i < VECTORS; i++) {
      const int64_t first = block * BLOCK + 16 * i, left = product.outputs - first;
      const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
      __m512 sum = _mm512_add_ps(sums[0][i], sums[1][i]);
      if (product.bias) {
        const __m512i bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, product.bias + first));
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(bias, 16)));
      }
      _mm256_mask_storeu_epi16(product.y + first, there, (__m256i)_mm512_cvtneps_pbh(sum));
    }
  }
}

}  // namespace lathe
#endif
