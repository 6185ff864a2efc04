// What the bindings call of the device code: a group of layers of one shape, by raw pointers. T: float or double.
// Matrices are row-major; of several layers, `stacked` ones lie one after the other.
#pragma once

#include "../cpu/api.h"
#include "../core/number.h"

namespace ssvdo {

constexpr int max_layers = 48;  // of one launch: their pointers travel with the kernel's arguments, 4 KiB in all

template <class T>
struct OuterGroup {
    int c, l, r, large, ld, count;
    T tau, root_tau, scale;
    bool rotation;
    const T* outer[max_layers];      // c x l
    const void* reflector[max_layers];  // large x r, as basis of the type S in which factors are stored
    const void* basis[max_layers];   // U_l, large x l
    T* columns[max_layers];          // forward: F; backward: dF. large x l, rows `ld` apart
    T* d_outer[max_layers];          // c x l
    T* inverse[max_layers];          // R^-1, l x l
    T* left[max_layers];             // Y_bot^T L, r x l
    int* info;                       // stacked: 0, or 1 + the column of the pivot that is not positive and finite
    // stacked scratch
    T* gram;   // l x l
    T* right;  // r x l
    T* more;   // backward: l x l
    T* pull;   // backward: dQ, c x l
};

template <class T>
struct InnerGroup {
    int k, l, q, width, count;
    bool cayley;                     // else G = I - 2K
    const T* packed[max_layers];     // k(k-1)/2
    const T* shift[max_layers];      // dS, k
    const T* singular[max_layers];   // S, width
    T* mixer[max_layers];            // forward: M; backward: dM. (width + l + q) x width
    T* G[max_layers];                // k x k
    T* saved[max_layers];            // (I + K)^-1, k x k
    T* d_packed[max_layers];
    T* d_shift[max_layers];
    // stacked scratch
    T* work;         // forward: 2 k x k; backward: k x k
    T* norms;        // forward: max_blocks
    unsigned* gate;  // forward: 1, zero at first
    int* info;       // 0, or 1 where I + K has no inverse to `inverse_residual`
};

constexpr int max_blocks = 64;  // that share one layer's inverse

// A device's kernels, or the same code with threads on the host. `stream`: a cudaStream_t; null: the default stream.
template <class T>
struct OuterDevice {
    void (*forward)(const OuterGroup<T>&, void* stream);
    void (*backward)(const OuterGroup<T>&, void* stream);
};
template <class T>
struct InnerDevice {
    void (*forward)(const InnerGroup<T>&, void* stream);
    void (*backward)(const InnerGroup<T>&, void* stream);
};

// Throw std::runtime_error with CUDA's message where a launch fails.
namespace emulated {
template <class T, class S>
const OuterDevice<T>* outer_device();
template <class T>
const InnerDevice<T>* inner_device();
}  // namespace emulated
namespace device {
template <class T, class S>
const OuterDevice<T>* outer_device();
template <class T>
const InnerDevice<T>* inner_device();
int set_device(int index);  // returns the one that was current
const char* architectures();
}  // namespace device

}  // namespace ssvdo
