// One side alone: log-sum-exp of a row of V logits, with and without some entries, and the softmax
// of the entries a support leaves out. common.metal comes first.
//
// A threadgroup owns a row: rows first, first + 1, ... Device memory per row: log_sums reads the
// row once, and the ids once a simdgroup; spread reads the row once and writes one, or only writes.

// log of an Online's sum; -inf for a sum of nothing but -inf.
METAL_FUNC float log_sum_of(Online o, float inv_t) {
  return o.m > kFloor ? o.m * inv_t + precise::log(o.s) : o.s - INFINITY;
}

// ids [N, K] ascend; those that are no column are V or larger. ints end with K (if 0, ids are not
// read). floats, of all these kernels: 1 / temperature.
kernel void log_sums(
    device const T* logits [[buffer(0)]],
    device const int* ids [[buffer(1)]],
    device float* all [[buffer(2)]],   // [N]
    device float* rest [[buffer(3)]],  // [N], without the ids
    constant long* ints [[buffer(4)]],
    constant float* floats [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint num_sg [[simdgroups_per_threadgroup]]) {
  threadgroup float slots[4 * kSimd];
  const uint V = uint(ints[0]);
  const uint K = uint(ints[4]);
  const long row = ints[2] + long(group);
  const float inv_t = floats[0];
  device const T* x = logits + row * ints[3];
  device const int* id = ids + row * long(K);
  Online kept = online_nothing();
  Online others = online_nothing();
  // a thread's columns ascend as the ids do: `at` is the first id not behind them, the k-th
  uint k = 0;
  uint at = K > 0 ? uint(id[0]) : V;
  for (uint i = tid * kReads; i < V; i += num_threads * kReads) {
    while (at < i) {
      ++k;
      at = k < K ? uint(id[k]) : V;
    }
    if (i + kReads <= V && at >= i + kReads) {
      others = online_add4(
          others, float(x[i]), float(x[i + 1]), float(x[i + 2]), float(x[i + 3]), inv_t);
      continue;
    }
    uint end = min(i + kReads, V);
    for (uint j = i; j < end; ++j) {
      if (at == j) {
        kept = online_add(kept, float(x[j]), inv_t);
        while (at <= j) {
          ++k;
          at = k < K ? uint(id[k]) : V;
        }
      } else {
        others = online_add(others, float(x[j]), inv_t);
      }
    }
  }
  put_online(slots, 0, kept, inv_t, lane, sg);
  put_online(slots, 2, others, inv_t, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  kept = get_online(slots, 0, inv_t, lane, num_sg);
  others = get_online(slots, 2, inv_t, lane, num_sg);
  if (tid == 0) {
    all[row] = log_sum_of(online_merge(kept, others, inv_t), inv_t);
    rest[row] = log_sum_of(others, inv_t);
  }
}

// out = factor exp(x / temperature - log_sum); zeros without reading where factor is 0. `out` may
// be `x`: each entry is read before it is written, by the same thread.
METAL_FUNC void write_spread(
    device const T* x,
    device T* out,
    float log_sum,
    float factor,
    constant long* ints,
    constant float* floats,
    uint tid,
    uint num_threads) {
  const uint V = uint(ints[0]);
  if (factor == 0.0f) {  // the same for all threads
    write_zeros(out, V, tid, num_threads);
    return;
  }
  const float inv_t = floats[0];
  for (uint i = tid * kReads; i < V; i += num_threads * kReads) {
    uint end = min(i + kReads, V);
    for (uint j = i; j < end; ++j) {
      out[j] = T(factor * precise::exp(float(x[j]) * inv_t - log_sum));
    }
  }
}

kernel void spread(
    device const T* logits [[buffer(0)]],
    device const float* log_sum [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    device T* out [[buffer(3)]],
    constant long* ints [[buffer(4)]],
    constant float* floats [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_spread(
      logits + row * ints[3],
      out + row * ints[4],
      log_sum[row],
      factor[row],
      ints,
      floats,
      tid,
      num_threads);
}

// Apple's compiler takes every buffer argument to overlap no other: in place is one argument.
kernel void spread_in_place(
    device T* logits [[buffer(0)]],
    device const float* log_sum [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    constant long* ints [[buffer(3)]],
    constant float* floats [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_spread(
      logits + row * ints[3],
      logits + row * ints[3],
      log_sum[row],
      factor[row],
      ints,
      floats,
      tid,
      num_threads);
}
