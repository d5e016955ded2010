// What the tests of the simulator run, and break: a row's largest x, its sum of 2^(x - largest)
// and the terms of the sum. Whole numbers near each other make every result exact.
#include <metal_stdlib>
using namespace metal;

constant constexpr uint kSimd = 32;
constant constexpr uint kReads = 4;  // consecutive elements a thread and step
constant constexpr float kFloor = -3.0e38f;

struct Online {
  float top;
  float sum;
};

template <typename T>
METAL_FUNC float load(device const T* row, uint i, float scale) {
  return float(row[i]) * scale;
}

METAL_FUNC Online with(Online o, float x) {
  float top = x > o.top ? x : o.top;
  o.sum = o.sum * exp2(o.top - top) + exp2(x - top);
  o.top = top;
  return o;
}

// Every lane gets the result; `shared` has 2 * kSimd floats and may be used again at once.
METAL_FUNC Online merge(Online o, threadgroup float* shared, uint lane, uint simd, uint simds) {
  float top = simd_max(o.top);
  float sum = simd_sum(o.sum * exp2(o.top - top));
  if (lane == 0) {
    shared[simd] = top;
    shared[kSimd + simd] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float tops = lane < simds ? shared[lane] : kFloor;
  float sums = lane < simds ? shared[kSimd + lane] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o.top = simd_max(tops);
  o.sum = simd_sum(sums * exp2(tops - o.top));
  return o;
}

template <typename T>
[[max_total_threads_per_threadgroup(1024)]] kernel void powers(
    device const T* x [[buffer(0)]],
    device const float* weights [[buffer(1)]],  // 0: the row is not read
    device float* tops [[buffer(2)]],
    device float* sums [[buffer(3)]],
    device T* out [[buffer(4)]],
    constant long* sizes [[buffer(5)]],    // V, row stride of x, of out
    constant float* scale [[buffer(6)]],
    uint row [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]]) {
  threadgroup float shared[2 * kSimd];
  const uint V = uint(sizes[0]);
  device T* to = out + long(row) * sizes[2];
  if (weights[row] == 0.0f) {
    for (uint i = tid; i < V; i += threads) {
      to[i] = T(0.0f);
    }
    if (tid == 0) {
      tops[row] = 0.0f;
      sums[row] = 0.0f;
    }
    return;
  }
  device const T* from = x + long(row) * sizes[1];
  Online o = {kFloor, 0.0f};
  for (uint start = 0; start < V; start += threads * kReads) {
    uint i = start + tid * kReads;
    if (i + kReads <= V) {
      for (uint j = 0; j < kReads; ++j) {
        o = with(o, load(from, i + j, scale[0]));
      }
    } else {
      for (uint j = i; j < V; ++j) {
        o = with(o, load(from, j, scale[0]));
      }
    }
  }
  o = merge(o, shared, lane, simd, simds);
  for (uint i = tid; i < V; i += threads) {
    to[i] = T(exp2(load(from, i, scale[0]) - o.top));
  }
  if (tid == 0) {
    tops[row] = o.top;
    sums[row] = o.sum;
  }
}

#define INSTANTIATE(T) \
  template [[host_name("powers_" #T)]] [[kernel]] decltype(powers<T>) powers<T>;
INSTANTIATE(float)
INSTANTIATE(half)
INSTANTIATE(bfloat)
