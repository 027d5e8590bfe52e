// torch.ops.sglang_ext_tokenweave: argument checks and conversion for the launcher. No Python.h, so the
// library serves every Python version.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "allreduce_rmsnorm.h"

namespace {

using tokenweave::AllReduceRmsNormArgs;
using tokenweave::kMaxWorld;

constexpr int64_t kAlignment = 16;

tokenweave::Dtype dtype_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kBFloat16) return tokenweave::Dtype::kBFloat16;
  TORCH_CHECK(tensor.scalar_type() == at::kHalf, "tokenweave: hidden states must be bfloat16 or float16, not ",
              tensor.scalar_type());
  return tokenweave::Dtype::kFloat16;
}

void check_rows(const at::Tensor& tensor, const at::Tensor& like, int64_t rows, const char* name) {
  TORCH_CHECK(tensor.is_cuda() && tensor.device() == like.device(), "tokenweave: ", name, " must be on ",
              like.device());
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "tokenweave: ", name, " must be ", like.scalar_type());
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == like.size(1) &&
                  tensor.is_contiguous(),
              "tokenweave: ", name, " must be contiguous [", rows, ", ", like.size(1), "], not ", tensor.sizes());
  TORCH_CHECK(reinterpret_cast<int64_t>(tensor.data_ptr()) % kAlignment == 0, "tokenweave: ", name,
              " must be aligned to 16 bytes");
}

int64_t owned_rows(int64_t tokens, int64_t world, int64_t rank) {
  const int64_t share = (tokens + world - 1) / world;
  const int64_t begin = std::min(rank * share, tokens);
  return std::min(begin + share, tokens) - begin;
}

// hidden[i], residual[i] and ranks[i] belong together: one entry in a server, W for virtual ranks.
void allreduce_rmsnorm(at::TensorList hidden, at::TensorList residual, const std::optional<at::Tensor>& weight,
                       at::IntArrayRef ranks, at::IntArrayRef buffers, at::IntArrayRef flags, int64_t multicast,
                       double epsilon, double weight_bias, int64_t ctas, int64_t timeout_ns, int64_t timeout_record) {
  const int64_t world = buffers.size();
  TORCH_CHECK(world >= 1 && world <= kMaxWorld, "tokenweave: world size must be 1 to ", kMaxWorld, ", not ", world);
  TORCH_CHECK(flags.size() == buffers.size(), "tokenweave: one flag address per rank is needed");
  TORCH_CHECK(!hidden.empty() && hidden.size() == ranks.size(), "tokenweave: one hidden tensor per local rank");
  TORCH_CHECK(residual.size() == (weight ? hidden.size() : 0), "tokenweave: one residual per local rank with a weight");
  TORCH_CHECK(hidden[0].is_cuda() && hidden[0].dim() == 2, "tokenweave: hidden must be [tokens, hidden] on CUDA");
  TORCH_CHECK(multicast % kAlignment == 0, "tokenweave: multicast address must be aligned to 16 bytes");

  AllReduceRmsNormArgs args{};
  args.multicast = reinterpret_cast<void*>(multicast);
  args.timeout = reinterpret_cast<tokenweave::BarrierTimeout*>(timeout_record);
  args.timeout_ns = timeout_ns;
  args.local_ranks = static_cast<int>(hidden.size());
  args.world = static_cast<int>(world);
  args.tokens = static_cast<int>(hidden[0].size(0));
  args.hidden = static_cast<int>(hidden[0].size(1));
  args.epsilon = static_cast<float>(epsilon);
  args.weight_bias = static_cast<float>(weight_bias);
  args.dtype = dtype_of(hidden[0]);
  for (int64_t rank = 0; rank < world; ++rank) {
    TORCH_CHECK(buffers[rank] % kAlignment == 0, "tokenweave: buffer of rank ", rank, " must be aligned to 16 bytes");
    args.buffers[rank] = reinterpret_cast<void*>(buffers[rank]);
    args.flags[rank] = reinterpret_cast<uint32_t*>(flags[rank]);
  }
  if (weight) {
    TORCH_CHECK(weight->dim() == 1, "tokenweave: weight must be [hidden]");
    check_rows(weight->unsqueeze(0), hidden[0], 1, "weight");
    args.weight = weight->const_data_ptr();
  }
  for (size_t i = 0; i < hidden.size(); ++i) {
    TORCH_CHECK(ranks[i] >= 0 && ranks[i] < world, "tokenweave: rank ", ranks[i], " is outside the world of ", world);
    check_rows(hidden[i], hidden[0], args.tokens, "hidden");
    TORCH_CHECK(reinterpret_cast<int64_t>(hidden[i].data_ptr()) == buffers[ranks[i]],
                "tokenweave: hidden is not the buffer registered for rank ", ranks[i]);
    args.local[i].rank = static_cast<int>(ranks[i]);
    if (!weight) continue;
    check_rows(residual[i], hidden[0], owned_rows(args.tokens, world, ranks[i]), "residual shard");
    args.local[i].residual = residual[i].data_ptr();
  }

  const c10::cuda::CUDAGuard guard(hidden[0].device());
  const cudaError_t error =
      tokenweave::launch_allreduce_rmsnorm(args, static_cast<int>(ctas), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == cudaSuccess, "tokenweave: launch failed: ", cudaGetErrorString(error), " (tokens ", args.tokens,
              ", hidden ", args.hidden, ", world ", world, ", ctas ", ctas, ")");
}

}  // namespace

TORCH_LIBRARY(sglang_ext_tokenweave, m) {
  m.def(
      "allreduce_rmsnorm(Tensor(a!)[] hidden, Tensor(b!)[] residual, Tensor? weight, int[] ranks, int[] buffers, "
      "int[] flags, int multicast, float epsilon, float weight_bias, int ctas, int timeout_ns, int timeout_record) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(sglang_ext_tokenweave, CUDA, m) { m.impl("allreduce_rmsnorm", &allreduce_rmsnorm); }
