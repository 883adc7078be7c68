// aarch64 with the dot product instructions: sixteen lanes are four registers.

#pragma once
#include <arm_neon.h>

struct Neon {
    template <class Q>
    struct Four {
        Q a, b, c, d;
    };
    using F = Four<float32x4_t>;
    using A = Four<int32x4_t>;
    using Line = Four<int8x16_t>;
    using Codes = Line;
    using Bytes = Line;
    using Nibbles = A;
    static constexpr int kBias = 0;
    static constexpr int kTile = 2;
    static constexpr int kRegisters = 8;  // of 16 lanes
    static constexpr bool kPairs = false;

    static F zero() { return set(0.0f); }
    static F set(float x) {
        const float32x4_t q = vdupq_n_f32(x);
        return {q, q, q, q};
    }
    static F load(const float* p) {
        return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
    }
    static void store(float* p, F x) {
        vst1q_f32(p, x.a);
        vst1q_f32(p + 4, x.b);
        vst1q_f32(p + 8, x.c);
        vst1q_f32(p + 12, x.d);
    }
    static F add(F x, F y) { return each(x, y, [](auto p, auto q) { return vaddq_f32(p, q); }); }
    static F sub(F x, F y) { return each(x, y, [](auto p, auto q) { return vsubq_f32(p, q); }); }
    static F mul(F x, F y) { return each(x, y, [](auto p, auto q) { return vmulq_f32(p, q); }); }
    static F div(F x, F y) { return each(x, y, [](auto p, auto q) { return vdivq_f32(p, q); }); }
    // By comparison, not vmaxq: y where either is NaN, as on x86.
    static F max(F x, F y) {
        return each(x, y, [](auto p, auto q) { return vbslq_f32(vcgtq_f32(p, q), p, q); });
    }
    static F fma(F x, F y, F z) {
        return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
                vfmaq_f32(z.d, x.d, y.d)};
    }
    static F abs(F x) { return each(x, [](auto q) { return vabsq_f32(q); }); }
    static F round(F x) { return each(x, [](auto q) { return vrndnq_f32(q); }); }
    static F times_power_of_two(F x, F n) {  // -126 <= n <= 127
        return each(x, n, [](auto p, auto q) {
            const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(q), vdupq_n_s32(127));
            return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
        });
    }
    // z, but 0 in lanes where x < y
    static F zero_where_less(F x, F y, F z) {
        const auto less = each(x, y, [](auto p, auto q) { return vcltq_f32(p, q); });
        return each(less, z, [](auto p, auto q) {
            return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(q), p));
        });
    }
    // x in the first n lanes, `rest` in the others
    static F first(int n, F x, F rest) {
        static constexpr int32_t kLanes[4] = {0, 1, 2, 3};
        const int32x4_t lanes = vld1q_s32(kLanes);
        const auto select = [&](int from, float32x4_t p, float32x4_t q) {
            return vbslq_f32(vcgtq_s32(vdupq_n_s32(n - from), lanes), p, q);
        };
        return {select(0, x.a, rest.a), select(4, x.b, rest.b), select(8, x.c, rest.c),
                select(12, x.d, rest.d)};
    }
    static float sum(F x) {
        const float32x4_t y = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
        const float32x2_t z = vadd_f32(vget_low_f32(y), vget_high_f32(y));
        return vget_lane_f32(vpadd_f32(z, z), 0);
    }
    static float largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.c), vmaxq_f32(x.b, x.d))); }

    static F load_i8(const int8_t* p) {
        const int8x16_t bytes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
        return to_float({vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low),
                         vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)});
    }
    static F load_f16(const uint16_t* p) {
        return each(quarters(p), [](auto q) { return vcvt_f32_f16(vreinterpret_f16_u16(q)); });
    }
    static F low_bits(const uint16_t* p) {
        return each(quarters(p), [](auto q) {
            return vcvtq_f32_u32(vmovl_u16(vand_u16(q, vdup_n_u16(15))));
        });
    }
    static F load_bf16(const uint16_t* p) {
        return each(quarters(p), [](auto q) { return vreinterpretq_f32_u32(vshll_n_u16(q, 16)); });
    }
    // Nearest, ties to even.
    static void store_bf16(uint16_t* p, F x) {
        const auto half = each(x, [](auto q) {
            const uint32x4_t bits = vreinterpretq_u32_f32(q);
            const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
            const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));  // rounding could end a NaN
            return vshrn_n_u32(vbslq_u32(vceqq_f32(q, q), rounded, quiet), 16);
        });
        vst1q_u16(p, vcombine_u16(half.a, half.b));
        vst1q_u16(p + 8, vcombine_u16(half.c, half.d));
    }
    // Nearest, ties to even; the values fit.
    static void store_i8(int8_t* p, F x) {
        const auto half = each(x, [](auto q) { return vmovn_s32(vcvtnq_s32_f32(q)); });
        const int8x8_t low = vmovn_s16(vcombine_s16(half.a, half.b));
        vst1q_s8(p, vcombine_s8(low, vmovn_s16(vcombine_s16(half.c, half.d))));
    }

    static F to_float(A x) { return each(x, [](auto q) { return vcvtq_f32_s32(q); }); }
    static A set_int(int32_t x) {
        const int32x4_t q = vdupq_n_s32(x);
        return {q, q, q, q};
    }
    template <int kShift>
    static A shifted(A x) { return each(x, [](auto q) { return vshlq_n_s32(q, kShift); }); }

    static Line line(const uint8_t* p) {
        const int8_t* s = reinterpret_cast<const int8_t*>(p);
        return {vld1q_s8(s), vld1q_s8(s + 16), vld1q_s8(s + 32), vld1q_s8(s + 48)};
    }
    static Codes low(Line x) { return each(x, [](auto q) { return vandq_s8(q, vdupq_n_s8(15)); }); }
    static Codes high(Line x) {
        return each(x, [](auto q) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(q), 4)); });
    }
    static Bytes bytes(Line x) { return x; }
    static Line book(const int8_t* entries) {
        const int8x16_t table = vld1q_s8(entries);
        return {table, table, table, table};
    }
    static Bytes lookup(Line book, Codes codes) {
        return each(book, codes, [](auto p, auto q) { return vqtbl1q_s8(p, vreinterpretq_u8_s8(q)); });
    }

    static Nibbles nothing() { return set_int(0); }
    static A total(Nibbles x, A start) {
        return each(x, start, [](auto p, auto q) { return vaddq_s32(p, q); });
    }
    static A dot(A sum, Bytes w, const int8_t* x) {
        uint32_t word;
        std::memcpy(&word, x, 4);
        const int8x8_t four = vcreate_s8(word);
        return each(sum, w, [&](auto p, auto q) { return vdotq_lane_s32(p, q, four, 0); });
    }
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) { return dot(sums, w, x); }

  private:
    template <class Q, class Op>
    static auto each(Four<Q> x, const Op& op) -> Four<decltype(op(x.a))> {
        return {op(x.a), op(x.b), op(x.c), op(x.d)};
    }
    template <class P, class Q, class Op>
    static auto each(Four<P> x, Four<Q> y, const Op& op) -> Four<decltype(op(x.a, y.a))> {
        return {op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d)};
    }
    static Four<uint16x4_t> quarters(const uint16_t* p) {
        return {vld1_u16(p), vld1_u16(p + 4), vld1_u16(p + 8), vld1_u16(p + 12)};
    }
};
