// CPU kernels of the transformers engine: matrix product with weights laid out once, attention over packed steps, and
// the small operations between them. Compiled where they run (build.py), for the instructions of that machine.
//
// Conventions: T is the type of activations in memory, S that of keys and values (float or bf16); arithmetic is in float, or in int32 for 8-bit weights. Rows are
// tokens. Every function is one parallel region of the OpenMP runtime that torch uses. Nothing is allocated per call
// except scratch of the threads, which they keep.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
constexpr int MR = 12;  // rows of a tile: MR x 2 accumulators, and room for two vectors of B
#else
constexpr int VL = 8;
constexpr int MR = 6;
#endif
constexpr int NR = 2 * VL;  // columns of a tile, and of a panel of packed weights

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef int32_t vi_unaligned __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh_unaligned __attribute__((vector_size(VL * 2), aligned(2)));

struct bf16 {
    uint16_t bits;
};

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf value) { *reinterpret_cast<vf_unaligned*>(p) = value; }
inline vf load(const bf16* p) {
    vu wide = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
    return reinterpret_cast<vf>(wide << 16);
}
inline void store(bf16* p, vf value) {
    // Round to nearest, ties to even.
    vu bits = reinterpret_cast<vu>(value);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh_unaligned);
}
inline float get(const float* p) { return *p; }
inline float get(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void put(float* p, float value) { *p = value; }
inline void put(bf16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    p->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(vf value) {
    float total = 0;
    for (int i = 0; i < VL; ++i) total += value[i];
    return total;
}
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline float largest(vf value) {
    float most = value[0];
    for (int i = 1; i < VL; ++i) most = std::max(most, value[i]);
    return most;
}

// e^x for x <= 88, relative error below 2e-7: Cephes' expf (S. Moshier), argument reduction in two parts.
inline vf exponential(vf x) {
    x = x < -87.0f ? vf{} - 87.0f : x;
    vf shifted = x * 1.44269504088896341f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi exponent = (reinterpret_cast<vi>(shifted) - 0x4b400000) << 23;
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
}
inline vf silu(vf x) { return x / (1.0f + exponential(x < -88.0f ? vf{} + 88.0f : -x)); }
inline vf tanh_(vf x) {
    vf e = exponential(x > 40.0f ? vf{} + 80.0f : 2.0f * x);
    return (e - 1.0f) / (e + 1.0f);
}

// Scratch that a thread keeps between calls.
template <int Slot>
char* scratch(size_t bytes) {
    thread_local std::vector<char> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// --- tiles ----------------------------------------------------------------------------------------------------------

// Calls f with std::integral_constant<int, min(rows, R)>: tiles are compiled for each number of rows.
template <int R, class F>
inline void for_rows(long rows, F&& f) {
    if (rows >= R) {
        f(std::integral_constant<int, R>{});
    } else if constexpr (R > 1) {
        for_rows<R - 1>(rows, f);
    }
}

// acc[r][0..1] += A[r, 0..depth) x B[0..depth, 0..NR), B of float or bf16
template <int R, class W>
inline void tile(const float* a, long lda, const W* b, long ldb, long depth, vf (&acc)[R][2]) {
    for (long k = 0; k < depth; ++k, b += ldb) {
        vf b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float value = a[r * lda + k];
            acc[r][0] += b0 * value;
            acc[r][1] += b1 * value;
        }
    }
}

// 8-bit weights: pairs of rows of B lie side by side, [depth / 2][NR][2]; A holds pairs of 16-bit integers.
template <int R>
inline void tile(const int32_t* a, long lda, const int8_t* b, long pairs, vi (&acc)[R][2]) {
    for (long k = 0; k < pairs; ++k, b += 2 * NR) {
#if defined(__AVX512BW__)
        __m512i b0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
        __m512i b1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 2 * VL)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512i value = _mm512_set1_epi32(a[r * lda + k]);
            acc[r][0] += reinterpret_cast<vi>(_mm512_madd_epi16(b0, value));
            acc[r][1] += reinterpret_cast<vi>(_mm512_madd_epi16(b1, value));
        }
#elif defined(__AVX2__) && !defined(__AVX512F__)
        __m256i b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
        __m256i b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 2 * VL)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m256i value = _mm256_set1_epi32(a[r * lda + k]);
            acc[r][0] += reinterpret_cast<vi>(_mm256_madd_epi16(b0, value));
            acc[r][1] += reinterpret_cast<vi>(_mm256_madd_epi16(b1, value));
        }
