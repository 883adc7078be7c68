// Products and look-ups of one instruction set, which is named on the command line, through the C ABI:
// against plain sums in double precision, and against themselves, since a token's result has the same
// bits however a pass is cut. Exits with 1 if a check fails.
//
// The test brings activations to 8 bits as docs/kernels.md says, from inputs whose squares add up
// exactly in any order: codes and scales agree to the bit, and float32 roundings are all that is left.
// Each of n terms, two for 16 columns (scale, minimum) or of floats one for each, is rounded where its
// scale meets the activations' and whenever it or a later one is added; bias and residual are one
// rounding each; one is to spare, since the scalar set may round a fused operation twice. Hence
// |error| <= gamma(n + 4) * sum of |terms|, gamma(n) = n u / (1 - n u), u = 2^-24 (Higham, 2002, 3.1).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

namespace {

constexpr int64_t kTokens = 17;
constexpr float kEps = 1e-5f;
constexpr int8_t kBook[16] = {-128, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 127};

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 generator(7);
int failures = 0;

void check(bool good, const std::string& what) {
    if (!good && ++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

bool same(const Floats& a, const Floats& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

int integer(int from, int to) { return std::uniform_int_distribution<int>(from, to)(generator); }

Floats reals(int64_t n, float from, float to) {
    Floats values(n);
    for (float& value : values) value = std::uniform_real_distribution<float>(from, to)(generator);
    return values;
}

double gamma(int64_t n) { return static_cast<double>(n) * 0x1p-24 / (1 - static_cast<double>(n) * 0x1p-24); }

struct Kind {
    const char* name;
    Form form;
    int bits, exponent_bits = 0;
    bool has_min = false, has_book = false;
    int shift = 0;
    bool is_float() const { return exponent_bits > 0; }
};

const Kind kPlain4{"q4", kQ4, 4}, kMin4{"q4, min", kQ4, 4, 0, true}, kPlain8{"q8", kQ8, 8},
    kBook4{"q4, book", kQ4, 4, 0, false, true}, kMin8{"q8, min", kQ8, 8, 0, true},
    kShift4{"q4, shifted book", kQ4, 4, 0, false, true, 4},
    kFloat32{"f32", kF32, 32, 8}, kFloat16{"f16", kF16, 16, 5}, kBfloat16{"bf16", kBF16, 16, 8};
const Kind kKinds[] = {kPlain4, kMin4, kBook4, kShift4, kPlain8, kMin8, kFloat32, kFloat16, kBfloat16};

// Puts a float of that kind somewhere and returns it: below 1/64; a half may be subnormal.
double put_random(void* to, const Kind& kind) {
    const int fraction_bits = kind.bits - 1 - kind.exponent_bits, one = 1 << fraction_bits;
    const int bias = (1 << (kind.exponent_bits - 1)) - 1, exponent = bias - integer(7, 15);
    const int fraction = integer(0, one - 1) + (exponent > 0 ? one : 0);
    const double size = std::ldexp(fraction, std::max(exponent, 1) - bias - fraction_bits);
    const uint32_t sign = integer(0, 1);
    const uint32_t stored = sign << (kind.bits - 1) | exponent << fraction_bits | fraction % one;
    std::memcpy(to, &stored, kind.bits / 8);  // all these machines have the low bytes first
    return sign ? -size : size;
}

// A part but for its columns.
struct Spec {
    int64_t rows;
    Kind kind;
    int64_t group;
};

// A random matrix, plainly and in panels.
struct Part : Spec {
    int64_t cols;
    Doubles values, mins;  // (rows, cols): a weight is the sum of the two
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scale_bits, min_bits;
    Panels panels{};

    Part(Pool* pool, const Spec& spec, int64_t cols_)
        : Spec(spec), cols(cols_), values(rows * cols), mins(rows * cols) {
        const int64_t n_panels = (rows + 15) / 16, n_blocks = (cols + 31) / 32;
        const int64_t width = kind.is_float() ? cols : n_blocks * 32;
        codes.assign(n_panels * 16 * width * kind.bits / 8, 0xFF);
        panels.codes = codes.data(), panels.rows = rows, panels.cols = cols, panels.form = kind.form;
        const std::vector<uint8_t> bytes = random_rows();
        if (!kind.is_float()) scale(n_panels, group == 16 ? 2 * n_blocks : (cols + group - 1) / group);
        lc_pack(pool, bytes.data(), &panels);
    }

    std::string name() const {
        const std::string size = std::to_string(rows) + "x" + std::to_string(cols);
        return size + " " + kind.name + " in groups of " + std::to_string(group);
    }
    int64_t n_terms() const { return kind.is_float() ? cols : 2 * ((cols + 15) / 16); }

  private:
    std::vector<uint8_t> random_rows() {
        const int64_t row_bytes = (cols * kind.bits + 7) / 8;
        std::vector<uint8_t> bytes(rows * row_bytes);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(integer(0, 255));
        for (int64_t i = 0; i < rows * cols; ++i) {
            uint8_t* at = &bytes[i / cols * row_bytes + i % cols * kind.bits / 8];
            values[i] = kind.is_float() ? put_random(at, kind) : multiplier(*at, i % cols);
        }
        return bytes;
    }

    double multiplier(uint8_t byte, int64_t k) const {
        if (kind.form == kQ8) return kind.has_min ? byte : static_cast<int8_t>(byte);
        const int code = k % 2 ? byte >> 4 : byte & 15;
        return kind.has_book ? kBook[code] : kind.has_min ? code : code - 8;
    }

    // All groups of row 1 and some others are zero.
    void scale(int64_t n_panels, int64_t n_groups) {
        scale_bits.assign(n_panels * n_groups * 16, 0);
        min_bits = scale_bits;
        panels.scales = scale_bits.data();
        panels.mins = kind.has_min ? min_bits.data() : nullptr;
        panels.group = static_cast<int32_t>(group);
        panels.has_book = kind.has_book;
        panels.shift = kind.shift;
        const float unit = panels.unit = std::ldexp(1.0f, integer(-2, 0));
        std::copy(std::begin(kBook), std::end(kBook), panels.book);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t g = 0; g * group < cols; ++g) {
                const bool zero = r == 1 || integer(0, 7) == 0;
                const int64_t at = (r / 16 * n_groups + g) * 16 + r % 16;
                const double scale = zero ? 0 : unit * put_random(&scale_bits[at], kFloat16);
                const double min = zero || !kind.has_min ? 0 : unit * put_random(&min_bits[at], kFloat16);
                const double shift = scale * kind.shift * ((scale_bits[at] & 15) - 8);
                for (int64_t k = g * group; k < std::min((g + 1) * group, cols); ++k)
                    values[r * cols + k] *= scale, mins[r * cols + k] = min + shift;
            }
    }
};

void run(Pool* pool, OpKind kind, const void* args, Progress progress = {}) {
    const Op op{kind, args};
    while (lc_run(pool, &op, 1, &progress) == 1) continue;
}

// A weight, what goes around it, and what comes in.
struct Layer {
    std::vector<Part> parts;
    std::vector<Panels> panels;
    Mode mode;
    int64_t rows = 0, cols, width;
    Floats x, norm, bias, before;  // (kTokens, cols), (cols) or none, (rows) or none, (kTokens, width)
    Weight weight;

    Layer(Pool* pool, const std::vector<Spec>& specs, int64_t cols_, Mode mode_, bool dressed)
        : mode(mode_), cols(cols_) {
        for (const Spec& spec : specs) {
            parts.emplace_back(pool, spec, cols);
            panels.push_back(parts.back().panels);
            rows += spec.rows;
        }
        width = mode == kSwiGLU ? rows / 2 : rows;
        x = random_tokens();
        before = reals(kTokens * width, -1, 1);
        if (dressed) norm = reals(cols, 0.5f, 1.5f), bias = reals(rows, -1, 1);
        const auto n_parts = static_cast<int32_t>(panels.size());
        weight = {panels.data(), dressed ? bias.data() : nullptr, rows, cols, n_parts, mode == kSwiGLU};
    }

    std::string name() const {
        const char* modes[] = {"stored", "added", "gated"};
        std::string text = modes[mode];
        for (const Part& part : parts) text += ", " + part.name();
        return text + (norm.empty() ? "" : ", with norm and bias");
    }

    // All tokens, in passes of at most `chunk`, each of them begun at `from`.
    Floats of_all(Pool* pool, int64_t chunk = kTokens, Progress from = {}) const {
        Floats out = before;
        for (int64_t t = 0; t < kTokens; t += chunk) {
            const float* with = norm.empty() ? nullptr : norm.data();
            const int64_t n = std::min(chunk, kTokens - t);
            const Linear args{&x[t * cols], with, &weight, &out[t * width], n, kEps, mode};
            run(pool, kLinear, &args, from);
        }
        return out;
    }

  private:
    // Multiples of 1/8 up to 127/8, of different sizes from block to block: float32 holds the sum of
    // a thousand of their squares. Token 1 and some blocks are zero.
    Floats random_tokens() const {
        const int sizes[] = {0, 3, 20, 127};
        Floats tokens(kTokens * cols);
        for (int64_t t = 0; t < kTokens; ++t)
            for (int64_t from = 0; from < cols; from += 32) {
                const int most = t == 1 ? 0 : sizes[integer(t == 0, 3)];
                for (int64_t k = from; k < std::min(from + 32, cols); ++k)
                    tokens[t * cols + k] = static_cast<float>(integer(-most, most)) / 8;
            }
        return tokens;
    }
};

Floats normed(const float* x, const Floats& norm) {
    const int64_t n = static_cast<int64_t>(norm.size());
    double squares = 0;
    for (int64_t k = 0; k < n; ++k) squares += x[k] * x[k];
    const float scale = 1 / std::sqrt(static_cast<float>(squares) / static_cast<float>(n) + kEps);
    Floats out(n);
    for (int64_t k = 0; k < n; ++k) out[k] = x[k] * scale * norm[k];
    return out;
}

Doubles at_8_bits(const Floats& x) {
    Doubles out(x.size());
    for (size_t from = 0; from < x.size(); from += 32) {
        const size_t end = std::min(from + 32, x.size());
        float most = 0;
        for (size_t k = from; k < end; ++k) most = std::max(most, std::fabs(x[k]));
        const double d = most / 127;
        for (size_t k = from; k < end && most > 0; ++k) out[k] = d * std::nearbyint(x[k] * (127 / most));
    }
    return out;
}

// A result, and how far from it float32 may be.
struct Right {
    double value, error;
};

Right product(const Part& part, int64_t row, const Doubles& x, double bias, double before) {
    double value = bias + before, size = std::fabs(bias) + std::fabs(before);
    for (int64_t k = 0; k < part.cols; ++k) {
        const double times = part.values[row * part.cols + k], min = part.mins[row * part.cols + k];
        value += x[k] * (times + min);
        size += std::fabs(x[k]) * (std::fabs(times) + std::fabs(min));
    }
    return {value, gamma(part.n_terms() + 4) * size};
}

// silu(gate) * up. The slope of silu is at most 1.1. e^-|x| is within 2 ulp, at most 4 u, and what
// follows is rounded four times: the sum, the quotient, and twice a product.
Right gated(const Right& gate, const Right& up) {
    const double silu = gate.value / (1 + std::exp(-gate.value));
    const double error = 1.1 * gate.error * (std::fabs(up.value) + up.error) + std::fabs(silu) * up.error;
    const double size = (std::fabs(silu) + 1.1 * gate.error) * (std::fabs(up.value) + up.error);
    return {silu * up.value, error + gamma(8) * size};
}

// (width) of a token.
std::vector<Right> expected(const Layer& layer, int64_t t) {
    const float* x = &layer.x[t * layer.cols];
    const Floats floats = layer.norm.empty() ? Floats(x, x + layer.cols) : normed(x, layer.norm);
    const Doubles exact(floats.begin(), floats.end()), rounded = at_8_bits(floats);
    std::vector<Right> all;
    for (const Part& part : layer.parts)
        for (int64_t r = 0; r < part.rows; ++r) {
            const size_t row = all.size();
            const double bias = layer.bias.empty() ? 0 : layer.bias[row];
            const double before = layer.mode == kAdd ? layer.before[t * layer.width + row] : 0;
            all.push_back(product(part, r, part.kind.is_float() ? exact : rounded, bias, before));
        }
    if (layer.mode != kSwiGLU) return all;
    for (int64_t row = 0; row < layer.width; ++row) all[row] = gated(all[row], all[layer.width + row]);
    all.resize(layer.width);
    return all;
}

bool near(const Floats& out, const std::vector<Right>& right) {
    bool good = true;
    for (size_t i = 0; i < out.size(); ++i) good &= std::fabs(out[i] - right[i].value) <= right[i].error;
    return good;
}

using Pools = std::array<Pool*, 2>;  // of one thread, and of two

void products_are_plain_sums(const Pools& pools, const Layer& layer) {
    std::vector<Right> right;
    for (int64_t t = 0; t < kTokens; ++t)
        for (const Right& value : expected(layer, t)) right.push_back(value);
    check(near(layer.of_all(pools[0]), right), "plain sums: " + layer.name());
}

void tokens_have_the_same_bits_in_every_pass(const Pools& pools, const Layer& layer) {
    const Floats whole = layer.of_all(pools[0]);
    for (const int64_t chunk : {1, 2, 5, 17})
        for (Pool* pool : pools)
            check(same(layer.of_all(pool, chunk), whole),
                  "the same bits, " + std::to_string(chunk) + " at a time: " + layer.name());
}

// From unit 1 on every result but the first unit's: of panels 0 and 2 of four.
void a_product_goes_on_from_where_it_stopped(const Pools& pools) {
    const Layer layer(pools[0], {{64, kPlain4, 32}}, 96, kStore, true);
    Floats wanted = layer.of_all(pools[1]);
    for (size_t i = 0; i < wanted.size(); ++i)
        if (i / 16 % 2 == 0) wanted[i] = layer.before[i];
    const Floats out = layer.of_all(pools[1], kTokens, {0, 1});
    check(same(out, wanted), "from unit 1");
}

void a_nan_or_an_infinity_stays_in_its_token(const Pools& pools, const Kind& kind) {
    Layer layer(pools[0], {{20, kind, 32}}, 70, kStore, false);
    Floats wanted = layer.of_all(pools[0]);
    layer.x[3 * layer.cols + 40] = std::numeric_limits<float>::quiet_NaN();
    layer.x[6 * layer.cols + 69] = std::numeric_limits<float>::infinity();
    const Floats out = layer.of_all(pools[0]);
    for (const int64_t t : {3, 6})
        for (int64_t at = t * layer.width; at < (t + 1) * layer.width; ++at) {
            check(!std::isfinite(out[at]), "not a number: " + layer.name());
            wanted[at] = out[at];
        }
    check(same(out, wanted), "the tokens beside it: " + layer.name());
}

// A value is rounded twice: the product with the scale, and the sum with the minimum.
void rows_are_looked_up(const Pools& pools, const Part& part) {
    std::vector<int32_t> ids;
    std::vector<Right> right;
    for (int64_t t = 0; t < kTokens; ++t) {
        ids.push_back(integer(0, static_cast<int>(part.rows) - 1));
        for (int64_t at = ids[t] * part.cols; at < (ids[t] + 1) * part.cols; ++at) {
            const double value = part.values[at], min = part.mins[at];
            const double size = part.kind.is_float() ? 0 : std::fabs(value) + std::fabs(min);
            right.push_back({value + min, gamma(2) * size});
        }
    }
    for (const int64_t n : {1, 2, 5, 17})
        for (Pool* pool : pools) {
            Floats out(n * part.cols, std::numeric_limits<float>::quiet_NaN());
            Pass pass{};
            pass.ids = ids.data(), pass.n_tokens = n;
            const Embed args{&pass, &part.panels, out.data()};
            run(pool, kEmbed, &args);
            check(near(out, right), "look-up: " + part.name());
        }
}

void check_layer(const Pools& pools, const Layer& layer) {
    products_are_plain_sums(pools, layer);
    tokens_have_the_same_bits_in_every_pass(pools, layer);
}

void check_form(const Pools& pools, const Kind& kind, int64_t group) {
    const std::pair<int64_t, int64_t> shapes[] = {{1, 7}, {33, 77}, {50, 160}};
    for (const auto& [rows, cols] : shapes) {
        const Spec spec{rows, kind, group};
        rows_are_looked_up(pools, Part(pools[0], spec, cols));
        for (const bool dressed : {false, true}) {
            check_layer(pools, {pools[0], {spec}, cols, kStore, dressed});
            check_layer(pools, {pools[0], {spec}, cols, kAdd, dressed});
            check_layer(pools, {pools[0], {spec, spec}, cols, kSwiGLU, dressed});
        }
    }
}

// Parts of several forms, so wide that few tokens are several units of work.
void check_mixtures(const Pools& pools) {
    const std::pair<Mode, std::vector<Spec>> layers[] = {
        {kStore, {{157, kBook4, 32}, {31, kPlain8, 64}, {49, kMin4, 16}}},
        {kAdd, {{17, kFloat32, 0}, {97, kMin8, 128}, {35, kFloat16, 0}}},
        {kSwiGLU, {{131, kPlain4, 32}, {131, kPlain4, 64}}},
        {kSwiGLU, {{43, kMin8, 16}, {43, kFloat32, 0}}},
    };
    for (const auto& [mode, specs] : layers) check_layer(pools, {pools[0], specs, 999, mode, true});
    check_layer(pools, {pools[0], {{65, kPlain4, 32}, {20, kBfloat16, 0}}, 999, kStore, false});
}

}  // namespace

int main(int n_words, char** words) {
    const char* isa = n_words > 1 ? words[1] : "scalar";
    const Pools pools{lc_pool_new(1, isa), lc_pool_new(2, isa)};
    if (!pools[0] || !pools[1]) return std::printf("FAILED: no %s here\n", isa), 1;
    for (const Kind& kind : kKinds) {
        for (const int64_t group : {16, 32, 64, 128})
            if (!kind.is_float() || group == 16) check_form(pools, kind, group);
        a_nan_or_an_infinity_stays_in_its_token(pools, kind);
    }
    check_mixtures(pools);
    a_product_goes_on_from_where_it_stopped(pools);
    for (Pool* pool : pools) lc_pool_free(pool);
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
