// 16-byte vectors of bf16 or fp16, and the rounding between them and fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "allreduce_rmsnorm.h"

namespace tokenweave {

union Vector {
  uint4 bits;
  uint32_t words[4];
};

template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  __device__ __forceinline__ static float2 unpack(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Pair<__half> {
  __device__ __forceinline__ static float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <typename T>
__device__ __forceinline__ void unpack(const Vector& vector, float (&values)[kVectorElements]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 pair = Pair<T>::unpack(vector.words[word]);
    values[2 * word] = pair.x;
    values[2 * word + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ Vector pack(const float (&values)[kVectorElements]) {
  Vector vector;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    vector.words[word] = Pair<T>::pack(values[2 * word], values[2 * word + 1]);
  }
  return vector;
}

}  // namespace tokenweave
