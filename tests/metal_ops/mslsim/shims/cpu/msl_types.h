// Metal's types on the host: what the kernels and c10/metal's reductions use of them.
#pragma once
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "runtime.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
typedef __fp16 half;  // all that this compiler has in C++
#else
typedef _Float16 half;
#endif

struct bfloat {  // to float implicitly, from float only explicitly: the rule of Metal 3.1
  uint16_t bits;
  bfloat() = default;
  template <typename T, std::enable_if_t<std::is_arithmetic<T>::value, bool> = true>
  explicit bfloat(T x) {
    float f = float(x);
    uint32_t u;
    memcpy(&u, &f, 4);
    bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};

#undef INFINITY
#undef NAN
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define M_SQRT2_F 1.41421356237309504880f
#define METAL_FUNC inline __attribute__((always_inline))

// Vectors by name only, without swizzles; packed ones are aligned like their elements.
template <typename T>
struct alignas(2 * sizeof(T)) msl_vec2 {
  T x, y;
  msl_vec2() = default;
  explicit msl_vec2(T a) : x(a), y(a) {}
  msl_vec2(T a, T b) : x(a), y(b) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) msl_vec3 {
  T x, y, z;
  msl_vec3() = default;
  explicit msl_vec3(T a) : x(a), y(a), z(a) {}
  msl_vec3(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <typename T>
struct msl_packed4 {
  T x, y, z, w;
};
template <typename T>
struct alignas(4 * sizeof(T)) msl_vec4 {
  T x, y, z, w;
  msl_vec4() = default;
  explicit msl_vec4(T a) : x(a), y(a), z(a), w(a) {}
  msl_vec4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  msl_vec4(const msl_packed4<T>& p) : x(p.x), y(p.y), z(p.z), w(p.w) {}
  template <typename U>
  explicit msl_vec4(const msl_vec4<U>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  template <typename U>
  explicit msl_vec4(const msl_packed4<U>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  operator msl_packed4<T>() const { return {x, y, z, w}; }
};
#define MSL_OPERATOR(op)                                                     \
  template <typename T>                                                      \
  inline msl_vec2<T> operator op(msl_vec2<T> a, msl_vec2<T> b) {             \
    return {T(a.x op b.x), T(a.y op b.y)};                                   \
  }                                                                          \
  template <typename T>                                                      \
  inline msl_vec4<T> operator op(msl_vec4<T> a, msl_vec4<T> b) {             \
    return {T(a.x op b.x), T(a.y op b.y), T(a.z op b.z), T(a.w op b.w)};     \
  }                                                                          \
  template <typename T>                                                      \
  inline msl_vec4<T> operator op(msl_vec4<T> a, T b) {                       \
    return {T(a.x op b), T(a.y op b), T(a.z op b), T(a.w op b)};             \
  }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#define MSL_VECTORS(T)       \
  typedef msl_vec2<T> T##2;  \
  typedef msl_vec3<T> T##3;  \
  typedef msl_vec4<T> T##4;  \
  typedef msl_packed4<T> packed_##T##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat)
MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint)

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

namespace metal {
using ::bfloat;
using ::half;
using std::declval;
using std::enable_if_t;
using std::is_integral_v;
using std::is_same_v;
using std::is_signed_v;
template <typename T>
constexpr bool is_small_float = std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <typename T>
constexpr bool is_floating_point_v = std::is_floating_point_v<T> || is_small_float<T>;
template <typename T>
constexpr bool is_scalar_v = std::is_scalar_v<T> || is_small_float<T>;
template <typename T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<bfloat> {
  static bfloat infinity() { return as_type<bfloat>(uint16_t(0x7f80)); }
  static bfloat quiet_NaN() { return as_type<bfloat>(uint16_t(0x7fc0)); }
  static bfloat max() { return as_type<bfloat>(uint16_t(0x7f7f)); }
  static bfloat lowest() { return as_type<bfloat>(uint16_t(0xff7f)); }
};
template <>
struct numeric_limits<half> {
  static half infinity() { return as_type<half>(uint16_t(0x7c00)); }
  static half quiet_NaN() { return as_type<half>(uint16_t(0x7e00)); }
  static half max() { return as_type<half>(uint16_t(0x7bff)); }
  static half lowest() { return as_type<half>(uint16_t(0xfbff)); }
};
template <typename T, unsigned N>
struct array {
  T elements[N];
  T& operator[](size_t i) { return elements[i]; }
  const T& operator[](size_t i) const { return elements[i]; }
};
}  // namespace metal
