// A pass of up to TOKENS tokens as one kernel: a block on each processor goes through the phases of all
// layers, and memory never waits.
//
// One warp of a block, the producer, asks for weights in the order in which its block will need
// them, as far ahead as the ring in shared memory has room: across phases and layers, as no weight
// depends on what is computed. The other warps multiply. Between two phases blocks wait for each
// other, since each needs what all have written; the ring fills meanwhile.
//
// A product's unit is 32 rows, or 32 of gate and of up. Units are dealt to blocks in turn, and the
// next phase begins where the last one ended, so that blocks have the same to read in the long run.
// A stage of the ring has four boxes of a unit, for the four warps of a team; teams take turns.
// Stages on their way at once are fewer, or whatever else a block asks of memory would wait behind them.
// Compiled for FORMS, TOKENS, WARPS (that multiply), STAGES, FLYING, TABLES (0: of floats, 1: scales, 2: and
// minima), ARRIVING (lanes that speak for a warp), HEAD_DIM, HEADS and CACHE.
#include "attention.cuh"
#include "matrix.cuh"

enum Op { kProducts = kSwiglu + 1, kKeep = kProducts, kAttend };  // after the modes of products

struct alignas(16) Work {
    union {
        Linear linear;
        Attention attention;
    };
    int op;
    int units;
    int first;  // block that has unit 0
    int unused;
};

struct Phase {
    Map maps[3][3];  // codes, scales and minima of a product's parts
    Work work;
    int unused[12];
};

struct Step {
    const Phase* phases;
    uint64_t* arrived;  // blocks, at the ends of phases, of all launches
    int n_phases;
    int unused;
};

constexpr int kBoxes = 4, kTeams = WARPS / kBoxes;
constexpr int kRowBytes = kBoxes * kBoxBytes;  // of codes, in a stage
constexpr int kTableSize = kBoxRows * 64;
constexpr int kStageSize = kBoxes * kBoxSize + TABLES * kTableSize;
constexpr int kThreads = WARPS * kWarp;  // that multiply
static_assert(WARPS % kBoxes == 0 && WARPS >= TOKENS && kStageSize % 1024 == 0 && sizeof(Phase) % 64 == 0);

// Barriers of the ring by stage, and of two units' partial sums: written, and free to be written again.
__shared__ uint64_t full[STAGES], empty[STAGES], summed[2], taken[2];

template <int SLOTS>
struct Turn {
    unsigned n;  // that came before
    __device__ int slot() const { return n % SLOTS; }
    __device__ int round() const { return n / SLOTS & 1; }
};

struct Ring : Turn<STAGES> {
    __device__ uint8_t* at() const { return dynamic_memory() + slot() * kStageSize; }
};

// Whether all blocks have finished a phase. Each launch adds a multiple of the number of blocks, so
// nothing needs to be set to zero: what is beyond a multiple was added by this one.
struct Grid {
    uint64_t* arrived;
    uint64_t goal;
    bool is_open;

    __device__ explicit Grid(uint64_t* count) : arrived(count), is_open(true) {
        goal = threadIdx.x == 0 ? acquired(arrived) / gridDim.x * gridDim.x : 0;
    }
    __device__ void arrive() {
        sync_first<kThreads>();
        if (threadIdx.x == 0) add_released(arrived);
        goal += gridDim.x;
        is_open = false;
    }
    __device__ void wait() {
        if (is_open) return;
        if (threadIdx.x == 0) {
            while (acquired(arrived) < goal) {}
        }
        sync_first<kThreads>();
        is_open = true;
    }
};

struct Place {  // of a unit: a part, and the first of its rows there
    int part, row;
};

__device__ __forceinline__ Place place_of(const Linear& a, int op, int unit, int half) {
    if (op == kSwiglu) return {half, unit * kBoxRows};
    int part = 0;
    while (part + 1 < a.n_parts && unit >= a.parts[part + 1].first) ++part;
    return {part, (unit - a.parts[part].first) * kBoxRows};
}

__device__ __forceinline__ int first_unit(const Work& work) {
    return (blockIdx.x + gridDim.x - work.first) % gridDim.x;
}

// The boxes of a row of units, one stage after the other.
__device__ __forceinline__ void fetch_rows(const Part& p, const Map (&maps)[3], int row, Ring& ring) {
    const int row_bytes = p.units * 16, kind = p.form % kKinds;
    const int table_bytes = kind <= kBook4 ? 64 : kind == kPlain8 ? 32 : 0;
    const int tables = table_bytes == 0 ? 0 : p.form & kMin ? 2 : 1;
    for (int from = 0, i = 0; from < row_bytes; from += kRowBytes, ++i, ++ring.n) {
        const int boxes = min(kBoxes, (row_bytes - from + kBoxBytes - 1) / kBoxBytes);
        uint64_t* filled = full + ring.slot();
        uint8_t* to = ring.at();
        barrier_wait(empty + ring.slot(), ring.round() ^ 1);
        if (ring.n >= FLYING) {
            const Turn<STAGES> landed{ring.n - FLYING};
            barrier_wait(full + landed.slot(), landed.round());
        }
        barrier_expect(filled, boxes * kBoxSize + tables * kBoxRows * table_bytes);
        for (int box = 0; box < boxes; ++box)
            copy_box(to + box * kBoxSize, &maps[0], from + box * kBoxBytes, row, filled);
        to += kBoxes * kBoxSize;
        for (int table = 0; table < tables; ++table)
            copy_box(to + table * kTableSize, &maps[1 + table], i * table_bytes, row, filled);
    }
}

