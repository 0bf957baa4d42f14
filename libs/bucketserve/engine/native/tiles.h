// Vectors of this processor, bfloat16, and tiles: the inner loops that products and attention share.
#pragma once

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

// Whether weights of type W are multiplied in pairs along the depth.
#if defined(__AVX512BF16__)
template <class W> constexpr bool IN_PAIRS = sizeof(W) <= 2;
#else
template <class W> constexpr bool IN_PAIRS = sizeof(W) == 1;
#endif

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

// Lane i of the result: lane i + S of the value.
template <int S>
inline vf shifted(vf value) {
    vi lanes;
    for (int i = 0; i < VL; ++i) lanes[i] = (i + S) % VL;
    return __builtin_shuffle(value, lanes);
}
template <int S = VL / 2>
inline float sum(vf value) {
    value += shifted<S>(value);
    if constexpr (S > 1) return sum<S / 2>(value);
    return value[0];
}
inline vf max(vf a, vf b) { return a > b ? a : b; }
template <int S = VL / 2>
inline float largest(vf value) {
    value = max(value, shifted<S>(value));
    if constexpr (S > 1) return largest<S / 2>(value);
    return value[0];
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
// The approximation by tanh, written with (1 + tanh(u)) / 2 = 1 / (1 + e^-2u).
inline vf gelu(vf x) {
    vf u = -1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(u > 88.0f ? vf{} + 88.0f : u));
}
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

// Exchanges bit S of the vectors' numbers with that of their lanes': all bits in turn transpose VL x VL numbers.
template <int S>
inline void exchange(vi (&v)[VL]) {
    vi low, high;
    for (int i = 0; i < VL; ++i) {
        low[i] = i & S ? VL + i - S : i;
        high[i] = i & S ? VL + i : i + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
        if (!(i & S)) {
            vi a = v[i], b = v[i + S];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + S] = __builtin_shuffle(a, b, high);
        }
    if constexpr (S > 1) exchange<S / 2>(v);
}

// out[length][R] = in[R][length], rows of `in` ldi apart; numbers of 4 bytes
template <int R, class N>
inline void interleave(const N* in, long ldi, long length, N* out) {
    long k = 0;
    for (; k + VL <= length; k += VL) {
        vi v[VL];
#pragma GCC unroll 16
        for (int r = 0; r < VL; ++r) v[r] = r < R ? *reinterpret_cast<const vi_unaligned*>(in + r * ldi + k) : vi{};
        exchange<VL / 2>(v);
        for (int i = 0; i < VL; ++i) std::memcpy(out + (k + i) * R, &v[i], R * 4);
    }
    for (; k < length; ++k)
        for (int r = 0; r < R; ++r) out[k * R + r] = in[r * ldi + k];
}

struct Nothing {
    void operator()(const void*) const {}
};
// Fetches what lies `distance` bytes behind two vectors into L2.
template <int Bytes>
struct Ahead {
    long distance;
    void operator()(const void* b) const {
        for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(static_cast<const char*>(b) + distance + i, 0, 2);
    }
};

// acc[r][0..C) += A[r, 0..depth) x B[0..depth, 0..C vectors), B of float or bf16; C is 2, or 1 for what is left.
// The rows of A are `row` apart, its columns `column`.
template <int R, int C, class W, class F = Nothing>
inline void tile(const float* a, long row, long column, const W* b, long ldb, long depth, vf (&acc)[R][C], F ahead = {}) {
    for (long k = 0; k < depth; ++k, a += column, b += ldb) {
        ahead(b);
        vf b0 = load(b), b1 = C == 2 ? load(b + VL) : b0;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float value = a[r * row];
            acc[r][0] += b0 * value;
            if (C == 2) acc[r][C - 1] += b1 * value;
        }
    }
}

// The same onto C vectors of R rows of floats, `ldo` apart.
template <int R, int C, class W>
inline void tile_onto(const float* a, long lda, const W* b, long ldb, long depth, float* out, long ldo) {
    vf acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * ldo + c * VL);
    tile<R>(a, lda, 1, b, ldb, depth, acc);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * ldo + c * VL, acc[r][c]);
}

// Weights that are multiplied in pairs along the depth: pairs of rows of B lie side by side, [depth / 2][NR][2], and A
// holds pairs of 16 bits, [depth / 2][R].

#if defined(__AVX512BF16__)
// Numbers too small for a normal float count as zero.
template <int R, class F>
inline void tile(const int32_t* a, const bf16* b, long pairs, vf (&acc)[R][2], F ahead) {
    for (long k = 0; k < pairs; ++k, a += R, b += 2 * NR) {
        ahead(b);
        __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
        __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 2 * VL));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[r]));
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], b0, value);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], b1, value);
        }
    }
}
#endif

// Floats that are laid out the same way, [depth][R].
template <int R, class W, class F>
inline void tile(const float* a, const W* b, long depth, vf (&acc)[R][2], F ahead) {
    tile<R>(a, 1, R, b, NR, depth, acc, ahead);
}

// 8-bit weights and 16-bit integers.
template <int R, class F>
inline void tile(const int32_t* a, const int8_t* b, long pairs, vi (&acc)[R][2], F ahead) {
    for (long k = 0; k < pairs; ++k, a += R, b += 2 * NR) {
        ahead(b);
#if defined(__AVX512VNNI__)
        __m512i b0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
        __m512i b1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 2 * VL)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512i value = _mm512_set1_epi32(a[r]);
            acc[r][0] = reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc[r][0]), b0, value));
            acc[r][1] = reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc[r][1]), b1, value));
        }
#elif defined(__AVX512BW__)
        __m512i b0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
        __m512i b1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 2 * VL)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512i value = _mm512_set1_epi32(a[r]);
            acc[r][0] += reinterpret_cast<vi>(_mm512_madd_epi16(b0, value));
            acc[r][1] += reinterpret_cast<vi>(_mm512_madd_epi16(b1, value));
        }
#elif defined(__AVX2__) && !defined(__AVX512F__)
        __m256i b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
        __m256i b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 2 * VL)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m256i value = _mm256_set1_epi32(a[r]);
            acc[r][0] += reinterpret_cast<vi>(_mm256_madd_epi16(b0, value));
            acc[r][1] += reinterpret_cast<vi>(_mm256_madd_epi16(b1, value));
        }
#else
        for (int r = 0; r < R; ++r) {
            int32_t pair = a[r];
            int32_t low = int16_t(pair & 0xffff), high = int16_t(pair >> 16);
            for (int i = 0; i < NR; ++i) acc[r][i / VL][i % VL] += low * b[2 * i] + high * b[2 * i + 1];
        }
#endif
    }
}

}  // namespace
