// Metal's arithmetic functions; noise stays within the error that Metal allows each of them.
#pragma once
#include "msl_types.h"

namespace metal {

#define MSL_UNARY(name, ulps) \
  inline float name(float x) { return msl::msl_noise(std::name(x), ulps); }
namespace precise {
MSL_UNARY(exp, 4)
MSL_UNARY(exp2, 4)
MSL_UNARY(log, 4)
MSL_UNARY(log2, 4)
MSL_UNARY(tanh, 5)
MSL_UNARY(sin, 4)
MSL_UNARY(cos, 4)
inline float sqrt(float x) { return std::sqrt(x); }
inline float rsqrt(float x) { return msl::msl_noise(1.0f / std::sqrt(x), 2); }
inline float pow(float x, float y) { return msl::msl_noise(std::pow(x, y), 16); }
inline float atan2(float y, float x) { return msl::msl_noise(std::atan2(y, x), 6); }
}  // namespace precise
namespace fast {
MSL_UNARY(exp, 3 + std::floor(std::fabs(2 * x)))
MSL_UNARY(exp2, 3 + std::floor(std::fabs(2 * x)))
MSL_UNARY(log, 8)
MSL_UNARY(log2, 8)
}  // namespace fast
using precise::atan2;
using precise::cos;
using precise::exp;
using precise::exp2;
using precise::log;
using precise::log2;
using precise::pow;
using precise::rsqrt;
using precise::sin;
using precise::sqrt;
using precise::tanh;

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float fmod(float a, float b) { return std::fmod(a, b); }
inline float ldexp(float a, int e) { return std::ldexp(a, e); }
inline float floor(float x) { return std::floor(x); }
inline float ceil(float x) { return std::ceil(x); }
inline float round(float x) { return std::round(x); }
inline float rint(float x) { return std::rint(x); }
inline float trunc(float x) { return std::trunc(x); }
inline float fabs(float x) { return std::fabs(x); }
inline float abs(float x) { return std::fabs(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float copysign(float x, float y) { return std::copysign(x, y); }
// a NaN operand loses, in all four
inline float fmax(float a, float b) { return std::fmax(a, b); }
inline float fmin(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
#define MSL_EXTREMES(T)                             \
  inline T max(T a, T b) { return a > b ? a : b; }  \
  inline T min(T a, T b) { return a < b ? a : b; }
MSL_EXTREMES(int) MSL_EXTREMES(uint) MSL_EXTREMES(long) MSL_EXTREMES(ulong) MSL_EXTREMES(ushort)
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
// by bits: must hold under -ffast-math too
inline bool isnan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }
inline bool isinf(float x) { return (as_type<uint>(x) & 0x7fffffffu) == 0x7f800000u; }
inline bool isunordered(float a, float b) { return isnan(a) || isnan(b); }
inline float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }
inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
template <typename T>
inline T popcount(T x) {
  return T(__builtin_popcountll(uint64_t(x)));
}
template <typename T>
inline T ctz(T x) {
  return x ? T(__builtin_ctzll(uint64_t(x))) : T(8 * sizeof(T));
}

}  // namespace metal
