// Reading rows of logits, with the beginning of the next one on its way before the last has ended.
#pragma once
#include "logits.cuh"

// Reads rows one after the other. The pieces of a row go round the warps. Each warp has bulk copies bring its pieces ahead
// of time into a ring of slots, where they complete on the slot's barrier: that needs no registers, warps do not wait for
// each other, and L2 is looked up half as often as for copies of 16 bytes by each thread. The end of a row is followed by
// the beginning of what is to be read next, if that is known, so that memory is busy while a CTA makes up its mind.
class Stream {
  public:
    __device__ __forceinline__ explicit Stream(Shared& shared)
        : shared_(shared), slot_(warp_index()) {
        if (lane_index() < SLOTS) barrier_init(barrier() + lane_index() * WARPS * 8, 1);
        barrier_init_fence();
        __syncwarp();
        begin(Source{});
    }

    // Start to copy what is read next, unless that has been done. What was begun in vain is waited for, lest it arrive later.
    __device__ __forceinline__ void prepare(const Source& source) {
        if (begun_ == source.data) return;
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) {
            wait();
            step();
        }
        begin(source);
    }

    // Call visit(Batch) round by round. All threads of the CTA come along, some beyond the row's end. `then` is what will most
    // likely be read next; it must not change any more.
    template <class Row, class Visit>
    __device__ __forceinline__ void batches(const Row& row, const Source& then, Visit visit) {
        constexpr int VECTORS = Batch<Row>::VECTORS, STRIDE = Batch<Row>::STRIDE;
        constexpr int ROUND = VECTORS * 32 * 16, ROUNDS = PIECE / ROUND;  // bytes of a round, rounds of a piece
        constexpr int TOKENS = WARPS * (PIECE / 16) * Row::WIDTH;         // of a turn: a piece of each warp
        const Source own = source_of(row);
        prepare(own);
        const int thread = thread_index_anew(), lane = thread % 32;
        Ahead ahead(own, SLOTS, thread / 32);
        Batch<Row> batch;
        batch.id = (thread / 32 * (PIECE / 16) + lane) * Row::WIDTH;
        const int whole = row.vocab_size / TOKENS, turns = max(SLOTS, (row.vocab_size + TOKENS - 1) / TOKENS);
        int turn = 0;
#pragma unroll 1
        for (int begun = 1; begun >= 0; --begun) {  // first while there is more of the row to begin
            if (!begun) ahead = Ahead(then, 0, thread_index_anew() / 32);
#pragma unroll 1
            for (; turn < turns - begun * SLOTS; ++turn) {
                wait();
                uint32_t from = place() + lane * 16;
#pragma unroll 1
                for (int round = 0; round < ROUNDS; ++round) {
                    uint4 v[VECTORS];
#pragma unroll
                    for (int i = 0; i < VECTORS; ++i) v[i] = load_shared_16(from + i * 32 * 16);
                    from += ROUND;
                    if (round == ROUNDS - 1) {
                        async_proxy_fence();  // what this lane reads of the slot has arrived
                        __syncwarp();
                        copy(ahead);
                        step();
                    }
                    if (turn >= whole) [[unlikely]] {
#pragma unroll
                        for (int i = 0; i < VECTORS; ++i)
                            cut_words(v[i], row.vocab_size - batch.id - i * STRIDE, Row::WIDTH / 4, Row::nothing().x);
                    }
#pragma unroll
                    for (int i = 0; i < VECTORS; ++i) {
                        Row::unpack(v[i], batch.x[i]);
                        batch.highest[i] = Row::highest(v[i]);
                    }
                    visit(batch);
                    batch.id += VECTORS * STRIDE;
                }
                batch.id += (WARPS - 1) * (PIECE / 16) * Row::WIDTH;
            }
        }
        begun_ = then.data;
    }

    // Call visit(first id, values) for every vector.
    template <class Row, class Visit>
    __device__ __forceinline__ void sweep(const Row& row, Visit visit) {
        batches(row, Source{}, [&](const Batch<Row>& batch) {
#pragma unroll
            for (int i = 0; i < batch.VECTORS; ++i) visit(batch.id + i * batch.STRIDE, batch.x[i]);
        });
    }

  private:
    static constexpr uint32_t ODD = 1u << 31;
    Shared& shared_;
    uint32_t slot_;  // where the next piece is, and its successor will be; a warp has every WARPS-th. ODD in odd phases
    const void* begun_ = nullptr;

    // What this warp copies next.
    struct Ahead {
        const char* from;
        int left;  // bytes from there to the end

        __device__ __forceinline__ Ahead(const Source& source, int pieces, int warp) {
            const int offset = (pieces * WARPS + warp) * PIECE;
            from = static_cast<const char*>(source.data) + offset;
            left = source.vectors * 16 - offset;
        }
    };

    __device__ __forceinline__ uint32_t place() const { return shared_address(&shared_ + 1) + slot_ * PIECE; }
    __device__ __forceinline__ uint32_t barrier() const { return shared_address(shared_.arrived) + slot_ * 8; }

    // Every slot has a copy on its way at all times, be it of nothing.
    __device__ __forceinline__ void copy(Ahead& ahead) {
        if (elect_lane()) {
            const int bytes = max(min(ahead.left, PIECE), 0);
            barrier_arrive_expect(barrier(), bytes);
            if (bytes > 0) bulk_copy(place(), ahead.from, bytes, barrier(), EVICT_NORMAL);
        }
        ahead.from += WARPS * PIECE;
        ahead.left -= WARPS * PIECE;
    }

    __device__ __forceinline__ void begin(const Source& source) {
        Ahead ahead(source, 0, thread_index_anew() / 32);
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) {
            copy(ahead);
            step();
        }
        slot_ ^= ODD;  // nothing has been waited for
        begun_ = source.data;
    }

    __device__ __forceinline__ void wait() const { barrier_wait(barrier(), slot_ / ODD); }

    __device__ __forceinline__ void step() {
        slot_ += slot_ % 32 < (SLOTS - 1) * WARPS ? WARPS : ODD - (SLOTS - 1) * WARPS;
    }
};
