// The CUDA kernels, emulated, for ThreadSanitizer: every kernel over sizes of one tile and of several.
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

static void outer(int d, int c, int l) {
    OuterGroup<float> g{};
    g.c = c, g.l = l, g.r = d, g.large = c + d, g.ld = l, g.count = 2, g.rotation = true;
    g.tau = 0.01f, g.root_tau = 0.1f, g.scale = 1;
    for (int i = 0; i < g.count; i++) {
        g.outer[i] = draw(size_t(c) * l, 0.1);
        g.reflector[i] = draw(size_t(c + d) * d, 0.1);
        g.basis[i] = draw(size_t(c + d) * l, 0.1);
        g.columns[i] = draw(size_t(c + d) * l, 1);
        g.d_outer[i] = draw(size_t(c) * l, 1);
        g.inverse[i] = draw(size_t(l) * l, 1);
        g.left[i] = draw(size_t(d) * l, 1);
    }
    std::vector<int> info(g.count, -1);
    g.info = info.data();
    g.gram = draw(size_t(g.count) * l * l, 1), g.more = draw(size_t(g.count) * l * l, 1);
    g.right = draw(size_t(g.count) * d * l, 1), g.pull = draw(size_t(g.count) * c * l, 1);
    emulated::outer_device<float, float>()->forward(g, nullptr);
    emulated::outer_device<float, float>()->backward(g, nullptr);
    for (int one : info)
        if (one) std::printf("pivot\n");
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
    outer(7, 5, 3);
    outer(80, 150, 70);
    for (bool cayley : {true, false})
        for (int k : {2, 20, 130}) inner(k, cayley);
    std::printf("ok\n");
}
