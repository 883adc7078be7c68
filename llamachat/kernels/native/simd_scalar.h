// Plain C++: what every machine can run, and what the other sets are read against.

#pragma once

struct Scalar {
    struct F {
        float at[16];
    };
    struct A {
        int32_t at[16];
    };
    struct Line {
        int8_t at[64];
    };
    using Codes = Line;
    using Bytes = Line;
    using Nibbles = A;
    static constexpr int kBias = 0;
    static constexpr int kTile = 1;
    static constexpr int kRegisters = 4;  // of 16 lanes, where the compiler makes vectors of them
    static constexpr bool kPairs = false;

    static F zero() { return set(0.0f); }
    static F set(float x) {
        return each([=](int) { return x; });
    }
    static F load(const float* p) {
        return each([=](int i) { return p[i]; });
    }
    // No memcpy: GCC 12 for aarch64 loads from p before it.
    static void store(float* p, F x) {
        for (int i = 0; i < 16; ++i) p[i] = x.at[i];
    }
    static F add(F a, F b) {
        return each([&](int i) { return a.at[i] + b.at[i]; });
    }
    static F sub(F a, F b) {
        return each([&](int i) { return a.at[i] - b.at[i]; });
    }
    static F mul(F a, F b) {
        return each([&](int i) { return a.at[i] * b.at[i]; });
    }
    static F div(F a, F b) {
        return each([&](int i) { return a.at[i] / b.at[i]; });
    }
    static F max(F a, F b) {
        return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
    }
    static F fma(F a, F b, F c) {
        return each([&](int i) { return fused(a.at[i], b.at[i], c.at[i]); });
    }
    static F abs(F a) {
        return each([&](int i) { return std::fabs(a.at[i]); });
    }
    static F round(F a) {
        return each([&](int i) { return nearest(a.at[i]); });
    }
    static F times_power_of_two(F a, F n) {  // -126 <= n <= 127
        return each([&](int i) {
            const uint32_t exponent = static_cast<uint32_t>(static_cast<int>(n.at[i]) + 127);
            return a.at[i] * from_bits(exponent << 23);
        });
    }
    // y, but 0 in lanes where a < b
    static F zero_where_less(F a, F b, F y) {
        return each([&](int i) { return a.at[i] < b.at[i] ? 0.0f : y.at[i]; });
    }
    // x in the first n lanes, `rest` in the others
    static F first(int n, F x, F rest) {
        return each([&](int i) { return i < n ? x.at[i] : rest.at[i]; });
    }
    static float sum(F x) {
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
        return x.at[0];
    }
    static float largest(F x) {
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) x.at[i] = x.at[i] > x.at[i + half] ? x.at[i] : x.at[i + half];
        return x.at[0];
    }

    static F load_i8(const int8_t* p) {
        return each([=](int i) { return static_cast<float>(p[i]); });
    }
    static F load_f16(const uint16_t* p) {
        return each([=](int i) { return from_f16(p[i]); });
    }
    static F low_bits(const uint16_t* p) {
        return each([=](int i) { return static_cast<float>(p[i] & 15); });
    }
    static F load_bf16(const uint16_t* p) {
        return each([=](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
    }
    // Nearest, ties to even.
    static void store_bf16(uint16_t* p, F x) {
        for (int i = 0; i < 16; ++i) {
            const uint32_t bits = to_bits(x.at[i]);
            const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
            const uint32_t quiet = bits | 0x400000;  // rounding could end a NaN
            p[i] = static_cast<uint16_t>((x.at[i] != x.at[i] ? quiet : rounded) >> 16);
        }
    }
    // Nearest, ties to even; the values fit.
    static void store_i8(int8_t* p, F x) {
        // Beyond 2^23 the last bits of a float are those of the integer.
        for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(to_bits(x.at[i] + 12582912.0f));
    }

    static F to_float(A a) {
        return each([&](int i) { return static_cast<float>(a.at[i]); });
    }
    static A set_int(int32_t x) {
        A y;
        for (int32_t& lane : y.at) lane = x;
        return y;
    }
    template <int kShift>
    static A shifted(A a) {
        for (int32_t& lane : a.at) lane *= 1 << kShift;
        return a;
    }

    static Line line(const uint8_t* p) {
        Line line;
        std::memcpy(line.at, p, 64);
        return line;
    }
    static Codes low(Line line) {
        for (int8_t& byte : line.at) byte &= 15;
        return line;
    }
    static Codes high(Line line) {
        for (int8_t& byte : line.at) byte = static_cast<int8_t>(static_cast<uint8_t>(byte) >> 4);
        return line;
    }
    static Bytes bytes(Line line) { return line; }
    static Line book(const int8_t* entries) {
        Line book = {};
        std::memcpy(book.at, entries, 16);
        return book;
    }
    static Bytes lookup(Line book, Codes codes) {
        for (int8_t& byte : codes.at) byte = book.at[byte];
        return codes;
    }

    static Nibbles nothing() { return set_int(0); }
    static A total(Nibbles sums, A start) {
        for (int r = 0; r < 16; r++) sums.at[r] += start.at[r];
        return sums;
    }
    static A dot(A sum, Bytes w, const int8_t* x) {
        for (int r = 0; r < 16; r++)
            for (int i = 0; i < 4; ++i) sum.at[r] += w.at[4 * r + i] * x[i];
        return sum;
    }
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) { return dot(sums, w, x); }

  private:
    template <class Lane>
    static F each(const Lane& lane) {
        F y;
        for (int i = 0; i < 16; ++i) y.at[i] = lane(i);
        return y;
    }
    static uint32_t to_bits(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }
    static float from_bits(uint32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    // Without the instruction std::fma is a call that may take a hundred times as long. The product
    // of two floats is exact as a double, so only the sum rounds twice: the result differs from the
    // fused one by an ulp where the sum falls on a tie of floats in all 29 bits below, hardly ever.
    static float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
        return std::fma(a, b, c);
#else
        return static_cast<float>(static_cast<double>(a) * b + c);
#endif
    }
    // Ties to even: from 2^23 on all floats are whole, so adding it leaves no fraction.
    static float nearest(float x) {
        constexpr float kWhole = 8388608.0f;
        const float size = std::fabs(x);
        return size < kWhole ? std::copysign((size + kWhole) - kWhole, x) : x;
    }
    static float from_f16(uint16_t half) {
        const uint32_t size = (half & 0x7FFFu) << 13;
        uint32_t bits = to_bits(from_bits(size) * 0x1p112f);      // the exponents' biases are 112 apart
        if (size >= 0x7C00u << 13) bits = size | 0x7F800000;      // infinity and NaN
        return from_bits(bits | (half & 0x8000u) << 16);
    }
};
