// y = W x for up to a few tokens: packed weights times activations at 8 bits.
//
// A block of threads gives 32 rows of one part, or of gate and up, of TOKENS tokens. A warp has
// ROWS of them; its lanes take one unit of each row after the other, DEPTH of them on their way.
// Compiled for FORMS, a list such as X(1) X(2), MODE, TOKENS, ROWS, DEPTH and RESIDENT, the blocks
// that a processor shall have room for.
#include "linear.cuh"
#include "peers.cuh"

constexpr int kWarps = 32 / ROWS;

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

struct Row {  // where it begins
    const uint8_t* codes;
    const uint16_t* scales;
    const uint16_t* mins;
};

template <int FORM>
__device__ __forceinline__ Raw read_unit(const Part& p, const Row& row, int unit) {
    using F = Form<FORM>;
    const bool is_in = unit < p.units;
    Raw raw{};
    raw.codes = stream16(row.codes + unit * 16, is_in);
    if constexpr (!F::is_float) {
        if constexpr (F::fine && F::per_unit == 32) {  // two groups a unit
            raw.scale = stream4(row.scales + 2 * unit, is_in);
            if (F::has_min) raw.min = stream4(row.mins + 2 * unit, is_in);
        } else {
            const int group = F::fine ? unit : (F::per_unit == 32 ? unit : unit / 2) >> p.shift;
            raw.scale = stream2(row.scales + group, is_in);
            if (F::has_min) raw.min = stream2(row.mins + group, is_in);
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

template <int FORM>
__device__ __forceinline__ void add_codes(
    const Part& p, const Acts& x, const int (&from)[TOKENS], int unit, const Raw (&raw)[ROWS],
    float (&sums)[ROWS][TOKENS]) {
    using F = Form<FORM>;
    Levels<FORM> levels[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) levels[r] = levels_of<FORM>(p, raw[r].codes);
    const int block = F::per_unit == 32 ? unit : unit / 2;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const int64_t row = static_cast<int64_t>(from[t]) * x.blocks;
        const uint4* codes = reinterpret_cast<const uint4*>(x.codes) + 2 * row + block;
        const float scale = x.scales[row + block];
        const int packed = x.sums[row + block];
        const int first = static_cast<short>(packed), second = packed >> 16;
        if constexpr (F::per_unit == 32) {
            const uint4 a = codes[0], b = codes[x.blocks];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const Raw& u = raw[r];
                const int low = dot16(levels[r], 0, a, 0);
                const int top = dot16(levels[r], 4, b, F::fine ? 0 : low);
                const float value = F::fine
                    ? scaled<FORM>(p, low, first, u.scale & 0xFFFF, u.min & 0xFFFF)
                        + scaled<FORM>(p, top, second, u.scale >> 16, u.min >> 16)
                    : scaled<FORM>(p, top, first + second, u.scale, u.min);
                sums[r][t] += scale * value;
            }
        } else {
            const uint4 a = codes[unit % 2 ? x.blocks : 0];
            const int sum = unit % 2 ? second : first;
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                sums[r][t] += scale * scaled<FORM>(p, dot16(levels[r], 0, a, 0), sum, raw[r].scale, raw[r].min);
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
    const int64_t row = first + threadIdx.x / kWarp * ROWS;
    const int64_t rows = min(static_cast<int64_t>(ROWS), p.rows - row);
    if (threadIdx.x % kWarp != 0 || rows <= 0) return;
    fetch_ahead(p.codes + row * p.stride, rows * p.stride);
    if (p.scales != nullptr) fetch_ahead(p.scales + row * p.groups, rows * p.groups * 2);
    if (p.mins != nullptr) fetch_ahead(p.mins + row * p.groups, rows * p.groups * 2);
}

// 32 rows from `first` times the tokens `from`, to y[t][row]; rows beyond the last repeat it.
template <int FORM>
__device__ __forceinline__ void multiply(
    const Part& p, int first, const Acts& x, const int (&from)[TOKENS], float (*y)[32]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Row rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = min(first + warp * ROWS + r, p.rows - 1);
        rows[r] = Row{p.codes + row * p.stride, p.scales + row * p.groups, p.mins + row * p.groups};
    }
    Raw ring[DEPTH][ROWS];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) ring[d][r] = read_unit<FORM>(p, rows[r], d * kWarp + lane);
    }
    await_inputs();
    float sums[ROWS][TOKENS] = {};
    for (int base = 0; base < p.units; base += DEPTH * kWarp) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int unit = base + d * kWarp + lane;
            const int inside = min(unit, p.units - 1);  // beyond it weights are zeros
            if constexpr (Form<FORM>::is_float) add_floats<FORM>(x, from, inside, ring[d], sums);
            else add_codes<FORM>(p, x, from, inside, ring[d], sums);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) ring[d][r] = read_unit<FORM>(p, rows[r], unit + DEPTH * kWarp);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = sum_over(sums[r][t]);
            if (lane == 0) y[t][warp * ROWS + r] = Form<FORM>::is_float ? sum : sum * p.unit;
        }
    }
}

__device__ __forceinline__ void multiply_part(
    const Part& p, int first, const Acts& x, const int (&from)[TOKENS], float (*y)[32]) {
#define X(FORM) if (p.form == FORM) multiply<FORM>(p, first, x, from, y);
    FORMS
#undef X
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, RESIDENT) linear(const __grid_constant__ Called<MODE>::Args a) {
    __shared__ float y[MODE == kSwiglu ? 2 : 1][TOKENS][32];
    const int block = blockIdx.x, t0 = blockIdx.y * TOKENS;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int from[TOKENS];
    if (a.wanted != nullptr) await_inputs();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const int token = min(t0 + t, a.tokens - 1);
        from[t] = MODE == kStore && a.wanted != nullptr ? a.wanted[token] : token;
    }
    int row = block * 32 + lane, end = a.parts[0].rows;  // of y
    if constexpr (MODE == kSwiglu) {
        multiply_part(a.parts[0], block * 32, a.x, from, y[0]);
        multiply_part(a.parts[1], block * 32, a.x, from, y[1]);
    } else {
        int rows_before = 0;
        for (int i = 0; i < a.n_parts; ++i) {
            const Part& p = a.parts[i];
            const bool is_here = block >= p.first && (i + 1 == a.n_parts || block < a.parts[i + 1].first);
            if (is_here) {
                if (MODE == kStore) fetch_rows(p, (block - p.first) * 32);  // others were slower
                multiply_part(p, (block - p.first) * 32, a.x, from, y[0]);
                row = rows_before + (block - p.first) * 32 + lane;
                end = rows_before + p.rows;
            }
            rows_before += p.rows;
        }
    }
    release_next();  // sooner, the next kernel's blocks would be in the way of these
    __syncthreads();
    for (int t = warp; t < TOKENS && t0 + t < a.tokens; t += kWarps) {
        const int64_t token = t0 + t;
        int source = static_cast<int>(token);
        if (MODE == kStore && a.wanted != nullptr) source = a.wanted[token];
        const float factor = norm_factor(a.x, lane_squares(a.x, source));
        const Beside beside = read_beside<MODE>(a, token, row, end);
        const float up = MODE == kSwiglu ? y[MODE == kSwiglu][t][lane] * factor : 0.0f;
        const float value = y[0][t][lane] * factor;
        if constexpr (MODE != kSend) finish<MODE>(a, token, block, row, end, value, up, beside);
        else if (row < end) send(a, token, row, value + beside.bias);
    }
}
