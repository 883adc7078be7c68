// Runs the threads of a kernel as fibers (emulated.h). Compiled with SOURCE, the kernel's file, and
// KERNEL(name, structure of its arguments) for each that is called from outside.
#include "emulated.h"

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace emulated {

thread_local Index thread, block, block_size, grid_size;
thread_local uint8_t* shared;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr long kPatience = 20'000'000;  // turns in which nothing happens: a deadlock
std::atomic<bool> is_stuck;

struct Gate {  // where threads wait for each other
    int here = 0;
    long opened = 0;
    std::vector<int> waiting;
};

struct Warp {
    Gate gate;
    long exchanges[kLanes] = {};
    alignas(64) uint8_t room[2][kLanes * 64];
};

struct Fiber {
    ucontext_t begin;
    jmp_buf place;  // where it goes on: without system calls, which swapcontext makes
    bool is_begun = false;
    std::unique_ptr<uint8_t[]> stack;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<int> ready;
    std::vector<std::function<void()>> copies;
    std::function<void()> body;
    Gate gate;
    jmp_buf scheduler;
    std::minstd_rand random;
    int running = 0;
    int alive = 0;
    long idle = 0;
};

thread_local Block* self;

void leave() {
    if (!_setjmp(self->fibers[self->running].place)) _longjmp(self->scheduler, 1);
}

void enter(Fiber& fiber) {
    if (_setjmp(self->scheduler)) return;
    if (fiber.is_begun) _longjmp(fiber.place, 1);
    fiber.is_begun = true;
    setcontext(&fiber.begin);
}

void wait_at(Gate& gate, int n_threads) {
    self->idle = 0;
    if (++gate.here == n_threads) {
        self->ready.insert(self->ready.end(), gate.waiting.begin(), gate.waiting.end());
        gate.waiting.clear();
        gate.here = 0;
        return;
    }
    gate.waiting.push_back(self->running);
    leave();
}

void run_fiber() {
    self->body();
    --self->alive;
    self->idle = 0;
    leave();
}

int drawn(size_t n) { return static_cast<int>(self->random() % n); }

template <class T> T taken(std::vector<T>& from) {
    std::swap(from[drawn(from.size())], from.back());
    T value = std::move(from.back());
    from.pop_back();
    return value;
}

void run_block(int threads) {
    Block& own = *self;
    own.fibers = std::vector<Fiber>(threads);
    own.warps = std::vector<Warp>((threads + kLanes - 1) / kLanes);
    own.alive = threads;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = own.fibers[i];
        fiber.stack.reset(new uint8_t[kStack]);
        getcontext(&fiber.begin);
        fiber.begin.uc_stack.ss_sp = fiber.stack.get();
        fiber.begin.uc_stack.ss_size = kStack;
        makecontext(&fiber.begin, run_fiber, 0);
        own.ready.push_back(i);
    }
    while (own.alive) {
        const bool is_late = own.ready.empty() || drawn(8) == 0;
        if (!own.copies.empty() && is_late) taken(own.copies)(), own.idle = 0;
        if (own.ready.empty() || ++own.idle > kPatience) {
            if (!own.copies.empty()) continue;  // which will let some go on
            is_stuck = true;
            return;
        }
        if (own.idle % 1024 == 1023) std::this_thread::yield();  // other blocks
        own.running = taken(own.ready);
        thread = {static_cast<unsigned>(own.running), 0, 0};
        enter(own.fibers[own.running]);
    }
}

}  // namespace

void wait(int n_threads) { wait_at(self->gate, n_threads); }

void wait_warp() {
    const int warp = self->running / kLanes;
    const int lanes = std::min<int>(kLanes, self->fibers.size() - warp * kLanes);
    wait_at(self->warps[warp].gate, lanes);
}

void pause() {
    self->ready.push_back(self->running);
    leave();
}

void* exchange() {
    Warp& warp = self->warps[self->running / kLanes];
    return warp.room[warp.exchanges[self->running % kLanes]++ % 2];
}

void later(std::function<void()> copy) { self->copies.push_back(std::move(copy)); }

// All blocks of a grid at once if they wait for each other, or one after the other. False if some
// wait for ever.
bool launch(
    std::function<void()> body, const int (&grid)[3], int threads, int64_t memory, bool at_once, int seed) {
    std::vector<std::thread> blocks;
    const auto run = [&body, &grid, threads, memory](Index at, int seed) {
        Block own;
        self = &own;
        own.body = body;
        own.random.seed(seed);
        std::vector<uint8_t> room(memory + 1024, 0xFF);  // NaN
        shared = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 1023);
        block = at;
        block_size = {static_cast<unsigned>(threads), 1, 1};
        grid_size = {
            static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2])};
        run_block(threads);
    };
    for (int z = 0; z < grid[2]; ++z)
        for (int y = 0; y < grid[1]; ++y)
            for (int x = 0; x < grid[0]; ++x) {
                const Index at{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
                blocks.emplace_back(run, at, seed = seed * 31 + 7919);
                if (!at_once) blocks.back().join(), blocks.pop_back();
            }
    for (auto& it : blocks) it.join();
    return !is_stuck.exchange(false);
}

}  // namespace emulated

#include SOURCE

#define KERNEL(NAME, ARGS)                                                                             \
    extern "C" bool emulate_##NAME(const ARGS* args, const int* grid, int threads, int64_t memory,     \
                                   int at_once, int seed) {                                            \
        const int sizes[3] = {grid[0], grid[1], grid[2]};                                              \
        return emulated::launch([=] { NAME(*args); }, sizes, threads, memory, at_once, seed);          \
    }
KERNELS
