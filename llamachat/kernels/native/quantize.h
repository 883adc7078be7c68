// Rows of floats to codes: for each group of columns the scale is searched that errs least, and the
// shift of its levels if they have one.
//
// A scale that makes the largest value an outer level is where the search begins: smaller ones clip
// it, but are finer for all others. The codes of each candidate have one best scale, by least
// squares: sum x v / sum v^2, of the levels v. quant/quantize.py does the same in torch.

#pragma once
#include <cfloat>

#include "panels.h"
#include "pool.h"
#include "simd.h"

constexpr int64_t kMaxGroup = 256;

// A float16 by its bits: those of the magnitude, nearest to |x|, and the sign above. Beyond the
// largest one it is that.
inline uint16_t f16_of(float x) {
    const float size = std::fabs(x);
    int exponent;
    std::frexp(size, &exponent);
    const int from = size >= 0x1p-14f ? exponent : -13;  // below, all have steps of 2^-24
    const float steps = std::nearbyint(std::ldexp(size, 11 - from));
    const float bits = static_cast<float>((from + 13) * 1024) + steps;
    return static_cast<uint16_t>((bits < 0x7BFF ? static_cast<int>(bits) : 0x7BFF) | (x < 0 ? 0x8000 : 0));
}

inline float f16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, steps = (bits & 1023) + (exponent ? 1024 : 0);
    const float size = std::ldexp(static_cast<float>(steps), (exponent ? exponent : 1) - 25);
    return bits & 0x8000 ? -size : size;
}

// The float16 near these bits whose lowest bits say: the shift of number n.
inline uint16_t f16_with_shift(uint16_t bits, int n) {
    constexpr int kNumbers = 1 << kShiftBits;
    const int size = bits & 0x7FFF, step = (size - n + kNumbers / 2) >> kShiftBits;
    int found = (step > 0 ? step : 0) * kNumbers + n;
    if (found > 0x7BFF) found -= kNumbers;
    return static_cast<uint16_t>(found | (bits & 0x8000));
}

template <class V>
class GroupSearch {
    using F = typename V::F;

  public:
    explicit GroupSearch(const Quantize& args) : args_(args), n_(static_cast<int>(args.group / 16)) {
        for (int i = 0; i + 1 < kLevels; ++i) {
            const float low = args.book[i], high = args.book[i + 1];
            gaps_[i] = V::set(high - low);
            bounds_[i] = V::set((low + high) / 2);
        }
    }

    // Writes the codes of a group and returns its scale.
    uint16_t run(const float* x, uint8_t* codes) {
        load(x);
        const float first = (high_ >= -low_ ? high_ : low_) / (args_.has_book ? args_.book[0] : kTop);
        least_ = FLT_MAX;
        best_ = 0;
        if (f16_of(first) & 0x7FFF) {
            consider(first, 0);  // without a search
            const Fit found = args_.has_book ? search_shifts() : search_scales(first);
            float scale = found.scale();
            for (int i = 0; i < kRefinements; ++i) scale = consider(scale, found.shift);
        }
        store(codes);
        return best_;
    }

  private:
    static constexpr int kLevels = 16;
    static constexpr float kTop = 127.0f;  // the largest code of 8 bits
    static constexpr int kRefinements = 3;
    static constexpr int kAround = 3;      // shifts on either side that are tried

    struct Fit {
        float product, square;  // sum x v, sum v^2
        int shift;              // in steps
        float scale() const { return square > 0 ? product / square : 0.0f; }
        float score() const { return square > 0 ? product * product / square : 0.0f; }
    };

    void load(const float* x) {
        F high = V::zero(), low = V::zero();
        for (int i = 0; i < n_; ++i) {
            x_[i] = V::load(x + 16 * i);
            high = V::max(high, x_[i]);
            low = V::max(low, V::sub(V::zero(), x_[i]));
        }
        high_ = V::largest(high), low_ = -V::largest(low);
    }

    // The level nearest to z.
    F level(F z) const {
        if (!args_.has_book) {
            const F bottom = V::set(-kTop), zero = V::zero();
            const F minus = V::max(bottom, V::sub(zero, V::round(z)));  // at most kTop, after its sign
            return V::max(bottom, V::sub(zero, minus));
        }
        F value = V::set(args_.book[0]);
        for (int i = 0; i + 1 < kLevels; ++i)
            value = V::add(value, V::zero_where_less(z, bounds_[i], gaps_[i]));
        return value;
    }

    // The level of each vector of values at an inverse scale.
    F level_at(int i, F inverse, F shift) const {
        return V::add(level(V::sub(V::mul(x_[i], inverse), shift)), shift);
    }

