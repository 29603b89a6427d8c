// The C++ shim over libtorch: what tch does not offer. Every function is `extern "C"`, lets no
// exception out, and leaves the reason of a failure in `lathe_last_error` of the calling thread.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <torch/version.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <dlfcn.h>
#include <memory>
#include <string>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "guard.h"

using at::Tensor;

namespace {
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

/// `gradient` becomes the parameter's; what a backward pass finds is added to it in place.
int lathe_set_gradient(Tensor* parameter, const Tensor* gradient) {
  return guarded(0, [=] {
    parameter->mutable_grad() = *gradient;
    return 1;
  });
}

/// Gives the memory behind a tensor back (0 bytes), or new memory to it, for all tensors that share it.
int lathe_resize_storage(const Tensor* tensor, int64_t bytes) {
  return guarded(0, [=] {
    const auto& storage = tensor->storage();
    auto data = bytes > 0 ? c10::GetAllocator(tensor->device().type())->allocate(bytes)
                          : at::DataPtr(nullptr, tensor->device());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
    return 1;
  });
}

/// Calls `body(data, parameter)` whenever a backward pass has the parameter's gradient; 0 from it fails the pass. `free(data)` is
/// called once nothing calls it any more, and also where this fails.
int lathe_on_gradient(Tensor* parameter, int (*body)(void*, const Tensor*), void (*free)(void*), void* data) {
  struct Hook : torch::autograd::PostAccumulateGradHook {
    int (*body)(void*, const Tensor*);
    void (*free)(void*);
    void* data;
    Hook(int (*body)(void*, const Tensor*), void (*free)(void*), void* data) : body(body), free(free), data(data) {}
    ~Hook() override { free(data); }
    void operator()(const Tensor& parameter) override {
      TORCH_CHECK(body(data, &parameter), "what follows a gradient failed");
    }
  };
  auto hook = std::make_unique<Hook>(body, free, data);
  return guarded(0, [&] {
    torch::autograd::impl::set_post_acc_grad_hooks(*parameter, std::move(hook));
    return 1;
  });
}

/// `output`, computed without gradients from `input`, as a step of the backward pass: what `body(data, gradient)` makes of
/// its gradient is the input's; null from it fails the pass. `free(data)` is called once nothing calls it any more, and
/// also where there is no backward pass.
Tensor* lathe_with_backward(const Tensor* input, const Tensor* output, Tensor* (*body)(void*, Tensor*),
                            void (*free)(void*), void* data) {
  struct Step : torch::autograd::Node {
    Tensor* (*body)(void*, Tensor*);
    std::shared_ptr<void> data;
    Step(Tensor* (*body)(void*, Tensor*), std::shared_ptr<void> data) : body(body), data(std::move(data)) {}
    std::string name() const override { return "LatheStep"; }
    torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
      if (!gradients[0].defined()) return {Tensor()};
      at::NoGradGuard guard;
      std::unique_ptr<Tensor> result(body(data.get(), &gradients[0]));
      TORCH_CHECK(result, "a step of the backward pass failed");
      return {*result};
    }
  };
  auto held = std::shared_ptr<void>(data, free);
  return guarded<Tensor*>(nullptr, [&] {
    auto result = std::make_unique<Tensor>(output->detach());
    if (at::GradMode::is_enabled() && input->requires_grad()) {
      std::shared_ptr<Step> step(new Step(body, held), torch::autograd::deleteNode);
      step->set_next_edges(torch::autograd::collect_next_edges(*input));
      torch::autograd::set_history(*result, step);
    }
    return result.release();
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

struct LatheSgd {
  double learning_rate, momentum, weight_decay;
};

/// One fused SGD step, with gradients and `found_inf` as in `lathe_adamw`. Without momentum `momenta` is not read.
int lathe_sgd(Tensor* const* parameters, Tensor* const* momenta, int64_t count, const LatheSgd* options,
              Tensor* grad_scale, Tensor* found_inf) {
  return guarded(0, [=] {
    at::NoGradGuard guard;
    auto own = list(parameters, count), grads = gradients(own);
    auto first = options->momentum > 0 ? list(momenta, count) : std::vector<Tensor>();
    at::_fused_sgd_(own, grads, first, options->weight_decay, options->momentum, options->learning_rate,
                    /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false, *grad_scale,
                    *found_inf);
    return 1;
  });
}

struct LatheDropout {
  uint64_t seed, step;
  uint32_t layer, site;
  double probability;
};

/// A dropout mask (rows, positions, width), fp32, of the positions from `first` on: 0 or 1/(1−p). An element is a pure function
/// of (seed, step, its row's global sequence index, layer, site, position × width + channel).
Tensor* lathe_dropout_mask(const uint64_t* sequences, int64_t rows, int64_t first, int64_t positions, int64_t width,
                           const LatheDropout* options) {
  return guarded<Tensor*>(nullptr, [=] {
    auto mask = at::empty({rows, positions, width}, at::kFloat);
    float* out = mask.data_ptr<float>();
    const Philox philox{{uint32_t(options->seed), uint32_t(options->seed >> 32)}};
    const float keep = float(1.0 / (1.0 - options->probability));
    const uint32_t threshold = uint32_t(std::min(options->probability * 4294967296.0, 4294967295.0));
    const int64_t elements = positions * width, before = first * width;
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const uint64_t sequence = sequences[row];
        const uint32_t place = (options->layer << 8 | (options->site & 0xff)) ^ uint32_t(sequence >> 32) * 0x9E3779B9u;
        // Four elements have one draw; the first draw may have begun before them.
        for (int64_t element = before - before % 4; element < before + elements; element += 4) {
          uint32_t bits[4];
          philox({uint32_t(element / 4), uint32_t(sequence), uint32_t(options->step), place}, bits);
          for (int64_t i = std::max<int64_t>(before - element, 0); i < 4 && element + i < before + elements; i++)
            out[row * elements + element - before + i] = bits[i] < threshold ? 0.0f : keep;
        }
      }
    });
    return new Tensor(mask);
  });
}
}
