// CPU kernels of the transformers engine: matrix product with weights laid out once, attention over packed steps, and
// the small operations between them; draws of tokens. Compiled where they run (build.py), for the instructions of that machine.
//
// Conventions: T is the type of activations in memory, S that of keys and values (float or bf16); arithmetic is in
// float, or in int32 for 8-bit weights. Rows are tokens. Every function is one parallel region of the OpenMP runtime
// that torch uses. Nothing is allocated per call except scratch of the threads, which they keep.

#include "attention.h"
#include "between.h"
#include "product.h"
#include "race.h"

extern "C" {

int bs_panel_columns() { return NR; }
int bs_vector_floats() { return VL; }
// Numbers of a column that lie side by side in packed weights of 4, 2 or 1 bytes: 2 where they are multiplied in pairs.
int bs_run(int bytes) { return bytes == 1 || (bytes == 2 && IN_PAIRS<bf16>) ? 2 : 1; }

// weight [rows, depth] of 4, 2 or 1 bytes into panels of NR rows, `panel_step` panels apart.
void bs_pack(const void* weight, long rows, long depth, void* packed, long panel_step, int bytes) {
    if (bytes == 4) pack_as<float>(weight, rows, depth, packed, panel_step);
    if (bytes == 2) pack_as<bf16>(weight, rows, depth, packed, panel_step);
    if (bytes == 1) pack_as<int8_t>(weight, rows, depth, packed, panel_step);
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

// out [rows, size] = x / rms(x) x weight, or is_added: that added to what is in out
void bs_rms_norm(const void* x, const float* weight, float eps, void* out, long rows, long size, int is_added, int is_half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        if (is_half) {
            const bf16* from = static_cast<const bf16*>(x) + row * size;
            scale_by(static_cast<bf16*>(out) + row * size, from, weight, inverse_rms(from, size, eps), size, is_added);
        } else {
            const float* from = static_cast<const float*>(x) + row * size;
            scale_by(static_cast<float*>(out) + row * size, from, weight, inverse_rms(from, size, eps), size, is_added);
        }
    }
}

// out [rows, size] = activation(both[:, :size]) x both[:, size:], of the epilogue
void bs_gate(const void* both, void* out, long rows, long size, int epilogue, int is_half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        for (long i = 0; i < size; i += VL) {
            if (is_half) {
                const bf16* gate = static_cast<const bf16*>(both) + row * 2 * size + i;
                store(static_cast<bf16*>(out) + row * size + i, activate(epilogue, load(gate)) * load(gate + size));
            } else {
                const float* gate = static_cast<const float*>(both) + row * 2 * size + i;
                store(static_cast<float*>(out) + row * size + i, activate(epilogue, load(gate)) * load(gate + size));
            }
        }
    }
}

// is_double: scores are double, else float.
void bs_race(const Race* at, int is_double, int threads) {
    if (is_double) {
        race<double>(*at, threads);
    } else {
        race<float>(*at, threads);
    }
}

}  // extern "C"
