// What host and device code share: the function qualifier and the namespace. `Team`, in the kernels: the workers of one
// algorithm, worker `rank` of `size`, and a barrier sync(); a thread block on a GPU, threads in emulation.
#pragma once

#include <cstddef>

#if defined(__CUDACC__)
#define SSVDO_HD __host__ __device__ __forceinline__
#define SSVDO_UNROLL _Pragma("unroll")
#define SSVDO_ROLLED _Pragma("unroll 1")  // where registers are scarce
#else
#define SSVDO_HD inline
#define SSVDO_UNROLL
#define SSVDO_ROLLED
#endif

#ifndef SSVDO_ISA
#define SSVDO_ISA plain  // one namespace an instruction set, so that the linker never mixes them
#endif

namespace ssvdo {
namespace SSVDO_ISA {

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
