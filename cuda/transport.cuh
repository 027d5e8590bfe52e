// Two ways to read the sum of all ranks' rows and to write a row to all ranks. Both index in vectors from
// the start of the token range, and both give the sum rounded once to the 16-bit type: the switch does so
// by itself, the peer transport on purpose.
#pragma once

#include "vector.cuh"

namespace tokenweave {

__device__ __forceinline__ Vector load_relaxed_sys(const void* address) {
  Vector v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys(void* address, const Vector& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.words[0]),
               "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

// Plain loads and stores on every rank's buffer. The sum is taken in rank order in fp32, whatever the row
// and whoever owns it, so that a row's bits do not depend on where it stands.
// kWorld is the number of ranks, or 0 where only known at run time.
template <typename T, int kWorld>
struct PeerTransport {
  static constexpr int kSlots = kWorld > 0 ? kWorld : 1;
  // Whether the next row's loads fit the registers beside the row in work (1,024 threads, 64 registers).
  // With a run-time world the loads are summed as they come, so nothing is held back.
  static constexpr bool kPrefetch = kWorld > 0 && kWorld <= 4;

  struct Fetched {
    Vector parts[kSlots];
  };

  void* const* buffers;
  int world;

  __device__ __forceinline__ explicit PeerTransport(const AllReduceRmsNormArgs& args)
      : buffers(args.buffers), world(kWorld > 0 ? kWorld : args.world) {}

  __device__ __forceinline__ Fetched fetch(int64_t index) const {
    Fetched fetched;
    if constexpr (kWorld > 0) {
#pragma unroll
      for (int rank = 0; rank < kWorld; ++rank) {
        fetched.parts[rank] = load_relaxed_sys(static_cast<const uint4*>(buffers[rank]) + index);
      }
    } else {
      float sum[kVectorElements];
      unpack<T>(load_relaxed_sys(static_cast<const uint4*>(buffers[0]) + index), sum);
      for (int rank = 1; rank < world; ++rank) {
        add(load_relaxed_sys(static_cast<const uint4*>(buffers[rank]) + index), sum);
      }
      fetched.parts[0] = pack<T>(sum);
    }
    return fetched;
  }

  __device__ __forceinline__ Vector reduce(const Fetched& fetched) const {
    if constexpr (kWorld == 0) return fetched.parts[0];
    float sum[kVectorElements];
    unpack<T>(fetched.parts[0], sum);
#pragma unroll
    for (int rank = 1; rank < kSlots; ++rank) add(fetched.parts[rank], sum);
    return pack<T>(sum);
  }

  __device__ __forceinline__ void store(int64_t index, const Vector& vector) const {
    if constexpr (kWorld > 0) {
#pragma unroll
      for (int rank = 0; rank < kWorld; ++rank) {
        store_relaxed_sys(static_cast<uint4*>(buffers[rank]) + index, vector);
      }
    } else {
      for (int rank = 0; rank < world; ++rank) {
        store_relaxed_sys(static_cast<uint4*>(buffers[rank]) + index, vector);
      }
    }
  }

 private:
  __device__ __forceinline__ static void add(const Vector& part, float (&sum)[kVectorElements]) {
    float values[kVectorElements];
    unpack<T>(part, values);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) sum[i] = __fadd_rn(sum[i], values[i]);
  }
};

// The NVLink switch adds (fp32 accumulation, one rounding) and broadcasts: Hopper or newer with multicast.
template <typename T>
struct MulticastTransport {
  static constexpr bool kPrefetch = true;

  struct Fetched {
    Vector sum;
  };

  char* base;

  __device__ __forceinline__ explicit MulticastTransport(const AllReduceRmsNormArgs& args)
      : base(static_cast<char*>(args.multicast)) {}

  __device__ __forceinline__ Fetched fetch(int64_t index) const {
    Fetched fetched;
    load_reduce(base + index * sizeof(uint4), fetched.sum);
    return fetched;
  }

  __device__ __forceinline__ Vector reduce(const Fetched& fetched) const { return fetched.sum; }

  __device__ __forceinline__ void store(int64_t index, const Vector& v) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     base + index * sizeof(uint4)),
                 "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
#else
    __trap();  // the launcher refuses multicast before sm_90
#endif
  }

 private:
  __device__ __forceinline__ static void load_reduce(const char* address, Vector& v);
};

template <>
__device__ __forceinline__ void MulticastTransport<__nv_bfloat16>::load_reduce(const char* address, Vector& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
#else
  __trap();
#endif
}

template <>
__device__ __forceinline__ void MulticastTransport<__half>::load_reduce(const char* address, Vector& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
#else
  __trap();
#endif
}

}  // namespace tokenweave
