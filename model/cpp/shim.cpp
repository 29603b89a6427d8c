// The C++ shim over libtorch: what tch does not offer. Every function is `extern "C"`, lets no
// exception out, and leaves the reason of a failure in `lathe_last_error` of the calling thread.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_fused_adamw.h>
#include <torch/version.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <dlfcn.h>
#include <string>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "attention.h"

using at::Tensor;

namespace {
thread_local std::string last_error;

/// Runs `body`; on an exception records its message (without the C++ backtrace) and returns `fallback`.
template <class Result, class Body>
Result guarded(Result fallback, Body body) {
  last_error.clear();
  try {
    return body();
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown C++ exception";
  }
  if (last_error.empty()) last_error = "an exception without a message";
  return fallback;
}

std::vector<Tensor> list(Tensor* const* tensors, int64_t count) {
  std::vector<Tensor> result;
  result.reserve(count);
  for (int64_t i = 0; i < count; i++) result.push_back(*tensors[i]);
  return result;
}

/// The gradient of a parameter that no loss reached is zero.
std::vector<Tensor> gradients(const std::vector<Tensor>& parameters) {
  std::vector<Tensor> result;
  result.reserve(parameters.size());
  for (const auto& parameter : parameters)
    result.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter));
  return result;
}

/// Row i of the result is row `from[i]` of the input. The backward pass gathers with `back`, which
/// says for each input row where it went, and zeroes the input rows marked in `unused`: several times
/// faster than the scattered addition of `index_select`, and right because no row is read twice but
/// by results whose gradient is known to be zero.
struct MoveRows : torch::autograd::Function<MoveRows> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input, const Tensor& from,
                        const Tensor& back, const Tensor& unused) {
    context->save_for_backward({back, unused});
    return input.index_select(0, from);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradient) {
    auto saved = context->get_saved_variables();
    auto result = gradient[0].index_select(0, saved[0]);
    if (saved[1].numel() > 0) result.masked_fill_(saved[1], 0);
    return {result, Tensor(), Tensor(), Tensor()};
  }
};

/// The kernels for the instruction set that libtorch's own kernels use.
const lathe::Kernels& attention_kernels() {
#ifdef __x86_64__
  static const std::string name = at::get_cpu_capability();
  if (name.rfind("AVX512", 0) == 0) return lathe::attention_avx512;
  if (name.rfind("AVX2", 0) == 0) return lathe::attention_avx2;
#endif
  return lathe::attention_baseline;
}

template <class T>
T* elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

/// Causal attention within documents on the CPU. Queries and the result are (b, t, heads, d), keys and values
/// (b, t, groups, d), fp32 or bf16; `documents` is (n, 2): the first token (row * t + position) of each
/// and how many there are. Tokens of no document attend to nothing: their result and gradient is zero.
struct DocumentAttention : torch::autograd::Function<DocumentAttention> {
  /// Positions in steps of one, elements of a head side by side.
  static Tensor readable(const Tensor& x) {
    const bool is = x.stride(3) == 1 && (x.size(0) == 1 || x.stride(0) == x.size(1) * x.stride(1));
    return is ? x : x.contiguous();
  }

  template <class T>
  static lathe::Rows<T> rows(const Tensor& x, int64_t token, int64_t head) {
    auto* first = elements<std::remove_const_t<T>>(x);
    return {first + token * x.stride(1) + head * x.stride(2), x.stride(1), x.stride(2)};
  }

  template <class T>
  static lathe::Document<T> document(const Tensor& q, const Tensor& k, const Tensor& v, int64_t group,
                                     const int64_t* span) {
    const int64_t shared = q.size(2) / k.size(2), dim = q.size(3);
    return {span[1], dim, shared, float(1 / std::sqrt(double(dim))), rows<const T>(q, span[0], group * shared),
            rows<const T>(k, span[0], group), rows<const T>(v, span[0], group)};
  }

