// What the bindings call: batches of layers of one shape, by raw pointers. No PyTorch, no Python.
#pragma once

#include <cstddef>

namespace ssvdo {

enum class Rotation { cayley, neumann, first_order };

struct InnerShape {
    int k, l, q, width, terms;
    Rotation rotation;
};

template <class T>
struct InnerLayer {
    const T* packed;    // k(k-1)/2
    const T* shift;     // dS, k
    const T* singular;  // S, width
    T* G;               // k x k
    T* saved;           // k x k
    T* mixer;           // (width + l + q) x width; backward: dM, unless rows are given
    const T* left;      // backward from rows: tokens x (width + l + q), rows left_ld apart
    const T* right;     // tokens x (at least k), rows right_ld apart
    ptrdiff_t left_ld, right_ld;
    int tokens;         // how many rows stand for the mixer's gradient; < 0: none, it is dense
    T* d_packed;
    T* d_scale;
};

// out = a b; strides of rows and columns in elements. out has adjacent columns, or adjacent rows.
struct ProductShape {
    int rows, inner, columns;
    ptrdiff_t a_row, a_column, b_row, b_column, out_row, out_column;
};

template <class T>
struct ProductLayer {
    const T* a;  // rows x inner
    const T* b;  // inner x columns
    T* out;      // rows x columns
};

template <class T>
struct Host {
    void (*product)(const ProductShape&, ProductLayer<T>*, int count, int threads);
    void (*inner_forward)(const InnerShape&, InnerLayer<T>*, int count, int threads);
    void (*inner_backward)(const InnerShape&, InnerLayer<T>*, int count, int threads);
};

// The best build that this processor runs, and its name; `name`: that one, or null where it is missing or cannot run.
template <class T>
const Host<T>* host(const char* name = nullptr);
const char* host_name();

}  // namespace ssvdo
