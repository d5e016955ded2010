// One kernel for each thing that only a small kernel shows: see test_checker.py.
#include <metal_stdlib>
using namespace metal;

// Each thread hands its value to the next through threadgroup memory, in whole simdgroups only.
kernel void rotate(
    device const float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint tid [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  threadgroup float shared[1024];
  shared[tid] = x[tid];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[tid] = shared[tid + 1 < threads ? tid + 1 : 0];
}

// The sum of each simdgroup, by every lane of it.
kernel void simd_sums(
    device const float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  out[i] = simd_sum(x[i]);
}

// A group writes, then its threads read what the others wrote, in device memory.
kernel void through_device(
    device float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint i [[thread_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  x[i] = float(tid);
  threadgroup_barrier(mem_flags::mem_device);
  out[i] = x[i - tid + (tid + 1 < threads ? tid + 1 : 0)];
}

// A simdgroup's lanes exchange through threadgroup memory.
kernel void within_simdgroups(
    device const float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint tid [[thread_position_in_threadgroup]]) {
  threadgroup float shared[1024];
  shared[tid] = x[tid];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[tid] = shared[tid ^ 1];
}

// Four elements at a time.
kernel void fours(
    device const float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant long* ints [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  device const float4* from = (device const float4*)(x + ints[0]);
  float4 v = from[i];
  out[4 * i] = v.x;
  out[4 * i + 1] = v.y;
  out[4 * i + 2] = v.z;
  out[4 * i + 3] = v.w;
}

// Positions of a thread in a grid of two dimensions.
kernel void positions(
    device int* out [[buffer(0)]],
    uint2 at [[thread_position_in_grid]],
    uint2 all [[threads_per_grid]],
    uint2 group [[threadgroup_position_in_grid]],
    uint2 size [[threads_per_threadgroup]],
    uint flat [[thread_index_in_threadgroup]]) {
  device int* mine = out + 5 * (at.y * all.x + at.x);
  mine[0] = int(group.x);
  mine[1] = int(group.y);
  mine[2] = int(size.x);
  mine[3] = int(size.y);
  mine[4] = int(flat);
}

// One number of the host's, everywhere.
kernel void fill(
    device int* out [[buffer(0)]],
    constant long* ints [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  out[i] = int(ints[0]);
}

// Twice x / 4, and exp x.
kernel void arithmetic(
    device const float* x [[buffer(0)]],
    device float* halves [[buffer(1)]],
    device float* exps [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  halves[i] = 2.0f * (0.25f * x[i]);
  exps[i] = precise::exp(x[i]);
}
