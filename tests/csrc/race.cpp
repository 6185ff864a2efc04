// The CUDA kernels, emulated, for the sanitizers: every kernel over sizes of one tile and of several, arrays of exactly what
// each needs.
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cuda/api.h"

using namespace ssvdo;

static std::mt19937 engine{3};
static std::vector<std::vector<float>> kept;

static float* draw(size_t count, double spread) {
    std::normal_distribution<double> normal(0, spread);
    kept.emplace_back(count);
    for (auto& x : kept.back()) x = float(normal(engine));
    return kept.back().data();
}

// rows x inner by inner x columns, either side by rows and by columns, with and without gaps.
template <class S>
static void product(int rows, int inner, int columns, int gap) {
    for (bool left : {true, false})
        for (bool right : {true, false}) {
            ProductGroup<float> g{};
            g.rows = rows, g.inner = inner, g.columns = columns, g.count = 2, g.ld = columns + gap;
            g.left_layout = {left, (left ? inner : rows) + gap};
            g.right_layout = {right, (right ? columns : inner) + gap};
            std::vector<std::vector<S>> stored;
            for (int i = 0; i < g.count; i++) {
                stored.emplace_back(size_t(left ? rows : inner) * g.left_layout.ld - gap);
                g.left[i] = stored.back().data();
                g.right[i] = draw(size_t(right ? inner : columns) * g.right_layout.ld - gap, 1);
                g.out[i] = draw(size_t(rows) * g.ld - gap, 1);
            }
            emulated::product<float, S>(g, nullptr);
            for (int i = 0; i < g.count; i++)
                if (g.out[i][rows * g.ld - gap - 1] != 0) std::printf("product\n");  // of zeros
        }
}

static void factor(int l) {
    std::vector<int> info(3, -1);
    const size_t square = size_t(l) * l;
    float* gram = draw(info.size() * square, 0.01);
    for (size_t i = 0; i < info.size(); i++)
        for (int j = 0; j < l; j++) gram[i * square + j * l + j] = i == 1 ? -1.f : 9.f;
    const FactorGroup<float> g{l, int(info.size()), gram, draw(info.size() * square, 1), draw(info.size() * square, 1),
                               info.data()};
    emulated::factor<float>(g, nullptr);
    if (info[0] || info[1] != 1 || info[2]) std::printf("pivot\n");
}

static void inner(int k, bool cayley) {
    InnerGroup<float> g{};
    g.k = k, g.l = 3, g.q = 1, g.width = k > 3 ? k : 3, g.count = 2, g.cayley = cayley;
    for (int i = 0; i < g.count; i++) {
        g.packed[i] = draw(size_t(k) * (k - 1) / 2, 0.3);
        g.shift[i] = draw(k, 0.1);
        float* singular = draw(g.width, 0);
        for (int j = 0; j < g.width; j++) singular[j] = 1;
        g.singular[i] = singular;
        g.mixer[i] = draw(size_t(g.width + g.l + g.q) * g.width, 1);
        g.G[i] = draw(size_t(k) * k, 0), g.saved[i] = draw(size_t(k) * k, 0);
        g.d_packed[i] = draw(size_t(k) * (k - 1) / 2, 0), g.d_shift[i] = draw(k, 0);
    }
    std::vector<int> info(g.count, 0);
    std::vector<unsigned> gate(g.count, 0);
    g.info = info.data(), g.gate = gate.data();
    g.work = draw(size_t(g.count) * 2 * k * k, 1), g.norms = draw(size_t(g.count) * max_blocks, 0);
    emulated::inner_device<float>()->forward(g, nullptr);
    emulated::inner_device<float>()->backward(g, nullptr);
    for (int one : info)
        if (one) std::printf("inverse\n");
}

int main() {
    for (int gap : {0, 3}) {
        product<float>(7, 5, 3, gap);
        product<float>(130, 20, 70, gap);
        product<Bfloat16>(5, 70, 66, gap);
        product<Float16>(129, 9, 5, gap);
    }
    for (int l : {1, 9, 40, 112}) factor(l);  // the last outside of shared memory
    for (bool cayley : {true, false})
        for (int k : {2, 20, 130}) inner(k, cayley);
    std::printf("ok\n");
}
