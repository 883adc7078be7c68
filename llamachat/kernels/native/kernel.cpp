// The kernels for one instruction set, chosen by the build (LC_...).

#include "kernel.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "abi.h"
#include "pool.h"
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#endif

// Nameless, lest the linker take one set's copy of an inline function for all of them.
namespace {
#include "attention.h"
#include "embed.h"
#include "matmul.h"
#include "quantize.h"

int64_t linear(Pool& pool, const Linear& args, int64_t from) { return Matmul<Simd>(pool, args).run(from); }

void read(const uint8_t* bytes, int64_t n) {
    auto sum = Simd::zero();
    for (int64_t at = 0; at + 256 <= n; at += 256)
        for (int i = 0; i < 4; ++i)
            sum = Simd::max(sum, Simd::load(reinterpret_cast<const float*>(bytes + at + 64 * i)));
    volatile float kept = Simd::largest(sum);
    (void)kept;
}
}  // namespace

#define LC_KERNEL(name) extern const Kernel kernel_##name = {#name, linear, attention<Simd>, embed<Simd>, quantize<Simd>, read}

#if defined(LC_AVX512BF16)
LC_KERNEL(avx512bf16);
#elif defined(LC_AVX512VNNI)
LC_KERNEL(avx512vnni);
#elif defined(LC_AVX512)
LC_KERNEL(avx512);
#elif defined(LC_AVXVNNI)
LC_KERNEL(avxvnni);
#elif defined(LC_AVX2)
LC_KERNEL(avx2);
#elif defined(LC_NEON)
LC_KERNEL(neon);
#else
LC_KERNEL(scalar);
#endif