// Lane i of a warp has 16 bytes of what is to be done in a phase.
constexpr int kWorkLanes = sizeof(Work) / 16;
static_assert(kWorkLanes <= kWarp);

__device__ __forceinline__ uint4 read_work(const Step& step, int phase, int lane) {
    if (phase >= step.n_phases || lane >= kWorkLanes) return uint4{};
    return reinterpret_cast<const uint4*>(&step.phases[phase].work)[lane];
}

__device__ __forceinline__ void write_work(Work& work, int lane, const uint4& bytes) {
    if (lane < kWorkLanes) reinterpret_cast<uint4*>(&work)[lane] = bytes;
}

__device__ __forceinline__ void fetch_units(const Work& work, const Map (&maps)[3][3], Ring& ring) {
    for (int unit = first_unit(work); unit < work.units; unit += gridDim.x) {
        for (int half = 0; half < (work.op == kSwiglu ? 2 : 1); ++half) {
            const Place place = place_of(work.linear, work.op, unit, half);
            fetch_rows(work.linear.parts[place.part], maps[place.part], place.row, ring);
        }
    }
}

// By one warp, whose first lane asks for copies; the others bring what is next.
__device__ __forceinline__ void produce(const Step& step) {
    __shared__ Work work;
    const int lane = threadIdx.x % kWarp;
    Ring ring{};
    uint4 next = read_work(step, 0, lane);
    for (int i = 0; i < step.n_phases; ++i) {
        write_work(work, lane, next);
        next = read_work(step, i + 1, lane);
        if (i + 1 < step.n_phases && lane < 9) prefetch_map(&step.phases[i + 1].maps[0][0] + lane);
        __syncwarp();
        if (lane == 0 && work.op < kProducts) fetch_units(work, step.phases[i].maps, ring);
        __syncwarp();
    }
}

// This warp is done with what a barrier stands for.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp < ARRIVING) barrier_arrive(barrier);
}

// This warp's boxes of 32 rows, which the ring brings.
template <int FORM>
__device__ __forceinline__ void multiply_rows(const Part& part, const Feed& x, Ring& ring, Sums& sums) {
    using B = Box<FORM>;
    const Part p = part;  // out of shared memory
    const int warp = threadIdx.x / kWarp, box = warp % kBoxes;
    const unsigned end = ring.n + (p.units * 16 + kRowBytes - 1) / kRowBytes;
    for (int first = box * B::blocks; ring.n != end; first += kBoxes * B::blocks, ++ring.n) {
        if (ring.n % kTeams != warp / kBoxes) continue;
        const bool is_in = first < x.blocks;
        const uint8_t* codes = ring.at() + box * kBoxSize;
        const uint8_t* tables = ring.at() + kBoxes * kBoxSize + box * B::blocks * 2;
        constexpr int n = B::is_float ? 1 : B::blocks / 4;
        Span spans[n];
        if (is_in && !B::is_float) {
#pragma unroll
            for (int i = 0; i < n; ++i) spans[i] = read_span<FORM>(x, first + 4 * i);
        }
        barrier_wait(full + ring.slot(), ring.round());
        if (is_in) {
            if constexpr (B::is_float) multiply_floats(codes, x, first, sums);
            else {
#pragma unroll
                for (int i = 0; i < n; ++i) {
                    const uint8_t* scales = tables + 8 * i;
                    multiply_span<FORM>(p, codes, scales, scales + kTableSize, 4 * i, spans[i], sums);
                }
            }
        }
        arrive_warp(empty + ring.slot());
    }
}

using Partial = float[TOKENS][WARPS][kBoxRows];
using Partials = Partial[2];  // of gate and of up

__device__ __forceinline__ Partials* both_partials() {
    return reinterpret_cast<Partials*>(dynamic_memory() + STAGES * kStageSize);
}

// What this warp adds to 32 rows.
__device__ __forceinline__ void store_sums(const Part& p, const Sums& sums, Partial& to) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const bool is_sixteenth = p.form == kPlain4;
    const float unit = is_sixteenth ? p.unit / 16 : p.unit;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const int token = lane % 4 * 2 + i;
        if (token >= TOKENS) continue;
