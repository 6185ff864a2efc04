// The launches, for whatever Launch makes them: CUDA (device.cu) or threads on the host (emulate.cpp).
//
//     Launch::run(kernel, stream)        kernel(team, 0 .. count() - 1, layer, shared) for each layer, in any order
//     Launch::together(kernel, stream)   the same with all of a layer's teams alive at once, so that they may meet;
//                                        fills in how many share a layer, at most most()
#pragma once

#include "inner.h"
#include "outer.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class Launch, class T>
struct Launches {
    static void outer_forward(const OuterGroup<T>& g, void* stream) {
        Launch::together(OuterKernel<T, OuterForward>{g, 0, 1}, stream);
        Launch::run(FactorKernel<T>{g}, stream);
        Launch::together(OuterKernel<T, OuterForward>{g, 1, 1}, stream);
    }
    static void outer_backward(const OuterGroup<T>& g, void* stream) {
        Launch::together(OuterKernel<T, OuterBackward>{g, 0, 1}, stream);
    }
    static void inner_forward(const InnerGroup<T>& g, void* stream) {
        if (g.cayley)
            Launch::together(InvertKernel<T>{{g}, 1}, stream);
        else
            Launch::run(FirstOrderKernel<T>{{g}}, stream);
    }
    static void inner_backward(const InnerGroup<T>& g, void* stream) {
        Launch::run(HalfwayKernel<T>{{g}}, stream);
        if (g.k > 1) Launch::run(PackKernel<T>{{g}}, stream);
    }
    static const Device<T>* table() {
        static const Device<T> found{outer_forward, outer_backward, inner_forward, inner_backward};
        return &found;
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo

// What api.h declares, by one Launch.
#define SSVDO_DEVICE(where, Launch) \
    namespace ssvdo { \
    namespace where { \
    template <class T> \
    const Device<T>* table() { return Launches<Launch, T>::table(); } \
    template const Device<float>* table(); \
    template const Device<double>* table(); \
    } \
    }
