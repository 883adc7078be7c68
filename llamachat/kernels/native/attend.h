// What 128 entries of a row say to a few queries: the arithmetic of attention.
//
// A block gives each query a partial result (o, m, l): the weighted sum of values, the largest score,
// the sum of weights. Scores and sums are single chains of fma, over the elements of a key and over
// the entries of a block, and no query touches an entry that it does not see: what a query gets does
// not depend on the queries beside it, nor on how or where the entries are stored.
//
// Where an instruction set multiplies bfloat16 in pairs (V::kPairs), keys and values of that form meet
// queries and weights rounded to it: chains take two steps at a time, and an odd last one alone.

#pragma once
#include "panels.h"
#include "rope.h"
#include "simd.h"

// What a chain adds at a time: `kSteps` lines of 16 elements, each times its factor.
template <class V, CacheForm kForm, bool kPaired = V::kPairs && kForm == kCacheBF16>
struct Term {
    using F = typename V::F;
    using T = typename Element<V, kForm>::T;
    using Factor = float;
    using Line = F;
    static constexpr int64_t kSteps = 1;

    static Line load(const T* line, int64_t) { return Element<V, kForm>::load(line); }
    static F factor(const Factor* x) { return V::set(*x); }
    static F add(F sum, F x, Line line) { return V::fma(x, line, sum); }
    // Makes factors of 16 floats, and returns what they are worth.
    static F store(Factor* factors, F x) {
        V::store(factors, x);
        return x;
    }
};

template <class V>
struct Term<V, kCacheBF16, true> {
    using F = typename V::F;
    using T = uint16_t;
    using Factor = uint16_t;
    using Line = typename V::Pairs;
    static constexpr int64_t kSteps = 2;

    static Line load(const T* line, int64_t step) { return V::pairs(line, line + step); }
    static Line factor(const Factor* x) { return V::pair(x); }
    static F add(F sum, Line x, Line line) { return V::dot_pairs(sum, x, line); }
    static F store(Factor* factors, F x) {
        V::store_bf16(factors, x);
        return V::load_bf16(factors);
    }

    // An odd last step, which touches nothing behind it.
    struct Last : Term<V, kCacheBF16, false> {
        using Factor = uint16_t;

        static F factor(const Factor* x) {
            const uint32_t bits = static_cast<uint32_t>(*x) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return V::set(value);
        }
    };
};

// Lines of 16 elements: (steps, columns, 16).
template <class Term>
struct Lines {
    const typename Term::T* data;
    int64_t steps, step, column;    // how many; elements from one step and one column to the next
    const typename Term::T* ahead;  // as much memory, fetched while these are read; or null

    Lines part(int64_t first, int64_t n, int64_t c) const {
        return {data + first * step + c * column, n, step, column, ahead ? ahead + 16 * c * steps : nullptr};
    }
};

// sums (N, M) += a (N, kSteps) times lines (kSteps, M, 16).
template <class Term, int N, int M, class F>
inline void add_term(const typename Term::Factor* a, int64_t a_stride, const typename Term::T* data,
                     int64_t step, int64_t column, F (&sums)[N][M]) {
    typename Term::Line line[M];
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) line[j] = Term::load(data + j * column, step);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const auto x = Term::factor(a + i * a_stride);
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) sums[i][j] = Term::add(sums[i][j], x, line[j]);
    }
}

// c (N, 16 M) += a (N, steps) times lines (steps, M, 16): one term after the other, in order.
template <class V, class Term, int N, int M>
void multiply_tile(const typename Term::Factor* a, int64_t a_stride, const Lines<Term>& lines, float* c,
                   int64_t c_stride) {
    typename V::F sums[N][M];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) sums[i][j] = V::load(c + i * c_stride + 16 * j);

    constexpr int64_t kSteps = Term::kSteps, kFetched = 16 * M * kSteps;
    const auto *data = lines.data, *ahead = lines.ahead;
    int64_t k = 0;
    for (; k + kSteps <= lines.steps; k += kSteps, data += kSteps * lines.step) {
        if (ahead) {  // into the second level: the first has no room for a block more
#pragma GCC unroll 8
            for (int64_t j = 0; j < kFetched; j += 64 / sizeof(*ahead)) __builtin_prefetch(ahead + j, 0, 2);
            ahead += kFetched;
        }
        add_term<Term>(a + k, a_stride, data, lines.step, lines.column, sums);
    }
    if constexpr (kSteps > 1)
        if (k < lines.steps)
            add_term<typename Term::Last>(a + k, a_stride, data, lines.step, lines.column, sums);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) V::store(c + i * c_stride + 16 * j, sums[i][j]);
}

// The same for any number of rows up to N, and of columns.
template <class V, class Term, int N, int M>
void multiply(int64_t rows, int64_t columns, const typename Term::Factor* a, int64_t a_stride,
              const Lines<Term>& lines, float* c, int64_t c_stride) {
    if (rows == N) {
        const auto from = [&](int64_t j) { return lines.part(0, lines.steps, j); };
        int64_t j = 0;
        for (; j + M <= columns; j += M)
            multiply_tile<V, Term, N, M>(a, a_stride, from(j), c + 16 * j, c_stride);
        for (; j < columns; ++j)
            multiply_tile<V, Term, N, 1>(a, a_stride, from(j), c + 16 * j, c_stride);
    } else if constexpr (N > 1) {
        multiply<V, Term, N - 1, M>(rows, columns, a, a_stride, lines, c, c_stride);
    }
}

template <class Term>
struct Entries {
    Lines<Term> keys;    // (E, tiles of 16 entries, 16)
    Lines<Term> values;  // (entries, E / 16, 16)
    const float *key_scales, *value_scales;  // (entries) of bytes, or null
};

