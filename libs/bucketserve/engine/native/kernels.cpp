// CPU kernels of the transformers engine: matrix product with weights laid out once, attention over packed steps, and
// the small operations between them. Compiled where they run (build.py), for the instructions of that machine.
//
// Conventions: T is the type of activations in memory, S that of keys and values (float or bf16); arithmetic is in
// float, or in int32 for 8-bit weights. Rows are tokens. Every function is one parallel region of the OpenMP runtime
// that torch uses. Nothing is allocated per call except scratch of the threads, which they keep.

#include "attention.h"
#include "between.h"
#include "product.h"

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
