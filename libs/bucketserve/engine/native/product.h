// Matrix product with weights laid out once in panels.
#pragma once

#include <unistd.h>

#include "tiles.h"

namespace {

// SILU_MUL, GELU_MUL: panels come in pairs, gate and up, and a pair makes the columns of one.
enum Epilogue { WRITE = 0, ADD = 1, SILU_MUL = 2, GELU_MUL = 3 };

inline vf activate(int epilogue, vf gate) { return epilogue == GELU_MUL ? gelu(gate) : silu(gate); }

struct Product {
    const void* x;  // [rows, depth] of T, row stride ldx
    long ldx;
    long rows, depth, columns;  // columns: of out
    const void* packed;
    const float* scales;  // of 8-bit weights, one a column
    const float* bias;  // one a column, or null
    void* out;  // [rows, columns] of T, row stride ldo
    long ldo;
    int epilogue;
};

const long BLOCK_BYTES = std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), 512L * 1024) / 2;  // of rows of the left side, in L2
constexpr long SLICE = 96;  // of depth: a slice of a panel stays in L1 while the rows and sums of a block go by

template <class T, class U>
void store_row(const T* x, long depth, U* out) {
    long k = 0;
    for (; k + VL <= depth; k += VL) store(out + k, load(x + k));
    for (; k < depth; ++k) put(out + k, get(x + k));
}

// How rows of the left side are held for weights of type W: as Numbers, each of per_number columns; what they add up to
// is a Sum. fill() makes them of a row, and gives what its sums are to be multiplied by.
template <class W>
struct Left {
    using Number = float;
    using Sum = vf;
    static constexpr int per_number = 1;

    template <class T>
    static float fill(const T* x, long depth, float* numbers) {
        store_row(x, depth, numbers);
        return 1.0f;
    }
};
#if defined(__AVX512BF16__)
template <>
struct Left<bf16> {
    using Number = int32_t;
    using Sum = vf;
    static constexpr int per_number = 2;

    template <class T>
    static float fill(const T* x, long depth, int32_t* numbers) {
        bf16* out = reinterpret_cast<bf16*>(numbers);
        store_row(x, depth, out);
        if (depth % 2) put(out + depth, 0.0f);
        return 1.0f;
    }
};
#endif
template <>
struct Left<int8_t> {
    using Number = int32_t;
    using Sum = vi;
    static constexpr int per_number = 2;

    // 16-bit integers of at most `most`, so that depth products with 8-bit weights fit 31 bits.
    template <class T>
    static float fill(const T* x, long depth, int32_t* numbers) {
        float most = float(std::min<long>(4095, 0x7fffffffL / (127 * (depth + 1))));
        int16_t* out = reinterpret_cast<int16_t*>(numbers);
        vf highest = vf{}, nothing = vf{};
        long k = 0;
        for (; k + VL <= depth; k += VL) {
            vf value = load(x + k);
            highest = max(highest, max(value, -value));
            nothing += value * 0.0f;
        }
        float peak = largest(highest), zero = sum(nothing);
        for (; k < depth; ++k) {
            peak = std::max(peak, std::fabs(get(x + k)));
            zero += get(x + k) * 0.0f;
        }
        float factor = peak > 0 ? most / peak : 0.0f;
        typedef int16_t vs_unaligned __attribute__((vector_size(VL * 2), aligned(2)));
        for (k = 0; k + VL <= depth; k += VL) {
            // Adding 1.5 x 2^23 leaves the nearest integer in the low bits.
            vf shifted = load(x + k) * factor + 12582912.0f;
            vi whole = reinterpret_cast<vi>(shifted) - 0x4b400000;
            *reinterpret_cast<vs_unaligned*>(out + k) = __builtin_convertvector(whole, vs_unaligned);
        }
        for (; k < depth; ++k) out[k] = int16_t(std::lrintf(get(x + k) * factor));
        if (depth % 2) out[depth] = 0;
        // No integer is NaN or infinite: of a row that is not finite the scale is NaN, and so are its products.
        return peak / most + zero;
    }
};

// The left side: tiles of MR rows, each [length][rows of the tile], so that a tile is read from front to back.
template <class W>
struct Rows {
    typename Left<W>::Number* numbers;
    float* scales;  // of each row
    long length;  // of a row

    static long length_of(long depth) { return (depth + Left<W>::per_number - 1) / Left<W>::per_number; }

