// Every member of Simd against plain loops. Compile once for each instruction set, with its LC_...
// and flags; exits with 1 and says what was wrong, or prints the number of checks.

#include "../../llamachat/kernels/native/simd.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

using F = Simd::F;
using A = Simd::A;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int n_checks = 0, n_failures = 0;

void expect(bool ok, const char* behaviour, double got, double wanted) {
    ++n_checks;
    if (ok || ++n_failures > 20) return;
    std::printf("FAILED %s: got %.9g, expected %.9g\n", behaviour, got, wanted);
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

float of_bf16(uint16_t bits) { return of_bits(static_cast<uint32_t>(bits) << 16); }

void expect_same(const char* behaviour, float got, float wanted) {
    const bool both_nan = std::isnan(got) && std::isnan(wanted);
    expect(both_nan || bits_of(got) == bits_of(wanted), behaviour, got, wanted);
}

struct Lanes {
    float at[16];

    Lanes(F x) { Simd::store(at, x); }
    Lanes(A x) : Lanes(Simd::to_float(x)) {}
};

template <class Wanted>
void expect_lanes(const char* behaviour, Lanes got, const Wanted& wanted) {
    for (int i = 0; i < 16; ++i) expect_same(behaviour, got.at[i], wanted(i));
}

std::mt19937 generator(7);

int integer(int from, int to) { return std::uniform_int_distribution<int>(from, to)(generator); }

// Of any size that leaves products and sums finite and normal.
float random_float() {
    return std::ldexp(std::uniform_real_distribution<float>(-2.0f, 2.0f)(generator), integer(-30, 30));
}

struct Inputs {
    float a[16], b[16], c[16];

    Inputs() {
        for (int i = 0; i < 16; ++i) a[i] = random_float(), b[i] = random_float(), c[i] = random_float();
    }
};

void arithmetic_is_that_of_float32() {
    for (int round = 0; round < 500; ++round) {
        const Inputs in;
        const F a = Simd::load(in.a), b = Simd::load(in.b), c = Simd::load(in.c);
        expect_lanes("add", Simd::add(a, b), [&](int i) { return in.a[i] + in.b[i]; });
        expect_lanes("sub", Simd::sub(a, b), [&](int i) { return in.a[i] - in.b[i]; });
        expect_lanes("mul", Simd::mul(a, b), [&](int i) { return in.a[i] * in.b[i]; });
        expect_lanes("div", Simd::div(a, b), [&](int i) { return in.a[i] / in.b[i]; });
        expect_lanes("abs", Simd::abs(a), [&](int i) { return std::fabs(in.a[i]); });
        expect_lanes("max", Simd::max(a, b), [&](int i) { return in.a[i] < in.b[i] ? in.b[i] : in.a[i]; });
        expect_lanes("fma", Simd::fma(a, b, c), [&](int i) { return std::fma(in.a[i], in.b[i], in.c[i]); });
        expect_lanes("set", Simd::set(in.a[3]), [&](int) { return in.a[3]; });
        expect_lanes("zero", Simd::zero(), [](int) { return 0.0f; });
    }
}

void fma_keeps_the_whole_product() {
    const float one_ulp = 1.0f + 0x1p-23f;
    const F fused = Simd::fma(Simd::set(one_ulp), Simd::set(one_ulp), Simd::set(-(1.0f + 0x1p-22f)));
    expect_lanes("fma, cancelling", fused, [](int) { return 0x1p-46f; });
}

void max_is_its_second_argument_where_either_is_nan() {
    const F one = Simd::set(1.0f), nan = Simd::set(kNan);
    expect_lanes("max(NaN, 1)", Simd::max(nan, one), [](int) { return 1.0f; });
    expect_lanes("max(1, NaN)", Simd::max(one, nan), [](int) { return kNan; });
}

void round_takes_ties_to_even() {
    std::vector<float> values = {0.5f, -0.5f, 1.5f, -1.5f, 2.5f, 126.5f, -126.5f, 0.49999997f, -0.0f, 1e-40f};
    for (const float x : {8388607.5f, 4194303.75f, 8388609.0f, 3e9f, 1e38f, kInfinity}) {
        values.push_back(x);
        values.push_back(-x);
    }
    for (int i = 0; i < 500; ++i) values.push_back(random_float());
    for (const float x : values)
        expect_lanes("round", Simd::round(Simd::set(x)), [&](int) { return std::nearbyint(x); });
}

void powers_of_two_scale_exactly() {
    for (int n = -126; n <= 0; ++n)
        expect_lanes("times_power_of_two", Simd::times_power_of_two(Simd::set(1.25f), Simd::set(float(n))),
                     [&](int) { return std::ldexp(1.25f, n); });
}

void exp_is_within_two_ulp_of_the_true_value() {
    for (int step = 0; step <= 87 * 512; ++step) {
        const float x = static_cast<float>(-step) / 512.0f;
        const double wanted = std::exp(static_cast<double>(x));
        const float got = Lanes(exp_of_negative<Simd>(Simd::set(x))).at[0];
        const double ulp = std::ldexp(1.0, std::ilogb(wanted) - 23);
        expect(std::fabs(got - wanted) <= 2 * ulp, "exp_of_negative", got, wanted);
    }
    for (const float x : {-87.00001f, -88.0f, -1e30f, -kInfinity})
        expect_lanes("exp_of_negative, far below", exp_of_negative<Simd>(Simd::set(x)),
                     [](int) { return 0.0f; });
}

void lanes_are_selected_by_comparison_and_by_number() {
    const Inputs in;
    const F a = Simd::load(in.a), b = Simd::load(in.b), nan = Simd::set(kNan);
    expect_lanes("zero_where_less", Simd::zero_where_less(a, b, nan),
                 [&](int i) { return in.a[i] < in.b[i] ? 0.0f : kNan; });
    expect_lanes("zero_where_less, equal", Simd::zero_where_less(a, a, b), [&](int i) { return in.b[i]; });
    expect_lanes("zero_where_less, NaN", Simd::zero_where_less(nan, a, b), [&](int i) { return in.b[i]; });
    for (int n = 0; n <= 16; ++n) {
        expect_lanes("first", Simd::first(n, a, nan), [&](int i) { return i < n ? in.a[i] : kNan; });
        expect_lanes("first, of NaN", Simd::first(n, nan, a), [&](int i) { return i < n ? kNan : in.a[i]; });
    }
}

void reductions_combine_halves() {
    for (int round = 0; round < 500; ++round) {
        Inputs in;
        const F a = Simd::load(in.a);
        float most = in.a[0];
        for (const float x : in.a) most = x > most ? x : most;
        expect_same("largest", Simd::largest(a), most);
        expect_same("largest below zero", Simd::largest(Simd::sub(Simd::set(-1e12f), Simd::abs(a))), [&] {
            float least = kInfinity;
            for (const float x : in.a) least = std::fabs(x) < least ? std::fabs(x) : least;
            return -1e12f - least;
        }());
        const float got = Simd::sum(a);
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) in.a[i] += in.a[i + half];
        expect_same("sum", got, in.a[0]);
    }
    for (int lane = 0; lane < 16; ++lane) {
        float values[16];
        for (float& x : values) x = -kInfinity;
        values[lane] = -3.0f;
        expect_same("largest of one finite lane", Simd::largest(Simd::load(values)), -3.0f);
    }
}

