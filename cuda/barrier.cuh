// Barrier between the thread blocks of equal index on all ranks.
//
// Flags only ever grow: block c of rank r writes its epoch into slot [c][r] of every rank's flags with a
// system-scope release and waits, with acquire, until its own flags show every peer at that epoch. The
// rank's own slot holds the epoch that it reached last, so the next launch, or a replay of a captured
// graph, goes on from there without any help from the host.
//
// A wait is bounded. When it runs out, the block writes a record to mapped host memory, prints it and
// traps: the rows would be wrong, so nothing may go on from here.
#pragma once

#include <cstdio>

#include "allreduce_rmsnorm.h"

namespace tokenweave {

enum class Phase : uint32_t { kEntry = 0, kExit = 1 };

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_sys(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t global_time_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// Out of line and by value, so that the path never taken costs the kernel no registers and no stack.
static __device__ __noinline__ void fail_barrier(BarrierTimeout* record, int rank, int peer, Phase phase, uint32_t expected,
                                          uint32_t seen) {
  if (record != nullptr && atomicCAS_system(&record->happened, 0u, 1u) == 0u) {
    record->rank = rank;
    record->peer = peer;
    record->cta = blockIdx.x;
    record->phase = static_cast<uint32_t>(phase);
    record->expected = expected;
    record->seen = seen;
    // 2 says that the record is complete.
    store_release_sys(&record->happened, 2u);
  }
  printf("tokenweave: barrier timed out: rank %d waited for rank %d, block %d, phase %s, expected epoch %u, seen %u\n",
         rank, peer, static_cast<int>(blockIdx.x), phase == Phase::kEntry ? "entry" : "exit", expected, seen);
  __trap();
}

class RankBarrier {
 public:
  // Every thread of the block constructs it; `thread` is the thread's linear index.
  __device__ __forceinline__ RankBarrier(const AllReduceRmsNormArgs& args, int rank, int thread)
      : args_(args), rank_(rank), thread_(thread), row_(blockIdx.x * kMaxWorld) {
    if (thread_ < args_.world) epoch_ = load_acquire_sys(args_.flags[rank_] + row_ + rank_);
    // Nobody may raise the rank's own slot before all waiting threads have read it.
    __syncthreads();
  }

  __device__ __forceinline__ void wait(Phase phase) {
    __syncthreads();  // the block's accesses come before the release below
    if (thread_ < args_.world) {
      ++epoch_;
      store_release_sys(args_.flags[thread_] + row_ + rank_, epoch_);
      wait_for_peer(phase);
    }
    __syncthreads();  // and after the acquire above
  }

 private:
  __device__ __forceinline__ void wait_for_peer(Phase phase) const {
    const uint32_t* flag = args_.flags[rank_] + row_ + thread_;
    uint64_t start = 0;
    uint32_t spins = 0;
    uint32_t seen;
    // The signed difference stays right when the epoch wraps around.
    while (static_cast<int32_t>((seen = load_acquire_sys(flag)) - epoch_) < 0) {
      if ((++spins & 0xff) != 0) continue;
      const uint64_t now = global_time_ns();
      if (start == 0) start = now;
      if (now - start > args_.timeout_ns) {
        fail_barrier(args_.timeout, rank_, thread_, phase, epoch_, seen);
      }
    }
  }

  const AllReduceRmsNormArgs& args_;
  int rank_;
  int thread_;
  int row_;
  uint32_t epoch_ = 0;
};

}  // namespace tokenweave
