// What stands around the products: angles, look-up, codes of a stream; for prompts, norms, gates and
// unpacked weights.
// Compiled for WEIGHTS, the form of what is looked up or unpacked.
#include "weights.cuh"

struct Bring {
    const int* staged;      // of a batch, in memory of the host
    const int64_t* chosen;  // its first `tokens` numbers instead, or null
    int* to;
    int count;
    int tokens;
};

// A batch to where its pass reads it. Copies by the driver would keep the GPU waiting twice as long.
extern "C" __global__ void bring(const __grid_constant__ Bring a) {
    await_inputs();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    a.to[i] = a.chosen != nullptr && i < a.tokens ? static_cast<int>(a.chosen[i]) : a.staged[i];
}

struct Best {
    const float* logits;  // (B, V)
    uint64_t* found;      // (B,) zeros, as they are again afterwards
    int* tickets;         // (B,) the same
    int64_t* ids;         // (B,)
    int64_t width;        // V
};

// The larger the number, and of equal ones the lower its index, the larger is this; a NaN is the largest.
__device__ __forceinline__ uint64_t ranked(float value, int64_t index) {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // a zero has one sign
    const uint32_t rank = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(value == value ? rank : ~0u) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ uint64_t largest_of_warp(uint64_t mine) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) mine = max(mine, __shfl_xor_sync(kAll, mine, step));
    return mine;
}

// Which of a row is the largest: (blocks that share a row, rows).
extern "C" __global__ void best(const __grid_constant__ Best a) {
    release_next();
    await_inputs();
    __shared__ uint64_t of_warps[kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const float* row = a.logits + blockIdx.y * a.width;
    uint64_t mine = 0;
#pragma unroll 8
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < a.width; i += gridDim.x * blockDim.x)
        mine = max(mine, ranked(row[i], i));
    mine = largest_of_warp(mine);
    if (lane == 0) of_warps[warp] = mine;
    __syncthreads();
    if (warp > 0) return;
    mine = largest_of_warp(lane < static_cast<int>(blockDim.x) / kWarp ? of_warps[lane] : 0);
    if (lane > 0) return;
    atomicMax(a.found + blockIdx.y, mine);
    __threadfence();
    if (atomicAdd(a.tickets + blockIdx.y, 1) + 1 < static_cast<int>(gridDim.x)) return;
    __threadfence();
    a.ids[blockIdx.y] = 0xFFFFFFFFu - static_cast<uint32_t>(__ldcg(a.found + blockIdx.y));
    a.found[blockIdx.y] = 0, a.tickets[blockIdx.y] = 0;
}

struct Angles {
    const int* position;
    const float* frequencies;
    float* cosines;  // (T, half)
    float* sines;
    int half;
    int tokens;
};

extern "C" __global__ void angles(const __grid_constant__ Angles a) {
    release_next();
    await_inputs();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.tokens * a.half) return;
    const float angle = static_cast<float>(a.position[i / a.half]) * a.frequencies[i % a.half];
    a.cosines[i] = cosf(angle);
    a.sines[i] = sinf(angle);
}

struct Embed {
    Part part;
    Acts out;           // what becomes of h, where `gain` is not null
    const float* gain;  // of the norm that follows
    const int* ids;
    float* h;           // (T, dim)
    int64_t dim;
};

extern "C" __global__ void embed(const __grid_constant__ Embed a) {
    release_next();
    await_inputs();
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (block * kBlock >= a.dim) return;
    const int64_t t = blockIdx.y;
    const int column = block * kBlock + threadIdx.x % kWarp;
    float values[8], value = 0;
    // Of logits that are not numbers, anything may have been chosen, and the host does not know yet.
    const int id = min(max(a.ids[t], 0), a.part.rows - 1);
    if (column < a.dim) {
        values8<WEIGHTS>(a.part, id, column / 8 * 8, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) value = column % 8 == i ? values[i] : value;
        a.h[t * a.dim + column] = value;
    }
    if (a.gain != nullptr) store_normed(a.out, t, block, value, column < a.dim ? a.gain[column] : 0.0f);
}

