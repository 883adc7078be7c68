// lc_linear: norm and quantize, multiply, and put the product where it belongs.

#pragma once
#include <cfloat>

#include "linear.h"

// The 32 values of a block as two vectors, normed if there is a norm; zeros beyond the row's end.
template <class V>
struct RowReader {
    const float *x, *norm;
    int64_t cols;
    float scale = 1.0f;  // of RMSNorm

    RowReader(const float* x_, const float* norm_, int64_t cols_, float eps) : x(x_), norm(norm_), cols(cols_) {
        if (!norm) return;
        auto squares = V::zero();
        for (int64_t k = 0; k < cols; k += 16) {
            const auto v = load_first(x + k, cols - k);
            squares = V::fma(v, v, squares);
        }
        scale = 1.0f / std::sqrt(V::sum(squares) / static_cast<float>(cols) + eps);
    }

    // Up to 16 of n values, then zeros.
    static typename V::F load_first(const float* p, int64_t n) {
        if (n >= 16) return V::load(p);
        float values[16] = {};
        std::memcpy(values, p, static_cast<size_t>(n) * sizeof(float));
        return V::load(values);
    }

    typename V::F at(int64_t k) const {
        const int64_t n = cols - k;
        if (n <= 0) return V::zero();
        const auto v = load_first(x + k, n);
        return norm ? V::mul(V::mul(v, V::set(scale)), load_first(norm + k, n)) : v;
    }
};

// d = absmax / 127, q = round(x * (127 / absmax)); a block with a NaN or an infinity has d = NaN and q = 0.
template <class V>
void quantize_block(typename V::F first, typename V::F second, const Acts& out, int64_t t) {
    const auto zero = V::zero();
    const float nan_or_zero = V::sum(V::fma(first, zero, V::mul(second, zero)));
    const float most = V::largest(V::max(V::abs(first), V::abs(second)));
    const float scale = most / 127.0f;
    if (!(scale >= FLT_MIN) || nan_or_zero != 0) {
        std::memset(out.q(t), 0, kBlock);
        out.d(t) = out.d_sum(t) = nan_or_zero;
        out.minus_first(t) = out.minus_sum(t) = 0;
        return;
    }
    const auto inverse = V::set(127.0f / most);
    const auto a = V::round(V::mul(first, inverse)), b = V::round(V::mul(second, inverse));
    V::store_i8(out.q(t), a);
    V::store_i8(out.q(t) + 16, b);
    const float first_sum = V::sum(a), sum = first_sum + V::sum(b);  // of small integers: exact
    out.d(t) = scale;
    out.minus_first(t) = static_cast<int32_t>(-first_sum);
    out.minus_sum(t) = static_cast<int32_t>(-sum);
    out.d_sum(t) = scale * sum;
}

template <class V>
class Matmul {
  public:
    Matmul(Pool& pool, const Linear& args) : pool_(pool), args_(args), weight_(*args.weight) {
        for (int32_t i = 0; i < weight_.n_parts; ++i) {
            const bool floats = is_float(weight_.parts[i]);
            (floats ? has_floats_ : has_codes_) = true;
        }
        const bool keeps_rows = has_floats_ && args.norm;  // floats are multiplied with what the norm gives
        const int64_t n_bytes = args.n_tokens * tokens_stride();
        acts_ = pool.scratch(n_bytes + (keeps_rows ? args.n_tokens * weight_.cols * 4 : 0));
        if (acts_ && keeps_rows) rows_ = reinterpret_cast<float*>(acts_ + n_bytes);
    }

    int64_t run(int64_t from) {
        if (args_.n_tokens == 0) return 0;
        if (!acts_) return -1;
        if (from == 0) prepare();
        const int64_t n = n_units();
        const auto work = [&](int64_t unit, int) { multiply(unit); };
        if (is_short()) {
            pool_.all(n, work);
            return 0;
        }
        const int64_t next = pool_.each(from, n, work);
        return next == n ? 0 : next;
    }

  private:
    static constexpr int64_t kTile = V::kTile;

    // Bound by memory, and over before long.
    bool is_short() const { return args_.n_tokens <= kShortTokens; }
    int64_t tokens_stride() const { return blocks_of(weight_.cols) * kActBytes; }
    int64_t n_tiles() const { return ceil_div(args_.n_tokens, kTile); }
    int64_t tile_tokens(int64_t tile) const { return smaller(kTile, args_.n_tokens - tile * kTile); }
    uint8_t* tile_acts(int64_t tile) const { return acts_ + tile * kTile * tokens_stride(); }

    void prepare() {
        const auto work = [&](int64_t tile, int) { prepare_tile(tile); };
        if (args_.n_tokens <= kTile) work(0, 0);
        else pool_.all(n_tiles(), work);
    }

    void prepare_tile(int64_t tile) {
        const int64_t n = tile_tokens(tile);
        for (int64_t t = 0; t < n; ++t) {
            const int64_t token = tile * kTile + t;
            const RowReader<V> row(args_.x + token * weight_.cols, args_.norm, weight_.cols, args_.eps);
            for (int64_t b = 0; has_codes_ && b < blocks_of(weight_.cols); ++b) {
                const Acts block{tile_acts(tile) + b * kActBytes * n, n};
                quantize_block<V>(row.at(b * kBlock), row.at(b * kBlock + 16), block, t);
            }
            if (rows_) keep_row(row, rows_ + token * weight_.cols);
        }
    }

    void keep_row(const RowReader<V>& row, float* out) const {
        for (int64_t k = 0; k < weight_.cols; k += 16) store_first(out + k, row.at(k), weight_.cols - k);
    }

