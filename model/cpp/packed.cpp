// Products with weights that are laid out once, on libtorch's tensors.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "guard.h"
#include "row_product.h"

using at::Tensor;

#ifdef __x86_64__
// Exported by libtorch and declared in no header that it comes with; absent where it has no oneDNN.
namespace at::native {
__attribute__((weak)) void* data_ptr_from_mkldnn(const Tensor& tensor);
__attribute__((weak)) int64_t nbytes_from_mkldnn(const Tensor& tensor);
}  // namespace at::native

namespace {
int64_t blocks(int64_t outputs) { return (outputs + lathe::BLOCK - 1) / lathe::BLOCK; }

const lathe::BFloat16* elements(const Tensor& tensor) { return static_cast<const lathe::BFloat16*>(tensor.data_ptr()); }

const lathe::BFloat16* packed_elements(const Tensor& packed) {
  return static_cast<const lathe::BFloat16*>(at::native::data_ptr_from_mkldnn(packed));
}

bool has_row_kernel() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && at::get_cpu_capability().rfind("AVX512", 0) == 0 &&
                          at::native::data_ptr_from_mkldnn && at::native::nbytes_from_mkldnn;
  return has;
}

/// Whether every number of the weight stands where row_product.h says: oneDNN promises no layout.
bool lies_in_blocks(const Tensor& weight, const Tensor& packed) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), bytes = blocks(outputs) * lathe::BLOCK * inputs * 2;
  if (at::native::nbytes_from_mkldnn(packed) != bytes) return false;
  const auto plain = weight.contiguous();
  const auto *from = elements(plain), *to = packed_elements(packed);
  std::atomic<bool> equal{true};
  at::parallel_for(0, blocks(outputs), 1, [&](int64_t begin, int64_t end) {
    for (int64_t output = begin * lathe::BLOCK; output < std::min(end * lathe::BLOCK, outputs) && equal; output++) {
      const auto *row = from + output * inputs,
                 *column = to + output / lathe::BLOCK * lathe::BLOCK * inputs + output % lathe::BLOCK * 2;
      for (int64_t i = 0; i < inputs; i++)
        if (row[i].bits != column[i / 2 * 2 * lathe::BLOCK + i % 2].bits) equal = false;
    }
  });
  return equal;
}
}  // namespace
#endif

extern "C" {
/// A weight (outputs, inputs) laid out for oneDNN's kernels, which libtorch's own product does anew
/// in every call. Fails where oneDNN cannot have its type here.
Tensor* lathe_pack_weight(const Tensor* weight) {
  return guarded<Tensor*>(nullptr, [=] {
    static const auto pack = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_reorder_linear_weight", "");
    std::vector<c10::IValue> stack{*weight, c10::IValue()};
    pack.callBoxed(stack);
    return new Tensor(stack[0].toTensor());
  });
}

/// `x W^T + b` with a weight of `lathe_pack_weight`, and GELU (tanh) of it if `gelu`. `bias` may be null.
Tensor* lathe_packed_linear(const Tensor* x, const Tensor* packed, const Tensor* bias, int gelu) {
  return guarded<Tensor*>(nullptr, [=] {
    static const auto product = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
    static const c10::IValue plain("none"), none(""), activated("gelu"), tanh("tanh");
    static const c10::IValue scalars(c10::List<std::optional<at::Scalar>>{});
    std::vector<c10::IValue> stack{*x, *packed, bias ? c10::IValue(*bias) : c10::IValue(), gelu ? activated : plain,
                                   scalars, gelu ? tanh : none};
    product.callBoxed(stack);
    return new Tensor(stack[0].toTensor());
  });
}

/// Whether `lathe_row_product` can take what `lathe_pack_weight` has made of this weight.
int lathe_is_for_rows(const Tensor* weight, const Tensor* packed) {
#ifdef __x86_64__
  return guarded(0, [=] {
    const bool fits = has_row_kernel() && weight->scalar_type() == at::kBFloat16 && weight->size(1) % lathe::INPUT_MULTIPLE == 0;
    return int(fits && lies_in_blocks(*weight, *packed));
  });
#else
  return 0;
#endif
}

/// `x W^T + b` of a single row (inputs) in bf16, shaped (1, outputs). `bias` may be null. Only for what `lathe_is_for_rows`
/// has said yes to.
Tensor* lathe_row_product(const Tensor* x, const Tensor* packed, const Tensor* bias, int64_t outputs) {
  return guarded<Tensor*>(nullptr, [=] {
#ifdef __x86_64__
    const auto row = x->contiguous();
    const int64_t inputs = row.numel(), bytes = blocks(outputs) * lathe::BLOCK * inputs * 2;
    TORCH_CHECK(has_row_kernel() && row.scalar_type() == at::kBFloat16 && at::native::nbytes_from_mkldnn(*packed) == bytes,
                "a row of ", inputs, " does not go with this weight");
    TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() && bias->numel() == outputs),
                "the bias is not one of ", outputs);
    auto y = at::empty({1, outputs}, row.options());
    const lathe::RowProduct product{elements(row), packed_elements(*packed), bias ? elements(*bias) : nullptr,
                                    static_cast<lathe::BFloat16*>(y.data_ptr()), inputs, outputs};
    at::parallel_for(0, blocks(outputs), 1, [&](int64_t begin, int64_t end) { lathe::row_product(product, begin, end); });
    return new Tensor(y);
#else
    TORCH_CHECK(false, "there is no kernel for single rows here");
    return static_cast<Tensor*>(nullptr);
#endif
  });
}
}
