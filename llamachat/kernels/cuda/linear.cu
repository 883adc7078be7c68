// y = W x for up to a few tokens: packed weights times activations at 8 bits.
//
// A block of threads gives HEIGHT rows of one part, or of gate and up, of TOKENS tokens. A warp has
// ROWS of them; its lanes take one unit of each row after the other, DEPTH of them on their way. Where
// a block has more WARPS than that, half of them have gate and the others up, or teams share the columns.
// Compiled for FORMS, a list such as X(1) X(2), MODE, TOKENS, HEIGHT (32 where they become a block of
// activations), ROWS, WARPS, DEPTH and RESIDENT, the blocks that a processor shall have room for.
#include "linear.cuh"
#include "peers.cuh"

constexpr int kAcross = HEIGHT / ROWS;  // warps that have all rows of a part
constexpr int kHalves = MODE == kSwiglu && WARPS > kAcross ? 2 : 1;
constexpr int kTeams = WARPS / kAcross / kHalves;
static_assert(WARPS >= TOKENS && WARPS == kAcross * kHalves * kTeams && 32 % HEIGHT == 0);
static_assert(HEIGHT == 32 || MODE == kStore);
// Of a single token few blocks of attention come next. Others would be in the way of these.
constexpr bool kSoon = MODE == kStore && TOKENS == 1;

#define X(FORM) + 1
constexpr int kForms = 0 FORMS;
#undef X

struct Sending : Linear {      // kSend
    uint64_t* to[kMostPeers];  // this process's (T, width) words, at each process
    const uint32_t* epoch;     // the number of the sum
    int peers;
    int unused;
};

template <int>
struct Called {
    using Args = Linear;
};
template <>
struct Called<kSend> {
    using Args = Sending;
};

template <class Args>
__device__ __forceinline__ void send(const Args& a, int64_t token, int row, float value) {
    const uint32_t epoch = epoch_of(a.epoch);
    for (int i = 0; i < a.peers; ++i) send_word(a.to[i] + token * a.width + row, value, epoch);
}

struct Raw {  // a unit as it is read
    uint4 codes;
    uint32_t scale, min;
};

struct Rows {  // of a warp: where the first begins, and how far from there the others do
    const uint8_t* codes;
    const uint16_t* scales;
    const uint16_t* mins;
    uint32_t bytes[ROWS], groups[ROWS];
    int shift;
};

template <int FORM>
__device__ __forceinline__ Raw read_unit(const Part& p, const Rows& rows, int r, int unit) {
    using F = Form<FORM>;
    const bool is_in = unit < p.units;
    Raw raw{};
    raw.codes = stream16(rows.codes + unit * 16 + rows.bytes[r], is_in);
    const uint16_t *scales = rows.scales + rows.groups[r], *mins = rows.mins + rows.groups[r];
    if constexpr (!F::is_float) {
        if constexpr (F::fine && F::per_unit == 32) {  // two groups a unit
            raw.scale = stream4(scales + 2 * unit, is_in);
            if (F::has_min) raw.min = stream4(mins + 2 * unit, is_in);
        } else {
            const int group = F::fine ? unit : (F::per_unit == 32 ? unit : unit / 2) >> rows.shift;
            raw.scale = stream2(scales + group, is_in);
            if (F::has_min) raw.min = stream2(mins + group, is_in);
        }
    }
    return raw;
}

// scale * (dot + offset * sum) + min * sum
template <int FORM>
__device__ __forceinline__ float scaled(const Part& p, int dot, int sum, uint32_t scale, uint32_t min) {
    const float levels = static_cast<float>(dot + offset_of<FORM>(p, scale) * sum);
    const float value = of_half(scale) * levels;
    return Form<FORM>::has_min ? value + of_half(min) * static_cast<float>(sum) : value;
}

template <int FORM>
struct Levels {  // of a unit, int8; their sum where there are two
    static constexpr int n = Form<FORM>::kind == kBook4 && TOKENS <= 2 ? 2 : 1;
    int of[Form<FORM>::words][n];
};

