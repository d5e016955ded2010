// Metal as far as clang can check it: address spaces, types, declarations. Nothing here runs.
#pragma once
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef _Float16 half;
typedef __bf16 bfloat;  // no arithmetic, no implicit conversion from float
#define MSL_VECTORS(T)                                      \
  typedef T T##2 __attribute__((ext_vector_type(2)));       \
  typedef T T##3 __attribute__((ext_vector_type(3)));       \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(uint) MSL_VECTORS(int) MSL_VECTORS(ushort)

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define METAL_FUNC inline __attribute__((always_inline))

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel

threadgroup void* msl_threadgroup_memory();

namespace metal {
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <typename T, typename U>
constexpr bool is_same_v = __is_same(T, U);
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
constexpr bool is_floating_point_v = __is_floating_point(T);

#define MSL_UNARY(name) float name(float);
#define MSL_BINARY(name) float name(float, float);
namespace precise {
MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(log) MSL_UNARY(log2) MSL_UNARY(sqrt) MSL_UNARY(rsqrt)
MSL_UNARY(tanh) MSL_BINARY(pow)
}
namespace fast {
MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(log) MSL_UNARY(log2)
}
using precise::exp;
using precise::exp2;
using precise::log;
using precise::log2;
using precise::pow;
using precise::rsqrt;
using precise::sqrt;
using precise::tanh;
MSL_UNARY(fabs) MSL_UNARY(floor) MSL_UNARY(ceil) MSL_UNARY(round) MSL_UNARY(rint)
MSL_BINARY(fmax) MSL_BINARY(fmin) MSL_BINARY(copysign)
float fma(float, float, float);
bool isnan(float);
bool isinf(float);
#define MSL_ORDERED(T) T max(T, T); T min(T, T); T clamp(T, T, T); T abs(T);
MSL_ORDERED(float) MSL_ORDERED(int) MSL_ORDERED(uint) MSL_ORDERED(long) MSL_ORDERED(ulong)
template <typename T>
T select(T, T, bool);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <typename T>
constexpr bool msl_reduces = __is_same(T, float) || __is_same(T, half) ||
                             (__is_integral(T) && sizeof(T) <= 4);
#define MSL_REDUCTION(name) \
  template <typename T>     \
  enable_if_t<msl_reduces<T>, T> name(T);
MSL_REDUCTION(simd_sum) MSL_REDUCTION(simd_product) MSL_REDUCTION(simd_max) MSL_REDUCTION(simd_min)
template <typename T>
T simd_broadcast(T, ushort);
template <typename T>
T simd_shuffle(T, ushort);
template <typename T>
T simd_shuffle_xor(T, ushort);
template <typename T>
T simd_shuffle_down(T, ushort);
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
}  // namespace metal

// Metal has none of these, or our kernels must not use them.
#pragma GCC poison double goto try catch throw dynamic_cast typeid virtual new delete asm std
#pragma GCC poison thread_local wchar_t friend
