// Fused AllReduce + residual add + RMSNorm: arguments and launcher. Free of torch, so that the kernel
// compiles with nvcc alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tokenweave {

// Ranks of one tensor-parallel group, all on one node.
constexpr int kMaxWorld = 16;
// Thread blocks of one launch; also the number of barrier flag rows.
constexpr int kMaxCtas = 128;
// Elements of a 16-byte access in a 16-bit type.
constexpr int kVectorElements = 8;
// A row is held in registers by at most 1,024 threads with at most two vectors each.
constexpr int kMaxHidden = 1024 * kVectorElements * 2;

enum class Dtype : int { kBFloat16 = 0, kFloat16 = 1 };

// What a barrier that ran out of time writes before it traps. Lives in mapped host memory, so that it can
// be read after the trap has ended the CUDA context.
struct BarrierTimeout {
  uint32_t happened;
  uint32_t rank;
  uint32_t peer;
  uint32_t cta;
  uint32_t phase;  // 0 entry, 1 exit
  uint32_t expected;
  uint32_t seen;
};

// A rank that this launch serves: one in a server, all of them where W virtual ranks share one GPU.
struct LocalRank {
  int rank;
  // Residual of the rows that the rank owns (the row shard), updated in place; null in reduce-only mode.
  void* residual;
};

struct AllReduceRmsNormArgs {
  // Address of every rank's hidden states [tokens, hidden], partial sums on entry, output on return.
  void* buffers[kMaxWorld];
  // Multicast address of the same rows, or null for the peer transport.
  void* multicast;
  // Every rank's barrier flags [kMaxCtas, kMaxWorld], zeroed once before the first launch.
  uint32_t* flags[kMaxWorld];
  LocalRank local[kMaxWorld];
  // Norm weight [hidden], or null: reduce-only mode (plain AllReduce, no residual, no norm).
  const void* weight;
  BarrierTimeout* timeout;
  uint64_t timeout_ns;
  int local_ranks;
  int world;
  int tokens;
  int hidden;
  float epsilon;
  float weight_bias;  // 0 for RMSNorm, 1 for Gemma's (1 + w)
  Dtype dtype;
};

// Launch shape for one row width: the same on every rank, and part of the rounding order (the sum of
// squares is a tree over threads_per_row).
struct RowLayout {
  int threads_per_row;
  int vectors_per_thread;
  int rows_per_cta;
};

RowLayout row_layout(int hidden);

// Enqueues the kernel with `ctas` thread blocks per local rank.
// Returns cudaErrorInvalidValue for arguments out of range, cudaErrorCooperativeLaunchTooLarge where the
// blocks of all local ranks could not be resident together (their barriers would wait for ever).
cudaError_t launch_allreduce_rmsnorm(const AllReduceRmsNormArgs& args, int ctas, cudaStream_t stream);

}  // namespace tokenweave
