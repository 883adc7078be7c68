// Attention of one instruction set (LC_...) against a plain loop in double precision, and against
// itself: a token's result has the same bits however the pass is cut. Exits with 1 if a check fails.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention.h"

namespace {

struct Model {
    int heads, kv_heads, head_dim;
    CacheForm form;
    std::string name() const {
        const char* forms[] = {"f32", "bf16", "int8"};
        return std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
               std::to_string(head_dim) + ", " + forms[form];
    }
    int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// A cache of two layers whose unwritten slots poison whatever reads them.
struct Memory {
    std::vector<uint8_t> keys, values;
    std::vector<float> key_scales, value_scales;
    Cache cache;
    int64_t slots;

    Memory(const Model& model, int64_t slots_) : slots(slots_) {
        const int64_t bytes = model.form == kCacheF32 ? 4 : model.form == kCacheBF16 ? 2 : 1;
        const int64_t chunk = 64, rows = 2 * model.kv_heads * ceil_div(slots, chunk) * chunk;
        keys.assign(rows * model.head_dim * bytes, 0xFF);  // NaN as float32 and as bfloat16
        values = keys;
        key_scales.assign(rows, std::numeric_limits<float>::quiet_NaN());
        value_scales = key_scales;
        cache = {keys.data(), values.data(), key_scales.data(), value_scales.data(), chunk, 2, model.kv_heads,
                 model.head_dim, model.form};
    }
};

// Everything about one token of one row but where it is stored.
struct Text {
    std::vector<float> qkv, cosines, sines;
    int64_t n;

    Text(const Model& model, int64_t n_, unsigned seed) : n(n_) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < n * model.width(); ++i) qkv.push_back(1.5f * normal(random));
        for (int64_t t = 0; t < n; ++t)
            for (int i = 0; i < model.head_dim / 2; ++i) {
                const double angle = static_cast<double>(t) * std::pow(10000.0, -2.0 * i / model.head_dim);
                cosines.push_back(static_cast<float>(std::cos(angle)));
                sines.push_back(static_cast<float>(std::sin(angle)));
            }
    }
};

using Order = std::vector<int32_t>;  // the slot of each entry

Order in_order(int64_t n, int32_t first) {
    Order slots(n);
    std::iota(slots.begin(), slots.end(), first);
    return slots;
}

Order shuffled(int64_t n) {
    Order slots = in_order(n, 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(5));
    return slots;
}

// Tokens [from, to) of a text that belongs to a row of the table.
struct Piece {
    const Text* text;
    int row;
    int64_t from, to;
};

// One pass over some pieces.
struct OnePass {
    const Model& model;
    Memory& memory;
    std::vector<Piece> pieces;
    std::vector<float> qkv, cosines, sines, out;
    std::vector<int32_t> row, slot, seen, table;

    OnePass(const Model& model_, Memory& memory_, const std::vector<Order>& orders,
            const std::vector<Piece>& pieces_)
        : model(model_), memory(memory_), pieces(pieces_), table(orders.size() * memory.slots, -1) {
        for (size_t r = 0; r < orders.size(); ++r)
            std::copy(orders[r].begin(), orders[r].end(), table.begin() + r * memory.slots);
        for (const Piece& piece : pieces) {
            const auto copy = [&](const std::vector<float>& from, int64_t size, std::vector<float>& to) {
                to.insert(to.end(), from.begin() + piece.from * size, from.begin() + piece.to * size);
            };
            copy(piece.text->qkv, model.width(), qkv);
            copy(piece.text->cosines, model.head_dim / 2, cosines);
            copy(piece.text->sines, model.head_dim / 2, sines);
            for (int64_t t = piece.from; t < piece.to; ++t) {
                row.push_back(piece.row);
                slot.push_back(orders[piece.row][t]);
                seen.push_back(static_cast<int32_t>(t + 1));
            }
        }
        out.assign(row.size() * model.heads * model.head_dim, NAN);
    }

    void run(Pool& pool, int64_t from = 0) {
        Pass pass{};
        pass.row = row.data(), pass.slot = slot.data(), pass.seen = seen.data(), pass.table = table.data();
        pass.n_tokens = static_cast<int64_t>(row.size()), pass.table_stride = memory.slots;
        const Attention args{&pass, qkv.data(), cosines.data(), sines.data(), &memory.cache,
                             out.data(), model.heads, 1};
        do from = attention<Simd>(pool, args, from);
        while (from > 0);
    }

