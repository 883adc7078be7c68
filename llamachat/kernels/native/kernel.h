// What one instruction set offers; kernel.cpp is compiled once for each.

#pragma once
#include "abi.h"

struct Pool;

struct Kernel {
    const char* name;
    // Resumable: from the unit of work to begin with to the one to go on with; 0: done, -1: no memory.
    int64_t (*linear)(Pool& pool, const Linear& args, int64_t from);
    int64_t (*attention)(Pool& pool, const Attention& args, int64_t from);
    void (*embed)(Pool& pool, const Embed& args);
    void (*quantize)(Pool& pool, const Quantize& args);
    void (*read)(const uint8_t* bytes, int64_t n);  // all of them, for the time it takes
};

extern const Kernel kernel_scalar, kernel_avx2, kernel_avxvnni, kernel_avx512, kernel_avx512vnni,
    kernel_avx512bf16, kernel_neon;
