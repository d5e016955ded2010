// Difference of two rows of H hidden states, by the formulas of blocks/hidden.py: the mean square of
// d = s - t, and the cosine distance 1 - s.t / (a b), a = max(|s|, 1e-8), b = max(|t|, 1e-8).
// common.metal comes first.
//
// A threadgroup owns a row: rows first, first + 1, ... Device memory per row: mse reads both rows
// once, cosine twice; their gradients read both once and write one. Rows without weight: nothing.

constant constexpr float kNormMin = 1.0e-8f;

// 1 - |s / a|^2 of a row of length `norm`: 0 but for rows shorter than kNormMin.
METAL_FUNC float shortness(float norm) {
  float ratio = norm / kNormMin;
  return norm < kNormMin ? (1.0f - ratio) * (1.0f + ratio) : 0.0f;
}

// A row made of s, d and t.
struct Mix {
  float of_s;
  float of_d;
  float of_t;
};

// w with u - v = w / a, u = s / a and v = t / b. Lengths within a factor of two of each other give
// d - k t, k = (a - b) / b: then no error is larger than one of d.
METAL_FUNC Mix mix_of(float a, float b, float apart) {
  bool near = a <= 2.0f * b && b <= 2.0f * a;
  Mix w = {near ? 0.0f : 1.0f, near ? 1.0f : 0.0f, near ? -apart / b : -a / b};
  return w;
}

kernel void mse(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* weights [[buffer(2)]],
    device float* loss [[buffer(3)]],
    constant long* ints [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint num_sg [[simdgroups_per_threadgroup]]) {
  threadgroup float slots[kSimd];
  const uint H = uint(ints[0]);
  const long row = ints[2] + long(group);
  if (weights[row] == 0.0f) {  // the same for all threads
    if (tid == 0) {
      loss[row] = 0.0f;
    }
    return;
  }
  device const T* s = student + row * ints[3];
  device const T* t = teacher + row * ints[4];
  float square = 0.0f;
  for (uint i = tid * kReads; i < H; i += num_threads * kReads) {
    uint end = min(i + kReads, H);
    for (uint j = i; j < end; ++j) {
      float d = float(s[j]) - float(t[j]);
      square += d * d;
    }
  }
  put_sum(slots, 0, square, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  square = get_sum(slots, 0, lane, num_sg);
  if (tid == 0) {
    loss[row] = square / float(H);
  }
}

// saved [4, N]: loss, |s|, |t| and a - b.
kernel void cosine(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* weights [[buffer(2)]],
    device float* saved [[buffer(3)]],
    constant long* ints [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint num_sg [[simdgroups_per_threadgroup]]) {
  threadgroup float slots[4 * kSimd];
  const uint H = uint(ints[0]);
  const long N = ints[1];
  const long row = ints[2] + long(group);
  if (weights[row] == 0.0f) {  // the same for all threads
    if (tid < 4) {
      saved[long(tid) * N + row] = 0.0f;
    }
    return;
  }
  device const T* s = student + row * ints[3];
  device const T* t = teacher + row * ints[4];
  float ss = 0.0f;
  float tt = 0.0f;
  float apart = 0.0f;
  for (uint i = tid * kReads; i < H; i += num_threads * kReads) {
    uint end = min(i + kReads, H);
    for (uint j = i; j < end; ++j) {
      float x = float(s[j]);
      float y = float(t[j]);
      ss += x * x;
      tt += y * y;
      apart += (x - y) * (x + y);
    }
  }
  put_sum(slots, 0, ss, lane, sg);
  put_sum(slots, 1, tt, lane, sg);
  put_sum(slots, 2, apart, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float s_norm = precise::sqrt(get_sum(slots, 0, lane, num_sg));
  const float t_norm = precise::sqrt(get_sum(slots, 1, lane, num_sg));
  apart = get_sum(slots, 2, lane, num_sg);
  const float a = s_norm < kNormMin ? kNormMin : s_norm;
  const float b = t_norm < kNormMin ? kNormMin : t_norm;
  // of lengths that were raised the difference is that of two numbers
  apart = s_norm < kNormMin || t_norm < kNormMin ? a - b : apart / (a + b);
  const Mix w = mix_of(a, b, apart);
  float square = 0.0f;
  for (uint i = tid * kReads; i < H; i += num_threads * kReads) {
    uint end = min(i + kReads, H);
    for (uint j = i; j < end; ++j) {
      float x = float(s[j]);
      float y = float(t[j]);
      float z = (w.of_s * x + w.of_d * (x - y) + w.of_t * y) / a;
      square += z * z;
    }
  }
  put_sum(slots, 3, square, lane, sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  square = get_sum(slots, 3, lane, num_sg);
  if (tid == 0) {
    device float* out = saved + row;
    out[0] = 0.5f * (square + shortness(s_norm) + shortness(t_norm));
    out[N] = s_norm;
    out[2 * N] = t_norm;
    out[3 * N] = apart;
  }
}

kernel void mse_gradient(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* weights [[buffer(2)]],
    device T* out [[buffer(3)]],
    constant long* ints [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const uint H = uint(ints[0]);
  const long row = ints[2] + long(group);
  const float weight = weights[row];
  device T* g = out + row * ints[5];
  if (weight == 0.0f) {  // the same for all threads
    write_zeros(g, H, tid, num_threads);
    return;
  }
  const float factor = weight * (2.0f / float(H));
  device const T* s = student + row * ints[3];
  device const T* t = teacher + row * ints[4];
  for (uint i = tid * kReads; i < H; i += num_threads * kReads) {
    uint end = min(i + kReads, H);
    for (uint j = i; j < end; ++j) {
      g[j] = T(factor * (float(s[j]) - float(t[j])));
    }
  }
}

// (w - loss s) / a^2; -t / (a b) for a shorter s, whose a is constant.
kernel void cosine_gradient(
    device const T* student [[buffer(0)]],
    device const T* teacher [[buffer(1)]],
    device const float* weights [[buffer(2)]],
    device const float* saved [[buffer(3)]],
    device T* out [[buffer(4)]],
    constant long* ints [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  const uint H = uint(ints[0]);
  const long N = ints[1];
  const long row = ints[2] + long(group);
  const float weight = weights[row];
  device T* g = out + row * ints[5];
  if (weight == 0.0f) {  // the same for all threads
    write_zeros(g, H, tid, num_threads);
    return;
  }
  const float loss = saved[row];
  const float s_norm = saved[N + row];
  const float t_norm = saved[2 * N + row];
  const float a = s_norm < kNormMin ? kNormMin : s_norm;
  const float b = t_norm < kNormMin ? kNormMin : t_norm;
  Mix w = mix_of(a, b, saved[3 * N + row]);
  w.of_s -= loss;
  if (s_norm < kNormMin) {
    w.of_s = 0.0f;
    w.of_d = 0.0f;
    w.of_t = -a / b;
  }
  // one division after the other: a^2 may be too small or too large for a float
  const float scale = weight / a;
  device const T* s = student + row * ints[3];
  device const T* t = teacher + row * ints[4];
  for (uint i = tid * kReads; i < H; i += num_threads * kReads) {
    uint end = min(i + kReads, H);
    for (uint j = i; j < end; ++j) {
      float x = float(s[j]);
      float y = float(t[j]);
      float z = w.of_s * (x / a) + w.of_d * ((x - y) / a) + w.of_t * (y / a);
      g[j] = T(scale * z);
    }
  }
}
