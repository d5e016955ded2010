// Barriers and simdgroup functions: each waits until the lanes that it concerns have arrived.
#pragma once
#include "msl_math.h"

#define MSL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4
};
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(unsigned(a) | unsigned(b));
}
inline void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  msl::msl_threadgroup_barrier(unsigned(flags), {"threadgroup_barrier", file, line});
}
inline void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  msl::msl_simdgroup_barrier(unsigned(flags), {"simdgroup_barrier", file, line});
}

// What the lanes of this thread's simdgroup gave to one call.
template <typename T>
struct msl_values {
  static_assert(sizeof(T) <= msl::slot, "too large for a simdgroup function");
  const unsigned char* slots;
  uint32_t present;
  msl::Site site;
  msl_values(T value, const char* call, const char* file, int line) : site{call, file, line} {
    slots = msl::msl_exchange(&value, sizeof(T), site, &present);
  }
  bool has(unsigned lane) const { return lane < msl::lanes && (present >> lane & 1); }
  T operator[](unsigned lane) const {
    T value;
    memcpy(static_cast<void*>(&value), slots + msl::slot * lane, sizeof(T));
    return value;
  }
  T at(unsigned lane) const {  // undefined in Metal unless the lane takes part
    if (has(lane)) return (*this)[lane];
    msl::msl_inactive_lane(site, lane);
    T poison;
    memset(static_cast<void*>(&poison), 0xff, sizeof(T));
    return poison;
  }
  template <typename F>
  T reduce(F combine) const {
    T v[msl::lanes];
    int n = 0;
    for (int i = 0; i < msl::lanes; ++i)
      if (has(i)) v[n++] = (*this)[i];
    const unsigned order = msl::msl_sum_order();
    for (int i = 1; order == 1 && i < n; ++i) v[0] = combine(v[0], v[i]);
    for (int rest; order != 1 && n > 1; n = rest) {
      rest = (n + 1) / 2;  // an odd one stays as it is
      for (int i = 0; i < n / 2; ++i)
        v[i] = order == 0 ? combine(v[i], v[rest + i]) : combine(v[2 * i], v[2 * i + 1]);
      if (order == 2 && n % 2) v[n / 2] = v[n - 1];
    }
    return v[0];
  }
};

template <typename T>
constexpr bool msl_reduces = std::is_same_v<T, float> || std::is_same_v<T, half> ||
                             (std::is_integral_v<T> && sizeof(T) <= 4);
#define MSL_REDUCTION(name, result)                                                \
  template <typename T>                                                            \
  inline T name(T value, MSL_SITE) {                                               \
    static_assert(msl_reduces<T>, #name ": Metal has it neither for bfloat nor for 64 bits"); \
    return msl_values<T>(value, #name, file, line).reduce([](T a, T b) { return T(result); }); \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
// a NaN operand loses, as in fmax and fmin
MSL_REDUCTION(simd_max, a != a ? b : (b != b || a > b ? a : b))
MSL_REDUCTION(simd_min, a != a ? b : (b != b || a < b ? a : b))

inline uint32_t msl_votes(bool vote, const char* call, const char* file, int line,
                          uint32_t* present) {
  msl_values<bool> votes(vote, call, file, line);
  uint32_t bits = 0;
  for (int i = 0; i < msl::lanes; ++i)
    if (votes.has(i)) bits |= uint32_t(votes[i]) << i;
  *present = votes.present;
  return bits;
}
inline bool simd_any(bool vote, MSL_SITE) {
  uint32_t present;
  return msl_votes(vote, "simd_any", file, line, &present) != 0;
}
inline bool simd_all(bool vote, MSL_SITE) {
  uint32_t present;
  uint32_t votes = msl_votes(vote, "simd_all", file, line, &present);
  return votes == present;
}
struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
inline simd_vote simd_ballot(bool vote, MSL_SITE) {
  uint32_t present;
  return {msl_votes(vote, "simd_ballot", file, line, &present)};
}
inline bool simd_is_first(MSL_SITE) {
  uint32_t present;
  msl_votes(true, "simd_is_first", file, line, &present);
  return msl::msl_thread().thread_index_in_simdgroup == unsigned(__builtin_ctz(present));
}
template <typename T>
inline T simd_broadcast_first(T value, MSL_SITE) {
  msl_values<T> values(value, "simd_broadcast_first", file, line);
  return values[unsigned(__builtin_ctz(values.present))];
}
#define MSL_SHUFFLE(name, source)                                            \
  template <typename T>                                                      \
  inline T name(T value, ushort argument, MSL_SITE) {                        \
    msl_values<T> values(value, #name, file, line);                          \
    unsigned lane = msl::msl_thread().thread_index_in_simdgroup;             \
    (void)lane;                                                              \
    return values.at(unsigned(source));                                      \
  }
MSL_SHUFFLE(simd_shuffle, argument)
MSL_SHUFFLE(simd_broadcast, argument)
MSL_SHUFFLE(simd_shuffle_xor, lane ^ argument)
MSL_SHUFFLE(simd_shuffle_down, lane + argument)
MSL_SHUFFLE(simd_shuffle_up, lane - argument)
template <typename T>
inline T simd_shuffle_and_fill_down(T value, T fill, ushort delta, MSL_SITE) {
  msl_values<T> values(value, "simd_shuffle_and_fill_down", file, line);
  unsigned lane = msl::msl_thread().thread_index_in_simdgroup + delta;
  return lane < msl::lanes ? values.at(lane) : fill;
}

}  // namespace metal
