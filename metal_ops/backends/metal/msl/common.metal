// What every kernel needs: loops over a row, sums over a threadgroup, exact small differences.
//
// The host puts `using T = half;` or the like before this text: T is the dtype of the rows. It
// passes every kernel its tensors, then `ints`: width of a row, N, the first row of this dispatch,
// the row strides of the tensors of T in their order, and more where a kernel says so.
// A threadgroup owns a row. Its size is a multiple of 32 and at most 1024; a thread reads kReads
// neighbours at a time, so that a simdgroup reads 128 in a row. Everything is counted in float.
// ASCII only; MSL 3.1, that is C++14 without lambdas; nothing of it depends on fast math.

constant constexpr uint kSimd = 32;          // the host refuses a device of another width
constant constexpr uint kReads = 4;
constant constexpr float kFloor = -3.0e38f;  // in place of -inf: no inf - inf in a maximum

METAL_FUNC float floored(float x) {
  return x < kFloor ? kFloor : x;  // NaN stays
}

METAL_FUNC void write_zeros(device T* out, uint width, uint tid, uint num_threads) {
  for (uint i = tid; i < width; i += num_threads) {
    out[i] = T(0.0f);
  }
}

// exp(x) - 1 for -0.5 <= x <= 0.5, by Taylor's series: what it leaves out is 1e-8 of the result.
METAL_FUNC float expm1_small(float x) {
  float r = 1.0f + x * (1.0f / 8.0f);
  r = 1.0f + x * (1.0f / 7.0f) * r;
  r = 1.0f + x * (1.0f / 6.0f) * r;
  r = 1.0f + x * (1.0f / 5.0f) * r;
  r = 1.0f + x * (1.0f / 4.0f) * r;
  r = 1.0f + x * (1.0f / 3.0f) * r;
  r = 1.0f + x * 0.5f * r;
  return x * r;
}

// log(1 + x) for -0.25 <= x <= 0.25: 2 atanh(z) with z = x / (2 + x), |z| <= 1/7, to z^9.
METAL_FUNC float log1p_small(float x) {
  float z = x / (2.0f + x);
  float w = z * z;
  float r = 1.0f / 7.0f + w * (1.0f / 9.0f);
  r = 1.0f / 5.0f + w * r;
  r = 1.0f / 3.0f + w * r;
  return 2.0f * z + 2.0f * z * w * r;
}

// ---- log-sum-exp in one pass ----

// The sum of exp((x - m) inv_t) over some entries x, of which m is the largest, or kFloor.
// A NaN is no largest and spoils the sum, as does +inf.
struct Online {
  float m;
  float s;
};

METAL_FUNC Online online_nothing() {
  Online o = {kFloor, 0.0f};
  return o;
}

METAL_FUNC Online online_merge(Online a, Online b, float inv_t) {
  Online o;
  o.m = b.m > a.m ? b.m : a.m;
  o.s = a.s * precise::exp((a.m - o.m) * inv_t) + b.s * precise::exp((b.m - o.m) * inv_t);
  return o;
}

METAL_FUNC Online online_add(Online o, float x, float inv_t) {
  Online one = {floored(x), 1.0f};
  return online_merge(o, one, inv_t);
}

METAL_FUNC Online online_add4(Online o, float x0, float x1, float x2, float x3, float inv_t) {
  float c0 = floored(x0);
  float c1 = floored(x1);
  float c2 = floored(x2);
  float c3 = floored(x3);
  float m = fmax(fmax(c0, c1), fmax(c2, c3));  // without NaN
  m = m > o.m ? m : o.m;
  o.s = o.s * precise::exp((o.m - m) * inv_t) +
      ((precise::exp((c0 - m) * inv_t) + precise::exp((c1 - m) * inv_t)) +
       (precise::exp((c2 - m) * inv_t) + precise::exp((c3 - m) * inv_t)));
  o.m = m;
  return o;
}

// ---- over a threadgroup ----
// `slots` holds kSimd floats for each number that is summed. First every number is put, then one
// barrier, then each simdgroup gets all it needs. No slot is used twice, so none needs a second.

METAL_FUNC void put(threadgroup float* slots, uint slot, float v, uint lane, uint sg) {
  if (lane == 0) {
    slots[slot * kSimd + sg] = v;
  }
}

METAL_FUNC void put_sum(threadgroup float* slots, uint slot, float v, uint lane, uint sg) {
  put(slots, slot, simd_sum(v), lane, sg);
}

METAL_FUNC float get_sum(threadgroup const float* slots, uint slot, uint lane, uint num_sg) {
  return simd_sum(lane < num_sg ? slots[slot * kSimd + lane] : 0.0f);
}

// Takes two slots.
METAL_FUNC void put_online(
    threadgroup float* slots, uint slot, Online o, float inv_t, uint lane, uint sg) {
  float m = simd_max(o.m);
  put(slots, slot, m, lane, sg);
  put_sum(slots, slot + 1, o.s * precise::exp((o.m - m) * inv_t), lane, sg);
}

METAL_FUNC Online get_online(
    threadgroup const float* slots, uint slot, float inv_t, uint lane, uint num_sg) {
  float m = lane < num_sg ? slots[slot * kSimd + lane] : kFloor;
  float s = lane < num_sg ? slots[(slot + 1) * kSimd + lane] : 0.0f;
  Online o;
  o.m = simd_max(m);
  o.s = simd_sum(s * precise::exp((m - o.m) * inv_t));
  return o;
}
