// Matrix product with weights laid out once in panels.
#pragma once

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

constexpr long BLOCK_BYTES = 256 * 1024;  // of rows of the left side, in L2
constexpr long SLICE = 1024;  // of depth: a slice of a panel stays in L2, and in L1 as far as it goes

template <int R, class A, class B>
inline void add_tile(const A* a, long lda, const B* b, long ldb, long depth, bool is_first, float* sums) {
    vf acc[R][2];
    for (int r = 0; r < R; ++r) {
        acc[r][0] = is_first ? vf{} : load(sums + r * NR);
        acc[r][1] = is_first ? vf{} : load(sums + r * NR + VL);
    }
    tile<R>(a, lda, b, ldb, depth, acc);
    for (int r = 0; r < R; ++r) {
        store(sums + r * NR, acc[r][0]);
        store(sums + r * NR + VL, acc[r][1]);
    }
}

// Adds a slice of a panel, `depth` rows of B `ldb` apart, to the sums of all rows.
template <class A, class B>
inline void add_slice(const A* a, long lda, const B* b, long ldb, long depth, long rows, bool is_first, float* sums) {
    for (long r = 0; r < rows; r += MR)
        for_rows<MR>(rows - r, [&](auto number) {
            add_tile<number>(a + r * lda, lda, b, ldb, depth, is_first, sums + r * NR);
        });
}

// A block of rows as the tiles want it, and the sums of one panel for all of its rows, [rows][NR] floats.
template <class T, class W>
struct Block {  // weights multiplied as floats
    const float* a;
    long lda;

    void prepare(const Product& p, long first, long rows) {
        const T* x = static_cast<const T*>(p.x) + first * p.ldx;
        if constexpr (sizeof(T) == 4) {
            a = x, lda = p.ldx;
        } else {
            float* wide = reinterpret_cast<float*>(scratch<0>(rows * p.depth * 4));
            for (long r = 0; r < rows; ++r) widen(x + r * p.ldx, p.depth, wide + r * p.depth);
            a = wide, lda = p.depth;
        }
    }
    static void widen(const T* from, long number, float* to) {
        long i = 0;
        for (; i + VL <= number; i += VL) store(to + i, load(from + i));
        for (; i < number; ++i) to[i] = get(from + i);
    }
    void sum_panel(const Product& p, long panel, long rows, float* sums) const {
        const W* b = static_cast<const W*>(p.packed) + panel * p.depth * NR;
        for (long k = 0; k < p.depth; k += SLICE) {
            long depth = std::min(SLICE, p.depth - k);
            if (sizeof(W) == 2 && rows > MR) {
                // Widened once for all rows.
                float* wide = reinterpret_cast<float*>(scratch<2>(SLICE * NR * 4));
                for (long i = 0; i < depth * NR; i += VL) store(wide + i, load(b + k * NR + i));
                add_slice(a + k, lda, wide, NR, depth, rows, k == 0, sums);
            } else {
                add_slice(a + k, lda, b + k * NR, NR, depth, rows, k == 0, sums);
            }
        }
    }
};
#if defined(__AVX512BF16__)
template <class T>
struct Block<T, bf16> {  // rows become bf16 as well, the sums are floats
    const int32_t* a;
    long pairs;

    void prepare(const Product& p, long first, long rows) {
        pairs = (p.depth + 1) / 2;
        bf16* to = reinterpret_cast<bf16*>(scratch<0>(rows * pairs * 4));
        a = reinterpret_cast<const int32_t*>(to);
        for (long r = 0; r < rows; ++r, to += 2 * pairs) {
            const T* x = static_cast<const T*>(p.x) + (first + r) * p.ldx;
            long k = 0;
            for (; k + VL <= p.depth; k += VL) store(to + k, load(x + k));
            for (; k < p.depth; ++k) put(to + k, get(x + k));
            if (p.depth % 2) put(to + p.depth, 0.0f);
        }
    }
    void sum_panel(const Product& p, long panel, long rows, float* sums) const {
        const bf16* b = static_cast<const bf16*>(p.packed) + panel * pairs * 2 * NR;
        for (long k = 0; k < pairs; k += SLICE)
            add_slice(a + k, pairs, b + k * 2 * NR, 2 * NR, std::min(SLICE, pairs - k), rows, k == 0, sums);
    }
};
#endif
template <class T>
struct Block<T, int8_t> {
    const int32_t* a;
    const float* row_scales;
    long pairs;