double half_value(uint16_t half) {  // of IEEE 754 binary16, by its definition
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent == 31  ? (fraction ? kNan : kInfinity)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return half >> 15 ? -size : size;
}

void sixteen_bit_floats_load_exactly() {
    for (int from = 0; from < 65536; from += 16) {
        uint16_t values[16];
        for (int i = 0; i < 16; ++i) values[i] = static_cast<uint16_t>(from + i);
        expect_lanes("load_f16", Simd::load_f16(values),
                     [&](int i) { return static_cast<float>(half_value(values[i])); });
        expect_lanes("load_bf16", Simd::load_bf16(values),
                     [&](int i) { return of_bf16(values[i]); });
    }
}

float nearest_bf16(float x) {  // eight significant bits, fewer below 2^-126
    if (!std::isfinite(x) || x == 0) return x;
    const int unit = std::max(std::ilogb(x) - 7, -133);
    return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(x), -unit)), unit));
}

void bf16_is_stored_as_the_nearest() {
    std::vector<uint32_t> patterns = {0x00000000, 0x80000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001,
                                      0x00018000, 0x007FFFFF, 0x3F808000, 0x3F818000, 0x3F817FFF, 0x3F808001,
                                      0xBF808000, 0xBF818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000,
                                      0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFBFFFFF};
    while (patterns.size() < 16000) patterns.push_back(static_cast<uint32_t>(generator()));
    for (size_t from = 0; from < patterns.size(); from += 16) {
        float values[16];
        uint16_t stored[16];
        const size_t n = std::min<size_t>(16, patterns.size() - from);
        for (size_t i = 0; i < 16; ++i) values[i] = i < n ? of_bits(patterns[from + i]) : 0.0f;
        Simd::store_bf16(stored, Simd::load(values));
        for (int i = 0; i < 16; ++i)
            expect_same("store_bf16", of_bf16(stored[i]), nearest_bf16(values[i]));
    }
}