struct Unpack {
    Part parts[3];  // one after the other
    uint16_t* out;  // bfloat16 (rows, columns)
    int64_t columns;
    int64_t first;  // row, of each part
    int64_t rows;
};

// A block for some rows of a part and some of their groups of eight; all rows are asked for before one is stored.
// Columns beyond the last are left out: `columns` need not be a multiple of 8.
extern "C" __global__ void unpack(const __grid_constant__ Unpack a) {
    constexpr int kRows = 4;
    release_next();
    await_inputs();
    const Part& p = a.parts[blockIdx.z];
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows, end = min(p.rows - a.first, a.rows);
    if (column >= a.columns || begin >= end) return;
    float values[kRows][8];
#pragma unroll
    for (int k = 0; k < kRows; ++k) values8<WEIGHTS>(p, a.first + min(begin + k, end - 1), column, values[k]);
    uint16_t* to = a.out + begin * a.columns + column;
    for (int n = 0; n < static_cast<int>(blockIdx.z); ++n) to += a.parts[n].rows * a.columns;
#pragma unroll
    for (int k = 0; k < kRows; ++k, to += a.columns) {
        if (begin + k >= end) return;
        if (a.columns % 8 == 0) *reinterpret_cast<uint4*>(to) = bfloat16s(values[k]);
        else for (int i = 0; i < 8 && column + i < a.columns; ++i) to[i] = to_bfloat16(values[k][i]);
    }
}

struct Code {
    Acts out;
    const float* x;     // (T, dim)
    const float* gain;  // of a norm, or null
};

extern "C" __global__ void code(const __grid_constant__ Code a) {
    release_next();
    await_inputs();
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (block >= a.out.blocks) return;
    const int64_t t = blockIdx.y;
    const int column = block * kBlock + threadIdx.x % kWarp;
    const float x = column < a.out.dim ? a.x[t * a.out.dim + column] : 0.0f;
    if (a.gain != nullptr) store_normed(a.out, t, block, x, column < a.out.dim ? a.gain[column] : 0.0f);
    else store_block(a.out, t, block, x);
}

struct Rows {
    const float* x;     // (T, width)
    const float* gain;
    uint16_t* out;      // bfloat16 (T, dim)
    int64_t dim;
    float eps;
    int unused;
};

// RMSNorm, a block of threads for each token.
extern "C" __global__ void norm_rows(const __grid_constant__ Rows a) {
    release_next();
    await_inputs();
    __shared__ float sums[32];
    const float* x = a.x + blockIdx.x * a.dim;
    float sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x) sum += x[i] * x[i];
    sum = sum_over(sum);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = sum_over(threadIdx.x % kWarp < blockDim.x / kWarp ? sums[threadIdx.x % kWarp] : 0.0f);
    const float factor = rsqrtf(sum / static_cast<float>(a.dim) + a.eps);
    uint16_t* out = a.out + blockIdx.x * a.dim;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x) out[i] = to_bfloat16(x[i] * factor * a.gain[i]);
}

// silu(gate) * up, of gate | up (T, 2 dim); a thread has some columns, all of which it asks for at once.
extern "C" __global__ void gate_rows(const __grid_constant__ Rows a) {
    constexpr int kColumns = 4;
    release_next();
    await_inputs();
    const float* x = a.x + blockIdx.y * 2 * a.dim;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * kColumns + threadIdx.x;
    float gate[kColumns], up[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
        const int64_t i = min(first + k * blockDim.x, a.dim - 1);
        gate[k] = x[i], up[k] = x[a.dim + i];
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
        const int64_t i = first + k * blockDim.x;
        if (i < a.dim) a.out[blockIdx.y * a.dim + i] = to_bfloat16(gate[k] / (1.0f + expf(-gate[k])) * up[k]);
    }
}
