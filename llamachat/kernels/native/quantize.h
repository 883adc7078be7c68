// Rows of floats to codes: for each group of columns the scale is searched that errs least.
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

// The nearest float16: 11 bits, or a multiple of 2^-24.
inline float nearest_f16(float x) {
    int exponent;
    std::frexp(x, &exponent);
    const float step = std::ldexp(1.0f, exponent - 11 > -24 ? exponent - 11 : -24);
    return std::nearbyint(x / step) * step;
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
    float run(const float* x, uint8_t* codes) {
        const float largest = load(x);
        const float first = args_.has_book ? args_.book[0] : kTop;
        const float last = args_.has_book ? args_.book[kLevels - 1] : kTop;
        if (nearest_f16(largest / first) == 0) return store(0.0f, codes);
        least_ = FLT_MAX;
        Fit best{0, 0};
        search(first / largest, best);
        if (first != last) search(last / largest, best);
        consider(largest / first);  // without a search
        float scale = best.scale();
        for (int i = 0; i < kRefinements; ++i) scale = consider(scale);
        return store(best_, codes);
    }

  private:
    static constexpr int kLevels = 16;
    static constexpr float kTop = 127.0f;  // the largest code of 8 bits
    static constexpr int kRefinements = 3;

    struct Fit {
        float product, square;  // sum x v, sum v^2
        float scale() const { return square > 0 ? product / square : 0.0f; }
        float score() const { return square > 0 ? product * product / square : 0.0f; }
    };

    // Returns the value of the largest magnitude, with its sign.
    float load(const float* x) {
        F most = V::zero(), least = V::zero();
        for (int i = 0; i < n_; ++i) {
            x_[i] = V::load(x + 16 * i);
            most = V::max(most, x_[i]);
            least = V::max(least, V::sub(V::zero(), x_[i]));
        }
        const float high = V::largest(most), low = V::largest(least);
        return high >= low ? high : -low;
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

    Fit fit_of(float inverse) const {
        const F factor = V::set(inverse);
        F product = V::zero(), square = V::zero();
        for (int i = 0; i < n_; ++i) {
            const F v = level(V::mul(x_[i], factor));
            product = V::fma(x_[i], v, product);
            square = V::fma(v, v, square);
        }
        return {V::sum(product), V::sum(square)};
    }

    // Inverse scales around one that makes the largest value an outer level. At 8 bits clipping does
    // not pay; a coarser scale may lie better.
    void search(float inverse, Fit& best) const {
        const int from = args_.has_book ? -12 : -30, to = args_.has_book ? 8 : 0;
        const float step = args_.has_book ? 0.02f : 0.002f;
        for (int i = from; i <= to; ++i) {
            const Fit found = fit_of(inverse * (1.0f + step * static_cast<float>(i)));
            if (found.score() > best.score()) best = found;
        }
    }

    // Keeps the scale, rounded to float16, if it errs least; returns the best one for its codes.
    float consider(float scale) {
        const float rounded = nearest_f16(scale);
        const F factor = V::set(rounded == 0 ? 0.0f : 1 / rounded), minus = V::set(-rounded);
        F error = V::zero(), product = V::zero(), square = V::zero();
        for (int i = 0; i < n_; ++i) {
            const F v = level(V::mul(x_[i], factor)), off = V::fma(minus, v, x_[i]);
            error = V::fma(off, off, error);
            product = V::fma(x_[i], v, product);
            square = V::fma(v, v, square);
        }
        const float total = V::sum(error);
        if (total < least_) least_ = total, best_ = rounded;
        return Fit{V::sum(product), V::sum(square)}.scale();
    }

    float store(float scale, uint8_t* codes) const {
        const F factor = V::set(scale == 0 ? 0.0f : 1 / scale);
        for (int i = 0; i < n_; ++i) {
            const F z = V::mul(x_[i], factor);
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
        return scale;
    }

    const Quantize& args_;
    const int n_;  // vectors of a group
    F gaps_[kLevels], bounds_[kLevels], x_[kMaxGroup / 16];
    float least_ = 0, best_ = 0;
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
