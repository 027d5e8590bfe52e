// Workload for compute-sanitizer: the fused kernel on virtual ranks over ragged shapes, without torch.
// Run by tests/tokenweave/sanitize.py. Checks every rank's output against rank 0's.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "allreduce_rmsnorm.h"

using namespace tokenweave;

static void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

static void* device_copy(const std::vector<__nv_bfloat16>& values) {
  void* memory = nullptr;
  const size_t bytes = values.size() * sizeof(__nv_bfloat16);
  check(cudaMalloc(&memory, bytes > 0 ? bytes : 16), "cudaMalloc");
  check(cudaMemcpy(memory, values.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

static std::vector<__nv_bfloat16> noise(size_t count, unsigned seed) {
  std::vector<__nv_bfloat16> values(count);
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = __float2bfloat16(static_cast<float>(seed >> 8) / 8388608.0f - 1.0f);
  }
  return values;
}

static void run(int world, int tokens, int hidden, int ctas, bool normalize) {
  AllReduceRmsNormArgs args{};
  std::vector<void*> owned;
  for (int rank = 0; rank < world; ++rank) {
    args.buffers[rank] = device_copy(noise(static_cast<size_t>(tokens) * hidden, rank + 1));
    check(cudaMalloc(&args.flags[rank], sizeof(uint32_t) * kMaxCtas * kMaxWorld), "cudaMalloc");
    check(cudaMemset(args.flags[rank], 0, sizeof(uint32_t) * kMaxCtas * kMaxWorld), "cudaMemset");
    const int share = (tokens + world - 1) / world;
    const int begin = std::min(rank * share, tokens);
    const int rows = std::min(begin + share, tokens) - begin;
    args.local[rank] = {rank, device_copy(noise(static_cast<size_t>(rows) * hidden, 100 + rank))};
    owned.insert(owned.end(), {args.buffers[rank], args.flags[rank], args.local[rank].residual});
  }
  void* weight = device_copy(noise(hidden, 7));
  owned.push_back(weight);
  args.weight = normalize ? weight : nullptr;
  args.timeout_ns = 60'000'000'000ull;
  args.local_ranks = args.world = world;
  args.tokens = tokens;
  args.hidden = hidden;
  args.epsilon = 1e-5f;
  for (int repeat = 0; repeat < 2; ++repeat) check(launch_allreduce_rmsnorm(args, ctas, nullptr), "launch");
  check(cudaDeviceSynchronize(), "kernel");

  const size_t count = static_cast<size_t>(tokens) * hidden;
  std::vector<uint16_t> first(count), other(count);
  check(cudaMemcpy(first.data(), args.buffers[0], count * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (int rank = 1; rank < world; ++rank) {
    check(cudaMemcpy(other.data(), args.buffers[rank], count * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (first != other) {
      std::fprintf(stderr, "rank %d differs from rank 0\n", rank);
      std::exit(1);
    }
  }
  for (void* memory : owned) check(cudaFree(memory), "cudaFree");
}

int main() {
  for (const int world : {1, 2, 3, 4, 8}) {
    for (const int hidden : {1024, 1032, 8192, 16384}) {
      for (const int tokens : {1, world, 21}) run(world, tokens, hidden, 2, true);
    }
    run(world, 13, 4096, 3, false);
  }
  std::puts("sanitize workload finished");
  return 0;
}