template <int FORM>
__device__ __forceinline__ Levels<FORM> levels_of(const Part& p, const uint4& codes) {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    Levels<FORM> levels;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (Form<FORM>::per_unit == 16) levels.of[i][0] = words[i];
        else if constexpr (levels.n == 2) summands8(p, words[i], levels.of[2 * i], levels.of[2 * i + 1]);
        else levels8<FORM>(p, words[i], levels.of[2 * i][0], levels.of[2 * i + 1][0]);
    }
    return levels;
}

// Four words from `first` times 16 activations.
template <int FORM>
__device__ __forceinline__ int dot16(const Levels<FORM>& levels, int first, const uint4& x, int sum) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int k = 0; k < levels.n; ++k) sum = dot4(levels.of[first + i][k], words[i], sum);
    }
    return sum;
}

struct Spread {  // activations of a unit: its halves, or of one that has 16 the first
    uint4 low, top;
    float scale;
    int low_sum, top_sum;
};

template <int FORM>
__device__ __forceinline__ Spread read_spread(const Acts& x, int64_t token, int unit) {
    using F = Form<FORM>;
    const int block = F::per_unit == 32 ? unit : unit / 2;
    const int64_t row = token * x.blocks;
    const uint4* codes = reinterpret_cast<const uint4*>(x.codes) + 2 * row + block;
    const int packed = x.sums[row + block];
    const int first = static_cast<short>(packed), second = packed >> 16;
    const bool is_second = F::per_unit == 16 && unit % 2;
    Spread spread{};
    spread.low = codes[is_second ? x.blocks : 0];
    if constexpr (F::per_unit == 32) spread.top = codes[x.blocks];
    spread.scale = x.scales[row + block];
    spread.low_sum = is_second ? second : first, spread.top_sum = second;
    return spread;
}

template <int FORM>
__device__ __forceinline__ float product_of(
    const Part& p, const Levels<FORM>& levels, const Raw& raw, const Spread& x) {
    using F = Form<FORM>;
    const int low = dot16(levels, 0, x.low, 0);
    if constexpr (F::per_unit == 16) return x.scale * scaled<FORM>(p, low, x.low_sum, raw.scale, raw.min);
    const int top = dot16(levels, 4, x.top, F::fine ? 0 : low);
    if constexpr (!F::fine) return x.scale * scaled<FORM>(p, top, x.low_sum + x.top_sum, raw.scale, raw.min);
    return x.scale * (scaled<FORM>(p, low, x.low_sum, raw.scale & 0xFFFF, raw.min & 0xFFFF)
                      + scaled<FORM>(p, top, x.top_sum, raw.scale >> 16, raw.min >> 16));
}

template <int FORM>
__device__ __forceinline__ void add_codes(
    const Part& p, const Acts& x, const int (&from)[TOKENS], int unit, const Raw (&raw)[ROWS],
    float (&sums)[ROWS][TOKENS]) {
    if constexpr (TOKENS <= 4) {  // of few tokens there is room for all, of many for all levels
        Spread spreads[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) spreads[t] = read_spread<FORM>(x, from[t], unit);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Levels<FORM> levels = levels_of<FORM>(p, raw[r].codes);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) sums[r][t] += product_of<FORM>(p, levels, raw[r], spreads[t]);
        }
    } else {
        Levels<FORM> levels[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) levels[r] = levels_of<FORM>(p, raw[r].codes);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const Spread spread = read_spread<FORM>(x, from[t], unit);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r][t] += product_of<FORM>(p, levels[r], raw[r], spread);
        }
    }
}

template <int FORM>
__device__ __forceinline__ void add_floats(
    const Acts& x, const int (&from)[TOKENS], int unit, const Raw (&raw)[ROWS],
    float (&sums)[ROWS][TOKENS]) {
    using F = Form<FORM>;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const float* at = x.values + static_cast<int64_t>(from[t]) * x.blocks * kBlock + unit * F::per_unit;
        float v[F::per_unit];
#pragma unroll
        for (int i = 0; i < F::per_unit; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(at + i);
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t words[4] = {raw[r].codes.x, raw[r].codes.y, raw[r].codes.z, raw[r].codes.w};
#pragma unroll
            for (int i = 0; i < F::per_unit; ++i) {
                float w;
                if constexpr (F::kind == kFloat32) w = __uint_as_float(words[i]);
                else {
                    const uint32_t bits = (words[i / 2] >> (16 * (i % 2))) & 0xFFFF;
                    w = F::kind == kFloat16 ? of_half(bits) : of_bfloat16(bits);
                }
                sums[r][t] = fmaf(w, v[i], sums[r][t]);
            }
        }
    }
}