    static void store_first(float* out, typename V::F values, int64_t n) {
        if (n >= 16) return V::store(out, values);
        float all[16];
        V::store(all, values);
        std::memcpy(out, all, static_cast<size_t>(n) * sizeof(float));
    }

    // A part is multiplied in pairs of panels, one of each half, so that memory is read in two
    // long streams; a gated weight in pairs of gate and up. A unit of work is so many pairs that few
    // tokens read kUnitBytes.
    int64_t pairs_of(const Panels& part) const {
        return weight_.gated ? panels_of(part) : ceil_div(panels_of(part), 2);
    }
    int64_t unit_pairs(const Panels& part) const {
        return is_short() ? larger(1, kUnitBytes / (2 * panel_bytes(part))) : 1;
    }
    int64_t units_of(const Panels& part) const { return ceil_div(pairs_of(part), unit_pairs(part)); }

    int64_t n_units() const {
        int64_t n = 0;
        for (int32_t i = 0; i < (weight_.gated ? 1 : weight_.n_parts); ++i) n += units_of(weight_.parts[i]);
        return n;
    }

    void multiply(int64_t unit) {
        int64_t row = 0;
        const Panels* part = weight_.parts;
        for (; unit >= units_of(*part); row += part->rows, ++part) unit -= units_of(*part);
        const int64_t first = unit * unit_pairs(*part), end = smaller(first + unit_pairs(*part), pairs_of(*part));
        for (int64_t pair = first; pair < end; ++pair) {
            if (weight_.gated) multiply_gated(pair);
            else multiply_pair(*part, pair, row);
        }
    }

    // A pair of panels of a part whose rows begin at `row` of the product.
    void multiply_pair(const Panels& part, int64_t pair, int64_t row) {
        const int64_t far = pair + pairs_of(part);
        const int64_t panels[2] = {pair, far < panels_of(part) ? far : pair};
        float out[2 * kTile * kRows];
        for (int64_t tile = 0; tile < n_tiles(); ++tile) {
            const int64_t n = tile_tokens(tile);
            product(part, panel_of(part, panels[0]), panel_of(part, panels[1]), tile, out);
            for (int r = 0; r < (panels[0] == panels[1] ? 1 : 2); ++r)
                for (int64_t t = 0; t < n; ++t)
                    put(tile * kTile + t, row + panels[r] * kRows, part.rows - panels[r] * kRows,
                        out + (r * n + t) * kRows);
        }
    }

    void multiply_gated(int64_t panel) {
        const Panels &gate = weight_.parts[0], &up = weight_.parts[1];
        const bool alike = gate.form == up.form && gate.group == up.group && gate.unit == up.unit &&
                           !gate.mins == !up.mins && gate.has_book == up.has_book && gate.shift == up.shift &&
                           std::memcmp(gate.book, up.book, sizeof gate.book) == 0;
        float out[2 * kTile * kRows], twice[2 * kTile * kRows];
        for (int64_t tile = 0; tile < n_tiles(); ++tile) {
            const int64_t n = tile_tokens(tile);
            const Panel g = panel_of(gate, panel), u = panel_of(up, panel);
            product(gate, g, alike ? u : g, tile, out);
            if (!alike) {
                product(up, u, u, tile, twice);
                std::memcpy(out + n * kRows, twice, static_cast<size_t>(n * kRows) * sizeof(float));
            }
            for (int64_t t = 0; t < n; ++t) {
                const auto gated = silu(V::load(with_bias(out + t * kRows, panel * kRows, gate.rows)));
                const auto upper = V::load(with_bias(out + (n + t) * kRows, gate.rows + panel * kRows, weight_.rows));
                float* to = args_.out + (tile * kTile + t) * gate.rows + panel * kRows;
                store_first(to, V::mul(gated, upper), gate.rows - panel * kRows);
            }
        }
    }

    const float* with_bias(float* values, int64_t row, int64_t end) const {
        for (int64_t i = 0; weight_.bias && i < smaller(kRows, end - row); ++i) values[i] += weight_.bias[row + i];
        return values;
    }

    // Values of rows `row`, ... of a token; `n` or 16 of them are real.
    void put(int64_t token, int64_t row, int64_t n, float* values) {
        float* to = args_.out + token * weight_.rows + row;
        with_bias(values, row, row + n);
        auto result = V::load(values);
        if (args_.mode == kAdd) result = V::add(RowReader<V>::load_first(to, n), result);
        store_first(to, result, n);
    }

    // x / (1 + e^-x), of e^-|x|, which cannot overflow
    static typename V::F silu(typename V::F x) {
        const auto one = V::set(1.0f), zero = V::zero();
        const auto e = exp_of_negative<V>(V::sub(zero, V::abs(x)));
        const auto numerator = V::max(e, V::zero_where_less(x, zero, one));
        return V::mul(x, V::div(numerator, V::add(one, e)));
    }

    void product(const Panels& part, const Panel& first, const Panel& second, int64_t tile, float* out) const {
        const float* x = rows_ ? rows_ : args_.x;
        const TileArgs args{{first, second}, &part, tile_acts(tile), x + tile * kTile * weight_.cols, weight_.cols, out};
        tile_function<V>(part, tile_tokens(tile))(args);
    }

    Pool& pool_;
    const Linear& args_;
    const Weight& weight_;
    bool has_floats_ = false, has_codes_ = false;
    uint8_t* acts_;
    float* rows_ = nullptr;
};
