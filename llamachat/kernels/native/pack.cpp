// Rows of codes to panels.

#include <cstring>

#include "panels.h"
#include "pool.h"

namespace {

// Eight nibbles, column c at bits 4 c, as four bytes: byte i has columns i and i + 4.
uint32_t spread(uint32_t nibbles) {
    const auto apart = [](uint32_t x) {
        x = (x | x << 8) & 0x00FF00FF;
        return (x | x << 4) & 0x0F0F0F0F;
    };
    return apart(nibbles & 0xFFFF) | apart(nibbles >> 16) << 4;
}

// Four bytes of a row from `at` on, zeros beyond its end.
uint32_t word_of(const uint8_t* row, int64_t row_bytes, int64_t at) {
    uint32_t word = 0;
    if (at + 4 <= row_bytes) std::memcpy(&word, row + at, 4);
    else if (at < row_bytes) std::memcpy(&word, row + at, static_cast<size_t>(row_bytes - at));
    return word;
}

// A line has 4 bytes of each row, as they come in the row.
void pack_codes(const uint8_t* rows, const Panels& panels, int64_t panel) {
    const bool nibbles = panels.form == kQ4;
    const int64_t row_bytes = nibbles ? ceil_div(panels.cols, 2) : panels.cols;
    const int64_t n_lines = blocks_of(panels.cols) * (nibbles ? 4 : 8);
    uint8_t* to = panels.codes + panel * panel_bytes(panels);
    const int64_t real = smaller(kRows, panels.rows - panel * kRows);
    std::memset(to, 0, static_cast<size_t>(panel_bytes(panels)));
    const uint32_t flip = panels.form == kQ8 && panels.mins ? 0x80808080 : 0;  // 0..255 to -128..127
    for (int64_t r = 0; r < real; ++r) {
        const uint8_t* row = rows + (panel * kRows + r) * row_bytes;
        for (int64_t line = 0; line < n_lines; ++line) {
            uint32_t word = word_of(row, row_bytes, line * 4);
            word = nibbles ? spread(word) : word ^ flip;
            std::memcpy(to + line * 64 + r * 4, &word, 4);
        }
    }
}

// Values of kSize bytes, a cache line of each row at a time: rows often lie a power of two apart, where
// the cache cannot hold a line of all of them.
template <size_t kSize>
void pack_values(const uint8_t* rows, const Panels& panels, int64_t panel) {
    constexpr int64_t kLine = 64 / kSize;
    uint8_t* to = panels.codes + panel * panel_bytes(panels);
    const int64_t real = smaller(kRows, panels.rows - panel * kRows), row_bytes = panels.cols * kSize;
    const uint8_t* from = rows + panel * kRows * row_bytes;
    uint8_t lines[kRows][64] = {};
    for (int64_t first = 0; first < panels.cols; first += kLine) {
        const int64_t n = smaller(kLine, panels.cols - first);
        for (int64_t r = 0; r < real; ++r)
            std::memcpy(lines[r], from + r * row_bytes + first * kSize, static_cast<size_t>(n) * kSize);
        for (int64_t k = 0; k < n; ++k)
            for (int64_t r = 0; r < kRows; ++r, to += kSize) std::memcpy(to, lines[r] + k * kSize, kSize);
    }
}

}  // namespace

void lc_pack(Pool* pool, const uint8_t* rows, const Panels* panels) {
    pool->all(panels_of(*panels), [&](int64_t panel, int) {
        const auto pack = !is_float(*panels)      ? pack_codes
                          : panels->form == kF32 ? pack_values<4>
                                                 : pack_values<2>;
        pack(rows, *panels, panel);
    });
}
