// Divergence of two rows of V logits, and its gradient for the student. The host has said what
// Kind is and whether entries are clipped (kEntries), and put common.metal and terms.metal first.
//
// A threadgroup owns a row: rows first, first + 1, ... of N. Device memory per row: the forward
// kernel reads both rows twice and writes kValues floats, the backward kernel reads both once and
// writes one. A row without weight, or without a factor, is not read.

constant constexpr uint kLoss = 0;
constant constexpr uint kHSum = 1;
constant constexpr uint kQLogSum = 2;
constant constexpr uint kPLogSum = 3;
constant constexpr uint kQEntropy = 4;
constant constexpr uint kPEntropy = 5;
constant constexpr uint kAgreement = 6;
constant constexpr uint kClipped = 7;
// for the backward kernels: what a row's softmax was made with, see Side
constant constexpr uint kQShift = 8;
constant constexpr uint kQSum = 9;
constant constexpr uint kPShift = 10;
constant constexpr uint kPSum = 11;
constant constexpr uint kValues = 12;

// A row of nothing but -inf has no softmax: NaN.
METAL_FUNC Side side(Online o) {
  Side x = {o.m, o.m > kFloor ? precise::log(o.s) : NAN};
  return x;
}

METAL_FUNC Terms clip(Terms x, float bound) {
  Terms cut = {bound, 0.0f};
  return kEntries && x.f > bound ? cut : x;
}

