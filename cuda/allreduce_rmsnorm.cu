// Fused AllReduce + residual add + RMSNorm for 16-bit hidden states of one tensor-parallel group.
//
// Each rank owns a contiguous share of the rows. For its rows it reads the sum over ranks, adds the
// residual (kept by the owner alone), normalises, and writes the result to every rank, between an entry and
// an exit barrier. A row stays in registers from the load to the store. Method: TokenWeave, section on the
// fused AllReduce-RMSNorm kernel.
//
// Rounding points, the same for both transports and equal to SGLang's RMSNorm after an all-reduce:
//   1. sum over ranks in fp32 (peer: rank order) -> 16 bit
//   2. h = sum + residual in fp32; the residual stored is h -> 16 bit
//   3. mean of h*h in fp32 (not of the rounded residual); 1 / sqrt(mean + epsilon) in fp32
//   4. (h * rstd) * (weight_bias + weight) in fp32 -> 16 bit
// Products and sums are written with the _rn intrinsics, which the compiler may not contract, so that
// sglang_ext.tokenweave.reference can repeat them bit for bit.

#include <cuda_runtime.h>

#include "allreduce_rmsnorm.h"
#include "barrier.cuh"
#include "transport.cuh"
#include "vector.cuh"

namespace tokenweave {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxRowsPerCta = 8;

// Sum over a warp, the same bits in every lane (addition commutes, and both lanes of a pair add the pair).
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Sum over the threads of one row (threadIdx.x); all threads of the block call it together. `partials` must
// not be the array of the previous call, which slower warps may still be reading.
__device__ __forceinline__ float row_sum(float value, float (&partials)[kMaxRowsPerCta][kWarp]) {
  const int lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) partials[threadIdx.y][threadIdx.x / kWarp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  return warp_sum(lane < warps ? partials[threadIdx.y][lane] : 0.0f);
}

struct RowRange {
  int begin;
  int end;
};

__device__ __forceinline__ RowRange owned_rows(int tokens, int world, int rank) {
  const int share = (tokens + world - 1) / world;
  return {min(rank * share, tokens), min(rank * share + share, tokens)};
}

template <typename T, typename Transport, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    allreduce_rmsnorm_kernel(const __grid_constant__ AllReduceRmsNormArgs args) {
  using Fetched = typename Transport::Fetched;
  // With two vectors per thread the row itself already fills the registers.
  constexpr bool kPrefetch = Transport::kPrefetch && kVectors == 1;
  __shared__ float partials[2][kMaxRowsPerCta][kWarp];

  const LocalRank local = args.local[blockIdx.y];
  const Transport transport(args);
  RankBarrier barrier(args, local.rank, threadIdx.y * blockDim.x + threadIdx.x);

  const int row_vectors = args.hidden / kVectorElements;
  const RowRange rows = owned_rows(args.tokens, args.world, local.rank);
  const int step = gridDim.x * blockDim.y;
  const bool normalize = args.weight != nullptr;

  int column[kVectors];
  Vector weight[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    column[v] = threadIdx.x + v * blockDim.x;
    if (normalize && column[v] < row_vectors) {
      weight[v].bits = static_cast<const uint4*>(args.weight)[column[v]];
    }
  }

  const auto holds = [&](int row, int v) { return row < rows.end && column[v] < row_vectors; };
  const auto index_of = [&](int row, int v) { return static_cast<int64_t>(row) * row_vectors + column[v]; };
  Fetched fetched;
  Vector residual;
  const auto fetch = [&](int row, int v) {
    if (!holds(row, v)) return;
    // First the load that never leaves this GPU: nothing of the others may hold it up.
    if (normalize) residual.bits = static_cast<const uint4*>(local.residual)[index_of(row - rows.begin, v)];
    fetched = transport.fetch(index_of(row, v));
  };

  barrier.wait(Phase::kEntry);

  if constexpr (kPrefetch) fetch(rows.begin + blockIdx.x * blockDim.y + threadIdx.y, 0);

  int parity = 0;
  // All rows of the block go through the loop together, because row_sum synchronises the block.
  for (int base = rows.begin + blockIdx.x * blockDim.y; base < rows.end; base += step) {
    const int row = base + threadIdx.y;
    float values[kVectors][kVectorElements];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (!kPrefetch) fetch(row, v);
      if (!holds(row, v)) continue;
      const Vector sum = transport.reduce(fetched);
      if (!normalize) {
        transport.store(index_of(row, v), sum);
        continue;
      }
      float addend[kVectorElements];
      unpack<T>(sum, values[v]);
      unpack<T>(residual, addend);
#pragma unroll
      for (int i = 0; i < kVectorElements; ++i) {
        values[v][i] = __fadd_rn(values[v][i], addend[i]);
        squares = __fadd_rn(squares, __fmul_rn(values[v][i], values[v][i]));
      }
      static_cast<uint4*>(local.residual)[index_of(row - rows.begin, v)] = pack<T>(values[v]).bits;
    }
    // The next row's loads are under way while this row is summed, scaled and stored.
    if constexpr (kPrefetch) fetch(row + step, 0);
    if (!normalize) continue;

    const float total = row_sum(squares, partials[parity]);
    parity ^= 1;
    const float mean = __fdiv_rn(total, static_cast<float>(args.hidden));
    const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.epsilon)));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!holds(row, v)) continue;
      float scale[kVectorElements];
      unpack<T>(weight[v], scale);
