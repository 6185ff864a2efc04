// The kernels with threads in place of blocks' lanes: how they are tested where there is no GPU. Slow.
#define SSVDO_ISA emulated
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
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
    Threads again() const { return *this; }
    void meet(unsigned*, int, unsigned) const { layer->wait(); }
};

struct Emulator {
    // Teams first .. first + count - 1 of one layer, alive together.
    template <class Kernel>
    static void teams(const Kernel& kernel, int first, int count, int layer) {
        using Line = std::aligned_storage<64, 64>::type;
        Barrier all(count * Threads::size);
        std::vector<std::vector<Line>> shared(count, std::vector<Line>(kernel.shared() / sizeof(Line) + 1));
        for (auto& one : shared) std::memset(one.data(), 0xff, one.size() * sizeof(Line));  // not a number, in every type
        std::vector<std::thread> pool;
        std::vector<Barrier*> own;
        for (int i = 0; i < count; i++) own.push_back(new Barrier(Threads::size));
        for (int i = 0; i < count; i++)
            for (int rank = 0; rank < Threads::size; rank++)
                pool.emplace_back([&, i, rank] {
                    kernel(Threads{rank, own[i], &all}, first + i, layer, reinterpret_cast<unsigned char*>(shared[i].data()));
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
        kernel.blocks = std::min(3, kernel.most());
        for (int layer = 0; layer < kernel.g.count; layer++) teams(kernel, 0, kernel.blocks, layer);
    }
};

}  // namespace emulated
}  // namespace ssvdo

SSVDO_DEVICE(emulated, Emulator)
