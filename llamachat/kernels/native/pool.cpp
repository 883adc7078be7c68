#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(200);  // longer than the gaps between calls of one token

// How often this process came out of fork(): threads of before are not there any more.
std::atomic<int> forks{0};

void watch_forks() {
#ifndef _WIN32
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
    (void)registered;
#endif
}

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

// The threads and the one job they share. `state` is epoch * 2^16 + joined * 2 + open: a worker joins
// an open job by raising `joined`; closing it tells the caller for how many to wait.
struct Crew {
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<uint64_t> finished{0};
    alignas(64) std::atomic<int> sleeping{0};
    Pool::Call call = nullptr;
    const void* work = nullptr;
    int n_ranges = 0;
    std::unique_ptr<Range[]> ranges;
    int born;  // the value of `forks`
    Clock::time_point deadline;
    bool ends = false;
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;

    explicit Crew(int n_threads) : ranges(new Range[static_cast<size_t>(n_threads)]), born(forks.load()) {
        for (int i = 1; i < n_threads; ++i) threads.emplace_back([this, i] { serve(i); });
    }

    ~Crew() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            ends = true;
        }
        wake.notify_all();
        for (auto& thread : threads) thread.join();
    }

    static uint64_t epoch_of(uint64_t state) { return state >> 16; }

    // Units of one's own range first, then of the others'.
    void take(int thread) {
        for (int i = 0; i < n_ranges; ++i) {
            Range& range = ranges[(thread + i) % n_ranges];
            for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
                call(work, unit, thread);
                if (n_ranges == 1 && Clock::now() > deadline) return;
            }
        }
    }

    void serve(int thread) {
        uint64_t seen = 0;
        while (wait_for_job(seen)) {
            uint64_t now = state.load(std::memory_order_acquire);
            seen = epoch_of(now);
            while (now & 1) {
                if (epoch_of(now) != seen) break;
                if (!state.compare_exchange_weak(now, now + 2, std::memory_order_acquire)) continue;
                take(thread);
                finished.fetch_add(1, std::memory_order_release);
                break;
            }
        }
    }

    bool wait_for_job(uint64_t seen) {
        const auto until = Clock::now() + kSpin;
        for (int i = 0; epoch_of(state.load(std::memory_order_acquire)) == seen; ++i) {
            pause();
            if (i % 64 == 63 && Clock::now() > until) return sleep_until_job(seen);
        }
        return true;
    }

    bool sleep_until_job(uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return ends || epoch_of(state.load()) != seen; });
        sleeping.fetch_sub(1);
        return !ends;
    }

    // One range: all threads take units in order until the slice is over. Else one range for each
    // thread, to the end.
    void share(Pool::Call call_, const void* work_, int64_t from, int64_t n, int n_ranges_,
               Clock::time_point slice_end) {
        call = call_, work = work_, n_ranges = n_ranges_;
        deadline = slice_end;
        for (int i = 0; i < n_ranges; ++i) {
            ranges[i].next.store(from + (n - from) * i / n_ranges, std::memory_order_relaxed);
            ranges[i].end = from + (n - from) * (i + 1) / n_ranges;
        }
        finished.store(0, std::memory_order_relaxed);
        state.store(((epoch_of(state.load()) + 1) << 16) | 1);
        if (sleeping.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex);
            wake.notify_all();
        }
        take(0);
        const uint64_t joined = (state.fetch_and(~uint64_t{1}, std::memory_order_acq_rel) & 0xFFFF) >> 1;
        for (int i = 0; finished.load(std::memory_order_acquire) != joined; ++i) {
            pause();
            if (i % 4096 == 4095) std::this_thread::yield();
        }
    }
};

Pool::Pool(int threads, const Kernel* kernel_) : kernel(kernel_), n_threads(threads) {
    watch_forks();
    crew_ = new Crew(threads);
}

Pool::~Pool() {
    if (crew_->born == forks.load()) delete crew_;  // after a fork its threads cannot be joined
    ::operator delete(scratch_, std::align_val_t{64});
}

uint8_t* Pool::scratch(int64_t n_bytes) {
    if (n_bytes > scratch_bytes_) {
        ::operator delete(scratch_, std::align_val_t{64});
        scratch_ = ::operator new(static_cast<size_t>(n_bytes), std::align_val_t{64}, std::nothrow);
        scratch_bytes_ = scratch_ ? n_bytes : 0;
    }
    return static_cast<uint8_t*>(scratch_);
}

void Pool::share(int64_t from, int64_t n, int n_ranges, Call call, const void* work) {
    if (crew_->born != forks.load()) crew_ = new Crew(n_threads);  // the old one's locks may be held for ever
    crew_->share(call, work, from, n, n_ranges, slice_end_);
}

int64_t Pool::run(int64_t from, int64_t n, Call call, const void* work) {
    if (n_threads > 1 && n - from > 1) {
        share(from, n, 1, call, work);
        return std::min(n, crew_->ranges[0].next.load(std::memory_order_relaxed));
    }
    do call(work, from++, 0);
    while (from < n && !slice_is_over());
    return from;
}

void Pool::run_all(int64_t n, Call call, const void* work) {
    if (n_threads > 1 && n > 1) return share(0, n, n_threads, call, work);
    for (int64_t unit = 0; unit < n; ++unit) call(work, unit, 0);
}