#pragma unroll
      for (int i = 0; i < kVectorElements; ++i) {
        const float factor = __fadd_rn(args.weight_bias, scale[i]);
        values[v][i] = __fmul_rn(__fmul_rn(values[v][i], rstd), factor);
      }
      transport.store(index_of(row, v), pack<T>(values[v]));
    }
  }

  barrier.wait(Phase::kExit);
}

using Kernel = void (*)(AllReduceRmsNormArgs);

template <typename T, int kVectors>
Kernel select_transport(const AllReduceRmsNormArgs& args) {
  if (args.multicast != nullptr) return allreduce_rmsnorm_kernel<T, MulticastTransport<T>, kVectors>;
  switch (args.world) {
    case 1:
      return allreduce_rmsnorm_kernel<T, PeerTransport<T, 1>, kVectors>;
    case 2:
      return allreduce_rmsnorm_kernel<T, PeerTransport<T, 2>, kVectors>;
    case 4:
      return allreduce_rmsnorm_kernel<T, PeerTransport<T, 4>, kVectors>;
    case 8:
      return allreduce_rmsnorm_kernel<T, PeerTransport<T, 8>, kVectors>;
    default:
      return allreduce_rmsnorm_kernel<T, PeerTransport<T, 0>, kVectors>;
  }
}

template <typename T>
Kernel select_vectors(const AllReduceRmsNormArgs& args, int vectors) {
  return vectors == 1 ? select_transport<T, 1>(args) : select_transport<T, 2>(args);
}

Kernel select_kernel(const AllReduceRmsNormArgs& args, int vectors) {
  return args.dtype == Dtype::kBFloat16 ? select_vectors<__nv_bfloat16>(args, vectors)
                                        : select_vectors<__half>(args, vectors);
}

bool in_range(const AllReduceRmsNormArgs& args, int ctas) {
  return args.world >= 1 && args.world <= kMaxWorld && args.local_ranks >= 1 && args.local_ranks <= args.world &&
         args.tokens >= 0 && args.hidden >= kVectorElements && args.hidden <= kMaxHidden &&
         args.hidden % kVectorElements == 0 && ctas >= 1 && ctas <= kMaxCtas;
}

}  // namespace

RowLayout row_layout(int hidden) {
  const int vectors = hidden / kVectorElements;
  const int per_thread = (vectors + kMaxThreads - 1) / kMaxThreads;
  const int needed = (vectors + per_thread - 1) / per_thread;
  const int threads = (needed + kWarp - 1) / kWarp * kWarp;
  const int rows = kMaxThreads / threads;
  return {threads, per_thread, rows < kMaxRowsPerCta ? rows : kMaxRowsPerCta};
}

cudaError_t launch_allreduce_rmsnorm(const AllReduceRmsNormArgs& args, int ctas, cudaStream_t stream) {
  if (!in_range(args, ctas)) return cudaErrorInvalidValue;
  const RowLayout layout = row_layout(args.hidden);
  const Kernel kernel = select_kernel(args, layout.vectors_per_thread);
  const dim3 block(layout.threads_per_row, layout.rows_per_cta);
  const dim3 grid(ctas, args.local_ranks);

  int device = 0;
  int multiprocessors = 0;
  int resident = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  if (cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, block.x * block.y, 0)) {
    return error;
  }
  if (ctas * args.local_ranks > resident * multiprocessors) return cudaErrorCooperativeLaunchTooLarge;

  kernel<<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tokenweave
