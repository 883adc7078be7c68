// Attention over the cache: turn q and k, store k and v, attend.
//
// A row's entries are cut into blocks of 128 at fixed positions; their partial results (attend.h) are
// merged in the order of the blocks. So a token's result depends on nothing but its row, however the
// work is cut into units:
//
//   in order   a run of tokens and a kv head: walks the blocks, and scratch stays small
//   apart      a run, a kv head and a span of blocks: where runs and heads are too few to share out

#pragma once
#include <type_traits>

#include "attend.h"
#include "pool.h"

// One call of `attention`.
template <class V, CacheForm kForm>
class AttentionPass {
    using Stored = Element<V, kForm>;
    using Factor = typename Term<V, kForm>::Factor;
    static constexpr bool kRounds = !std::is_same_v<Factor, float>;       // queries to the form of keys
    static constexpr CacheForm kGathered = kRounds ? kForm : kCacheF32;  // of entries that are gathered
    using Gathered = Element<V, kGathered>;
    static constexpr int64_t kEntries = Attend<V>::kEntries;
    static constexpr int64_t kQueries = 48;          // of a run: tokens times heads; one token may have more
    static constexpr int64_t kFewQueries = 12;       // so few read the cache as it is
    static constexpr int64_t kStoredTokens = 16;     // of a unit: they share lines of keys
    static constexpr int64_t kLittleWork = 1 << 14;  // multiplications: less than sharing them costs
    static constexpr int64_t kMuchWork = 1 << 26;    // the same: over before a slice is
    static constexpr int64_t kUnitsPerThread = 8;    // where units are apart
    static constexpr int64_t kPartialBytes = 16 << 20;

    // Consecutive tokens of one row, which see no more than its first `seen` entries.
    struct Run {
        int64_t first, n, seen;
    };

    // What one thread works in.
    struct Room {
        float *q, *scores, *partials, *states, *keys, *values, *key_scales, *value_scales;
        int32_t* seen;
    };

    Pool& pool_;
    const Attention& args_;
    const Pass& pass_;
    const Cache& cache_;
    const int64_t kv_heads_, head_dim_, padded_;
    const int64_t group_;   // query heads of a kv head
    const int64_t tokens_;  // of a run, at most
    const Attend<V> attend_;
    const int64_t result_;  // floats of a partial result
    int64_t n_runs_ = 0, n_blocks_ = 0, work_ = 0;
    int64_t span_ = 0;  // blocks of a unit, or 0: in order
    Run* runs_ = nullptr;
    float* rooms_ = nullptr;
    float* partials_ = nullptr;  // (K, T, H / K, blocks, result_), if units are apart

  public:
    AttentionPass(Pool& pool, const Attention& args)
        : pool_(pool), args_(args), pass_(*args.pass), cache_(*args.cache), kv_heads_(cache_.n_kv_heads),
          head_dim_(cache_.head_dim), padded_(ceil_div(head_dim_, 16) * 16),
          group_(args.n_heads / kv_heads_), tokens_(larger(1, kQueries / group_)),
          attend_{head_dim_, padded_}, result_(attend_.result_floats()) {}

    int64_t run(int64_t from) {
        if (pass_.n_tokens == 0) return 0;
        if (!plan()) return -1;
        const int64_t stores = kv_heads_ * ceil_div(pass_.n_tokens, kStoredTokens);
        const bool at_once = !span_ && n_runs_ == 1 && stores == kv_heads_;  // a unit stores what it reads
        if (from == 0 && !at_once) all(stores, [&](int64_t unit, int thread) { store(unit, thread); });
        const int64_t n = kv_heads_ * n_runs_ * (span_ ? ceil_div(n_blocks_, span_) : 1);
        const int64_t next = each(from, n, [&](int64_t unit, int thread) {
            if (at_once) store(unit, thread);
            span_ ? answer_apart(unit, thread) : answer(unit, thread);
        });
        if (next < n) return next;
        if (span_) all(pass_.n_tokens * kv_heads_, [&](int64_t unit, int) { merge(unit); });
        return 0;
    }