// Queries that are asked together. Query i sees the first seen[i] entries.
template <class Factor>
struct Queries {
    const Factor* q;      // (n, E)
    const int32_t* seen;  // (n)
    int64_t n;
    float* scores;    // (n, 128); weights take their place, as factors
    float* partials;  // (n, stride): o, padded with zeros to a multiple of 16; m and l, 16 times each
    int64_t stride;
};

template <class V>
struct Attend {
    using F = typename V::F;
    static constexpr int64_t kEntries = 128;
    // A tile of sums leaves room in the registers for its lines and a broadcast.
    static constexpr int64_t kRows = V::kRegisters >= 32 ? 6 : 2, kColumns = V::kRegisters >= 32 ? 4 : 2;

    int64_t head_dim, padded;  // E, and up to a multiple of 16

    int64_t result_floats() const { return padded + 32; }

    // The partial results of a block.
    template <class Term>
    void ask(const Entries<Term>& entries, const Queries<typename Term::Factor>& queries) const {
        score(entries.keys, queries);
        for (int64_t i = 0; i < queries.n; ++i)
            weigh<Term>(entries.key_scales, entries.value_scales, queries.seen[i],
                        queries.scores + i * kEntries, queries.partials + i * queries.stride);
        for (int64_t column = 0; column < padded / 16; column += kColumns)
            sum(entries.values, column, queries);
    }

    // Merges a partial result into that of the blocks before.
    void merge(float* state, const float* partial) const {
        const F before = V::load(state + padded), here = V::load(partial + padded);
        const F most = V::max(before, here);
        const F keep = exp_of_negative<V>(V::sub(before, most));
        const F take = exp_of_negative<V>(V::sub(here, most));
        const auto mix = [&](int64_t e) {
            V::store(state + e, V::fma(V::load(partial + e), take, V::mul(V::load(state + e), keep)));
        };
        for (int64_t e = 0; e < padded; e += 16) mix(e);
        V::store(state + padded, most);
        mix(padded + 16);
    }

    // The result of all blocks (E).
    void finish(float* state, float* out) const {
        const F total = V::load(state + padded + 16);
        for (int64_t e = 0; e < padded; e += 16) V::store(state + e, V::div(V::load(state + e), total));
        std::memcpy(out, state, head_dim * sizeof(float));
    }

  private:
    template <class Term>
    void score(const Lines<Term>& keys, const Queries<typename Term::Factor>& queries) const {
        std::memset(queries.scores, 0, queries.n * kEntries * sizeof(float));
        for (int64_t tile = 0; tile < kEntries / 16; tile += kColumns)
            for (int64_t i = 0; i < queries.n; i += kRows) {
                const int64_t rows = smaller(kRows, queries.n - i);
                int64_t most = 0;
                for (int64_t r = 0; r < rows; ++r) most = larger(most, queries.seen[i + r]);
                multiply<V, Term, kRows, kColumns>(
                    rows, smaller(kColumns, ceil_div(most, 16) - tile), queries.q + i * head_dim, head_dim,
                    keys.part(0, head_dim, tile), queries.scores + i * kEntries + 16 * tile, kEntries);
            }
    }

    // Scores of one query into weights, m and l (the sum of what the weights are worth); o becomes zero.
    template <class Term>
    void weigh(const float* key_scales, const float* value_scales, int64_t seen, float* scores,
               float* partial) const {
        const F nothing = V::set(-INFINITY);
        F most = nothing, total = V::zero();
        for (int64_t i = 0; i < seen; i += 16) {
            F score = V::load(scores + i);
            if (key_scales) score = V::mul(score, V::load(key_scales + i));
            score = V::first(static_cast<int>(smaller(16, seen - i)), score, nothing);  // others may be NaN
            most = V::max(most, score);
            V::store(scores + i, score);
        }
        most = V::set(V::largest(most));
        auto* weights = reinterpret_cast<typename Term::Factor*>(scores);
        for (int64_t i = 0; i < seen; i += 16) {
            const F weight = Term::store(weights + i, exp_of_negative<V>(V::sub(V::load(scores + i), most)));
            total = V::add(total, weight);
            if (value_scales) Term::store(weights + i, V::mul(weight, V::load(value_scales + i)));
        }
        for (int64_t e = 0; e < padded; e += 16) V::store(partial + e, V::zero());
        V::store(partial + padded, most);
        V::store(partial + padded + 16, V::set(V::sum(total)));
    }

    // Adds up some columns of o: together as far as all queries of a tile see, then each to its end.
    template <class Term>
    void sum(const Lines<Term>& values, int64_t column, const Queries<typename Term::Factor>& queries) const {
        const int64_t columns = smaller(kColumns, padded / 16 - column);
        const auto add = [&](int64_t i, int64_t rows, int64_t from, int64_t to) {
            const auto* weights =
                reinterpret_cast<const typename Term::Factor*>(queries.scores + i * kEntries);
            multiply<V, Term, kRows, kColumns>(
                rows, columns, weights + from, kEntries * sizeof(float) / sizeof(*weights),
                values.part(from, to - from, column),
                queries.partials + i * queries.stride + 16 * column, queries.stride);
        };
        for (int64_t i = 0; i < queries.n; i += kRows) {
            const int64_t rows = smaller(kRows, queries.n - i);
            int64_t common = kEntries;
            for (int64_t r = 0; r < rows; ++r) common = smaller(common, queries.seen[i + r]);
            common -= common % Term::kSteps;
            add(i, rows, 0, common);
            for (int64_t r = 0; r < rows; ++r)
                if (queries.seen[i + r] > common) add(i + r, 1, common, queries.seen[i + r]);
        }
    }
};
