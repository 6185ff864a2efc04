// What the bindings call of the device code: a group of layers of one shape, by raw pointers. T: float or double.
// Matrices are row-major; of several layers, `stacked` ones lie one after the other.
#pragma once

#include "../cpu/api.h"
#include "../core/number.h"

namespace ssvdo {

constexpr int max_layers = 36;   // of one launch: their pointers travel with the kernel's arguments, 4 KiB in all
constexpr int max_blocks = 256;  // that share one layer's work

// A frozen matrix's numbers: those of the work, or halves beside float32 work.
enum class Stored { work, bfloat16, float16 };

// The outer part of ssvdo_kernels/ops/outer.py and complement.py.
template <class T>
struct OuterGroup {
    int large, c, d, l, width, null, passes, count;  // null: columns of N
    Stored tall_type, basis_type, rest_type;         // of A; V; U_l and N
    bool by_rows;                                    // A(i, j) at [i * tall_ld + j], else at [j * tall_ld + i]
    unsigned tall_ld, basis_ld, F_ld, dF_ld;         // no matrix has 2^32 elements
    T scale, tau, least;              // of L; of what the adapted components have of S_0
    const void* tall[max_layers];     // A, large x d
    const void* basis[max_layers];    // V, d x d
    const void* turned[max_layers];   // U_l, large x l; null in all: outer="additive"
    const void* rest[max_layers];     // N, large x null
    const T* singular[max_layers];    // S, d
    const T* outer[max_layers];       // L / scale, c x l
    T* F[max_layers];                 // large x l
    T* X[max_layers];                 // R^-T, l x l; NaN where info is not 0
    const T* dF[max_layers];          // backward: large x l
    T* d_outer[max_layers];           // backward: c x l
    // stacked
    T* work;         // scratch, outer_work() elements a layer
    ptrdiff_t room;  // of these, for sums that several teams make together
    unsigned* gate;  // 2, zero at first
    int* info;       // forward: 0, or 1 + the column of the pivot that is not positive and finite
};

// Elements of scratch a layer, but for `room`.
template <class T>
SSVDO_HD ptrdiff_t outer_work(const OuterGroup<T>& g) {
    const ptrdiff_t square = ptrdiff_t(g.l) * g.l;
    return (ptrdiff_t(g.large) + 2 * g.d + g.null) * g.l + 3 * square;
}

template <class T>
struct InnerGroup {
    int k, l, q, width, count;
    bool cayley;                     // else G = I - 2K
    const T* packed[max_layers];     // k(k-1)/2
    const T* shift[max_layers];      // dS, k
    const T* singular[max_layers];   // S, width
    T* mixer[max_layers];            // forward: M; backward: dM. (width + l + q) x width
    T* saved[max_layers];            // (I + K)^-1, or K for G = I - 2K; k x k
    T* d_packed[max_layers];
    T* d_shift[max_layers];
    // stacked
    T* work;         // forward: 2 k x k; backward: k x k
    T* norms;        // forward: max_blocks
    unsigned* gate;  // forward: 1, zero at first
    int* info;       // 0, or 1 where I + K has no inverse to `inverse_residual`
};

// A device's kernels, or the same code with threads on the host. `stream`: a cudaStream_t; null: the default stream.
template <class T>
struct Device {
    void (*outer_forward)(const OuterGroup<T>&, void* stream);
    void (*outer_backward)(const OuterGroup<T>&, void* stream);
    void (*inner_forward)(const InnerGroup<T>&, void* stream);
    void (*inner_backward)(const InnerGroup<T>&, void* stream);
};

// Throw std::runtime_error with CUDA's message where a launch fails.
namespace emulated {
template <class T>
const Device<T>* table();
}  // namespace emulated
namespace device {
template <class T>
const Device<T>* table();
int set_device(int index);  // returns the one that was current
unsigned long long capture(void* stream);  // of a graph: unique in a process; 0: none
const char* architectures();
}  // namespace device

}  // namespace ssvdo
