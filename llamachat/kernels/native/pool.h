// Threads that share out units of work. A job never waits for a thread that has not begun.

#pragma once
#include <chrono>
#include <cstdint>

#include "abi.h"

constexpr auto kSlice = std::chrono::milliseconds(30);  // of work between two chances to be interrupted

struct Crew;
struct Kernel;  // what one instruction set offers (kernel.h)

struct Pool {
    Pool(int n_threads, const Kernel* kernel);
    ~Pool();
    Pool(const Pool&) = delete;

    const Kernel* const kernel;
    const int n_threads;

    // Memory of at least n bytes, aligned to 64, the caller's until the next call of `scratch`.
    // Null if there is none.
    uint8_t* scratch(int64_t n_bytes);

    // Begins the time slice that `each` keeps to.
    void begin_slice() { slice_end_ = std::chrono::steady_clock::now() + kSlice; }
    bool slice_is_over() const { return std::chrono::steady_clock::now() > slice_end_; }

    // Calls work(unit, thread) once for each unit in [from, n), on any thread in any order. Stops
    // giving out units when the slice is over, but not before one is done; returns the first unit
    // that was not done, n if all were.
    template <class Work>
    int64_t each(int64_t from, int64_t n, const Work& work) {
        if (from >= n) return n;
        return run(from, n, call<Work>, &work);
    }
    // The same to the end, for work that takes less than a slice: units that follow each other are
    // done by the same thread as far as possible, so that it reads memory in order.
    template <class Work>
    void all(int64_t n, const Work& work) {
        run_all(n, call<Work>, &work);
    }

    using Call = void (*)(const void* work, int64_t unit, int thread);

  private:
    template <class Work>
    static void call(const void* work, int64_t unit, int thread) {
        (*static_cast<const Work*>(work))(unit, thread);
    }
    int64_t run(int64_t from, int64_t n, Call call, const void* work);
    void run_all(int64_t n, Call call, const void* work);
    void share(int64_t from, int64_t n, int n_ranges, Call call, const void* work);

    std::chrono::steady_clock::time_point slice_end_;
    Crew* crew_;
    void* scratch_ = nullptr;
    int64_t scratch_bytes_ = 0;
};