// Subnormal products and sums aside, each lane is a chain of two fma, the second element's first.
template <class V>
void pairs_are_multiplied_in_order() {
    if constexpr (V::kPairs)
        for (int round = 0; round < 500; ++round) {
            const Inputs in, other;
            uint16_t a[16], b[16], x[16];
            V::store_bf16(a, V::load(in.a));
            V::store_bf16(b, V::load(in.b));
            V::store_bf16(x, V::load(other.a));
            const auto found = V::dot_pairs(V::load(in.c), V::pairs(a, b), V::pair(x));
            expect_lanes("dot_pairs", found, [&](int i) {
                const float second = std::fma(of_bf16(b[i]), of_bf16(x[1]), in.c[i]);
                return std::fma(of_bf16(a[i]), of_bf16(x[0]), second);
            });
        }
}

void bytes_load_and_store() {
    for (int from = -128; from < 128; from += 16) {
        int8_t bytes[16], stored[16];
        float near[16];
        for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(from + i);
        expect_lanes("load_i8", Simd::load_i8(bytes), [&](int i) { return static_cast<float>(bytes[i]); });
        for (const float away : {-0.49f, 0.0f, 0.49f}) {
            for (int i = 0; i < 16; ++i) near[i] = static_cast<float>(bytes[i]) + away;
            Simd::store_i8(stored, Simd::load(near));
            for (int i = 0; i < 16; ++i) expect(stored[i] == bytes[i], "store_i8", stored[i], bytes[i]);
        }
        for (int i = 0; i < 16; ++i) near[i] = static_cast<float>(bytes[i]) + (bytes[i] < 0 ? 0.5f : -0.5f);
        Simd::store_i8(stored, Simd::load(near));
        for (int i = 0; i < 16; ++i) {
            const float even = std::nearbyint(near[i]);
            expect(stored[i] == even, "store_i8, ties", stored[i], even);
        }
    }
}

void integers_become_the_nearest_floats() {
    for (const int x : {0, 1, -1, 16777217, -16777219, 2147483647, -2147483647 - 1})
        expect_lanes("to_float of set_int", Simd::set_int(x), [&](int) { return static_cast<float>(x); });
    for (const int x : {0, 5, -5, 500000, -500000}) {
        const float exact = static_cast<float>(x);
        expect_lanes("shifted<3>", Simd::shifted<3>(Simd::set_int(x)), [&](int) { return 8 * exact; });
        expect_lanes("shifted<7>", Simd::shifted<7>(Simd::set_int(x)), [&](int) { return 128 * exact; });
    }
}

// Sixty-four bytes times four, eight times over: a block as `dot` sees it.
struct Steps {
    uint8_t lines[8][64];
    int8_t x[8][8];

    template <class Byte, class Activation>
    Steps(const Byte& byte, const Activation& activation) {
        for (auto& line : lines)
            for (uint8_t& b : line) b = static_cast<uint8_t>(byte());
        for (auto& step : x)
            for (int8_t& a : step) a = static_cast<int8_t>(activation());
    }
    int sum_of_x() const {
        int sum = 0;
        for (const auto& step : x)
            for (int i = 0; i < 4; ++i) sum += step[i];
        return sum;
    }
};

