// Metal on CUDA: the same text on real warps. Simdgroup functions need every lane of the warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

struct bfloat {  // explicit from float, as in Metal
  __nv_bfloat16 value;
  bfloat() = default;
  __device__ explicit bfloat(float x) : value(__float2bfloat16_rn(x)) {}
  __device__ operator float() const { return __bfloat162float(value); }
};

#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#define MSL_DEVICE static __device__ __forceinline__
#define METAL_FUNC __device__ __forceinline__

struct MslThread {  // the fields of `Thread` in cpu/runtime.h
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  uint3 dispatch_threads_per_threadgroup;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup;
  uint simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, threads_per_simdgroup;
};
// Whole groups only: CUDA has no smaller ones at the edges of a grid.
MSL_DEVICE MslThread msl_thread() {
  const uint3 n = {blockDim.x, blockDim.y, blockDim.z}, groups = {gridDim.x, gridDim.y, gridDim.z};
  const uint3 t = threadIdx, g = blockIdx;
  const uint flat = t.x + n.x * (t.y + n.y * t.z);
  return {{g.x * n.x + t.x, g.y * n.y + t.y, g.z * n.z + t.z},
          t,
          g,
          n,
          {groups.x * n.x, groups.y * n.y, groups.z * n.z},
          groups,
          n,
          flat,
          flat % 32,
          flat / 32,
          (n.x * n.y * n.z + 31) / 32,
          32};
}

namespace metal {
#define MSL_UNARY(name, function) \
  MSL_DEVICE float name(float x) { return function(x); }
#define MSL_BINARY(name, function) \
  MSL_DEVICE float name(float x, float y) { return function(x, y); }
namespace precise {
MSL_UNARY(exp, expf)
MSL_UNARY(exp2, exp2f)
MSL_UNARY(log, logf)
MSL_UNARY(log2, log2f)
MSL_UNARY(sqrt, sqrtf)
MSL_UNARY(rsqrt, rsqrtf)
MSL_UNARY(tanh, tanhf)
MSL_BINARY(pow, powf)
}  // namespace precise
using precise::exp;
using precise::exp2;
using precise::log;
using precise::log2;
using precise::pow;
using precise::rsqrt;
using precise::sqrt;
using precise::tanh;
MSL_UNARY(fabs, fabsf)
MSL_UNARY(abs, fabsf)
MSL_UNARY(floor, floorf)
MSL_BINARY(fmax, fmaxf)
MSL_BINARY(fmin, fminf)
MSL_BINARY(max, fmaxf)
MSL_BINARY(min, fminf)
MSL_BINARY(copysign, copysignf)
MSL_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
#define MSL_EXTREMES(T)                                 \
  MSL_DEVICE T max(T a, T b) { return a > b ? a : b; }  \
  MSL_DEVICE T min(T a, T b) { return a < b ? a : b; }
MSL_EXTREMES(int) MSL_EXTREMES(uint) MSL_EXTREMES(long) MSL_EXTREMES(ulong)
template <typename T>
MSL_DEVICE T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
MSL_DEVICE T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_DEVICE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_DEVICE void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_DEVICE void simdgroup_barrier(mem_flags) { __syncwarp(); }

template <typename T, typename F>
MSL_DEVICE T msl_reduce(T value, F combine) {
  for (int distance = 16; distance != 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}
#define MSL_REDUCTION(name, result)                                     \
  template <typename T>                                                 \
  MSL_DEVICE T name(T value) {                                          \
    return msl_reduce(value, [](T a, T b) { return T(result); });       \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_max, a != a ? b : (b != b || a > b ? a : b))
MSL_REDUCTION(simd_min, a != a ? b : (b != b || a < b ? a : b))
MSL_DEVICE bool simd_any(bool vote) { return __any_sync(0xffffffffu, vote); }
MSL_DEVICE bool simd_all(bool vote) { return __all_sync(0xffffffffu, vote); }
template <typename T>
MSL_DEVICE T simd_broadcast(T value, ushort lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
}  // namespace metal
