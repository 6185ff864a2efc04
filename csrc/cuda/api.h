// What the bindings call of the device code: a group of layers of one shape, by raw pointers. T: float or double.
// Matrices are row-major; of several layers, `stacked` ones lie one after the other.
#pragma once

#include "../cpu/api.h"
#include "../core/number.h"

namespace ssvdo {

constexpr int max_layers = 48;  // of one launch: their pointers travel with the kernel's arguments, 4 KiB in all

// How a matrix lies: element (i, j) at [i * ld + j] by rows, else at [j * ld + i].
struct Layout {
    bool by_rows;
    ptrdiff_t ld;
};

template <class T>
struct ProductGroup {
    int rows, inner, columns, count;
    Layout left_layout, right_layout;
    ptrdiff_t ld;                    // from row to row of `out`
    const void* left[max_layers];    // rows x inner, of the type S in which it is stored
    const T* right[max_layers];      // inner x columns
    T* out[max_layers];              // rows x columns
};

template <class T>
struct FactorGroup {  // all stacked
    int l, count;
    const T* gram;  // l x l; the lower triangle is read
    T* work;        // scratch, l x l
    T* inverse;     // R^-1, l x l; NaN where info is not 0
    int* info;      // 0, or 1 + the column of the pivot that is not positive and finite
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
    T* saved[max_layers];            // (I + K)^-1, or K for G = I - 2K; k x k
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
struct InnerDevice {
    void (*forward)(const InnerGroup<T>&, void* stream);
    void (*backward)(const InnerGroup<T>&, void* stream);
};

// Throw std::runtime_error with CUDA's message where a launch fails.
namespace emulated {
template <class T, class S>
void product(const ProductGroup<T>&, void* stream);
template <class T>
void factor(const FactorGroup<T>&, void* stream);
template <class T>
const InnerDevice<T>* inner_device();
}  // namespace emulated
namespace device {
template <class T, class S>
void product(const ProductGroup<T>&, void* stream);
template <class T>
void factor(const FactorGroup<T>&, void* stream);
template <class T>
const InnerDevice<T>* inner_device();
int set_device(int index);  // returns the one that was current
const char* architectures();
}  // namespace device

}  // namespace ssvdo