void expect_dots(const Steps& steps, int start) {
    A sum = Simd::set_int(start - Simd::kBias * steps.sum_of_x());
    for (int s = 0; s < 8; ++s) sum = Simd::dot(sum, Simd::bytes(Simd::line(steps.lines[s])), steps.x[s]);
    expect_lanes("dot of signed bytes", sum, [&](int r) {
        int wanted = start;
        for (int s = 0; s < 8; ++s)
            for (int i = 0; i < 4; ++i) {
                const int w = static_cast<int8_t>(steps.lines[s][4 * r + i]);
                wanted += w * steps.x[s][i];
            }
        return static_cast<float>(wanted);
    });
}

void expect_nibble_dots(const Steps& steps, int start) {
    auto sums = Simd::nothing();
    for (int s = 0; s < 4; ++s) {
        const auto line = Simd::line(steps.lines[s]);
        sums = Simd::dot_nibbles(sums, Simd::low(line), steps.x[s]);
        sums = Simd::dot_nibbles(sums, Simd::high(line), steps.x[s] + 4);
    }
    expect_lanes("dot of nibbles", Simd::total(sums, Simd::set_int(start)), [&](int r) {
        int wanted = start;
        for (int s = 0; s < 4; ++s)
            for (int i = 0; i < 4; ++i) {
                const int byte = steps.lines[s][4 * r + i];
                wanted += (byte & 15) * steps.x[s][i] + (byte >> 4) * steps.x[s][4 + i];
            }
        return static_cast<float>(wanted);
    });
}

void expect_lookup_dots(const Steps& steps, const int8_t (&entries)[16]) {
    const auto book = Simd::book(entries);
    int bias = 0;
    for (int s = 0; s < 4; ++s)
        for (const int8_t a : steps.x[s]) bias += Simd::kBias * a;
    A sum = Simd::set_int(-bias);
    for (int s = 0; s < 4; ++s) {
        const auto line = Simd::line(steps.lines[s]);
        sum = Simd::dot(sum, Simd::lookup(book, Simd::low(line)), steps.x[s]);
        sum = Simd::dot(sum, Simd::lookup(book, Simd::high(line)), steps.x[s] + 4);
    }
    expect_lanes("dot of looked-up bytes", sum, [&](int r) {
        int wanted = 0;
        for (int s = 0; s < 4; ++s)
            for (int i = 0; i < 4; ++i) {
                const int byte = steps.lines[s][4 * r + i];
                wanted += entries[byte & 15] * steps.x[s][i] + entries[byte >> 4] * steps.x[s][4 + i];
            }
        return static_cast<float>(wanted);
    });
}

void expect_all_dots(const Steps& steps) {
    int8_t entries[16];
    for (int8_t& entry : entries) entry = static_cast<int8_t>(integer(-128, 127));
    entries[integer(0, 15)] = -128;
    for (const int start : {0, -8 * steps.sum_of_x(), 1 << 22}) {
        expect_dots(steps, start);
        expect_nibble_dots(steps, start);
    }
    expect_lookup_dots(steps, entries);
}

void dots_are_exact() {
    const auto sign = [] { return integer(0, 1) ? 127 : -127; };
    for (int round = 0; round < 300; ++round) {
        expect_all_dots(Steps([] { return integer(0, 255); }, [] { return integer(-127, 127); }));
        expect_all_dots(Steps([] { return integer(0, 255); }, sign));
    }
    for (int byte = 0; byte < 256; ++byte)
        for (const int x : {-127, 0, 1, 127}) expect_all_dots(Steps([=] { return byte; }, [=] { return x; }));
    for (int round = 0; round < 100; ++round)
        expect_all_dots(Steps([] { return integer(0, 1) ? 0x80 : 0x7F; }, sign));
}

}  // namespace

int main() {
    arithmetic_is_that_of_float32();
    fma_keeps_the_whole_product();
    max_is_its_second_argument_where_either_is_nan();
    round_takes_ties_to_even();
    powers_of_two_scale_exactly();
    exp_is_within_two_ulp_of_the_true_value();
    lanes_are_selected_by_comparison_and_by_number();
    reductions_combine_halves();
    sixteen_bit_floats_load_exactly();
    bf16_is_stored_as_the_nearest();
    pairs_are_multiplied_in_order<Simd>();
    bytes_load_and_store();
    integers_become_the_nearest_floats();
    dots_are_exact();
    std::printf("%d checks, %d failures\n", n_checks, n_failures);
    return n_failures ? 1 : 0;
}