    template <class T>
    void fill_tile(const Product& p, long first) {
        for_rows<MR>(p.rows - first, [&](auto number) {
            constexpr int R = number;
            const T* x = static_cast<const T*>(p.x) + first * p.ldx;
            if constexpr (R == 1) {
                scales[first] = Left<W>::fill(x, p.depth, numbers + first * length);
            } else if constexpr (std::is_same_v<typename Left<W>::Number, T>) {
                interleave<R>(x, p.ldx, length, numbers + first * length);
            } else {
                auto* apart = reinterpret_cast<typename Left<W>::Number*>(scratch<0>(R * length * 4));
                for (int r = 0; r < R; ++r) scales[first + r] = Left<W>::fill(x + r * p.ldx, p.depth, apart + r * length);
                interleave<R>(apart, length, length, numbers + first * length);
            }
        });
    }
};

// A tile of the left side times a slice of a panel, added to the tile's sums, [R][NR].
template <class W, int R, class B, class F>
inline void add_tile(const typename Left<W>::Number* a, const B* b, long depth, bool is_first, float* sums, F ahead) {
    using Sum = typename Left<W>::Sum;
    Sum acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) acc[r][c] = is_first ? Sum{} : reinterpret_cast<Sum>(load(sums + r * NR + c * VL));
    tile<R>(a, b, depth, acc, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) store(sums + r * NR + c * VL, reinterpret_cast<vf>(acc[r][c]));
}

// The sums of one panel for `rows` rows from `first` on, [rows][NR]. Panels up to `end` are asked for next.
template <class W>
void sum_panel(const Product& p, const Rows<W>& left, long first, long rows, long panel, long end, float* sums) {
    constexpr long width = NR * Left<W>::per_number;
    const W* b = static_cast<const W*>(p.packed) + panel * left.length * width;
    for (long k = 0; k < left.length; k += SLICE) {
        long depth = std::min(SLICE, left.length - k);
        bool is_last = k + SLICE >= left.length && panel + 1 == end;
        Ahead<width * sizeof(W)> ahead{is_last ? 0 : long(SLICE * width * sizeof(W))};
        auto add = [&](const auto* slice, auto ahead) {
            for (long r = 0; r < rows; r += MR)
                for_rows<MR>(rows - r, [&](auto number) {
                    constexpr int R = number;
                    const auto* a = left.numbers + (first + r) * left.length + k * R;
                    if (r == 0) {
                        add_tile<W, R>(a, slice, depth, k == 0, sums, ahead);
                    } else {
                        add_tile<W, R>(a, slice, depth, k == 0, sums + r * NR, Nothing{});
                    }
                });
        };
        const W* slice = b + k * width;
        if constexpr (sizeof(W) == 2 && !IN_PAIRS<W>) {
            if (rows > MR) {
                // Made floats once for all rows.
                float* wide = reinterpret_cast<float*>(scratch<2>(SLICE * NR * 4));
                for (long i = 0; i < depth; ++i) {
                    ahead(slice + i * NR);
                    for (int c = 0; c < NR; c += VL) store(wide + i * NR + c, load(slice + i * NR + c));
                }
                add(wide, Nothing{});
                continue;
            }
        }
        add(slice, ahead);
    }
    if constexpr (std::is_same_v<W, int8_t>) {
        vf s0 = load(p.scales + panel * NR), s1 = load(p.scales + panel * NR + VL);
        for (long r = 0; r < rows; ++r, sums += NR) {
            float scale = left.scales[first + r];
            store(sums, __builtin_convertvector(reinterpret_cast<vi>(load(sums)), vf) * (s0 * scale));
            store(sums + VL, __builtin_convertvector(reinterpret_cast<vi>(load(sums + VL)), vf) * (s1 * scale));
        }
    }
}

// Writes one panel's columns, or of a pair of panels the product silu(gate) x up.
template <class T>
void finish(const Product& p, long first, long rows, long panel, const float* sums, const float* gate) {
    bool is_pair = p.epilogue >= SILU_MUL;
    long column = (is_pair ? panel / 2 : panel) * NR;
    int width = int(std::min<long>(NR, p.columns - column));
    for (long r = 0; r < rows; ++r, sums += NR, gate += NR) {
        T* out = static_cast<T*>(p.out) + (first + r) * p.ldo + column;
        vf values[2] = {load(sums), load(sums + VL)};
        for (int half = 0; half < 2; ++half) {
            if (is_pair) values[half] *= activate(p.epilogue, load(gate + half * VL));
            if (p.bias) values[half] += load(p.bias + panel * NR + half * VL);
        }
        if (width == NR) {
            if (p.epilogue == ADD) {
                values[0] += load(out);
                values[1] += load(out + VL);
            }
            store(out, values[0]);
            store(out + VL, values[1]);
        } else {
            for (int i = 0; i < width; ++i)
                put(out + i, values[i / VL][i % VL] + (p.epilogue == ADD ? get(out + i) : 0.0f));
        }
    }
}

