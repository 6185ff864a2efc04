// The host core over odd shapes, for the sanitizers: one thread and three must give the same bits, and rotations must be
// orthogonal. Exits with 1 and a line where they are not.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/api.h"

using namespace ssvdo;

template <class T>
struct Draw {
    std::mt19937 engine{7};
    std::vector<T> operator()(size_t count, double spread) {
        std::normal_distribution<double> normal(0, spread);
        std::vector<T> made(count);
        for (auto& x : made) x = T(normal(engine));
        return made;
    }
};

[[noreturn]] void fail(const char* what) {
    std::printf("%s\n", what);
    std::exit(1);
}

// Sizes of exactly what each array needs: AddressSanitizer sees one element too many.
template <class T>
std::vector<T> inner(int k, int l, int q, Rotation rotation, int tokens, int count, int threads) {
    Draw<T> draw;
    const int width = k > l ? k : l, rows = width + l + q;
    InnerShape shape{k, l, q, width, 3, rotation};
    std::vector<std::vector<T>> keep;
    std::vector<InnerLayer<T>> layers;
    auto take = [&](size_t n, double spread) { return keep.push_back(draw(n, spread)), keep.back().data(); };
    keep.reserve(10 * count);
    for (int i = 0; i < count; i++) {
        InnerLayer<T> one{};
        one.packed = take(size_t(k) * (k - 1) / 2, 0.05);
        one.shift = take(k, 1);
        T* singular = take(width, 0);
        for (int j = 0; j < width; j++) singular[j] = T(1 + j);
        one.singular = singular;
        one.G = take(size_t(k) * k, 0);
        one.saved = take(size_t(k) * k, 0);
        one.mixer = take(size_t(rows) * width, 0);
        one.left = take(size_t(tokens) * rows, 1);
        one.right = take(size_t(tokens) * width, 1);
        one.left_ld = rows;
        one.right_ld = width;
        one.tokens = tokens;
        one.d_packed = take(size_t(k) * (k - 1) / 2, 0);
        one.d_scale = take(k, 0);
        layers.push_back(one);
    }
    host<T>()->inner_forward(shape, layers.data(), count, threads);
    for (auto& layer : layers)
        for (int i = 0; rotation == Rotation::cayley && i < k; i++) {
            double length = 0;
            for (int j = 0; j < k; j++) length += double(layer.G[i * k + j]) * layer.G[i * k + j];
            if (std::fabs(length - 1) > 1e-4) fail("G is not orthogonal");
        }
    if (rotation == Rotation::cayley) host<T>()->inner_backward(shape, layers.data(), count, threads);
    for (auto& layer : layers) layer.tokens = -1;
    host<T>()->inner_backward(shape, layers.data(), count, threads);
    std::vector<T> all;
    for (auto& array : keep) all.insert(all.end(), array.begin(), array.end());
    return all;
}

template <class T>
void run() {
    const int inners[][4] = {{1, 0, 0, 0}, {5, 3, 1, 4}, {70, 75, 2, 9}, {150, 8, 0, 20}, {200, 16, 0, 150}};
    for (auto& s : inners)
        for (Rotation rotation : {Rotation::cayley, Rotation::neumann, Rotation::first_order})
            for (int count : {1, 4})
                if (inner<T>(s[0], s[1], s[2], rotation, s[3], count, 1) !=
                    inner<T>(s[0], s[1], s[2], rotation, s[3], count, 3))
                    fail("inner: threads change the result");
}

int main() {
    run<float>();
    run<double>();
    std::printf("%s: ok\n", host_name());
}
