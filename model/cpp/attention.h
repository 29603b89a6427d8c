// Causal attention on the CPU, over the documents of a packed batch or over a cache of keys and values.
//
// Work and memory follow the documents: nothing is gathered or padded, and no mask exists. One call serves
// one document and the query heads that share one key head, so calls are independent of each other and
// their results do not depend on how they are spread over threads. Everything is computed in fp32,
// whatever the element type.
//
// The code is compiled once for every instruction set; a caller picks one. Nothing but this
// header may be included there: an inline function of a library that was compiled for a newer processor
// could be linked into the rest of the program.
#pragma once
#include <cstdint>

namespace lathe {

/// The bits of a bfloat16.
struct BFloat16 {
  uint16_t bits;
};

/// `length` rows of `dim` neighbouring elements for each of several heads. Steps count elements.
template <class T>
struct Rows {
  T* first;
  int64_t step;
  int64_t head_step;
};

/// The last `length` positions of a document, which are queries, and the `past` before them. Keys and values are
/// there of all. Query head h, query i: `queries.first + h * head_step + i * step`.
template <class T>
struct Document {
  int64_t past, length, dim;
  /// Query heads that share the key head.
  int64_t heads;
  float scale;
  Rows<const T> queries, keys, values;
};

/// `log_sums[h * log_sum_step + i]`: the logarithm of the sum of a query's exponentials. May be null.
template <class T>
struct Attended {
  Rows<T> outputs;
  float* log_sums;
  int64_t log_sum_step;
};

template <class T>
struct Gradients {
  Rows<const T> outputs, output_gradients;
  const float* log_sums;
  int64_t log_sum_step;
  Rows<T> queries, keys, values;
};

/// One instruction set's code. `scratch` has as many numbers as the pass takes and is written over. The backward
/// pass is for whole documents, without a past.
struct Kernels {
  int64_t (*forward_floats)(int64_t past, int64_t length, int64_t dim);
  int64_t (*backward_floats)(int64_t length, int64_t dim);
  void (*forward)(const Document<float>&, const Attended<float>&, float* scratch);
  void (*forward_bf16)(const Document<BFloat16>&, const Attended<BFloat16>&, float* scratch);
  void (*backward)(const Document<float>&, const Gradients<float>&, float* scratch);
  void (*backward_bf16)(const Document<BFloat16>&, const Gradients<BFloat16>&, float* scratch);
};

extern const Kernels attention_baseline;
#ifdef __x86_64__
extern const Kernels attention_avx2;
extern const Kernels attention_avx512;
#endif

}  // namespace lathe
