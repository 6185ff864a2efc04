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
struct OuterSteps {
    static void forward(const OuterGroup<T>& g, void* stream) {
        Launch::run(GramKernel<T, S>{{g}}, stream);
        FactorKernel<T> factor{{g}, true};
        factor.in_shared = size_t(factor.shared()) * sizeof(T) <= Launch::shared_limit();
        Launch::run(factor, stream);
        Launch::run(TurnKernel<T>{{g}}, stream);
        Launch::run(ColumnsKernel<T, S>{{g}}, stream);
    }
    static void backward(const OuterGroup<T>& g, void* stream) {
        Launch::run(ProjectKernel<T, S>{{g}}, stream);
        Launch::run(PullKernel<T, S>{{g}}, stream);
        Launch::run(AdjointKernel<T>{{g}}, stream);
        Launch::run(GradientKernel<T>{{g}}, stream);
    }
    static const OuterDevice<T>* table() {
        static const OuterDevice<T> found{forward, backward};
        return &found;
    }
};

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

// The tables of one Launch.
#define SSVDO_DEVICE(where, Launch) \
    namespace ssvdo { \
    namespace where { \
    template <class T, class S> \
    const OuterDevice<T>* outer_device() { return OuterSteps<Launch, T, S>::table(); } \
    template <class T> \
    const InnerDevice<T>* inner_device() { return InnerSteps<Launch, T>::table(); } \
    template const OuterDevice<float>* outer_device<float, float>(); \
    template const OuterDevice<float>* outer_device<float, Bfloat16>(); \
    template const OuterDevice<float>* outer_device<float, Float16>(); \
    template const OuterDevice<double>* outer_device<double, double>(); \
    template const InnerDevice<float>* inner_device(); \
    template const InnerDevice<double>* inner_device(); \
    } \
    }
