// Sixteen lanes, whatever the machine: one struct for each instruction set, all with these members.
//
//   F            16 float32              A            16 int32 sums
//   Codes        64 unsigned bytes of at most 15 each; byte 4 r + i belongs to lane r
//   Bytes        the same of signed bytes, prepared for `dot`
//   Nibbles      sums of products of Codes, before `total`
//
// `dot(sum, w, x)` adds to each lane r: w[4 r + i] * x[i], i = 0..3. With unsigned multipliers
// (VNNI) signed bytes are biased by `kBias` and the sum starts at -kBias times the sum of x.
// `low_bits` are the lowest four of 16 words, as floats.
// `kTile` tokens are multiplied with two panels at a time: their sums fit the registers.
// With `kPairs` bfloat16 is multiplied in pairs: `pairs(a, b)` has a[r] and b[r] in lane r, `pair(x)` x[0]
// and x[1] in all of them; `dot_pairs(sum, p, q)` adds p's products with q to each lane.
// Reductions (`sum`, `largest`) combine halves: lane i with lane i + 8, then + 4, + 2, + 1.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(LC_AVX512) || defined(LC_AVX512VNNI) || defined(LC_AVX512BF16)
#include "simd_avx512.h"
using Simd = Avx512;
#elif defined(LC_AVX2) || defined(LC_AVXVNNI)
#include "simd_avx2.h"
using Simd = Avx2;
#elif defined(LC_NEON)
#include "simd_neon.h"
using Simd = Neon;
#else
#include "simd_scalar.h"
using Simd = Scalar;
#endif

// e^x for x <= 0, within 2 ulp; 0 below -87. Cephes' expf: reduction by ln 2 in two parts, then a
// polynomial of degree 6.
template <class V>
inline typename V::F exp_of_negative(typename V::F x) {
    using F = typename V::F;
    const F low = V::set(-87.0f);
    const F clamped = V::max(low, x);  // NaN stays NaN
    const F n = V::round(V::mul(clamped, V::set(1.44269504088896341f)));
    F r = V::fma(n, V::set(-0.693359375f), clamped);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    F p = V::set(1.9875691500e-4f);
    p = V::fma(p, r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
    return V::zero_where_less(x, low, V::times_power_of_two(p, n));
}
