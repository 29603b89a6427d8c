// Attention's kernels on libtorch's tensors: over the documents of a batch, with their gradient, and over a
// cache of keys and values.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "guard.h"

using at::Tensor;

namespace {
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

void check_kinds(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto kind = q.scalar_type();
  TORCH_CHECK(kind == at::kFloat || kind == at::kBFloat16, "attention on the CPU is for fp32 and bf16");
  TORCH_CHECK(k.scalar_type() == kind && v.scalar_type() == kind, "queries, keys and values differ in type");
}

float scale(int64_t dim) { return float(1 / std::sqrt(double(dim))); }

/// Below this cost all of it takes less time than to wake a thread.
constexpr int64_t SHARED_FROM = 4096;

/// Calls `run(piece, group, scratch)` for every piece and every key head; threads get about the same work. A
/// piece's `costs` are those of one head.
template <class Run>
void each(const std::vector<int64_t>& costs, int64_t groups, int64_t scratch_floats, Run run) {
  const int64_t count = costs.size();
  std::vector<int64_t> before(count + 1);
  for (int64_t i = 0; i < count; i++) before[i + 1] = before[i] + costs[i];
  const int64_t total = before[count] * groups, threads = total < SHARED_FROM ? 1 : at::get_num_threads();
  const auto border = [&](int64_t thread) {
    // Items are pieces by key heads, the heads of a piece in a row.
    const int64_t cost = total / threads * thread;
    const int64_t i = std::upper_bound(before.begin(), before.end(), cost / groups) - before.begin() - 1;
    if (thread == threads || i >= count) return count * groups;
    return i * groups + (cost - before[i] * groups) / costs[i];
  };
  const auto scratch = at::empty({threads, scratch_floats}, at::kFloat);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto* own = elements<float>(scratch) + begin * scratch.stride(0);
    for (int64_t item = border(begin); item < border(end); item++) run(item / groups, item % groups, own);
  });
}