// What this warp will multiply: on its way while the kernel before is not yet over.
__device__ __forceinline__ void fetch_rows(const Part& p, int first) {
    const int warp = threadIdx.x / kWarp;
    const int64_t row = first + warp * ROWS;
    const int64_t rows = min(static_cast<int64_t>(ROWS), p.rows - row);
    if (threadIdx.x % kWarp != 0 || warp >= kAcross || rows <= 0) return;
    fetch_ahead(p.codes + row * p.stride, rows * p.stride);
    if (p.scales != nullptr) fetch_ahead(p.scales + row * p.groups, rows * p.groups * 2);
    if (p.mins != nullptr) fetch_ahead(p.mins + row * p.groups, rows * p.groups * 2);
}

// What a product becomes depends on more than the product: of a single token, the first warp asks for it
// as soon as it is there.
struct Inputs {
    static constexpr bool kEarly = TOKENS == 1;
    static constexpr int kSquares = 4;  // times 32 blocks of activations, whose squares come early
    const Linear& a;
    int row, end;  // of y
    Beside early;
    float squares[kSquares];

    __device__ __forceinline__ int token() const {  // of this warp
        return min(static_cast<int>(blockIdx.y * TOKENS + threadIdx.x / kWarp), a.tokens - 1);
    }
    __device__ __forceinline__ int source() const {  // of x
        return MODE == kStore && a.wanted != nullptr ? a.wanted[token()] : token();
    }
    __device__ __forceinline__ void await() {
        await_inputs();
        if (!kEarly || threadIdx.x >= kWarp) return;
        early = read_beside<MODE>(a, token(), row, end);
        if (a.x.squares == nullptr) return;
#pragma unroll
        for (int i = 0; i < kSquares; ++i) squares[i] = square_of(a.x, source(), i * kWarp);
    }
    __device__ __forceinline__ Beside beside() const {
        return kEarly ? early : read_beside<MODE>(a, token(), row, end);
    }
    __device__ __forceinline__ float factor() const {
        if (a.x.squares == nullptr) return 1.0f;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kSquares; ++i) sum += kEarly ? squares[i] : square_of(a.x, source(), i * kWarp);
        for (int from = kSquares * kWarp; from < a.x.blocks; from += kWarp) sum += square_of(a.x, source(), from);
        return norm_factor(a.x, sum);
    }
};

using Product = float[kTeams][TOKENS][HEIGHT];  // of a part, what each team has of it

// This warp's of HEIGHT rows from `first`; rows beyond the last repeat it.
__device__ __forceinline__ Rows rows_of(const Part& p, int first) {
    const int begin = min(first + static_cast<int>(threadIdx.x) / kWarp % kAcross * ROWS, p.rows - 1);
    const int64_t from = static_cast<int64_t>(begin) * p.groups;
    Rows rows{p.codes + begin * p.stride, p.scales + from, p.mins + from, {}, {}, p.shift};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = min(r, p.rows - 1 - begin);
        rows.bytes[r] = row * static_cast<uint32_t>(p.stride), rows.groups[r] = row * p.groups;
    }
    return rows;
}