  /// Calls `run(group, span, scratch)` for every document and key head; threads get about the same work.
  template <class Run>
  static void each(const Tensor& documents, int64_t groups, int64_t dim, Run run) {
    const auto* spans = elements<int64_t>(documents);
    const int64_t count = documents.size(0);
    // What a document costs: products over half its square, and reading and writing it.
    std::vector<int64_t> costs(count + 1);
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t length = spans[2 * i + 1];
      longest = std::max(longest, length);
      costs[i + 1] = costs[i] + length * (length + 64);
    }
    const int64_t threads = at::get_num_threads(), total = costs[count] * groups;
    const auto border = [&](int64_t thread) {
      // Items are documents by key heads, the heads of a document in a row.
      const int64_t cost = total / threads * thread;
      const int64_t i = std::upper_bound(costs.begin(), costs.end(), cost / groups) - costs.begin() - 1;
      if (thread == threads || i >= count) return count * groups;
      return i * groups + (cost - costs[i] * groups) / (costs[i + 1] - costs[i]);
    };
    const auto scratch = at::empty({threads, attention_kernels().scratch_floats(longest, dim)}, at::kFloat);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      auto* own = elements<float>(scratch) + begin * scratch.stride(0);
      for (int64_t item = border(begin); item < border(end); item++)
        run(item % groups, spans + 2 * (item / groups), own);
    });
  }

  template <class T, class Kernel>
  static void attend(Kernel kernel, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                     const Tensor& out, const Tensor& log_sums) {
    const int64_t shared = q.size(2) / k.size(2), step = log_sums.size(1);
    each(documents, k.size(2), q.size(3), [&](int64_t group, const int64_t* span, float* scratch) {
      kernel(document<T>(q, k, v, group, span),
             lathe::Attended<T>{rows<T>(out, span[0], group * shared),
                                elements<float>(log_sums) + group * shared * step + span[0], step},
             scratch);
    });
  }

  template <class T, class Kernel>
  static void differentiate(Kernel kernel, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                            const Tensor& out, const Tensor& log_sums, const Tensor& gradient, const Tensor& dq,
                            const Tensor& dk, const Tensor& dv) {
    const int64_t shared = q.size(2) / k.size(2), step = log_sums.size(1);
    each(documents, k.size(2), q.size(3), [&](int64_t group, const int64_t* span, float* scratch) {
      kernel(document<T>(q, k, v, group, span),
             lathe::Gradients<T>{rows<const T>(out, span[0], group * shared),
                                 rows<const T>(gradient, span[0], group * shared),
                                 elements<float>(log_sums) + group * shared * step + span[0], step,
                                 rows<T>(dq, span[0], group * shared), rows<T>(dk, span[0], group),
                                 rows<T>(dv, span[0], group)},
             scratch);
    });
  }

  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& queries, const Tensor& keys,
                        const Tensor& values, const Tensor& documents) {
    const auto kind = queries.scalar_type();
    TORCH_CHECK(kind == at::kFloat || kind == at::kBFloat16, "attention over documents is for fp32 and bf16");
    TORCH_CHECK(keys.scalar_type() == kind && values.scalar_type() == kind, "queries, keys and values differ in type");
    const auto q = readable(queries), k = readable(keys), v = readable(values);
    auto out = at::zeros(q.sizes(), q.options());
    auto log_sums = at::empty({q.size(2), q.size(0) * q.size(1)}, q.options().dtype(at::kFloat));
    const auto& kernels = attention_kernels();
    if (kind == at::kFloat)
      attend<float>(kernels.forward, q, k, v, documents, out, log_sums);
    else
      attend<lathe::BFloat16>(kernels.forward_bf16, q, k, v, documents, out, log_sums);
    context->save_for_backward({q, k, v, documents, out, log_sums});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &documents = saved[3], &out = saved[4];
    const auto& log_sums = saved[5];
    const auto gradient = readable(gradients[0]);
    const auto zeros = [](const Tensor& like) { return at::zeros(like.sizes(), like.options()); };
    auto dq = zeros(q), dk = zeros(k), dv = zeros(v);
    const auto& kernels = attention_kernels();
    if (q.scalar_type() == at::kFloat)
      differentiate<float>(kernels.backward, q, k, v, documents, out, log_sums, gradient, dq, dk, dv);
    else
      differentiate<lathe::BFloat16>(kernels.backward_bf16, q, k, v, documents, out, log_sums, gradient, dq, dk, dv);
    return {dq, dk, dv, Tensor()};
  }
};

/// Philox4x32-10 (Salmon et al., SC 2011).
struct Philox {
  uint32_t key[2];

  void operator()(const uint32_t (&counter)[4], uint32_t (&out)[4]) const {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
      const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};
}  // namespace

