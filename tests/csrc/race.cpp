// The CUDA kernels, emulated, for the sanitizers: every kernel over sizes of one tile and of several, arrays of exactly what
// each needs.
#include <cmath>
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

// Two layers, W0 by rows and by columns, gaps between lines, a null space of one column where there is room.
template <class S>
static void outer(Stored type, int large, int c, int d, int l, bool by_rows, bool additive, int gap) {
    OuterGroup<float> g{};
    g.large = large, g.c = c, g.d = d, g.l = l, g.width = l + (l < d), g.null = l < d, g.count = 2, g.by_rows = by_rows;
    g.passes = type == Stored::work ? 1 : 2, g.tall_type = g.basis_type = g.rest_type = type;
    g.tall_ld = (by_rows ? d : large) + gap, g.basis_ld = d + gap, g.F_ld = g.dF_ld = l + gap;
    g.scale = 0.5f, g.tau = 0.1f, g.least = 1e-3f, g.room = 4 * d * l;
    std::vector<std::vector<S>> stored;
    const auto zeros = [&](size_t count) {
        stored.emplace_back(count);
        return stored.back().data();
    };
    const size_t square = size_t(l) * l;
    for (int i = 0; i < g.count; i++) {
        g.tall[i] = zeros(size_t(by_rows ? large : d) * g.tall_ld - gap);
        g.basis[i] = zeros(size_t(d) * g.basis_ld - gap);
        g.turned[i] = additive ? nullptr : zeros(size_t(large) * l);
        g.rest[i] = g.null ? zeros(size_t(large) * g.null) : nullptr;
        float* singular = draw(d, 0);
        for (int j = 0; j < d; j++) singular[j] = 1;
        g.singular[i] = singular, g.outer[i] = draw(size_t(c) * l, i ? NAN : 0.01);
        g.F[i] = draw(size_t(large) * g.F_ld - gap, 0), g.X[i] = draw(square, 0);
        g.dF[i] = draw(size_t(large) * g.dF_ld - gap, 1), g.d_outer[i] = draw(size_t(c) * l, 0);
    }
    std::vector<int> info(g.count, -1);
    std::vector<unsigned> gate(2 * g.count, 0);
    g.info = info.data(), g.gate = gate.data();
    g.work = draw(g.count * (outer_work(g) + g.room), 0);
    emulated::table<float>()->outer_forward(g, nullptr);
    gate.assign(gate.size(), 0);
    emulated::table<float>()->outer_backward(g, nullptr);
    if (info[0] || info[1] != 1) std::printf("pivot\n");
    if (std::fabs(g.X[0][square - 1] - 1 / std::sqrt(0.1f)) > 0.1f) std::printf("X\n");  // W0 = 0
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
        g.saved[i] = draw(size_t(k) * k, 0);
        g.d_packed[i] = draw(size_t(k) * (k - 1) / 2, 0), g.d_shift[i] = draw(k, 0);
    }
    std::vector<int> info(g.count, 0);
    std::vector<unsigned> gate(g.count, 0);
    g.info = info.data(), g.gate = gate.data();
    g.work = draw(size_t(g.count) * 2 * k * k, 1), g.norms = draw(size_t(g.count) * max_blocks, 0);
    emulated::table<float>()->inner_forward(g, nullptr);
    emulated::table<float>()->inner_backward(g, nullptr);
    for (int one : info)
        if (one) std::printf("inverse\n");
}

int main() {
    for (int gap : {0, 3}) outer<float>(Stored::work, 9, 5, 4, 3, true, false, gap);
    outer<Bfloat16>(Stored::bfloat16, 140, 7, 20, 20, false, true, 3);
    outer<Float16>(Stored::float16, 800, 30, 5, 2, true, false, 0);  // a depth that three teams share
    outer<float>(Stored::work, 75, 70, 70, 66, false, false, 3);     // two blocks of the factor
    for (bool cayley : {true, false})
        for (int k : {2, 20, 70}) inner(k, cayley);
    inner(200, true);  // probes
    std::printf("ok\n");
}