#else
        for (int r = 0; r < R; ++r) {
            int32_t pair = a[r * lda + k];
            int32_t low = int16_t(pair & 0xffff), high = int16_t(pair >> 16);
            for (int i = 0; i < NR; ++i) acc[r][i / VL][i % VL] += low * b[2 * i] + high * b[2 * i + 1];
        }
#endif
    }
}

// --- matrix product ---------------------------------------------------------------------------------------------------

// SILU_MUL: panels come in pairs, gate and up, and a pair makes the columns of one.
enum Epilogue { WRITE = 0, ADD = 1, SILU_MUL = 2 };

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

// A block of rows as the tiles want it, and the sums of one panel for all of its rows, [rows][NR] floats.
template <class T, class W>
struct Block {  // float and bf16 weights
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
    template <int R, class B>
    static void add(const float* a, long lda, const B* b, long depth, bool is_first, float* sums) {
        vf acc[R][2];
        for (int r = 0; r < R; ++r) {
            acc[r][0] = is_first ? vf{} : load(sums + r * NR);
            acc[r][1] = is_first ? vf{} : load(sums + r * NR + VL);
        }
        tile<R>(a, lda, b, NR, depth, acc);
        for (int r = 0; r < R; ++r) {
            store(sums + r * NR, acc[r][0]);
            store(sums + r * NR + VL, acc[r][1]);
        }
    }
    template <class B>
    void add_slice(const B* b, long k, long depth, long rows, float* sums) const {
        for (long r = 0; r < rows; r += MR)
            for_rows<MR>(rows - r, [&](auto number) {
                add<number>(a + r * lda + k, lda, b, depth, k == 0, sums + r * NR);
            });
    }
    void sum_panel(const Product& p, long panel, long rows, float* sums) const {
        const W* b = static_cast<const W*>(p.packed) + panel * p.depth * NR;
        for (long k = 0; k < p.depth; k += SLICE) {
            long depth = std::min(SLICE, p.depth - k);
            if (sizeof(W) == 2 && rows > MR) {
                // Widened once for all rows.
                float* wide = reinterpret_cast<float*>(scratch<2>(SLICE * NR * 4));
                for (long i = 0; i < depth * NR; i += VL) store(wide + i, load(b + k * NR + i));
                add_slice(wide, k, depth, rows, sums);
            } else {
                add_slice(b + k * NR, k, depth, rows, sums);
            }
        }
    }
};
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
            vf highest = vf{};
            long k = 0;
            for (; k + VL <= p.depth; k += VL) {
                vf value = load(x + k);
                highest = max(highest, max(value, -value));
            }
            float peak = largest(highest);
            for (long rest = k; rest < p.depth; ++rest) peak = std::max(peak, std::fabs(get(x + rest)));
            float factor = peak > 0 ? most / peak : 0.0f;
            scales[r] = peak / most;
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
    bool is_pair = p.epilogue == SILU_MUL;
    long column = (is_pair ? panel / 2 : panel) * NR;
    int width = int(std::min<long>(NR, p.columns - column));
    for (long r = 0; r < rows; ++r, sums += NR, gate += NR) {
        T* out = static_cast<T*>(p.out) + (first + r) * p.ldo + column;
        vf values[2] = {load(sums), load(sums + VL)};
        for (int half = 0; half < 2; ++half) {
            if (is_pair) values[half] *= silu(load(gate + half * VL));
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
    long step = p.epilogue == SILU_MUL ? 2 : 1;
    long panels = (p.columns + NR - 1) / NR * step;
    // A block of rows stays in L2 while the panels go by.
    long row_bytes = p.depth * (sizeof(W) == 1 ? 2 : 4);
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

// --- attention --------------------------------------------------------------------------------------------------------

struct Attention {
    const void* q;  // [tokens, heads, dim] of T, strides ldq and head_stride
    long ldq, head_stride;
    const void* keys;  // [kv_heads, arena tokens, dim] of S
    const void* values;
    long arena;  // tokens in the arena
    void* out;  // [tokens, heads, dim] of T, row stride ldo
    long ldo;
    const int64_t* segments;  // [n, 4]: first token, tokens, where its KV starts, context with the new tokens
    long num_segments;
    int heads, kv_heads, dim;
    float scale;
    long window;  // tokens to look back to, 0 for all
    float softcap;  // 0 for none
};

constexpr int KEYS = 128;  // keys of a block, a multiple of NR
constexpr int ROWS = 192;  // query rows (tokens x heads of a group) of a block, about
constexpr float NEVER = -1e30f;

// A block of keys as floats, transposed into panels [KEYS / NR][dim][NR]; keys beyond `count` are zero.
template <class S>
void transpose_keys(const S* keys, long count, int dim, float* out) {
    for (long first = 0; first < count; first += NR) {
        float* panel = out + first * dim;
        long here = std::min<long>(NR, count - first);
        const S* at = keys + first * dim;
#if defined(__AVX2__)
        // 8 x 8 at a time; with wider vectors a panel is four of these wide instead of two.
        if (here == NR) {
            for (long c = 0; c < NR; c += 8) {
                for (int d = 0; d < dim; d += 8) {
                    __m256 row[8], a[8], b[8];
                    for (int i = 0; i < 8; ++i) {
                        const S* p = at + (c + i) * dim + d;
                        if constexpr (sizeof(S) == 4) {
                            row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(p));
                        } else {
                            __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
                            row[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
                        }
                    }
                    for (int i = 0; i < 4; ++i) {
                        a[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
                        a[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
                    }
                    for (int i = 0; i < 8; i += 4) {
                        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
                        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
                        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
                        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
                    }
                    for (int i = 0; i < 4; ++i) {
                        float* low = panel + (d + i) * NR + c;
                        _mm256_storeu_ps(low, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
                        _mm256_storeu_ps(low + 4 * NR, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
                    }
                }
            }
            continue;
        }
#endif
        for (int d = 0; d < dim; ++d)
            for (long c = 0; c < NR; ++c) panel[d * NR + c] = c < here ? get(at + c * dim + d) : 0.0f;
    }
}

template <int R>
inline void scores_tile(const float* q, const float* panel, int dim, float* out, long ldo) {
    vf acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vf{};
    tile<R>(q, dim, panel, NR, dim, acc);
    for (int r = 0; r < R; ++r) {
        store(out + r * ldo, acc[r][0]);
        store(out + r * ldo + VL, acc[r][1]);
    }
}
template <int R>
inline void mix_tile(const float* p, long ldp, const float* values, int dim, long count, float* out) {
    for (int d = 0; d < dim; d += NR) {
        vf acc[R][2];
        for (int r = 0; r < R; ++r) {
            acc[r][0] = load(out + r * dim + d);
            acc[r][1] = load(out + r * dim + d + VL);
        }
        tile<R>(p, ldp, values + d, dim, count, acc);
        for (int r = 0; r < R; ++r) {
            store(out + r * dim + d, acc[r][0]);
            store(out + r * dim + d + VL, acc[r][1]);
        }
    }
}
// Softmax so far of one row: takes a block of scores, leaves their weights in it; returns what to scale the past by.
inline float soften(float* scores, long count, float& highest, float& total) {
    long padded = (count + VL - 1) / VL * VL;
    for (long i = count; i < padded; ++i) scores[i] = NEVER;
    vf most = vf{} + highest;
    for (long i = 0; i < padded; i += VL) most = max(most, load(scores + i));
    float peak = largest(most);
    vf added = vf{};
    for (long i = 0; i < padded; i += VL) {
        vf weight = exponential(load(scores + i) - peak);
        added += weight;
        store(scores + i, weight);
    }
    // Padding has a weight of e^-87 each: nothing, but it must not reach the values.
    for (long i = count; i < padded; ++i) scores[i] = 0.0f;
    float past = highest == peak ? 1.0f : exponential(vf{} + (highest - peak))[0];
    highest = peak;
    total = total * past + sum(added);
    return past;
}

inline void cap(float* scores, long count, float softcap) {
    for (long i = 0; i < count; i += VL) store(scores + i, tanh_(load(scores + i) / softcap) * softcap);
}

// One block of query tokens of one segment, for the heads that share one KV head.
template <class T, class S>
void attend(const Attention& at, const int64_t* segment, int kv_head, long token, long tokens) {
    int group = at.heads / at.kv_heads, dim = at.dim;
    long rows = tokens * group;
    long context = segment[3], position = context - segment[1] + token;  // of the first query token
    const S* keys = static_cast<const S*>(at.keys) + (kv_head * at.arena + segment[2]) * dim;
    const S* values = static_cast<const S*>(at.values) + (kv_head * at.arena + segment[2]) * dim;
    float* memory = reinterpret_cast<float*>(scratch<1>((rows * (2 * dim + KEYS + 3) + 2 * KEYS * dim) * 4 + 1024));
    float* q = memory;  // [rows, dim], scaled
    float* out = q + rows * dim;  // [rows, dim]
    float* scores = out + rows * dim;  // [rows, KEYS]
    float* panel = scores + rows * KEYS;  // [KEYS / NR][dim][NR]
    float* wide = panel + KEYS * dim;  // values of a block, if they are not floats
    float* highest = wide + KEYS * dim;
    float* total = highest + rows;
    for (long t = 0; t < tokens; ++t) {
        for (int g = 0; g < group; ++g) {
            const T* from = static_cast<const T*>(at.q) + (segment[0] + token + t) * at.ldq + (kv_head * group + g) * at.head_stride;
            for (int d = 0; d < dim; d += VL) store(q + (t * group + g) * dim + d, load(from + d) * at.scale);
        }
    }
    std::fill(out, out + rows * dim, 0.0f);
    std::fill(highest, highest + rows, NEVER);
    std::fill(total, total + rows, 0.0f);
    long low = at.window ? std::max<long>(0, position - at.window + 1) : 0;
    long end = position + tokens;
    for (long first = low / KEYS * KEYS; first < end; first += KEYS) {
        long count = std::min<long>(KEYS, end - first);
        transpose_keys(keys + first * dim, count, dim, panel);
        for (long c = 0; c < count; c += NR)
            // Rows whose positions lie before all of these keys see none of them.
            for (long r = std::max<long>(0, first + c - position) * group / MR * MR; r < rows; r += MR)
                for_rows<MR>(rows - r, [&](auto number) {
                    scores_tile<number>(q + r * dim, panel + c * dim, dim, scores + r * KEYS + c, KEYS);
                });
        for (long r = 0; r < rows; ++r) {
            float* row = scores + r * KEYS;
            long here = position + r / group;  // this row's position sees keys up to itself
            long seen = std::min<long>(count, here + 1 - first);
            if (at.softcap > 0) cap(row, (std::max<long>(seen, 0) + VL - 1) / VL * VL, at.softcap);
            if (seen <= 0) {
                std::fill(row, row + count, 0.0f);
                continue;
            }
            long unseen = at.window ? here - at.window + 1 - first : 0;
            for (long i = 0; i < std::min(unseen, seen); ++i) row[i] = NEVER;
            float past = soften(row, seen, highest[r], total[r]);
            std::fill(row + seen, row + count, 0.0f);
            if (past != 1.0f)
                for (int d = 0; d < dim; d += VL) store(out + r * dim + d, load(out + r * dim + d) * past);
        }
        const float* mixed;
        if constexpr (sizeof(S) == 4) {
            mixed = values + first * dim;
        } else {
            for (long i = 0; i < count * dim; i += VL) store(wide + i, load(values + first * dim + i));
            mixed = wide;
        }
        for (long r = 0; r < rows; r += MR)
            for_rows<MR>(rows - r, [&](auto number) {
                // Beyond the last of these rows' positions all weights are zero.
                long seen = std::min<long>(count, position + (r + number - 1) / group + 1 - first);
                if (seen > 0) mix_tile<number>(scores + r * KEYS, KEYS, mixed, dim, seen, out + r * dim);
            });
    }
    for (long r = 0; r < rows; ++r) {
        T* to = static_cast<T*>(at.out) + (segment[0] + token + r / group) * at.ldo + (kv_head * group + r % group) * dim;
        for (int d = 0; d < dim; d += VL) store(to + d, load(out + r * dim + d) / total[r]);
    }
}

// One token: scores are dot products with the keys as they lie, so that each key is read once for the whole group.
template <class T, class S, int G>
void attend_one(const Attention& at, const int64_t* segment, int kv_head) {
    int dim = at.dim;
    long context = segment[3], low = at.window ? std::max<long>(0, context - at.window) : 0;
    const S* keys = static_cast<const S*>(at.keys) + (kv_head * at.arena + segment[2]) * dim;
    const S* values = static_cast<const S*>(at.values) + (kv_head * at.arena + segment[2]) * dim;
    float* memory = reinterpret_cast<float*>(scratch<1>(G * (2 * dim + KEYS) * 4 + 256));
    float *q = memory, *out = q + G * dim, *scores = out + G * dim;
    float highest[G], total[G];
    for (int g = 0; g < G; ++g) {
        const T* from = static_cast<const T*>(at.q) + segment[0] * at.ldq + (kv_head * G + g) * at.head_stride;
        for (int d = 0; d < dim; d += VL) store(q + g * dim + d, load(from + d) * at.scale);
    }
    std::fill(out, out + G * dim, 0.0f);
    std::fill(highest, highest + G, NEVER);
    std::fill(total, total + G, 0.0f);
    for (long first = low; first < context; first += KEYS) {
        long count = std::min<long>(KEYS, context - first);
        for (long i = 0; i < count; ++i) {
            const S* key = keys + (first + i) * dim;
            vf acc[G];
            for (int g = 0; g < G; ++g) acc[g] = vf{};
            for (int d = 0; d < dim; d += VL) {
                vf value = load(key + d);
                for (int g = 0; g < G; ++g) acc[g] += value * load(q + g * dim + d);
            }
            for (int g = 0; g < G; ++g) scores[g * KEYS + i] = sum(acc[g]);
        }
        for (int g = 0; g < G; ++g) {
            if (at.softcap > 0) cap(scores + g * KEYS, (count + VL - 1) / VL * VL, at.softcap);
            float past = soften(scores + g * KEYS, count, highest[g], total[g]);
            if (past != 1.0f)
                for (int d = 0; d < dim; d += VL) store(out + g * dim + d, load(out + g * dim + d) * past);
        }
        for (int d = 0; d < dim; d += 2 * VL) {
            vf acc[G][2];
            for (int g = 0; g < G; ++g) {
                acc[g][0] = load(out + g * dim + d);
                acc[g][1] = load(out + g * dim + d + VL);
            }
            tile<G>(scores, KEYS, values + first * dim + d, dim, count, acc);
            for (int g = 0; g < G; ++g) {
                store(out + g * dim + d, acc[g][0]);
                store(out + g * dim + d + VL, acc[g][1]);
            }
        }
    }
    for (int g = 0; g < G; ++g) {
        T* to = static_cast<T*>(at.out) + segment[0] * at.ldo + (kv_head * G + g) * dim;
        for (int d = 0; d < dim; d += VL) store(to + d, load(out + g * dim + d) / total[g]);
    }
}
struct Piece {
    long segment, token, tokens, work;
    int kv_head;
};

template <class T, class S>
void attention(const Attention& at, int threads) {
    static thread_local std::vector<Piece> pieces;
    pieces.clear();
    int group = at.heads / at.kv_heads;
    long block = std::max<long>(1, ROWS / group);
    for (long s = 0; s < at.num_segments; ++s) {
        const int64_t* segment = at.segments + 4 * s;
        for (long token = 0; token < segment[1]; token += block) {
            long tokens = std::min(block, segment[1] - token);
            long seen = segment[3] - segment[1] + token + tokens;
            for (int head = 0; head < at.kv_heads; ++head) pieces.push_back({s, token, tokens, tokens * seen, head});
        }
    }
    // The longest first, so that the threads end together.
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.work > b.work; });
    const Piece* all = pieces.data();
    long number = long(pieces.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long i = 0; i < number; ++i) {
        const Piece& piece = all[i];
        const int64_t* segment = at.segments + 4 * piece.segment;
        if (segment[1] == 1 && group <= 8) {
            for_rows<8>(group, [&](auto number) { attend_one<T, S, number>(at, segment, piece.kv_head); });
        } else {
            attend<T, S>(at, segment, piece.kv_head, piece.token, piece.tokens);
        }
    }
}

// --- between ----------------------------------------------------------------------------------------------------------

template <class T>
inline float inverse_rms(const T* x, long size, float eps) {
    vf squares = vf{};
    for (long i = 0; i < size; i += VL) {
        vf value = load(x + i);
        squares += value * value;
    }
    return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}
template <class T>
inline void scale_by(T* out, const T* x, const float* weight, float factor, long size) {
    for (long i = 0; i < size; i += VL) store(out + i, load(x + i) * factor * load(weight + i));
}

struct Rotation {
    void* qkv;  // [rows, (heads + 2 kv_heads) x dim] of T; queries are left there, rotated
    long ld;
    const void* cos;  // [rows, dim] of T
    const void* sin;
    const float* q_norm;  // [dim] or null
    const float* k_norm;
    float eps;
    void* keys;  // [kv_heads, arena tokens, dim] of S
    void* values;
    long arena;
    const int64_t* slots;  // [rows]
    long rows;
    int heads, kv_heads, dim;
};

template <class T, class S>
inline void rotate(S* to, T* from, const T* cos, const T* sin, const float* norm, float eps, int dim) {
    if (norm) scale_by(from, from, norm, inverse_rms(from, dim, eps), dim);
    int half = dim / 2;
    for (int d = 0; d < half; d += VL) {
        vf low = load(from + d), high = load(from + half + d);
        store(to + d, low * load(cos + d) - high * load(sin + d));
        store(to + half + d, high * load(cos + half + d) + low * load(sin + half + d));
    }
}

template <class T, class S>
void rotation(const Rotation& at, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < at.rows; ++row) {
        T* x = static_cast<T*>(at.qkv) + row * at.ld;
        const T* cos = static_cast<const T*>(at.cos) + row * at.dim;
        const T* sin = static_cast<const T*>(at.sin) + row * at.dim;
        for (int h = 0; h < at.heads; ++h) rotate<T, T>(x + h * at.dim, x + h * at.dim, cos, sin, at.q_norm, at.eps, at.dim);
        for (int h = 0; h < at.kv_heads; ++h) {
            T* key = x + (at.heads + h) * at.dim;
            long place = (h * at.arena + at.slots[row]) * at.dim;
            rotate<T, S>(static_cast<S*>(at.keys) + place, key, cos, sin, at.k_norm, at.eps, at.dim);
            const T* value = x + (at.heads + at.kv_heads + h) * at.dim;
            for (int d = 0; d < at.dim; d += VL) store(static_cast<S*>(at.values) + place + d, load(value + d));
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

}  // namespace

extern "C" {

int bs_panel_columns() { return NR; }
int bs_vector_floats() { return VL; }

// weight [rows, depth] of 4, 2 or 1 bytes into panels of NR rows, `panel_step` panels apart.
void bs_pack(const void* weight, long rows, long depth, void* packed, long panel_step, int bytes) {
    if (bytes == 4) {
        pack(static_cast<const float*>(weight), rows, depth, static_cast<float*>(packed), panel_step);
    } else if (bytes == 2) {
        pack(static_cast<const bf16*>(weight), rows, depth, static_cast<bf16*>(packed), panel_step);
    } else {
        long panels = (rows + NR - 1) / NR, pairs = (depth + 1) / 2;
        const int8_t* from = static_cast<const int8_t*>(weight);
#pragma omp parallel for schedule(static)
        for (long panel = 0; panel < panels; ++panel) {
            int8_t* to = static_cast<int8_t*>(packed) + panel * panel_step * pairs * 2 * NR;
            for (long k = 0; k < 2 * pairs; ++k)
                for (int i = 0; i < NR; ++i) {
                    long row = panel * NR + i;
                    to[(k / 2 * NR + i) * 2 + k % 2] = row < rows && k < depth ? from[row * depth + k] : 0;
                }
        }
    }
}

// is_half: x and out are bf16. weight_bytes: 4, 2 or 1.
void bs_product(const Product* p, int is_half, int weight_bytes, int threads) {
    if (is_half) {
        if (weight_bytes == 4) product<bf16, float>(*p, threads);
        if (weight_bytes == 2) product<bf16, bf16>(*p, threads);
        if (weight_bytes == 1) product<bf16, int8_t>(*p, threads);
    } else {
        if (weight_bytes == 4) product<float, float>(*p, threads);
        if (weight_bytes == 2) product<float, bf16>(*p, threads);
        if (weight_bytes == 1) product<float, int8_t>(*p, threads);
    }
}

// is_half: activations are bf16; is_kv_half: keys and values are.
void bs_attention(const Attention* at, int is_half, int is_kv_half, int threads) {
    if (is_half) {
        attention<bf16, bf16>(*at, threads);
    } else if (is_kv_half) {
        attention<float, bf16>(*at, threads);
    } else {
        attention<float, float>(*at, threads);
    }
}

void bs_rotate_and_store(const Rotation* at, int is_half, int is_kv_half, int threads) {
    if (is_half) {
        rotation<bf16, bf16>(*at, threads);
    } else if (is_kv_half) {
        rotation<float, bf16>(*at, threads);
    } else {
        rotation<float, float>(*at, threads);
    }
}

// out [rows, size] = x / rms(x) x weight
void bs_rms_norm(const void* x, const float* weight, float eps, void* out, long rows, long size, int is_half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        if (is_half) {
            const bf16* from = static_cast<const bf16*>(x) + row * size;
            scale_by(static_cast<bf16*>(out) + row * size, from, weight, inverse_rms(from, size, eps), size);
        } else {
            const float* from = static_cast<const float*>(x) + row * size;
            scale_by(static_cast<float*>(out) + row * size, from, weight, inverse_rms(from, size, eps), size);
        }
    }
}

// out [rows, size] = silu(both[:, :size]) x both[:, size:]
void bs_silu_mul(const void* both, void* out, long rows, long size, int is_half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        for (long i = 0; i < size; i += VL) {
            if (is_half) {
                const bf16* gate = static_cast<const bf16*>(both) + row * 2 * size + i;
                store(static_cast<bf16*>(out) + row * size + i, silu(load(gate)) * load(gate + size));
            } else {
                const float* gate = static_cast<const float*>(both) + row * 2 * size + i;
                store(static_cast<float*>(out) + row * size + i, silu(load(gate)) * load(gate + size));
            }
        }
    }
}

}  // extern "C"
