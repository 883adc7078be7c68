// Attention of a few tokens, a kernel for each layer; of prompts, what comes before it.
// Compiled for HEAD_DIM, HEADS and CACHE.
#define WARPS 16
#include "attention.cuh"

extern "C" __global__ void store(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    append(a, blockIdx.y, blockIdx.x);
}

// Turned queries as bfloat16 (T, H, E) to `partial`; a warp each.
extern "C" __global__ void turn(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int e = threadIdx.x * 8;
    if (e >= HEAD_DIM) return;
    float q[8];
    turned8(a, blockIdx.y, blockIdx.x, e, q);
    const int64_t row = static_cast<int64_t>(blockIdx.y) * a.heads + blockIdx.x;
    uint16_t* to = reinterpret_cast<uint16_t*>(a.partial) + row * HEAD_DIM + e;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_bfloat16(q[i]);
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp) attend(const __grid_constant__ Attention a) {
    release_next();
    attend_tile(a, blockIdx.x, blockIdx.y, blockIdx.z, [] { await_inputs(); });
}

extern "C" __global__ void combine(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (block < a.out.blocks) combine_block(a, blockIdx.y, block);
}