  private:
    template <class Work>
    int64_t each(int64_t from, int64_t n, const Work& work) {
        if (work_ > kMuchWork || from > 0) return pool_.each(from, n, work);
        all(n, work);
        return n;
    }
    template <class Work>
    void all(int64_t n, const Work& work) {
        if (work_ > kLittleWork) return pool_.all(n, work);
        for (int64_t unit = 0; unit < n; ++unit) work(unit, 0);
    }

    // Cuts the work and finds memory, always the same for the same arguments. False if there is none.
    bool plan() {
        find_runs(nullptr);
        const int64_t run_bytes = ceil_div(n_runs_ * sizeof(Run), 64) * 64;
        const int64_t room_bytes = room_floats() * sizeof(float) * pool_.n_threads;
        int64_t partial_bytes = pass_.n_tokens * args_.n_heads * n_blocks_ * result_ * sizeof(float);
        const int64_t spans = smaller(n_blocks_, kUnitsPerThread * pool_.n_threads / (n_runs_ * kv_heads_));
        if (spans > 1 && partial_bytes <= kPartialBytes)
            span_ = ceil_div(n_blocks_, spans);
        else
            partial_bytes = 0;
        uint8_t* scratch = pool_.scratch(run_bytes + room_bytes + partial_bytes);
        if (!scratch) return false;
        runs_ = reinterpret_cast<Run*>(scratch);
        rooms_ = reinterpret_cast<float*>(scratch + run_bytes);
        partials_ = reinterpret_cast<float*>(scratch + run_bytes + room_bytes);
        find_runs(runs_);
        return true;
    }

    // Counts the runs, and fills them in if there is where.
    void find_runs(Run* runs) {
        n_runs_ = n_blocks_ = work_ = 0;
        for (int64_t t = 0; t < pass_.n_tokens; ++n_runs_) {
            Run run{t, 0, 0};
            const int64_t end = smaller(pass_.n_tokens, t + tokens_);
            for (; t < end && pass_.row[t] == pass_.row[run.first]; ++t, ++run.n)
                run.seen = larger(run.seen, pass_.seen[t]);
            n_blocks_ = larger(n_blocks_, ceil_div(run.seen, kEntries));
            work_ += run.n * run.seen * args_.n_heads * head_dim_;
            if (runs) runs[n_runs_] = run;
        }
    }

    int64_t room_floats() const {
        return tokens_ * group_ * (padded_ + kEntries + 2 * result_ + 16) +
               kEntries * (head_dim_ + padded_ + 2);
    }

    Room room(int thread) const {
        float* next = rooms_ + thread * room_floats();
        const auto take = [&](int64_t n) { return (next += n) - n; };
        const int64_t n = tokens_ * group_;
        Room room;
        room.q = take(n * padded_);
        room.scores = take(n * kEntries);
        room.partials = take(n * result_);
        room.states = take(n * result_);
        room.seen = reinterpret_cast<int32_t*>(take(n * 16));
        room.keys = take(kEntries * head_dim_);
        room.values = take(kEntries * padded_);
        room.key_scales = take(kEntries);
        room.value_scales = take(kEntries);
        return room;
    }

    void store(int64_t unit, int thread) const {
        const Room here = room(thread);
        auto* coded = reinterpret_cast<typename Stored::T*>(here.values);
        const int64_t first = unit / kv_heads_ * kStoredTokens, head = unit % kv_heads_;
        const int64_t end = smaller(pass_.n_tokens, first + kStoredTokens);
        if (head == 0) expect<V, kForm>(args_, first, head);
        if (head + 1 < kv_heads_) expect<V, kForm>(args_, first, head + 1);
        for (int64_t t = first; t < end; ++t) remember<V, kForm>(args_, t, head, padded_, here.keys, coded);
    }

