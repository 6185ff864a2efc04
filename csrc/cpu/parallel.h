// Tasks on several threads: OpenMP, or std::thread where SSVDO_STD_THREADS asks for it (ThreadSanitizer knows those).
#pragma once

#include "../core/team.h"
#if defined(_OPENMP)
#include <omp.h>
#elif defined(SSVDO_STD_THREADS)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace ssvdo {
namespace SSVDO_ISA {

#if !defined(_OPENMP) && defined(SSVDO_STD_THREADS)
inline bool& inside() {
    static thread_local bool flag = false;
    return flag;
}
#endif

// Whether work may be spread: not from inside of a parallel_for.
inline bool may_spread(int threads) {
#if defined(_OPENMP)
    return threads > 1 && !omp_in_parallel();
#elif defined(SSVDO_STD_THREADS)
    return threads > 1 && !inside();
#else
    return (void)threads, false;
#endif
}

// work(0) ... work(count - 1), each once, in any order.
template <class Work>
inline void parallel_for(int count, int threads, Work work) {
    if (count < 2 || !may_spread(threads)) {
        for (int i = 0; i < count; i++) work(i);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < count; i++) work(i);
#elif defined(SSVDO_STD_THREADS)
    std::atomic<int> next{0};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++)
        pool.emplace_back([&] {
            inside() = true;
            for (int i = next++; i < count; i = next++) work(i);
        });
    for (auto& thread : pool) thread.join();
#endif
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