// floats, of all these kernels: 1 / temperature, beta, 1 - beta, bound of an entry.
kernel void divergence_forward(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* weights [[buffer(2)]],
    device float* values [[buffer(3)]],  // [kValues, N]
    constant long* ints [[buffer(4)]],
    constant float* floats [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint num_sg [[simdgroups_per_threadgroup]]) {
  threadgroup float slots[10 * kSimd];
  const uint V = uint(ints[0]);
  const long N = ints[1];
  const long row = ints[2] + long(group);
  if (weights[row] == 0.0f) {  // the same for all threads
    if (tid < kValues) {
      values[long(tid) * N + row] = 0.0f;
    }
    return;
  }
  const float inv_t = floats[0];
  const Beta beta = {floats[1], floats[2]};
  const float bound = floats[3];
  device const T* s = student + row * ints[3];
  device const T* t = teacher + row * ints[4];

  Online on_s = online_nothing();
  Online on_t = online_nothing();
  for (uint i = tid * kReads; i < V; i += num_threads * kReads) {
    if (i + kReads <= V) {
      on_s = online_add4(on_s, float(s[i]), float(s[i + 1]), float(s[i + 2]), float(s[i + 3]), inv_t);
      on_t = online_add4(on_t, float(t[i]), float(t[i + 1]), float(t[i + 2]), float(t[i + 3]), inv_t);
    } else {
      for (uint j = i; j < V; ++j) {
        on_s = online_add(on_s, float(s[j]), inv_t);
        on_t = online_add(on_t, float(t[j]), inv_t);
      }
    }
  }
  put_online(slots, 0, on_s, inv_t, lane, sg);
  put_online(slots, 2, on_t, inv_t, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  on_s = get_online(slots, 0, inv_t, lane, num_sg);
  on_t = get_online(slots, 2, inv_t, lane, num_sg);
  const Side of_s = side(on_s);
  const Side of_t = side(on_t);

  float f = 0.0f;
  float h = 0.0f;
  float q_entropy = 0.0f;
  float p_entropy = 0.0f;
  float agree = 0.0f;
  float clipped = 0.0f;
  for (uint i = tid * kReads; i < V; i += num_threads * kReads) {
    uint end = min(i + kReads, V);
    for (uint j = i; j < end; ++j) {
      float x = float(s[j]);
      float y = float(t[j]);
      Entry e = entry(x, y, of_s, of_t, inv_t);
      Terms whole = Kind::of(e, beta);
      Terms cut = clip(whole, bound);
      f += cut.f;
      h += cut.h;
      q_entropy -= weighed(e.q, e.log_q, false);
      p_entropy -= weighed(e.p, e.log_p, false);
      agree += x == on_s.m && y == on_t.m ? 1.0f : 0.0f;
      clipped += kEntries && whole.f > bound ? 1.0f : 0.0f;
    }
  }
  put_sum(slots, 4, f, lane, sg);
  put_sum(slots, 5, h, lane, sg);
  put_sum(slots, 6, q_entropy, lane, sg);
  put_sum(slots, 7, p_entropy, lane, sg);
  put_sum(slots, 8, agree, lane, sg);
  put_sum(slots, 9, clipped, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  f = get_sum(slots, 4, lane, num_sg);
  h = get_sum(slots, 5, lane, num_sg);
  q_entropy = get_sum(slots, 6, lane, num_sg);
  p_entropy = get_sum(slots, 7, lane, num_sg);
  agree = get_sum(slots, 8, lane, num_sg);
  clipped = get_sum(slots, 9, lane, num_sg);
  if (tid == 0) {
    device float* out = values + row;
    out[kLoss * N] = f;
    out[kHSum * N] = h;
    out[kQLogSum * N] = of_s.shift * inv_t + of_s.log_sum;
    out[kPLogSum * N] = of_t.shift * inv_t + of_t.log_sum;
    out[kQEntropy * N] = q_entropy;
    out[kPEntropy * N] = p_entropy;
    out[kAgreement * N] = agree > 0.0f ? 1.0f : 0.0f;
    out[kClipped * N] = clipped > 0.0f ? 1.0f : 0.0f;
    out[kQShift * N] = of_s.shift;
    out[kQSum * N] = of_s.log_sum;
    out[kPShift * N] = of_t.shift;
    out[kPSum * N] = of_t.log_sum;
  }
}

// The cross-entropy of the logits at temperature 1: share * (softmax - 1 at the label).
struct Hard {
  uint label;
  float log_sum;
  float share;
};

// out = factor (h - q H) + the hard part. `out` may be `s`: each entry is read before it is
// written, by the same thread.
METAL_FUNC void write_gradient(
    device const T* s,
    device const T* t,
    device T* out,
    float factor,
    Hard hard,
    device const float* values,  // of this row, N apart
    constant long* ints,
    constant float* floats,
    uint tid,
    uint num_threads) {
  const uint V = uint(ints[0]);
  const long N = ints[1];
  if (factor == 0.0f && hard.share == 0.0f) {  // the same for all threads
    write_zeros(out, V, tid, num_threads);
    return;
  }
  const float inv_t = floats[0];
  const Beta beta = {floats[1], floats[2]};
  const float bound = floats[3];
  const Side of_s = {values[kQShift * N], values[kQSum * N]};
  const Side of_t = {values[kPShift * N], values[kPSum * N]};
  const float H = values[kHSum * N];
  for (uint i = tid * kReads; i < V; i += num_threads * kReads) {
    uint end = min(i + kReads, V);
    for (uint j = i; j < end; ++j) {
      float x = float(s[j]);
      float g = 0.0f;
      if (factor != 0.0f) {
        Entry e = entry(x, float(t[j]), of_s, of_t, inv_t);
        g = factor * (clip(Kind::of(e, beta), bound).h - e.q * H);
      }
      if (hard.share != 0.0f) {
        g += hard.share * (precise::exp(x - hard.log_sum) - (j == hard.label ? 1.0f : 0.0f));
      }
      out[j] = T(g);
    }
  }
}

METAL_FUNC Hard no_hard() {
  Hard x = {0, 0.0f, 0.0f};
  return x;
}

METAL_FUNC Hard hard_of(
    device const long* labels, device const float* log_sums, device const float* shares, long row) {
  Hard x = {uint(labels[row]), log_sums[row], shares[row]};
  return x;
}


kernel void divergence_backward(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    device const float* values [[buffer(3)]],
    device T* out [[buffer(4)]],
    constant long* ints [[buffer(5)]],
    constant float* floats [[buffer(6)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_gradient(
      student + row * ints[3],
      teacher + row * ints[4],
      out + row * ints[5],
      factor[row],
      no_hard(),
      values + row,
      ints,
      floats,
      tid,
      num_threads);
}

// Apple's compiler takes every buffer argument to overlap no other: in place is one argument.
kernel void divergence_backward_in_place(
    device T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    device const float* values [[buffer(3)]],
    constant long* ints [[buffer(4)]],
    constant float* floats [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_gradient(
      student + row * ints[3],
      teacher + row * ints[4],
      student + row * ints[3],
      factor[row],
      no_hard(),
      values + row,
      ints,
      floats,
      tid,
      num_threads);
}

kernel void divergence_backward_hard(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    device const float* values [[buffer(3)]],
    device const long* labels [[buffer(4)]],
    device const float* log_sums [[buffer(5)]],
    device const float* shares [[buffer(6)]],
    device T* out [[buffer(7)]],
    constant long* ints [[buffer(8)]],
    constant float* floats [[buffer(9)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_gradient(
      student + row * ints[3],
      teacher + row * ints[4],
      out + row * ints[5],
      factor[row],
      hard_of(labels, log_sums, shares, row),
      values + row,
      ints,
      floats,
      tid,
      num_threads);
}

kernel void divergence_backward_hard_in_place(
    device T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* factor [[buffer(2)]],
    device const float* values [[buffer(3)]],
    device const long* labels [[buffer(4)]],
    device const float* log_sums [[buffer(5)]],
    device const float* shares [[buffer(6)]],
    constant long* ints [[buffer(7)]],
    constant float* floats [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const long row = ints[2] + long(group);
  write_gradient(
      student + row * ints[3],
      teacher + row * ints[4],
      student + row * ints[3],
      factor[row],
      hard_of(labels, log_sums, shares, row),
      values + row,
      ints,
      floats,
      tid,
      num_threads);
}