    // What the first block gives becomes the state that the others are merged into.
    void answer(int64_t unit, int thread) const {
        const Run& run = runs_[unit % n_runs_];
        const int64_t head = unit / n_runs_, blocks = ceil_div(run.seen, kEntries), n = run.n * group_;
        const Room here = room(thread);
        turn(run, head, here.q);
        for (int64_t block = 0; block < blocks; ++block) {
            float* results = block == 0 ? here.states : here.partials;
            const auto* next = block + 1 < blocks ? keys(run, head, block + 1) : keys(run, head + 1, 0);
            ask(run, head, block, next, here, results, result_);
            for (int64_t i = 0; block > 0 && i < n; ++i)
                if (here.seen[i] > 0) attend_.merge(here.states + i * result_, results + i * result_);
        }
        for (int64_t i = 0; i < n; ++i)
            attend_.finish(here.states + i * result_, out(run.first + i / group_, head, i % group_));
    }

    void answer_apart(int64_t unit, int thread) const {
        const Run& run = runs_[unit % n_runs_];
        const int64_t spans = ceil_div(n_blocks_, span_), head = unit / n_runs_ / spans;
        const int64_t first = unit / n_runs_ % spans * span_;
        const int64_t end = smaller(first + span_, ceil_div(run.seen, kEntries));
        const Room here = room(thread);
        turn(run, head, here.q);
        for (int64_t block = first; block < end; ++block) {
            float* results = partials(head, run.first, 0) + block * result_;
            const auto* next = block + 1 < end ? keys(run, head, block + 1) : nullptr;
            ask(run, head, block, next, here, results, n_blocks_ * result_);
        }
    }

    // The blocks of one token and one kv head.
    void merge(int64_t unit) const {
        const int64_t head = unit % kv_heads_, t = unit / kv_heads_;
        for (int64_t g = 0; g < group_; ++g) {
            float* state = partials(head, t, g);
            for (int64_t block = 1; block * kEntries < pass_.seen[t]; ++block)
                attend_.merge(state, state + block * result_);
            attend_.finish(state, out(t, head, g));
        }
    }

    float* partials(int64_t head, int64_t t, int64_t g) const {
        return partials_ + ((head * pass_.n_tokens + t) * group_ + g) * n_blocks_ * result_;
    }
    float* out(int64_t t, int64_t head, int64_t g) const {
        return args_.out + (t * args_.n_heads + head * group_ + g) * head_dim_;
    }

    // The queries (tokens, H / K, E) of a run, turned and scaled, as factors from q on.
    void turn(const Run& run, int64_t head, float* q) const {
        const int64_t width = (args_.n_heads + 2 * kv_heads_) * head_dim_, half = head_dim_ / 2;
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
        float* next = q;
        for (int64_t t = run.first; t < run.first + run.n; ++t)
            for (int64_t g = 0; g < group_; ++g, next += head_dim_)
                rotate<V>(args_.qkv + t * width + (head * group_ + g) * head_dim_, args_.cosines + t * half,
                          args_.sines + t * half, half, scale, next);
        if constexpr (kRounds)
            for (int64_t i = 0; q + i < next; i += 16)
                Term<V, kForm>::store(reinterpret_cast<Factor*>(q) + i, V::load(q + i));
    }

    // The slots of a run's row, from a block on.
    const int32_t* slots_of(const Run& run, int64_t block) const {
        return pass_.table + pass_.row[run.first] * pass_.table_stride + block * kEntries;
    }

    // The keys of a block; null beyond the last head.
    const typename Stored::T* keys(const Run& run, int64_t head, int64_t block) const {
        if (head == kv_heads_) return nullptr;
        return CachedHead<V, kForm>(cache_, args_.layer, head).key(slots_of(run, block)[0]);
    }

