// The terms of every divergence, by the formulas of blocks/terms.py: p is the teacher, q the student,
// f an entry of the sum, h = d f / d log q. Of a whole row sum(f) is the loss and
// h_k - q_k sum(h) its gradient. With kEntries (entries that may be clipped) f and h are those of
// the definition; otherwise both may differ by what cancels in the sum, and are then small where
// p and q agree.

// d = log p - log q, finite also where a side is -inf; no_p, no_q: that side's logit is -inf.
struct Entry {
  float p;
  float q;
  float log_p;
  float log_q;
  float d;
  bool no_p;
  bool no_q;
};

struct Terms {
  float f;
  float h;
};

// One side's softmax: log p = (x - shift) / temperature - log_sum.
struct Side {
  float shift;
  float log_sum;
};

METAL_FUNC Entry entry(float s, float t, Side of_s, Side of_t, float inv_t) {
  Entry e;
  e.no_q = s < kFloor;
  e.no_p = t < kFloor;
  float x = floored(s) - of_s.shift;
  float y = floored(t) - of_t.shift;
  e.log_q = x * inv_t - of_s.log_sum;
  e.log_p = y * inv_t - of_t.log_sum;
  e.q = precise::exp(e.log_q);
  e.p = precise::exp(e.log_p);
  // What the sides have in common cancels first, without rounding: their logits, where these lie
  // close together, else what each side's logits have in common.
  float apart = of_t.shift - of_s.shift;
  float d = fabs(apart) < 4.0f ? (floored(t) - floored(s)) - apart : y - x;
  e.d = d * inv_t - (of_t.log_sum - of_s.log_sum);
  return e;
}

// w log(.) where the logarithm is infinite if its argument is gone; 0 * anything = 0.
METAL_FUNC float weighed(float w, float log_value, bool gone) {
  return w == 0.0f ? 0.0f : (gone ? INFINITY : w * log_value);
}

METAL_FUNC float p_log_ratio(Entry e) {
  return weighed(e.p, e.d, e.no_q);
}

METAL_FUNC float q_log_ratio(Entry e) {
  return weighed(e.q, -e.d, e.no_p);
}

// q - p, from the logarithm of their ratio where they are near.
METAL_FUNC float difference(Entry e) {
  float far = -fabs(e.d);
  float larger = e.d > 0.0f ? e.p : -e.q;
  return far > -0.5f ? larger * expm1_small(far) : e.q - e.p;
}

// What a kind's a and 1 - a are called in DivergenceSpec; both from the host, which has more digits.
struct Beta {
  float a;
  float rest;
};

// m = beta a + (1 - beta) b, never zero, and (a - b) / m.
struct Mixture {
  float m;
  float excess;
};

METAL_FUNC Mixture mixture(float a, float b, Beta beta) {
  float m = beta.a * a + beta.rest * b;
  Mixture x;
  x.m = m < 1.18e-38f ? 1.18e-38f : m;  // the least normal number: devices flush smaller ones
  x.excess = (a - b) / x.m;
  return x;
}

// a log(a / m), given excess = a / m - 1.
METAL_FUNC float log_share(float a, float m, float excess) {
  float ratio = a / m;
  ratio = ratio < 1.18e-38f ? 1.18e-38f : ratio;
  return a * (fabs(excess) < 0.25f ? log1p_small(excess) : precise::log(ratio));
}

struct forward_kl {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    float less = difference(e);
    Terms x = {p_log_ratio(e) + (kEntries ? 0.0f : less), kEntries ? -e.p : less};
    return x;
  }
};

struct reverse_kl {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    float f = q_log_ratio(e);
    Terms x = {f - (kEntries ? 0.0f : difference(e)), f + (kEntries ? e.q : 0.0f)};
    return x;
  }
};

struct mixed_kl {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    Terms x = forward_kl::of(e, beta);
    Terms y = reverse_kl::of(e, beta);
    x.f = beta.a * x.f + beta.rest * y.f;
    x.h = beta.a * x.h + beta.rest * y.h;
    return x;
  }
};

struct soft_ce {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    Terms x = {weighed(e.p, -e.log_q, e.no_q), kEntries ? -e.p : difference(e)};
    return x;
  }
};

struct tvd {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    float less = difference(e);
    float slope = less < 0.0f ? -0.5f * e.q : less;  // NaN and 0 stay
    Terms x = {0.5f * fabs(less), less > 0.0f ? 0.5f * e.q : slope};
    return x;
  }
};

struct jsd {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    Mixture x = mixture(e.p, e.q, beta);
    float from_p = beta.a * log_share(e.p, x.m, beta.rest * x.excess);
    float from_q = beta.rest * log_share(e.q, x.m, -beta.a * x.excess);
    Terms y = {from_p + from_q, from_q};
    return y;
  }
};

struct skew_kl {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    float rest = beta.rest;
    Mixture x = mixture(e.p, e.q, beta);
    float f = log_share(e.p, x.m, rest * x.excess);
    Terms whole = {f - rest * (e.p - e.q), -rest * rest * (x.excess * e.q)};
    Terms single = {f, -rest * (e.p / x.m * e.q)};
    return kEntries ? single : whole;
  }
};

struct skew_reverse_kl {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    float rest = beta.rest;
    Mixture x = mixture(e.q, e.p, beta);
    float f = log_share(e.q, x.m, rest * x.excess);
    Terms whole = {f - rest * (e.q - e.p), f - beta.a * rest * (x.excess * e.q)};
    Terms single = {f, f + rest * (e.p / x.m * e.q)};
    return kEntries ? single : whole;
  }
};

// f = (a p + (1 - a) q - g) / (a (1 - a)), h = (q - g) / a, g = p^a q^(1-a).
struct alpha {
  static METAL_FUNC Terms of(Entry e, Beta beta) {
    bool p_larger = e.d > 0.0f;
    float larger = p_larger ? e.p : e.q;
    float far = -fabs(e.d);
    float power = p_larger ? beta.rest : beta.a;
    // near: all three less the larger of p and q
    float less = expm1_small(far);
    float less_g = expm1_small(far * power);
    float g = larger * precise::exp(far * power);
    bool near = far > -0.5f;
    float f = near ? larger * (power * less - less_g) : beta.a * e.p + beta.rest * e.q - g;
    float h = near ? larger * ((p_larger ? less : 0.0f) - less_g) : e.q - g;
    Terms x = {f / (beta.a * beta.rest), h / beta.a};
    return x;
  }
};
