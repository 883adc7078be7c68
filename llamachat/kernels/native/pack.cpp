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

void pack_values(const uint8_t* rows, const Panels& panels, int64_t panel) {
    const int64_t size = panels.form == kF32 ? 4 : 2;
    uint8_t* to = panels.codes + panel * panel_bytes(panels);
    std::memset(to, 0, static_cast<size_t>(panel_bytes(panels)));
    const int64_t real = smaller(kRows, panels.rows - panel * kRows);
    for (int64_t r = 0; r < real; ++r) {
        const uint8_t* row = rows + (panel * kRows + r) * panels.cols * size;
        for (int64_t k = 0; k < panels.cols; ++k)
            std::memcpy(to + (k * kRows + r) * size, row + k * size, static_cast<size_t>(size));
    }
}

}  // namespace

void lc_pack(Pool* pool, const uint8_t* rows, const Panels* panels) {
    pool->all(panels_of(*panels), [&](int64_t panel, int) {
        (is_float(*panels) ? pack_values : pack_codes)(rows, *panels, panel);
    });
}