    // The partial results of a block. A few queries read the cache as it is, and look ahead at the keys
    // that are read next, if any; more have it brought to float lines first, unless they need none.
    void ask(const Run& run, int64_t head, int64_t block, const typename Stored::T* next, const Room& here,
             float* results, int64_t stride) const {
        const int64_t first = block * kEntries, n = smaller(kEntries, run.seen - first);
        const int32_t* slots = slots_of(run, block);
        const Queries<Factor> queries{reinterpret_cast<const Factor*>(here.q), here.seen, run.n * group_,
                                      here.scores, results, stride};
        for (int64_t i = 0; i < queries.n; ++i) {
            const int64_t seen = pass_.seen[run.first + i / group_] - first;
            here.seen[i] = static_cast<int32_t>(larger(0, smaller(n, seen)));
        }

        const CachedHead<V, kForm> cached(cache_, args_.layer, head);
        const bool few = queries.n <= kFewQueries;
        if ((few || kForm == kGathered) && head_dim_ % 16 == 0 && are_line(slots, n)) {
            const int64_t slot = slots[0];
            const auto *keys = cached.key(slot), *values = cached.value(slot);
            const Entries<Term<V, kForm>> entries{{keys, head_dim_, 16, 16 * head_dim_, values},
                                                  {values, n, head_dim_, 16, next},
                                                  cached.key_scale(slot),
                                                  cached.value_scale(slot)};
            attend_.ask(entries, queries);
        } else {
            attend_.ask(gather(cached, slots, n, here), queries);
        }
    }

    // Whether slots are consecutive in one chunk and begin a line of keys.
    bool are_line(const int32_t* slots, int64_t n) const {
        bool consecutive = slots[0] % 16 == 0 && slots[0] % cache_.chunk + n <= cache_.chunk;
        for (int64_t i = 1; i < n; ++i) consecutive &= slots[i] == slots[0] + i;
        return consecutive;
    }

    // n entries in the order of the row.
    Entries<Term<V, kGathered>> gather(const CachedHead<V, kForm>& cached, const int32_t* slots, int64_t n,
                                       const Room& here) const {
        auto* keys = reinterpret_cast<typename Gathered::T*>(here.keys);
        auto* values = reinterpret_cast<typename Gathered::T*>(here.values);
        for (int64_t i = 0; i < n; i += 16)
            gather_keys(cached, slots + i, smaller(16, n - i), keys + i * head_dim_);
        for (int64_t i = 0; i < n; ++i) gather_value(cached.value(slots[i]), values + i * padded_);
        const bool scaled = kForm == kCacheInt8;
        for (int64_t i = 0; scaled && i < n; ++i) {
            here.key_scales[i] = *cached.key_scale(slots[i]);
            here.value_scales[i] = *cached.value_scale(slots[i]);
        }
        return {{keys, head_dim_, 16, 16 * head_dim_, nullptr},
                {values, n, padded_, 16, nullptr},
                scaled ? here.key_scales : nullptr,
                scaled ? here.value_scales : nullptr};
    }

    // Up to 16 keys side by side: (E, 16).
    void gather_keys(const CachedHead<V, kForm>& cached, const int32_t* slots, int64_t n,
                     typename Gathered::T* lines) const {
        if (are_line(slots, n)) {
            const auto* line = cached.key(slots[0]);
            for (int64_t e = 0; e < 16 * head_dim_; e += 16)
                Gathered::store(lines + e, Stored::load(line + e));
            return;
        }
        const typename Stored::T* keys[16];
        for (int64_t i = 0; i < n; ++i) keys[i] = cached.key(slots[i]);
        typename Stored::T line[16] = {};
        for (int64_t e = 0; e < head_dim_; ++e) {
            for (int64_t i = 0; i < n; ++i) line[i] = keys[i][16 * e];
            Gathered::store(lines + 16 * e, Stored::load(line));
        }
    }

    void gather_value(const typename Stored::T* value, typename Gathered::T* line) const {
        const int64_t whole = head_dim_ / 16 * 16;
        for (int64_t e = 0; e < whole; e += 16) Gathered::store(line + e, Stored::load(value + e));
        if (whole == head_dim_) return;
        typename Stored::T rest[16] = {};
        std::memcpy(rest, value + whole, (head_dim_ - whole) * sizeof(*rest));
        Gathered::store(line + whole, Stored::load(rest));
    }
};

// Returns the unit to go on from, 0 when all is done, -1 if there is no memory.
template <class V>
int64_t attention(Pool& pool, const Attention& args, int64_t from) {
    switch (args.cache->form) {
        case kCacheF32: return AttentionPass<V, kCacheF32>(pool, args).run(from);
        case kCacheBF16: return AttentionPass<V, kCacheBF16>(pool, args).run(from);
        default: return AttentionPass<V, kCacheInt8>(pool, args).run(from);
    }
}
