// Products of tiles by one worker that plays all lanes, against sums in float64.
//
// With u = 2^-24, |error| <= (2 products u + steps u + pieces) |A| |B|: a step's instructions (products of them) cut off what
// lies below 2 u of a sum, steps are added with rounding, and of a pair of tf32 numbers what lies below 2^-22 of a float32
// number is left out, on either side, and the product of the two lower ones; of two bfloat16 numbers what lies below 2^-16.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define SSVDO_ISA tiles
#include "../../csrc/core/eliminate.h"

using namespace ssvdo;
using namespace ssvdo::tiles;

struct Alone {
    static constexpr int size = 1;
    int rank = 0;
    void sync() const {}
    Alone again() const { return *this; }
};

static std::mt19937 engine{5};

static float as(float x, float) { return x; }
static double as(float x, double) { return x; }
static Bfloat16 as(float x, Bfloat16) { return {std::uint16_t(brain(x) >> 16)}; }
static Float16 as(float x, Float16) {  // of a number in its range: the nearest below
    const std::uint32_t bits = to_bits(x);
    return {std::uint16_t((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)))};
}

template <class Kind, int M, class S, class T>
static void check(int rows, int depth, int columns, bool left, bool right, int gap, double pieces, bool coarse = false) {
    std::normal_distribution<float> normal;
    const int lld = (left ? depth : rows) + gap, rld = (right ? depth : columns) + gap;
    std::vector<S> a(size_t(left ? rows : depth) * lld);
    std::vector<T> b(size_t(right ? columns : depth) * rld);
    for (auto& x : a) x = as(std::copysign(std::fabs(normal(engine)) + 0.01f, normal(engine)), S());
    for (auto& x : b) x = T(normal(engine)) * T(1.0 + 1e-7);
    const Matrix<S> A(a.data(), rows, depth, lld, left);
    const Matrix<T> B(b.data(), columns, depth, rld, right);
    static Sums<T, M, Alone> sums;
    std::vector<unsigned char> memory(Stages<Kind, M>::bytes + 64, 0xff);
    void* aligned = memory.data() + (64 - reinterpret_cast<size_t>(memory.data()) % 64);
    const double unit = sizeof(T) == 4 ? std::ldexp(1, -24) : std::ldexp(1, -53);
    const int steps = (depth + 4 * Kind::right * Kind::numbers - 1) / (4 * Kind::right * Kind::numbers);
    for (int m0 = 0; m0 < rows; m0 += M)
        for (int n0 = 0; n0 < columns; n0 += 64) {
            sums.clear();
            sums.template add<Kind>(Alone(), aligned, m0, n0, 0, depth, A, B, coarse);
            sums.store(Alone(), [&](int m, int n, T sum) {
                m += m0, n += n0;
                double exact = 0, size = 0;
                for (int k = 0; k < depth && m < rows && n < columns; k++) {
                    const double x = value(a[left ? m * lld + k : k * lld + m]), y = b[right ? n * rld + k : k * rld + n];
                    exact += x * y, size += std::fabs(x * y);
                }
                const double most = sizeof(T) == 8 ? 2 * depth * unit : (2 * Kind::products + steps) * unit + pieces;
                if (!(std::fabs(sum - exact) <= 1.001 * most * size)) {
                    std::printf("(%d, %d) of %d x %d x %d: %.9g, not %.9g\n", m, n, rows, depth, columns, double(sum), exact);
                    std::exit(1);
                }
            });
        }
}

template <class S>
static void every_half() {  // is a number of its kind of piece, zeros and subnormal ones too: exact, times 1
    std::vector<S> all(1 << 16);
    for (int i = 0; i < 1 << 16; i++) all[i].bits = std::uint16_t(i);
    using Kind = std::conditional_t<std::is_same_v<S, Bfloat16>, Brain, Tensor32<true>>;
    for (const S& x : all) {
        typename Kind::Word word[Kind::panels] = {};
        const S pair[2] = {x, x};
        Kind::split(pair, word);
        float back;
        if constexpr (std::is_same_v<S, Bfloat16>)
            back = from_bits(word[0] << 16);
        else
            back = Kind::piece(word[0], 0);
        const float want = value(x);
        if (back != want && want == want) std::printf("half %x\n", unsigned(x.bits)), std::exit(1);
    }
}

int main() {
    const double two = std::ldexp(1, -22), three = 3 * std::ldexp(1, -22);
    const int sizes[][3] = {{1, 1, 1}, {5, 3, 7}, {64, 32, 64}, {70, 300, 33}, {129, 33, 65}, {200, 17, 4}};
    for (auto& s : sizes)
        for (int way = 0; way < 4; way++)
            for (int gap : {0, 3}) {
                const bool left = way & 1, right = way & 2;
                check<Brain, 128, Bfloat16, float>(s[0], s[1], s[2], left, right, gap, 0);
                check<Brain, 128, Bfloat16, float>(s[0], s[1], s[2], left, right, gap, std::ldexp(1, -16), true);
                check<Tensor32<true>, 128, Float16, float>(s[0], s[1], s[2], left, right, gap, two);
                check<Tensor32<false>, 128, float, float>(s[0], s[1], s[2], left, right, gap, three);
                check<Tensor32<false>, 64, float, float>(s[0], s[1], s[2], left, right, gap, three);
                check<Twice, 128, double, double>(s[0], s[1], s[2], left, right, gap, 0);
            }
    every_half<Bfloat16>();
    every_half<Float16>();
    std::printf("ok\n");
}
