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
    const int* ids;
    float* h;  // (T, dim)
    int64_t dim;
};

extern "C" __global__ void embed(const __grid_constant__ Embed a) {
    release_next();
    await_inputs();
    const int column = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= a.dim) return;
    float values[8];
    // Of logits that are not numbers, anything may have been chosen, and the host does not know yet.
    const int id = min(max(a.ids[blockIdx.y], 0), a.part.rows - 1);
    values8<WEIGHTS>(a.part, id, column, values);
    for (int i = 0; i < 8 && column + i < a.dim; ++i) a.h[blockIdx.y * a.dim + column + i] = values[i];
}

struct Unpack {
    Part part;
    uint16_t* out;  // bfloat16 (rows, columns)
    int64_t columns;
    int64_t first;  // row
    int64_t count;  // of groups of eight
};

// Columns beyond the last are left out: `columns` need not be a multiple of 8.
extern "C" __global__ void unpack(const __grid_constant__ Unpack a) {
    release_next();
    await_inputs();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    const int64_t across = (a.columns + 7) / 8, row = i / across;
    const int column = static_cast<int>(i % across) * 8;
    float values[8];
    values8<WEIGHTS>(a.part, a.first + row, column, values);
    uint16_t* to = a.out + row * a.columns + column;
    if (a.columns % 8 == 0) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) words[k] = to_bfloat16(values[2 * k]) | to_bfloat16(values[2 * k + 1]) << 16;
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
    for (int k = 0; k < 8 && column + k < a.columns; ++k) to[k] = to_bfloat16(values[k]);
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
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x) sum += x[i] * x[i];
    sum = sum_over(sum);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = sum_over(threadIdx.x % kWarp < blockDim.x / kWarp ? sums[threadIdx.x % kWarp] : 0.0f);
    const float factor = rsqrtf(sum / static_cast<float>(a.dim) + a.eps);
    uint16_t* out = a.out + blockIdx.x * a.dim;
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x) out[i] = to_bfloat16(x[i] * factor * a.gain[i]);
}

// silu(gate) * up, of gate | up (T, 2 dim).
extern "C" __global__ void gate_rows(const __grid_constant__ Rows a) {
    release_next();
    await_inputs();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= a.dim) return;
    const float gate = a.x[blockIdx.y * 2 * a.dim + i], up = a.x[(blockIdx.y * 2 + 1) * a.dim + i];
    a.out[blockIdx.y * a.dim + i] = to_bfloat16(gate / (1.0f + expf(-gate)) * up);
}
