// Attention of packed steps over KV that lies in pages. Results don't depend on which pages they are.
#pragma once

#include "tiles.h"

namespace {

struct Attention {
    const void* q;  // [tokens, heads, dim] of T, strides ldq and head_stride
    long ldq, head_stride;
    const void* keys;  // [kv_heads, arena tokens, dim] of S
    const void* values;
    long arena;  // tokens in the arena
    void* out;  // [tokens, heads, dim] of T, row stride ldo
    long ldo;
    const int64_t* segments;  // [n, 4]: first token, tokens, where its KV starts in `pages`, context with the new tokens
    long num_segments;
    const int64_t* pages;  // [n]: the arena's page for each `page_tokens` tokens of KV, all sequences' one after another
    long page_tokens;
    int heads, kv_heads, dim;  // dim: a multiple of VL
    float scale;
    long window;  // tokens to look back to, 0 for all
    float softcap;  // 0 for none
};

constexpr int KEYS = 128;  // keys of a block, a multiple of NR
constexpr int AHEAD = 16;  // keys: what lies a page or two behind the one that is read
constexpr int ROWS = 192;  // query rows (tokens x heads of a group) of a block, about
constexpr float NEVER = -1e30f;

// Calls use(i, number, place) for each run of tokens that lie side by side: tokens [first + i, first + i + number) of
// `pages` are the arena's from `place` on.
template <class Use>
inline void for_runs(const Attention& at, long first, long count, Use&& use) {
    long page = first / at.page_tokens, offset = first % at.page_tokens;
    for (long done = 0; done < count;) {
        long place = at.pages[page] * at.page_tokens + offset, number = at.page_tokens - offset;
        while (number < count - done && at.pages[page + 1] == at.pages[page] + 1) {
            ++page;
            number += at.page_tokens;
        }
        number = std::min(number, count - done);
        use(done, number, place);
        done += number;
        ++page;
        offset = 0;
    }
}

// A block of keys as floats, transposed into panels [KEYS / NR][dim][NR]; keys beyond `count` are zero.
template <class S>
void transpose_keys(const S* const* keys, long count, int dim, float* out) {
    for (long first = 0; first < count; first += NR) {
        float* panel = out + first * dim;
        long here = std::min<long>(NR, count - first);
        const S* const* at = keys + first;
#if defined(__AVX2__)
        // 8 x 8 at a time; with wider vectors a panel is four of these wide instead of two.
        if (here == NR) {
            for (long c = 0; c < NR; c += 8) {
                for (int d = 0; d < dim; d += 8) {
                    __m256 row[8], a[8], b[8];
                    for (int i = 0; i < 8; ++i) {
                        const S* p = at[c + i] + d;
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
            for (long c = 0; c < NR; ++c) panel[d * NR + c] = c < here ? get(at[c] + d) : 0.0f;
    }
}

template <int R>
inline void scores_tile(const float* q, const float* panel, int dim, float* out, long ldo) {
    vf acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vf{};
    tile<R>(q, dim, 1, panel, NR, dim, acc);
    for (int r = 0; r < R; ++r) {
        store(out + r * ldo, acc[r][0]);
        store(out + r * ldo + VL, acc[r][1]);
    }
}
// out [R, dim] += P [R, count] x values [count, dim]
template <int R, class S>
inline void mix(const float* p, long ldp, const S* values, int dim, long count, float* out) {
    int d = 0;
    for (; d + NR <= dim; d += NR) tile_onto<R, 2>(p, ldp, values + d, dim, count, out + d, dim);
    if (d < dim) tile_onto<R, 1>(p, ldp, values + d, dim, count, out + d, dim);
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
    const S* keys = static_cast<const S*>(at.keys) + kv_head * at.arena * dim;
    const S* values = static_cast<const S*>(at.values) + kv_head * at.arena * dim;
    float* memory = reinterpret_cast<float*>(scratch<1>((rows * (2 * dim + KEYS + 3) + 2 * KEYS * dim) * 4 + 1024));
    float* q = memory;  // [rows, dim], scaled
    float* out = q + rows * dim;  // [rows, dim]
    float* scores = out + rows * dim;  // [rows, KEYS]
    float* panel = scores + rows * KEYS;  // [KEYS / NR][dim][NR]
    float* wide = panel + KEYS * dim;  // values of a block, if they are not floats side by side
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
        const S* key[KEYS];
        for_runs(at, segment[2] + first, count, [&](long i, long number, long place) {
            for (long k = 0; k < number; ++k) key[i + k] = keys + (place + k) * dim;
        });
        transpose_keys(key, count, dim, panel);
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
        const float* mixed = wide;
        for_runs(at, segment[2] + first, count, [&](long i, long number, long place) {
            const S* from = values + place * dim;
            if constexpr (sizeof(S) == 4) {
                if (number == count) {
                    mixed = from;
                    return;
                }
            }
            for (long k = 0; k < number * dim; k += VL) store(wide + i * dim + k, load(from + k));
        });
        for (long r = 0; r < rows; r += MR)
            for_rows<MR>(rows - r, [&](auto number) {
                // Beyond the last of these rows' positions all weights are zero.
                long seen = std::min<long>(count, position + (r + number - 1) / group + 1 - first);
                if (seen > 0) mix<number>(scores + r * KEYS, KEYS, mixed, dim, seen, out + r * dim);
            });
    }
    for (long r = 0; r < rows; ++r) {
        T* to = static_cast<T*>(at.out) + (segment[0] + token + r / group) * at.ldo + (kv_head * group + r % group) * dim;
        for (int d = 0; d < dim; d += VL) store(to + d, load(out + r * dim + d) / total[r]);
    }
}

// Asks for a row of keys or values that is read later.
template <class S>
inline void fetch(const S* row, int dim) {
    for (int d = 0; d < dim; d += 64 / sizeof(S)) __builtin_prefetch(row + d, 0, 2);
}

// One token: scores are dot products with the keys as they lie, so that each key is read once for the whole group.
template <class T, class S, int G>
void attend_one(const Attention& at, const int64_t* segment, int kv_head) {
    int dim = at.dim;
    long context = segment[3], low = at.window ? std::max<long>(0, context - at.window) : 0;
    const S* keys = static_cast<const S*>(at.keys) + kv_head * at.arena * dim;
    const S* values = static_cast<const S*>(at.values) + kv_head * at.arena * dim;
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
        for_runs(at, segment[2] + first, count, [&](long i, long number, long place) {
            const S* value = values + place * dim;
            for (const S* key = keys + place * dim; number > 0; --number, ++i, key += dim, value += dim) {
                fetch(key + AHEAD * dim, dim);
                fetch(value, dim);
                vf acc[G];
                for (int g = 0; g < G; ++g) acc[g] = vf{};
                for (int d = 0; d < dim; d += VL) {
                    vf part = load(key + d);
                    for (int g = 0; g < G; ++g) acc[g] += part * load(q + g * dim + d);
                }
                for (int g = 0; g < G; ++g) scores[g * KEYS + i] = sum(acc[g]);
            }
        });
        for (int g = 0; g < G; ++g) {
            if (at.softcap > 0) cap(scores + g * KEYS, (count + VL - 1) / VL * VL, at.softcap);
            float past = soften(scores + g * KEYS, count, highest[g], total[g]);
            if (past != 1.0f)
                for (int d = 0; d < dim; d += VL) store(out + g * dim + d, load(out + g * dim + d) * past);
        }
        for_runs(at, segment[2] + first, count, [&](long i, long number, long place) {
            mix<G>(scores + i, KEYS, values + place * dim, dim, number, out);
        });
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

}  // namespace