template <class T, class W>
void product(const Product& p, int threads) {
    long step = p.epilogue >= SILU_MUL ? 2 : 1;
    long panels = (p.columns + NR - 1) / NR * step;
    Rows<W> left;
    left.length = Rows<W>::length_of(p.depth);
    // Of the thread that calls: all others read it.
    left.numbers = reinterpret_cast<typename Left<W>::Number*>(scratch<4>(p.rows * (left.length + 1) * 4));
    left.scales = reinterpret_cast<float*>(left.numbers + p.rows * left.length);
    // A block of rows stays in L2 while the panels go by.
    long block_rows = std::max<long>(2 * MR, std::min<long>(96, BLOCK_BYTES / (left.length * 4)) / MR * MR);
    // Even blocks: a last one of few rows would have the weights read for little.
    long blocks = (p.rows + block_rows - 1) / block_rows;
    block_rows = ((p.rows + blocks - 1) / blocks + MR - 1) / MR * MR;
    blocks = (p.rows + block_rows - 1) / block_rows;
    // So many tasks that threads end together.
    long chunks = (16 * threads + blocks - 1) / blocks;
    chunks = std::max<long>(1, std::min(chunks, panels / step / 2));
    long chunk_panels = (panels / step + chunks - 1) / chunks * step;
    chunks = (panels + chunk_panels - 1) / chunk_panels;
    // One tile takes less than for the threads to wait for each other.
    bool is_one_tile = p.rows <= MR;
    if (is_one_tile) left.template fill_tile<T>(p, 0);
#pragma omp parallel num_threads(threads)
    {
        if (!is_one_tile) {
#pragma omp for schedule(static)
            for (long first = 0; first < p.rows; first += MR) left.template fill_tile<T>(p, first);
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < blocks * chunks; ++task) {
            // Blocks of one chunk follow each other: threads share the panels in L3.
            long first = task % blocks * block_rows, rows = std::min(block_rows, p.rows - first);
            long begin = task / blocks * chunk_panels, end = std::min(begin + chunk_panels, panels);
            float* gate = reinterpret_cast<float*>(scratch<3>(2 * rows * NR * 4));
            float* sums = gate + rows * NR;
            for (long panel = begin; panel < end; panel += step) {
                if (step == 2) sum_panel(p, left, first, rows, panel, end, gate);
                sum_panel(p, left, first, rows, panel + step - 1, end, sums);
                finish<T>(p, first, rows, panel, sums, gate);
            }
        }
    }
}

template <class T>
void pack(const T* weight, long rows, long depth, T* packed, long panel_step) {
    long panels = (rows + NR - 1) / NR;
#pragma omp parallel for schedule(static)
    for (long panel = 0; panel < panels; ++panel) {
        T* to = packed + panel * panel_step * depth * NR;
        for (long k = 0; k < depth; ++k)
            for (int i = 0; i < NR; ++i) {
                long row = panel * NR + i;
                to[k * NR + i] = row < rows ? weight[row * depth + k] : T{};
            }
    }
}

// The same in pairs of rows of B: [panels][depth / 2][NR][2].
template <class T>
void pack_pairs(const T* weight, long rows, long depth, T* packed, long panel_step) {
    long panels = (rows + NR - 1) / NR, pairs = (depth + 1) / 2;
#pragma omp parallel for schedule(static)
    for (long panel = 0; panel < panels; ++panel) {
        T* to = packed + panel * panel_step * pairs * 2 * NR;
        for (long k = 0; k < 2 * pairs; ++k)
            for (int i = 0; i < NR; ++i) {
                long row = panel * NR + i;
                to[(k / 2 * NR + i) * 2 + k % 2] = row < rows && k < depth ? weight[row * depth + k] : T{};
            }
    }
}

template <class T>
void pack_as(const void* weight, long rows, long depth, void* packed, long panel_step) {
    const T* from = static_cast<const T*>(weight);
    if constexpr (IN_PAIRS<T>) {
        pack_pairs(from, rows, depth, static_cast<T*>(packed), panel_step);
    } else {
        pack(from, rows, depth, static_cast<T*>(packed), panel_step);
    }
}

}  // namespace