    // The results to the pieces' places in `outs`, one for each row.
    void spread(std::vector<std::vector<float>>& outs) const {
        const int64_t wide = model.heads * model.head_dim;
        auto next = out.begin();
        for (const Piece& piece : pieces) {
            std::vector<float>& to = outs[piece.row];
            to.resize(piece.text->n * wide);
            const auto end = next + (piece.to - piece.from) * wide;
            std::copy(next, end, to.begin() + piece.from * wide);
            next = end;
        }
    }
};

// A whole text in chunks of at most `chunk` tokens.
std::vector<float> read(const Model& model, const Text& text, int64_t chunk, const Order& order,
                        int threads) {
    Pool pool(threads, nullptr);
    Memory memory(model, (*std::max_element(order.begin(), order.end()) / 16 + 1) * 16);
    std::vector<std::vector<float>> outs(1);
    for (int64_t t = 0; t < text.n; t += chunk) {
        OnePass pass(model, memory, {order}, {{&text, 0, t, std::min(t + chunk, text.n)}});
        pass.run(pool);
        pass.spread(outs);
    }
    return outs[0];
}

double as_stored(double x, double scale, CacheForm form) {
    if (form == kCacheF32) return x;
    if (form == kCacheInt8) return scale == 0 ? 0 : std::nearbyint(x / scale) * scale;
    const int exponent = std::ilogb(x == 0 ? 1 : x);
    return std::ldexp(std::nearbyint(std::ldexp(x, 7 - exponent)), exponent - 7);
}

std::vector<double> stored(std::vector<double> x, CacheForm form) {
    double most = 0;
    for (double value : x) most = std::max(most, std::fabs(value));
    for (double& value : x) value = as_stored(value, most / 127, form);
    return x;
}

std::vector<double> turned(const Model& model, const Text& text, int64_t t, int64_t at) {
    const int half = model.head_dim / 2;
    const float* x = &text.qkv[t * model.width() + at];
    std::vector<double> out(model.head_dim);
    for (int i = 0; i < half; ++i) {
        const double cosine = text.cosines[t * half + i], sine = text.sines[t * half + i];
        out[i] = x[i] * cosine - x[i + half] * sine;
        out[i + half] = x[i] * sine + x[i + half] * cosine;
    }
    return out;
}

// softmax(q k^T / sqrt(E)) v of token t, plainly.
std::vector<double> expected(const Model& model, const Text& text, int64_t t) {
    const int E = model.head_dim;
    std::vector<double> out(model.heads * E);
    for (int h = 0; h < model.heads; ++h) {
        const int kv = h / (model.heads / model.kv_heads);
        const auto q = turned(model, text, t, h * E);
        double total = 0;
        for (int64_t s = 0; s <= t; ++s) {
            const auto k = stored(turned(model, text, s, (model.heads + kv) * E), model.form);
            const float* first = &text.qkv[s * model.width() + (model.heads + model.kv_heads + kv) * E];
            const auto v = stored(std::vector<double>(first, first + E), model.form);
            const double score = std::inner_product(q.begin(), q.end(), k.begin(), 0.0) / std::sqrt(E);
            const double weight = std::exp(score);
            total += weight;
            for (int e = 0; e < E; ++e) out[h * E + e] += weight * v[e];
        }
        for (int e = 0; e < E; ++e) out[h * E + e] /= total;
    }
    return out;
}

int failures = 0;

