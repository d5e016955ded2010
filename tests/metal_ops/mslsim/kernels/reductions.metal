// The reductions of PyTorch's own Metal kernels, from the headers in its wheel.
#include <c10/metal/reduction_utils.h>
#include <metal_stdlib>
using namespace metal;

template <typename T>
kernel void reductions(
    device const T* x [[buffer(0)]],
    device float* out [[buffer(1)]],  // of each group: sum, product, largest, least, where largest
    uint i [[thread_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint group [[threadgroup_position_in_grid]],
    uint threads [[threads_per_threadgroup]]) {
  threadgroup float sums[32];
  threadgroup float products[32];
  threadgroup T largest[32];
  threadgroup T least[32];
  threadgroup T values[32];
  threadgroup uint places[32];
  float sum = c10::metal::threadgroup_sum(sums, x[i], tid, threads);
  float product = c10::metal::threadgroup_prod(products, T(float(x[i]) > 60.0f ? 2.0f : 1.0f), tid, threads);
  float high = float(c10::metal::threadgroup_max(largest, x[i], tid, threads));
  float low = float(c10::metal::threadgroup_min(least, x[i], tid, threads));
  uint place = c10::metal::threadgroup_argmax(values, places, x[i], tid, tid, threads);
  if (tid == 0) {
    out[5 * group] = sum;
    out[5 * group + 1] = product;
    out[5 * group + 2] = high;
    out[5 * group + 3] = low;
    out[5 * group + 4] = float(place);
  }
}

template [[host_name("reductions_float")]] [[kernel]] decltype(reductions<float>) reductions<float>;
template [[host_name("reductions_half")]] [[kernel]] decltype(reductions<half>) reductions<half>;
template [[host_name("reductions_bfloat")]] [[kernel]] decltype(reductions<bfloat>) reductions<bfloat>;
