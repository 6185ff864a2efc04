// The kernels with threads in place of blocks' lanes: how they are tested where there is no GPU. Slow.
#define SSVDO_ISA emulated
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "device.h"

namespace ssvdo {
namespace emulated {

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const unsigned turn = turn_;
        if (++here_ == count_) {
            here_ = 0, turn_++;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return turn_ != turn; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_;
    int count_, here_ = 0;
    unsigned turn_ = 0;
};

struct Threads {
    static constexpr int size = 2;
    int rank;
    Barrier *own, *layer;
    void sync() const { own->wait(); }
    void meet(unsigned*, int, unsigned) const { layer->wait(); }
};

template <class T>
T number_of(const ProductGroup<T>&);
template <class T>
T number_of(const FactorGroup<T>&);
template <class T>
T number_of(const InnerGroup<T>&);

struct Emulator {
    static size_t shared_limit() { return 48 * 1024; }

    // Teams first .. first + count - 1 of one layer, alive together.
    template <class Kernel>
    static void teams(const Kernel& kernel, int first, int count, int layer) {
        using T = decltype(number_of(kernel.g));
        Barrier all(count * Threads::size);
        std::vector<std::vector<T>> shared(count, std::vector<T>(size_t(kernel.shared()) + 8, T(NAN)));
        std::vector<std::thread> pool;
        std::vector<Barrier*> own;
        for (int i = 0; i < count; i++) own.push_back(new Barrier(Threads::size));
        for (int i = 0; i < count; i++)
            for (int rank = 0; rank < Threads::size; rank++)
                pool.emplace_back([&, i, rank] {
                    const auto address = reinterpret_cast<std::uintptr_t>(shared[i].data());
                    T* aligned = reinterpret_cast<T*>((address + 15) / 16 * 16);
                    kernel(Threads{rank, own[i], &all}, first + i, layer, aligned);
                });
        for (auto& thread : pool) thread.join();
        for (Barrier* barrier : own) delete barrier;
    }

    template <class Kernel>
    static void run(const Kernel& kernel, void*) {
        for (int layer = 0; layer < kernel.g.count; layer++)
            for (int i = 0; i < kernel.count(); i++) teams(kernel, i, 1, layer);
    }
    template <class Kernel>
    static void together(Kernel kernel, void*) {
        kernel.blocks = 3;
        for (int layer = 0; layer < kernel.g.count; layer++) teams(kernel, 0, kernel.blocks, layer);
    }
};

}  // namespace emulated
}  // namespace ssvdo

SSVDO_DEVICE(emulated, Emulator)