extern "C" {
int lathe_shim_abi() { return 2; }

const char* lathe_last_error() { return last_error.c_str(); }

/// Keeps freed memory in the process: libtorch allocates and frees the same large blocks every step,
/// and returning them to the kernel costs more than the arithmetic of a small model.
void lathe_tune_malloc() {
#ifdef __GLIBC__
  mallopt(M_TRIM_THRESHOLD, INT32_MAX);
  mallopt(M_ARENA_MAX, 1);
  // Older glibc refuses more than half of an arena's largest heap.
  if (!mallopt(M_MMAP_THRESHOLD, INT32_MAX)) mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

int lathe_deterministic() {
  return guarded(0, [] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Filling fresh memory is for finding bugs, and costs a pass over every buffer.
    context.setDeterministicFillUninitializedMemory(false);
    context.setBenchmarkCuDNN(false);
    return 1;
  });
}

const char* lathe_instruction_set() {
  thread_local std::string name;
  return guarded<const char*>("unknown", [] {
    name = at::get_cpu_capability();
    return name.c_str();
  });
}

const char* lathe_libtorch_version() { return TORCH_VERSION; }

int lathe_dlopen(const char* path) {
  last_error.clear();
  if (dlopen(path, RTLD_NOW | RTLD_GLOBAL)) return 1;
  const char* reason = dlerror();
  last_error = reason ? reason : "dlopen failed";
  return 0;
}

/// Enters (`on`) or leaves bf16 autocast on this thread. The cache of casted weights is dropped on leaving.
int lathe_autocast(int cuda, int on) {
  return guarded(0, [=] {
    const auto device = cuda ? at::kCUDA : at::kCPU;
    if (on) {
      at::autocast::set_autocast_dtype(device, at::kBFloat16);
      at::autocast::set_autocast_enabled(device, true);
      at::autocast::set_autocast_cache_enabled(true);
      at::autocast::increment_nesting();
    } else {
      if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(device, false);
    }
    return 1;
  });
}

Tensor* lathe_move_rows(Tensor* input, Tensor* from, Tensor* back, Tensor* unused) {
  return guarded<Tensor*>(nullptr, [=] { return new Tensor(MoveRows::apply(*input, *from, *back, *unused)); });
}

Tensor* lathe_attend_documents(Tensor* queries, Tensor* keys, Tensor* values, Tensor* documents) {
  return guarded<Tensor*>(nullptr, [=] {
    return new Tensor(DocumentAttention::apply(*queries, *keys, *values, *documents));
  });
}

/// The norm over all gradients, one fp32 scalar on the parameters' device.
Tensor* lathe_gradient_norm(Tensor* const* parameters, int64_t count) {
  return guarded<Tensor*>(nullptr, [=] {
    at::NoGradGuard guard;
    return new Tensor(at::stack(at::_foreach_norm(gradients(list(parameters, count)), 2)).norm());
  });
}

int lathe_zero_gradients(Tensor* const* parameters, int64_t count) {
  return guarded(0, [=] {
    for (int64_t i = 0; i < count; i++) parameters[i]->mutable_grad() = Tensor();
    return 1;
  });
}

struct LatheAdamw {
  double learning_rate, beta1, beta2, weight_decay, eps;
};

/// One fused AdamW step. Gradients are divided by `grad_scale`; where `found_inf` is 1 nothing
/// changes, the step counters included. Neither is read on the host.
int lathe_adamw(Tensor* const* parameters, Tensor* const* averages, Tensor* const* squares, Tensor* const* steps,
                int64_t count, const LatheAdamw* options, Tensor* grad_scale, Tensor* found_inf) {
  return guarded(0, [=] {
    at::NoGradGuard guard;
    auto own = list(parameters, count), first = list(averages, count), second = list(squares, count);
    auto counters = list(steps, count);
    // The kernel undoes nothing: a skipped step must not count.
    at::_foreach_add_(counters, at::rsub(*found_inf, 1));
    auto grads = gradients(own);
    at::_fused_adamw_(own, grads, first, second, {}, counters, options->learning_rate, options->beta1, options->beta2,
                      options->weight_decay, options->eps, /*amsgrad=*/false, /*maximize=*/false, *grad_scale,
                      *found_inf);
    return 1;
  });
}

struct LatheDropout {
  uint64_t seed, step;
  uint32_t layer, site;
  double probability;
};

/// A dropout mask (rows, positions, width), fp32: 0 or 1/(1−p). An element is a pure function of
/// (seed, step, its row's global sequence index, layer, site, position × width + channel).
Tensor* lathe_dropout_mask(const uint64_t* sequences, int64_t rows, int64_t positions, int64_t width,
                           const LatheDropout* options) {
  return guarded<Tensor*>(nullptr, [=] {
    auto mask = at::empty({rows, positions, width}, at::kFloat);
    float* out = mask.data_ptr<float>();
    const Philox philox{{uint32_t(options->seed), uint32_t(options->seed >> 32)}};
    const float keep = float(1.0 / (1.0 - options->probability));
    const uint32_t threshold = uint32_t(std::min(options->probability * 4294967296.0, 4294967295.0));
    const int64_t elements = positions * width;
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const uint64_t sequence = sequences[row];
        const uint32_t place = (options->layer << 8 | (options->site & 0xff)) ^ uint32_t(sequence >> 32) * 0x9E3779B9u;
        for (int64_t element = 0; element < elements; element += 4) {
          uint32_t bits[4];
          philox({uint32_t(element / 4), uint32_t(sequence), uint32_t(options->step), place}, bits);
          for (int64_t i = 0; i < 4 && element + i < elements; i++)
            out[row * elements + element + i] = bits[i] < threshold ? 0.0f : keep;
        }
      }
    });
    return new Tensor(mask);
  });
}

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
}
