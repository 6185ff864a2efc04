// What host and device code share: the function qualifier, the namespace, and the team that runs an algorithm.
#pragma once

#include <cstddef>

#if defined(__CUDACC__)
#define SSVDO_HD __host__ __device__ __forceinline__
#define SSVDO_UNROLL _Pragma("unroll")
#define SSVDO_UNROLL_BY(n) SSVDO_TEXT_PRAGMA(unroll n)
#define SSVDO_TEXT_PRAGMA(text) _Pragma(#text)
#else
#define SSVDO_UNROLL_BY(n)
#define SSVDO_HD inline
#define SSVDO_UNROLL
#endif

#ifndef SSVDO_ISA
#define SSVDO_ISA plain  // one namespace an instruction set, so that the linker never mixes them
#endif

namespace ssvdo {
namespace SSVDO_ISA {

// The workers of one algorithm: worker `rank` of `size`, and a barrier. Alone, on the host; a thread block, on a GPU.
struct Alone {
    static constexpr int rank = 0, size = 1;
    SSVDO_HD void sync() const {}
};

SSVDO_HD float root(float x) {
#if defined(__CUDA_ARCH__)
    return ::sqrtf(x);
#else
    return __builtin_sqrtf(x);
#endif
}
SSVDO_HD double root(double x) {
#if defined(__CUDA_ARCH__)
    return ::sqrt(x);
#else
    return __builtin_sqrt(x);
#endif
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
