// The kernels on NVIDIA GPUs, by the CUDA runtime alone.
#define SSVDO_ISA device
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"

#define SSVDO_TEXT_OF(...) #__VA_ARGS__
#define SSVDO_TEXT(...) SSVDO_TEXT_OF(__VA_ARGS__)

namespace ssvdo {
namespace device {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Block {  // a thread block
    static constexpr int size = 256;
    int rank;
    __device__ void sync() const { __syncthreads(); }
    // The same, unknown to the compiler: what follows from `rank` is not kept in registers over what lies between.
    __device__ Block again() const {
        int same = rank;
        asm volatile("" : "+r"(same));
        return {same};
    }
    // The blocks of one layer: returns when all have come `meeting` times. They must be on the device together.
    __device__ void meet(unsigned* gate, int blocks, unsigned meeting) const {
        __syncthreads();
        if (rank == 0) {
            __threadfence();
            atomicAdd(gate, 1u);
            while (*static_cast<volatile unsigned*>(gate) < meeting * unsigned(blocks)) __nanosleep(32);
            __threadfence();
        }
        __syncthreads();
    }
};

template <class Kernel>
__global__ void __launch_bounds__(256, Kernel::min_blocks) run_kernel(const __grid_constant__ Kernel kernel) {
    extern __shared__ __align__(16) unsigned char shared[];
    kernel(Block{int(threadIdx.x)}, int(blockIdx.x), int(blockIdx.y), shared);
}

struct Cuda {
    static int attribute(cudaDeviceAttr name) {
        int device = 0, value = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    }

    template <class Kernel>
    static auto entry(size_t bytes) {
        const auto function = run_kernel<Kernel>;
        if (bytes > 48 * 1024)
            check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
                  "cudaFuncSetAttribute");
        return function;
    }

    template <class Kernel>
    static void run(const Kernel& kernel, void* stream) {
        const size_t bytes = kernel.shared();
        entry<Kernel>(bytes)<<<dim3(kernel.count(), kernel.g.count), 256, bytes, cudaStream_t(stream)>>>(kernel);
        check(cudaGetLastError(), "launch");
    }

    template <class Kernel>
    static void together(Kernel kernel, void* stream) {
        const size_t bytes = kernel.shared();
        const auto function = entry<Kernel>(bytes);
        int resident = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, 256, bytes), "occupancy");
        resident *= attribute(cudaDevAttrMultiProcessorCount);
        kernel.blocks = std::max(1, std::min(resident / kernel.g.count, kernel.most()));
        if (kernel.blocks == 1) return run(kernel, stream);  // nobody waits: more layers than fit may take turns
        void* arguments[] = {&kernel};
        check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(function), dim3(kernel.blocks, kernel.g.count),
                                          dim3(256), arguments, bytes, cudaStream_t(stream)),
              "cooperative launch");
    }
};

int set_device(int index) {
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (before != index) check(cudaSetDevice(index), "cudaSetDevice");
    return before;
}

unsigned long long capture(void* stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(cudaStream_t(stream), &status, &id), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

const char* architectures() { return SSVDO_TEXT(SSVDO_ARCHITECTURES); }

}  // namespace device
}  // namespace ssvdo

SSVDO_DEVICE(device, Cuda)
