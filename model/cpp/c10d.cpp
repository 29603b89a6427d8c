// PyTorch's collectives for Rust: a store at which the ranks of a job meet, process groups, and the work that a
// collective is. See guard.h for how failures come back. What is started keeps the tensors that it works on.
#define USE_C10D_GLOO
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <cstdint>

#include "guard.h"

using at::Tensor;
using std::chrono::milliseconds;

struct LatheStore {
  c10::intrusive_ptr<c10d::TCPStore> store;
};

struct LatheGroup {
  c10::intrusive_ptr<c10d::Backend> backend;
};

struct LatheWork {
  c10::intrusive_ptr<c10d::Work> work;
};

namespace {
/// Threads of a group that carry collectives out; as many are under way at once.
constexpr int kGlooThreads = 2;

template <class Start>
LatheWork* started(Start start) {
  return guarded<LatheWork*>(nullptr, [&] { return new LatheWork{start()}; });
}

c10d::ReduceOp reduction(int operation) {
  return c10d::ReduceOp(static_cast<c10d::ReduceOp::RedOpType>(operation));
}
}

extern "C" {
/// A store that listens on the socket `listener`, which it takes over, or, where that is negative, the connection to one.
LatheStore* lathe_store_new(const char* host, int port, int listener, int64_t timeout_ms) {
  return guarded<LatheStore*>(nullptr, [=] {
    c10d::TCPStoreOptions options;
    options.port = static_cast<std::uint16_t>(port);
    options.isServer = listener >= 0;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    if (listener >= 0) options.masterListenFd = listener;
    return new LatheStore{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

void lathe_store_free(LatheStore* store) { delete store; }

/// A group over Gloo whose members meet in the store under `name` and listen on `address`.
LatheGroup* lathe_group_gloo(const LatheStore* store, const char* name, int rank, int size, const char* address,
                             int64_t timeout_ms) {
  return guarded<LatheGroup*>(nullptr, [=] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
    options->threads = kGlooThreads;
    auto part = c10::make_intrusive<c10d::PrefixStore>(name, store->store);
    return new LatheGroup{c10::make_intrusive<c10d::ProcessGroupGloo>(part, rank, size, options)};
  });
}

void lathe_group_free(LatheGroup* group) { delete group; }

LatheWork* lathe_all_reduce(LatheGroup* group, Tensor* tensor, int operation) {
  return started([=] {
    std::vector<Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = reduction(operation);
    return group->backend->allreduce(tensors, options);
  });
}

LatheWork* lathe_reduce_scatter(LatheGroup* group, Tensor* output, Tensor* input, int operation) {
  return started([=] {
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduction(operation);
    return group->backend->_reduce_scatter_base(*output, *input, options);
  });
}

LatheWork* lathe_all_gather(LatheGroup* group, Tensor* output, Tensor* input) {
  return started([=] { return group->backend->_allgather_base(*output, *input); });
}

LatheWork* lathe_broadcast(LatheGroup* group, Tensor* tensor, int root) {
  return started([=] {
    std::vector<Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return group->backend->broadcast(tensors, options);
  });
}

LatheWork* lathe_send(LatheGroup* group, Tensor* tensor, int to, int tag) {
  return started([=] {
    std::vector<Tensor> tensors{*tensor};
    return group->backend->send(tensors, to, tag);
  });
}

LatheWork* lathe_receive(LatheGroup* group, Tensor* tensor, int from, int tag) {
  return started([=] {
    std::vector<Tensor> tensors{*tensor};
    return group->backend->recv(tensors, from, tag);
  });
}

LatheWork* lathe_barrier(LatheGroup* group) {
  return started([=] { return group->backend->barrier(); });
}

/// Waits for it; 0 where it failed, was aborted or did not end in time.
int lathe_work_wait(LatheWork* work, int64_t timeout_ms) {
  return guarded(0, [=] {
    TORCH_CHECK(work->work->wait(milliseconds(timeout_ms)), "it was aborted");
    return 1;
  });
}

void lathe_work_free(LatheWork* work) { delete work; }
}
