// Instructions that CUDA C++ has no words for, a function each, and the types that NVRTC lacks.
// tests/native/emulated.h has the same for the CPU.
#pragma once

typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

__device__ __forceinline__ float of_half(uint32_t bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

// Two float16.
__device__ __forceinline__ float2 of_halves(uint32_t bits) {
    float2 values;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(values.x), "=f"(values.y) : "r"(bits));
    return values;
}

// (x ^ flipped) & kept: the compiler would take two instructions.
__device__ __forceinline__ uint32_t flip_and_keep(uint32_t x, uint32_t flipped, uint32_t kept) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(bits) : "r"(x), "r"(flipped), "r"(kept));
    return bits;
}

// Of the signed halves of a word.
__device__ __forceinline__ int sum_halves(int word) {
    int sum;
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(word), "r"(0x0101), "r"(0));
    return sum;
}

// To the nearest, ties to even; beyond the largest an infinity.
__device__ __forceinline__ uint32_t to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ int dot4(int a, int b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

// Weights: read once a pass, so they need no room in the first cache. Zeros if `is_in` is false.
__device__ __forceinline__ uint4 stream16(const void* from, bool is_in) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0;"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

__device__ __forceinline__ uint32_t stream4(const void* from, bool is_in) {
    uint32_t v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.L2::128B.u32 %0, [%1];}"
                 : "=r"(v) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

__device__ __forceinline__ uint32_t stream2(const void* from, bool is_in) {
    uint16_t v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.L2::128B.u16 %0, [%1];}"
                 : "=h"(v) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

// Bytes that will be read soon, to the second cache; `from` need not be aligned.
__device__ __forceinline__ void fetch_ahead(const void* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
    const uint64_t begin = reinterpret_cast<uint64_t>(from) & ~15ull;
    const uint64_t end = (reinterpret_cast<uint64_t>(from) + bytes + 15) & ~15ull;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 :: "l"(begin), "r"(static_cast<uint32_t>(end - begin)));
#endif
}

// What this kernel reads of the kernel before, and all it writes, comes after `await_inputs`: until
// then both may run at once (programmatic dependent launch).
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}


// For compute capability 9.0 alone, what step.cu is made of.

struct alignas(64) Map {  // of a matrix in global memory, as the driver encodes it (CUtensorMap)
    uint64_t words[16];
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The first THREADS threads of a block wait for each other.
template <int THREADS>
__device__ __forceinline__ void sync_first() {
    asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

// Arrives; the phase is over when so many bytes have come, too.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of this parity, 0 first, is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    uint32_t is_over = 0;
    while (!is_over) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                     "selp.u32 %0, 1, 0, p;}"
                     : "=r"(is_over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    }
}

// What the host has written to a map is seen by the copies of this block.
__device__ __forceinline__ void acquire_map(const Map* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" :: "l"(map) : "memory");
}

__device__ __forceinline__ void prefetch_map(const Map* map) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(map) : "memory");
}

// A box of the matrix from byte `x` of row `y`, zeros beyond its edges; it will not be read again.
__device__ __forceinline__ void copy_box(void* to, const Map* map, int x, int y, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;"
        :: "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y),
           "l"(0x12F0000000000000ull /* evict first */) : "memory");
}

// Four matrices of 8 rows by 16 bytes: lane i points to row i % 8 of matrix i / 8, and gets bytes
// i % 4 * 4 on of row i / 4 of each.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&to)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// 16 rows of 32 int8 by 8 columns, added to `start`. Lane i has words i % 4 and 4 + i % 4 of rows
// i / 4 and 8 + i / 4 (a), of column i / 4 (b), and sums of these rows, of columns i % 4 * 2 on.
__device__ __forceinline__ void multiply_bytes(
    const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&start)[4], int (&sums)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%10, %11, %12, %13};"
        : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),
          "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
}

// The same of 16 bfloat16 a row, added to `sums`.
__device__ __forceinline__ void multiply_bfloat16(
    float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats to the nearest, ties to even, the first in the lower half; a NaN stays one.
__device__ __forceinline__ uint32_t pack_bfloat16(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// Counts up; what this thread has seen written is seen by whoever reads the count by `acquired`.
__device__ __forceinline__ void add_released(uint64_t* count) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" :: "l"(count) : "memory");
}

__device__ __forceinline__ uint64_t acquired(const uint64_t* count) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(count) : "memory");
    return value;
}

// Whole words that other GPUs write and read, too.
__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t word) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ uint64_t relaxed(const uint64_t* from) {
    uint64_t word;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

// Memory of the block beside its static one, from a multiple of 1024 on.
__device__ __forceinline__ uint8_t* dynamic_memory() {
    extern __shared__ uint8_t memory[];
    return memory + (-shared_address(memory) & 1023);
}