    Fit fit_of(float inverse, int steps) const {
        const F factor = V::set(inverse), shift = V::set(static_cast<float>(steps * args_.shift));
        F product = V::zero(), square = V::zero();
        for (int i = 0; i < n_; ++i) {
            const F v = level_at(i, factor, shift);
            product = V::fma(x_[i], v, product);
            square = V::fma(v, v, square);
        }
        return {V::sum(product), V::sum(square), steps};
    }

    // At 8 bits clipping does not pay; a coarser scale may lie better.
    Fit search_scales(float first) const {
        Fit best{0, 0, 0};
        for (int i = -30; i <= 0; ++i) {
            const Fit found = fit_of(1 / first * (1.0f + 0.002f * static_cast<float>(i)), 0);
            if (found.score() > best.score()) best = found;
        }
        return best;
    }

    // With either sign: shifts around the one under which both the least value and the largest are
    // outer levels, each with a scale that clips nothing and one that clips a little.
    Fit search_shifts() const {
        const float bottom = args_.book[0], top = args_.book[kLevels - 1], step = static_cast<float>(args_.shift);
        Fit best{0, 0, 0};
        for (const float sign : {1.0f, -1.0f}) {
            const float low = sign > 0 ? low_ : -high_, high = sign > 0 ? high_ : -low_;
            const float fitting = (low / ((high - low) / (top - bottom)) - bottom) / step;
            const float least = kAround - kNoShift, most = kNoShift - 1 - kAround;
            const float middle = std::fmin(std::fmax(std::nearbyint(fitting), least), most);
            for (int i = -kAround; i <= kAround; ++i) {
                const int steps = static_cast<int>(middle) + i;
                const float shift = static_cast<float>(steps) * step;
                const float whole = std::fmax(low / (bottom + shift), high / (top + shift));
                for (const float part : {1.0f, 0.92f}) {
                    const Fit found = fit_of(sign / (whole * part), steps);
                    if (found.score() > best.score()) best = found;
                }
            }
        }
        return best;
    }

    // Keeps the scale, rounded to what float16 has for the shift, if it errs least; returns the best
    // one for its codes.
    float consider(float scale, int steps) {
        uint16_t bits = f16_of(scale);
        if (args_.has_book) bits = f16_with_shift(bits, steps + kNoShift);
        const float rounded = f16_value(bits);
        const F factor = V::set(rounded == 0 ? 0.0f : 1 / rounded), minus = V::set(-rounded);
        const F shift = V::set(static_cast<float>(steps * args_.shift));
        F error = V::zero(), product = V::zero(), square = V::zero();
        for (int i = 0; i < n_; ++i) {
            const F v = level_at(i, factor, shift), off = V::fma(minus, v, x_[i]);
            error = V::fma(off, off, error);
            product = V::fma(x_[i], v, product);
            square = V::fma(v, v, square);
        }
        const float total = V::sum(error);
        if (total < least_) least_ = total, best_ = bits;
        return Fit{V::sum(product), V::sum(square), steps}.scale();
    }

    void store(uint8_t* codes) const {
        const float scale = f16_value(best_);
        const F factor = V::set(scale == 0 ? 0.0f : 1 / scale);
        const F shift = V::set(args_.has_book ? shift_of(best_, args_.shift) : 0.0f);
        for (int i = 0; i < n_; ++i) {
            const F z = V::sub(V::mul(x_[i], factor), shift);
            if (!args_.has_book) {
                V::store_i8(reinterpret_cast<int8_t*>(codes) + 16 * i, level(z));
                continue;
            }
            F index = V::zero();
            for (int j = 0; j + 1 < kLevels; ++j)
                index = V::add(index, V::zero_where_less(z, bounds_[j], V::set(1.0f)));
            int8_t bytes[16];
            V::store_i8(bytes, index);
            for (int j = 0; j < 8; ++j)
                codes[8 * i + j] = static_cast<uint8_t>(bytes[2 * j] | bytes[2 * j + 1] << 4);
        }
    }

    const Quantize& args_;
    const int n_;  // vectors of a group
    F gaps_[kLevels], bounds_[kLevels], x_[kMaxGroup / 16];
    float low_ = 0, high_ = 0;  // of the values, and of zero
    float least_ = 0;           // error so far, and its scale
    uint16_t best_ = 0;
};

template <class V>
void quantize(Pool& pool, const Quantize& args) {
    const int64_t groups = args.cols / args.group, group_bytes = args.has_book ? args.group / 2 : args.group;
    pool.all(args.rows, [&](int64_t row, int) {
        GroupSearch<V> search(args);
        for (int64_t g = row * groups; g < (row + 1) * groups; ++g)
            args.scales[g] = search.run(args.x + g * args.group, args.codes + g * group_bytes);
    });
}