#pragma unroll
        for (int row = 0; row < 4; ++row) to[token][warp][lane / 4 + 8 * row] = sums.of[row][i] * unit;
    }
}

__device__ __forceinline__ float added(const float (&partials)[WARPS][kBoxRows]) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += partials[warp][threadIdx.x % kWarp];
    return sum;
}

// All units of this block. Once a unit is multiplied, a warp for each token adds up what all warps have
// of it; the others go on, two units ahead at most.
template <int MODE>
__device__ __forceinline__ void multiply(const Work& work, Grid& grid, Ring& ring, Turn<2>& turn) {
    const Linear& a = work.linear;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const auto source = [&](int t) { return MODE == kStore && a.wanted != nullptr ? a.wanted[t] : t; };
    Partials* partials = both_partials();
    const Feed feed(a.x, a.tokens, source);
    grid.wait();
    const float squares = warp < a.tokens ? lane_squares(a.x, source(warp)) : 0.0f;
    for (int unit = first_unit(work); unit < work.units; unit += gridDim.x, ++turn.n) {
        Partials& sums_of = partials[turn.slot()];
        Place place{};
        for (int half = 0; half < (MODE == kSwiglu ? 2 : 1); ++half) {
            place = place_of(a, MODE, unit, half);
            const Part& p = a.parts[place.part];
            Sums sums{};
#define X(FORM) if (p.form == FORM) multiply_rows<FORM>(p, feed, ring, sums);
            FORMS
#undef X
            if (half == 0) barrier_wait(taken + turn.slot(), turn.round() ^ 1);
            store_sums(p, sums, sums_of[half]);
        }
        arrive_warp(summed + turn.slot());
        int rows_before = 0;
        for (int i = 0; MODE != kSwiglu && i < place.part; ++i) rows_before += a.parts[i].rows;
        const int row = rows_before + place.row + lane;
        const int end = (MODE == kSwiglu ? 0 : rows_before) + a.parts[place.part].rows;
        if (warp < a.tokens) {
            const Beside beside = read_beside<MODE>(a, warp, row, end);
            const float factor = norm_factor(a.x, squares);
            barrier_wait(summed + turn.slot(), turn.round());
            const float value = added(sums_of[0][warp]) * factor;
            const float up = MODE == kSwiglu ? added(sums_of[1][warp]) * factor : 0.0f;
            finish<MODE>(a, warp, unit, row, end, value, up, beside);
        }
        arrive_warp(taken + turn.slot());
    }
}

__device__ __forceinline__ void attend(const Work& work, Grid& grid) {
    const Attention& a = work.attention;
    const int tiles = tiles_of(a);
    for (int unit = blockIdx.x; unit < work.units; unit += gridDim.x) {
        attend_tile(a, unit % tiles, unit / tiles % a.splits, unit / tiles / a.splits, [&] { grid.wait(); });
        sync_first<kThreads>();  // the next one writes to the same shared memory
    }
}

__device__ __forceinline__ void keep(const Work& work, Grid& grid) {
    const Attention& a = work.attention;
    grid.wait();
    for (int i = blockIdx.x * WARPS + threadIdx.x / kWarp; i < work.units; i += gridDim.x * WARPS)
        append(a, i / a.kv_heads, i % a.kv_heads);
}

__device__ __forceinline__ void consume(const Step& step) {
    __shared__ Work work;
    Grid grid(step.arrived);
    Ring ring{};
    Turn<2> turn{};
    uint4 next = read_work(step, 0, threadIdx.x);
    for (int i = 0; i < step.n_phases; ++i) {
        write_work(work, threadIdx.x, next);
        next = read_work(step, i + 1, threadIdx.x);
        sync_first<kThreads>();
        if (work.op == kStore) multiply<kStore>(work, grid, ring, turn);
        if (work.op == kAdd) multiply<kAdd>(work, grid, ring, turn);
        if (work.op == kSwiglu) multiply<kSwiglu>(work, grid, ring, turn);
        if (work.op == kKeep) keep(work, grid);
        if (work.op == kAttend) attend(work, grid);
        grid.wait();  // also without a unit
        grid.arrive();
    }
}

extern "C" __global__ void __launch_bounds__(kThreads + kWarp, 1) run_step(const __grid_constant__ Step a) {
    if (threadIdx.x == 0) {
        constexpr int kArriving = WARPS * ARRIVING;
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i, 1), barrier_init(empty + i, kBoxes * ARRIVING);
        for (int i = 0; i < 2; ++i) barrier_init(summed + i, kArriving), barrier_init(taken + i, kArriving);
    }
    for (int i = threadIdx.x; i < a.n_phases * 9; i += kThreads + kWarp)
        acquire_map(&a.phases[i / 9].maps[i % 9 / 3][i % 3]);
    __syncthreads();
    if (threadIdx.x >= kThreads) {
        produce(a);
    } else {
        consume(a);
    }
}