/// What a query costs beside its keys, in keys: reading and writing it.
constexpr int64_t QUERY_COST = 64;

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
    return {0, span[1], dim, shared, scale(dim), rows<const T>(q, span[0], group * shared),
            rows<const T>(k, span[0], group), rows<const T>(v, span[0], group)};
  }

  /// Calls `run(group, span, scratch)` for every document and key head. `floats` says what a length takes.
  template <class Floats, class Run>
  static void each_document(const Tensor& documents, int64_t groups, Floats floats, Run run) {
    const auto* spans = elements<int64_t>(documents);
    std::vector<int64_t> costs(documents.size(0));
    int64_t longest = 0;
    for (size_t i = 0; i < costs.size(); i++) {
      const int64_t length = spans[2 * i + 1];
      longest = std::max(longest, length);
      costs[i] = length * (length + QUERY_COST);
    }
    each(costs, groups, floats(longest),
         [&](int64_t piece, int64_t group, float* scratch) { run(group, spans + 2 * piece, scratch); });
  }

  template <class T, class Kernel>
  static void attend(Kernel kernel, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                     const Tensor& out, const Tensor& log_sums) {
    const int64_t shared = q.size(2) / k.size(2), step = log_sums.size(1);
    const auto floats = [&](int64_t length) { return attention_kernels().forward_floats(0, length, q.size(3)); };
    each_document(documents, k.size(2), floats, [&](int64_t group, const int64_t* span, float* scratch) {
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
    const auto floats = [&](int64_t length) { return attention_kernels().backward_floats(length, q.size(3)); };
    each_document(documents, k.size(2), floats, [&](int64_t group, const int64_t* span, float* scratch) {
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
    check_kinds(queries, keys, values);
    const auto q = readable(queries), k = readable(keys), v = readable(values);
    auto out = at::zeros(q.sizes(), q.options());
    auto log_sums = at::empty({q.size(2), q.size(0) * q.size(1)}, q.options().dtype(at::kFloat));
    const auto& kernels = attention_kernels();
    if (q.scalar_type() == at::kFloat)
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

/// `length` tokens of a pass from `token` on: one sequence's, from position `start` on.
struct Span {
  int64_t token, length, slot, start;
};

/// The new tokens' keys and values are put into the cache, and each attends to all before it there.
struct CachedAttention {
  /// (t, heads, d); (t, groups, d); (slots, groups, capacity, d).
  const Tensor &q, &k, &v, &cached_keys, &cached_values, &out;

  /// One head's rows from a token or a position on.
  template <class T>
  static lathe::Rows<T> rows(const Tensor& x, int64_t token, int64_t head) {
    auto* first = elements<std::remove_const_t<T>>(x);
    return {first + token * x.stride(0) + head * x.stride(1), x.stride(0), x.stride(1)};
  }

  template <class T>
  static T* cached(const Tensor& cache, const Span& span, int64_t group) {
    return elements<T>(cache) + span.slot * cache.stride(0) + group * cache.stride(1);
  }

  template <class T>
  static void put(const Tensor& from, const Span& span, int64_t group, T* to) {
    const auto source = rows<const T>(from, span.token, group);
    const int64_t dim = from.size(2);
    for (int64_t i = 0; i < span.length; i++)
      std::memcpy(to + (span.start + i) * dim, source.first + i * source.step, dim * sizeof(T));
  }

  template <class T, class Kernel>
  void attend(Kernel kernel, const std::vector<Span>& spans) const {
    const int64_t groups = k.size(1), dim = q.size(2), shared = q.size(1) / groups;
    std::vector<int64_t> costs;
    int64_t floats = 0;
    for (const auto& [token, length, slot, start] : spans) {
      costs.push_back(length * (start + length + QUERY_COST));
      floats = std::max(floats, attention_kernels().forward_floats(start, length, dim));
    }
    each(costs, groups, floats, [&](int64_t piece, int64_t group, float* scratch) {
      const auto& span = spans[piece];
      auto *keys = cached<T>(cached_keys, span, group), *values = cached<T>(cached_values, span, group);
      put(k, span, group, keys);
      put(v, span, group, values);
      kernel(lathe::Document<T>{span.start, span.length, dim, shared, scale(dim),
                                rows<const T>(q, span.token, group * shared), {keys, dim, 0}, {values, dim, 0}},
             lathe::Attended<T>{rows<T>(out, span.token, group * shared), nullptr, 0}, scratch);
    });
  }
};

/// What the kernel reads and writes without looking must be there.
void check_spans(const std::vector<Span>& spans, int64_t tokens, const Tensor& cache) {
  for (const auto& [token, length, slot, start] : spans) {
    TORCH_CHECK(0 <= token && 0 < length && token + length <= tokens, "tokens ", token, " to ", token + length, " of ", tokens);
    TORCH_CHECK(0 <= slot && slot < cache.size(0), "slot ", slot, " of a cache with ", cache.size(0));
    TORCH_CHECK(0 <= start && start + length <= cache.size(2), "positions ", start, " to ", start + length,
                " of a cache for ", cache.size(2));
  }
}
}  // namespace

extern "C" {
Tensor* lathe_attend_documents(Tensor* queries, Tensor* keys, Tensor* values, Tensor* documents) {
  return guarded<Tensor*>(nullptr, [=] {
    return new Tensor(DocumentAttention::apply(*queries, *keys, *values, *documents));
  });
}

/// Queries (t, heads, d), keys and values (t, groups, d), the cache's keys and values (slots, groups, capacity,
/// d), contiguous. No two spans may be of one slot. The result (t, heads, d) is zero for tokens of no span.
Tensor* lathe_attend_cached(Tensor* queries, Tensor* keys, Tensor* values, Tensor* cached_keys, Tensor* cached_values,
                            const Span* spans, int64_t count) {
  return guarded<Tensor*>(nullptr, [=] {
    const auto side_by_side = [](const Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); };
    const auto q = side_by_side(*queries), k = side_by_side(*keys), v = side_by_side(*values);
    check_kinds(q, k, v);
    check_kinds(q, *cached_keys, *cached_values);
    TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == q.size(0) && k.size(2) == q.size(2) && q.size(1) % k.size(1) == 0,
                "queries ", q.sizes(), " do not go with keys ", k.sizes(), " and values ", v.sizes());
    TORCH_CHECK(cached_keys->is_contiguous() && cached_values->is_contiguous(), "the cache is not contiguous");
    TORCH_CHECK(cached_keys->sizes() == cached_values->sizes() && cached_keys->size(1) == k.size(1) &&
                    cached_keys->size(3) == k.size(2), "a cache of ", cached_keys->sizes(), " is not for keys ", k.sizes());
    const std::vector<Span> placed(spans, spans + count);
    check_spans(placed, q.size(0), *cached_keys);
    auto out = at::zeros(q.sizes(), q.options());
    const CachedAttention attention{q, k, v, *cached_keys, *cached_values, out};
    const auto& kernels = attention_kernels();
    if (q.scalar_type() == at::kFloat)
      attention.attend<float>(kernels.forward, placed);
    else
      attention.attend<lathe::BFloat16>(kernels.forward_bf16, placed);
    return new Tensor(out);
  });
}
}