void check(bool good, const std::string& what) {
    if (!good) std::printf("FAILED: %s\n", what.c_str()), ++failures;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The largest difference; a NaN counts as infinite.
double distance(const std::vector<float>& out, const Model& model, const Text& text, int64_t step) {
    double most = 0;
    for (int64_t t = text.n - 1; t >= 0; t -= step) {
        const auto right = expected(model, text, t);
        for (size_t i = 0; i < right.size(); ++i) {
            const double difference = std::fabs(out[t * right.size() + i] - right[i]);
            most = difference <= most ? most : std::isnan(difference) ? INFINITY : difference;
        }
    }
    return most;
}

void attention_is_the_plain_loop(const Model& model) {
    const Text text(model, 300, 1);
    const double bound = model.form == kCacheF32 ? 2e-5 : 3e-2;  // k or v may be rounded the other way
    const auto out = read(model, text, 300, in_order(300, 0), 2);
    check(distance(out, model, text, 23) < bound, "plain loop: " + model.name());
}

void a_token_has_the_same_bits_in_every_pass(const Model& model) {
    const Text text(model, 270, 2);
    const auto whole = read(model, text, 270, in_order(270, 0), 1);
    for (int64_t chunk : {1, 3, 17, 130})
        check(same(read(model, text, chunk, in_order(270, 0), 2), whole),
              "chunks of " + std::to_string(chunk) + ": " + model.name());
    check(same(read(model, text, 270, in_order(270, 0), 5), whole), "five threads: " + model.name());
}

void slots_may_lie_anywhere(const Model& model) {
    const Text text(model, 150, 3);
    const auto whole = read(model, text, 150, in_order(150, 0), 1);
    for (int64_t chunk : {1, 16, 150}) {
        const std::string what = " slots, chunks of " + std::to_string(chunk) + ": " + model.name();
        check(same(read(model, text, chunk, shuffled(150), 2), whole), "shuffled" + what);
        check(same(read(model, text, chunk, in_order(150, 7), 2), whole), "shifted" + what);
    }
}

// Row 1 shares the first 40 entries of row 0, then goes on with a text of its own.
void rows_do_not_touch_each_other(const Model& model) {
    const Text one(model, 200, 4);
    Text two(model, 200, 5);
    std::copy_n(one.qkv.begin(), 40 * model.width(), two.qkv.begin());
    Order first(200), second(200);
    for (int32_t t = 0; t < 200; ++t) first[t] = t < 40 ? t : 2 * t - 40, second[t] = t < 40 ? t : 2 * t - 39;
    Pool pool(2, nullptr);
    Memory memory(model, 368);
    std::vector<std::vector<float>> outs(2);
    const auto together = [&](const std::vector<Piece>& pieces) {
        OnePass pass(model, memory, {first, second}, pieces);
        pass.run(pool);
        pass.spread(outs);
    };
    together({{&one, 0, 0, 40}});
    for (int64_t t = 40; t < 60; ++t) together({{&two, 1, t, t + 1}, {&one, 0, t, t + 1}});
    together({{&one, 0, 60, 200}, {&two, 1, 60, 200}});
    check(same(outs[0], read(model, one, 200, in_order(200, 0), 1)), "first row: " + model.name());
    const auto alone = read(model, two, 200, in_order(200, 0), 1);
    std::copy_n(alone.begin(), 40 * model.heads * model.head_dim, outs[1].begin());
    check(same(outs[1], alone), "second row: " + model.name());
}

// From unit 1 on every result but the first unit's is computed, from nothing but arguments and cache.
void a_pass_goes_on_from_where_it_stopped() {
    const Model model{4, 2, 64, kCacheBF16};
    const Text text(model, 300, 6);
    const int64_t wide = model.heads * model.head_dim;
    Pool pool(2, nullptr);
    Memory memory(model, 304);
    OnePass pass(model, memory, {in_order(300, 0)}, {{&text, 0, 0, 300}});
    pass.run(pool);
    auto whole = pass.out;
    std::fill(pass.out.begin(), pass.out.end(), 0.0f);
    for (int64_t t = 0; t < 24; ++t)  // the first unit's: 48 queries of two heads
        std::fill_n(whole.begin() + t * wide, 2 * model.head_dim, 0.0f);
    pass.run(pool, 1);
    check(same(pass.out, whole), "from unit 1");
}

// So long that the pool stops in between, at least without optimization.
void a_long_pass_is_the_plain_loop() {
    const Model model{8, 8, 64, kCacheBF16};
    const Text text(model, 700, 8);
    check(distance(read(model, text, 700, in_order(700, 0), 3), model, text, 350) < 3e-2, "a long pass");
}

// Scores far apart, and keys and values of nothing but zeros.
void extremes_stay_finite(CacheForm form) {
    const Model model{2, 1, 32, form};
    Text text(model, 140, 7);
    for (int64_t t = 0; t < text.n; ++t)
        for (int64_t i = 0; i < model.width(); ++i) {
            if (t % 3 == 0) text.qkv[t * model.width() + i] *= 100;
            if (t % 7 == 0 && i >= 64) text.qkv[t * model.width() + i] = 0;
            if (t % 11 == 0 && i >= 64) text.qkv[t * model.width() + i] = 1e-42f;
        }
    const auto whole = read(model, text, 140, in_order(140, 0), 2);
    for (float x : whole) check(std::isfinite(x), "extremes: " + model.name());
    check(same(read(model, text, 1, shuffled(140), 2), whole), "extremes, token by token: " + model.name());
}

}  // namespace

int main() {
    for (const CacheForm form : {kCacheF32, kCacheBF16, kCacheInt8}) {
        for (const Model& model : {Model{9, 3, 64, form}, Model{4, 4, 128, form}, Model{4, 2, 8, form},
                                   Model{5, 1, 20, form}, Model{8, 1, 80, form}}) {
            attention_is_the_plain_loop(model);
            a_token_has_the_same_bits_in_every_pass(model);
            slots_may_lie_anywhere(model);
            rows_do_not_touch_each_other(model);
        }
        extremes_stay_finite(form);
    }
    a_pass_goes_on_from_where_it_stopped();
    a_long_pass_is_the_plain_loop();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
