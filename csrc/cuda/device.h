// The order of the launches, for whatever Launch runs them: CUDA (device.cu) or threads on the host (emulate.cpp).
//
//     Launch::run(kernel, stream)        kernel(team, 0 .. count() - 1, layer, shared) for each layer, in any order
//     Launch::together(kernel, stream)   the same with all of a layer's teams alive at once, so that they may meet;
//                                        fills in how many share a layer
#pragma once

#include "inner.h"
#include "outer.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class Launch, class T, class S>
void launch_product(const ProductGroup<T>& g, void* stream) {
    const bool left = g.left_layout.by_rows, right = g.right_layout.by_rows;
    if (left && right) Launch::run(ProductKernel<T, S, true, true>{g}, stream);
    if (left && !right) Launch::run(ProductKernel<T, S, true, false>{g}, stream);
    if (!left && right) Launch::run(ProductKernel<T, S, false, true>{g}, stream);
    if (!left && !right) Launch::run(ProductKernel<T, S, false, false>{g}, stream);
}

template <class Launch, class T>
void launch_factor(const FactorGroup<T>& g, void* stream) {
    FactorKernel<T> kernel{g, true};
    kernel.in_shared = size_t(kernel.shared()) * sizeof(T) <= Launch::shared_limit();
    Launch::run(kernel, stream);
}

template <class Launch, class T>
struct InnerSteps {
    static void forward(const InnerGroup<T>& g, void* stream) {
        if (g.cayley)
            Launch::together(InvertKernel<T>{{g}, 1}, stream);
        else
            Launch::run(FirstOrderKernel<T>{{g}}, stream);
    }
    static void backward(const InnerGroup<T>& g, void* stream) {
        Launch::run(HalfwayKernel<T>{{g}}, stream);
        if (g.k > 1) Launch::run(PackKernel<T>{{g}}, stream);
    }
    static const InnerDevice<T>* table() {
        static const InnerDevice<T> found{forward, backward};
        return &found;
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo

// What api.h declares, by one Launch.
#define SSVDO_DEVICE(where, Launch) \
    namespace ssvdo { \
    namespace where { \
    template <class T, class S> \
    void product(const ProductGroup<T>& g, void* stream) { launch_product<Launch, T, S>(g, stream); } \
    template <class T> \
    void factor(const FactorGroup<T>& g, void* stream) { launch_factor<Launch>(g, stream); } \
    template <class T> \
    const InnerDevice<T>* inner_device() { return InnerSteps<Launch, T>::table(); } \
    template void product<float, float>(const ProductGroup<float>&, void*); \
    template void product<float, Bfloat16>(const ProductGroup<float>&, void*); \
    template void product<float, Float16>(const ProductGroup<float>&, void*); \
    template void product<double, double>(const ProductGroup<double>&, void*); \
    template void factor(const FactorGroup<float>&, void*); \
    template void factor(const FactorGroup<double>&, void*); \
    template const InnerDevice<float>* inner_device(); \
    template const InnerDevice<double>* inner_device(); \
    } \
    }
