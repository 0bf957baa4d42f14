// Draws by the Gumbel-max trick: the token with the highest sum of scaled score and noise. drawing.py has the formulas.
#pragma once

#include <cmath>
#include <cstdint>

namespace {

struct Race {
    const void* scores;  // [rows, size] of T
    long ld;
    long rows, size;
    const double* tops;  // [rows]: the highest score
    const double* temperatures;
    const int64_t* starts;
    int64_t* out;  // [rows]
};

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

// SplitMix64's finaliser (Steele, Lea, Flood 2014).
inline uint64_t mixed(uint64_t value) {
    value += GOLDEN;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

inline double gumbel(uint64_t bits) {
    double uniform = std::fmin((double(bits >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53);
    return -std::log(-std::log(uniform));
}

template <class T>
void race(const Race& at, int threads) {
    const double LN2 = 0.6931471805599453;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < at.rows; ++row) {
        const T* scores = static_cast<const T*>(at.scores) + row * at.ld;
        double top = at.tops[row], temperature = at.temperatures[row], factor = 1 / temperature, best = -INFINITY;
        uint64_t start = uint64_t(at.starts[row]);
        long chosen = 0;
        for (long i = 0; i < at.size; ++i) {
            uint64_t bits = mixed(start + uint64_t(i) * GOLDEN);
            // Noise from a number with n leading ones is at most (n + 1) ln 2, since -log u >= 1 - u >= 2^-(n + 1).
            // That spares nearly all tokens the logarithms; the rest of the bound is for rounding.
            int ones = __builtin_clzll(~bits | 1);
            if ((double(scores[i]) - top) * factor + (ones + 1.01) * LN2 < best) continue;
            double value = (double(scores[i]) - top) / temperature + gumbel(bits);
            if (value > best) {
                best = value;
                chosen = i;
            }
        }
        at.out[row] = chosen;
    }
}

}  // namespace
