// The small operations between products and attention: norms, gates, rotary embedding with the write of KV.
#pragma once

#include "tiles.h"

namespace {

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
inline void scale_by(T* out, const T* x, const float* weight, float factor, long size, bool is_added = false) {
    for (long i = 0; i < size; i += VL) {
        vf value = load(x + i) * factor * load(weight + i);
        store(out + i, is_added ? load(out + i) + value : value);
    }
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
    int heads, kv_heads, dim;  // dim: a multiple of VL
};

template <class T, class S>
inline void rotate(S* to, T* from, const T* cos, const T* sin, const float* norm, float eps, int dim) {
    if (norm) scale_by(from, from, norm, inverse_rms(from, dim, eps), dim);
    int half = dim / 2, d = 0;
    for (; d + VL <= half; d += VL) {
        vf low = load(from + d), high = load(from + half + d);
        store(to + d, low * load(cos + d) - high * load(sin + d));
        store(to + half + d, high * load(cos + half + d) + low * load(sin + half + d));
    }
    // Halves that are no whole number of vectors, such as those of 80.
    for (; d < half; ++d) {
        float low = get(from + d), high = get(from + half + d);
        put(to + d, low * get(cos + d) - high * get(sin + d));
        put(to + half + d, high * get(cos + half + d) + low * get(sin + half + d));
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

}  // namespace