// HEIGHT rows from `first` of each of N parts in this form times the tokens `from`; rows beyond the last
// repeat it. The second part's first weights are asked for with the first one's last.
template <int FORM, int N>
__device__ __forceinline__ void multiply(
    const Part* parts, int first, const Acts& x, const int (&from)[TOKENS], Inputs& inputs, Product* y) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int across = warp % kAcross, team = warp / kAcross % kTeams;
    const int begin = team * kWarp + lane;
    constexpr int kStep = kTeams * kWarp;
    Rows rows = rows_of(parts[0], first);
    Raw ring[DEPTH][ROWS];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) ring[d][r] = read_unit<FORM>(parts[0], rows, r, d * kStep + begin);
    }
    inputs.await();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const Part& p = parts[i];
        float sums[ROWS][TOKENS] = {};
        for (int base = 0; base < p.units; base += DEPTH * kStep) {
            const bool is_next = i + 1 < N && base + DEPTH * kStep >= p.units;
            if (is_next) rows = rows_of(parts[i + 1], first);
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int unit = base + d * kStep + begin;
                const int inside = min(unit, p.units - 1);  // beyond it weights are zeros
                if constexpr (Form<FORM>::is_float) add_floats<FORM>(x, from, inside, ring[d], sums);
                else add_codes<FORM>(p, x, from, inside, ring[d], sums);
                const int ahead = is_next ? d * kStep + begin : unit + DEPTH * kStep;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) ring[d][r] = read_unit<FORM>(p, rows, r, ahead);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const float sum = sum_over(sums[r][t]);
                if (lane == 0) y[i][team][t][across * ROWS + r] = Form<FORM>::is_float ? sum : sum * p.unit;
            }
        }
    }
}

template <int N>
__device__ __forceinline__ void multiply_parts(
    const Part* parts, int first, const Acts& x, const int (&from)[TOKENS], Inputs& inputs, Product* y) {
#define X(FORM) if (parts[0].form == FORM) multiply<FORM, N>(parts, first, x, from, inputs, y);
    FORMS
#undef X
}

__device__ __forceinline__ float added(const Product& y, int t) {
    float sum = 0;
#pragma unroll
    for (int team = 0; team < kTeams; ++team) sum += y[team][t][threadIdx.x % HEIGHT];
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * kWarp, RESIDENT) linear(const __grid_constant__ Called<MODE>::Args a) {
    __shared__ Product y[MODE == kSwiglu ? 2 : 1];
    constexpr int kPieces = 32 / HEIGHT;  // of 32 rows, by which blocks of a part are counted
    const int block = blockIdx.x / kPieces, first = blockIdx.x * HEIGHT, t0 = blockIdx.y * TOKENS;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int from[TOKENS];
    if (kSoon) release_next();
    if (a.wanted != nullptr) await_inputs();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const int token = min(t0 + t, a.tokens - 1);
        from[t] = MODE == kStore && a.wanted != nullptr ? a.wanted[token] : token;
    }
    Inputs inputs{a, first + lane, a.parts[0].rows, {}, {}};
    if constexpr (kHalves == 2) {
        const int half = warp / (WARPS / 2);
        multiply_parts<1>(a.parts + half, first, a.x, from, inputs, y + half);
    } else if constexpr (MODE == kSwiglu) {
        if (kForms == 1 || a.parts[0].form == a.parts[1].form) {
            multiply_parts<2>(a.parts, first, a.x, from, inputs, y);
        } else {
            multiply_parts<1>(a.parts, first, a.x, from, inputs, y);
            multiply_parts<1>(a.parts + 1, first, a.x, from, inputs, y + 1);
        }
    } else {
        int rows_before = 0;
        for (int i = 0; i < a.n_parts; ++i) {
            const Part& p = a.parts[i];
            const bool is_here = block >= p.first && (i + 1 == a.n_parts || block < a.parts[i + 1].first);
            if (is_here) {
                const int there = first - p.first * 32;
                inputs.row = rows_before + there + lane;
                inputs.end = rows_before + min(p.rows, there + HEIGHT);
                if (MODE == kStore) fetch_rows(p, there);  // others were slower
                multiply_parts<1>(&p, there, a.x, from, inputs, y);
            }
            rows_before += p.rows;
        }
    }
    if (!kSoon) release_next();
    __syncthreads();
    if (warp >= TOKENS || t0 + warp >= a.tokens) return;
    const int64_t token = t0 + warp;
    const int row = inputs.row, end = inputs.end;
    const Beside beside = inputs.beside();
    const float factor = inputs.factor();
    const float up = MODE == kSwiglu ? added(y[MODE == kSwiglu], warp) * factor : 0.0f;
    const float value = added(y[0], warp) * factor;
    if constexpr (MODE != kSend) finish<MODE>(a, token, block, row, end, value, up, beside);
    else if (row < end) send(a, token, row, value + beside.bias);
}