    // Rows become 16-bit integers of at most `most`, so that depth products with 8-bit weights fit 31 bits.
    void prepare(const Product& p, long first, long rows) {
        pairs = (p.depth + 1) / 2;
        float most = float(std::min<long>(4095, 0x7fffffffL / (127 * (p.depth + 1))));
        char* memory = scratch<0>(rows * (pairs * 4 + 4));
        float* scales = reinterpret_cast<float*>(memory + rows * pairs * 4);
        for (long r = 0; r < rows; ++r) {
            const T* x = static_cast<const T*>(p.x) + (first + r) * p.ldx;
            int16_t* out = reinterpret_cast<int16_t*>(memory + r * pairs * 4);
            vf highest = vf{}, nothing = vf{};
            long k = 0;
            for (; k + VL <= p.depth; k += VL) {
                vf value = load(x + k);
                highest = max(highest, max(value, -value));
                nothing += value * 0.0f;
            }
            float peak = largest(highest), zero = sum(nothing);
            for (long rest = k; rest < p.depth; ++rest) {
                peak = std::max(peak, std::fabs(get(x + rest)));
                zero += get(x + rest) * 0.0f;
            }
            float factor = peak > 0 ? most / peak : 0.0f;
            // No integer is NaN or infinite: of a row that is not finite the scale is NaN, and so are its products.
            scales[r] = peak / most + zero;
            typedef int16_t vs_unaligned __attribute__((vector_size(VL * 2), aligned(2)));
            for (k = 0; k + VL <= p.depth; k += VL) {
                // Adding 1.5 x 2^23 leaves the nearest integer in the low bits.
                vf shifted = load(x + k) * factor + 12582912.0f;
                vi whole = reinterpret_cast<vi>(shifted) - 0x4b400000;
                *reinterpret_cast<vs_unaligned*>(out + k) = __builtin_convertvector(whole, vs_unaligned);
            }
            for (; k < p.depth; ++k) out[k] = int16_t(std::lrintf(get(x + k) * factor));
            if (p.depth % 2) out[p.depth] = 0;
        }
        a = reinterpret_cast<const int32_t*>(memory);
        row_scales = scales;
    }
    template <int R>
    static void rows_of(const int32_t* a, const float* row_scales, long pairs, const int8_t* b, const float* scales, float* sums) {
        vi acc[R][2];
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vi{};
        tile<R>(a, pairs, b, pairs, acc);
        vf s0 = load(scales), s1 = load(scales + VL);
        for (int r = 0; r < R; ++r) {
            store(sums + r * NR, __builtin_convertvector(acc[r][0], vf) * (s0 * row_scales[r]));
            store(sums + r * NR + VL, __builtin_convertvector(acc[r][1], vf) * (s1 * row_scales[r]));
        }
    }
    void sum_panel(const Product& p, long panel, long rows, float* sums) const {
        const int8_t* b = static_cast<const int8_t*>(p.packed) + panel * pairs * 2 * NR;
        for (long r = 0; r < rows; r += MR)
            for_rows<MR>(rows - r, [&](auto number) {
                rows_of<number>(a + r * pairs, row_scales + r, pairs, b, p.scales + panel * NR, sums + r * NR);
            });
    }
};

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
    // A block of rows stays in L2 while the panels go by.
    long row_bytes = p.depth * (IN_PAIRS<W> ? 2 : 4);
    long block_rows = std::max<long>(2 * MR, std::min<long>(96, BLOCK_BYTES / row_bytes) / MR * MR);
    // Even blocks: a last one of few rows would have the weights read for little.
    long blocks = (p.rows + block_rows - 1) / block_rows;
    block_rows = ((p.rows + blocks - 1) / blocks + MR - 1) / MR * MR;
    blocks = (p.rows + block_rows - 1) / block_rows;
    long chunks = blocks >= 8 * threads ? 1 : (8 * threads + blocks - 1) / blocks;
    chunks = std::max<long>(1, std::min(chunks, panels / step / 2));
    long chunk_panels = (panels / step + chunks - 1) / chunks * step;
    chunks = (panels + chunk_panels - 1) / chunk_panels;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long task = 0; task < blocks * chunks; ++task) {
        // Blocks of one chunk follow each other: threads share the panels in L3.
        long first = task % blocks * block_rows, rows = std::min(block_rows, p.rows - first);
        long begin = task / blocks * chunk_panels, end = std::min(begin + chunk_panels, panels);
        Block<T, W> block;
        block.prepare(p, first, rows);
        float* gate = reinterpret_cast<float*>(scratch<3>(2 * rows * NR * 4));
        float* sums = gate + rows * NR;
        for (long panel = begin; panel < end; panel += step) {
            if (step == 2) block.sum_panel(p, panel, rows, gate);
            block.sum_panel(p, panel + step - 1, rows, sums);
            finish<T>(p, first, rows, panel, sums, gate);
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
