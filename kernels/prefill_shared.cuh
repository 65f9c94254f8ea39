// Prefill attention: constants, what a CTA's warps share, and who works on what. Included by prefill_attention.cu.
#pragma once

#include "cluster.cuh"
#include "memory.cuh"
#include "prefill_plan.cuh"

using uint8_t = unsigned char;  // NVRTC brings no <cstdint>

constexpr int PANELS = HEAD_DIM / 64;  // of 64 columns, 128 bytes a row
constexpr int WARPGROUPS = 2;          // that multiply, on 64 query rows each; one more loads
constexpr int ROWS = 64 * WARPGROUPS;  // of a CTA's half of a tile: (token, query head of the group) pairs
constexpr int KEYS = 128;              // of a key block
constexpr int K_STAGES = HEAD_DIM == 128 ? 2 : 4, V_STAGES = HEAD_DIM == 128 ? 3 : 4;
constexpr int Q_PANEL_BYTES = ROWS * 128;
constexpr int Q_BYTES = PANELS * Q_PANEL_BYTES;
constexpr int KV_PANEL_BYTES = KEYS * 128;
constexpr int KV_BYTES = PANELS * KV_PANEL_BYTES;  // K or V of a key block
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;  // per thread; 168 at launch
constexpr int TURN_BARRIER = 1, WARPGROUP_BARRIER = TURN_BARRIER + WARPGROUPS;  // ids of named barriers

constexpr int L2_BYTES = 16 << 20;  // of K and V that CTAs work on at a time

constexpr float NEGATIVE_INFINITY = __builtin_bit_cast(float, 0xFF800000u);

// Running maxima, base 2, follow the true ones only once these are RAISE higher: weights stay below 2^RAISE, far inside
// the range of bf16 and fp32, and the output is hardly ever rescaled.
constexpr float RAISE = 8.0f;

// A tile and KV head, the same for all CTAs of the cluster; no tokens: there is nothing more to do.
struct __align__(16) Item {
    int row, tokens, position, page_begin;  // as in Tile
    int head, unused[3];
};

struct __align__(1024) Shared {
    uint8_t q[2][Q_BYTES];
    uint8_t k[K_STAGES][KV_BYTES];
    uint8_t v[V_STAGES][KV_BYTES];
    Item item[2];
    float scale_log2;  // of the scores, times log2(e)
    // Barriers: `full` says that something is there to be read, `empty` that every reader has done so.
    uint64_t item_full[2], item_empty[2], q_full[2];
    uint64_t k_full[K_STAGES], k_empty[K_STAGES], v_full[V_STAGES], v_empty[V_STAGES];
};

static_assert(sizeof(Shared) == SHARED_BYTES);
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * 168);  // else none may start

extern __shared__ Shared shared[];

// Key blocks of an item: the last one that any of its rows sees, and the first.
__device__ __forceinline__ int last_block(const Item& item) { return (item.position + item.tokens - 1) / KEYS; }
__device__ __forceinline__ int first_block(const Item& item, int window) {
    return window > 0 ? max(0, item.position - window + 1) / KEYS : 0;
}

// How query heads are packed: row r of a CTA's rows is token r / group, query head r % group of the KV head.
struct Group {
    int size, inverse;  // 65536 / size, rounded up

    __device__ __forceinline__ int token(int row) const { return row * inverse >> 16; }
    __device__ __forceinline__ int cta_tokens() const { return token(ROWS); }  // of a whole tile, in one CTA
};

// The part of an item whose queries are this CTA's.
struct Part {
    int row, tokens, position;

    __device__ __forceinline__ Part(const Item& item, const Group& group) {
        const int before = cluster_rank() * group.cta_tokens();
        row = item.row + before;
        tokens = min(item.tokens - before, group.cta_tokens());
        position = item.position + before;
    }
};

struct Ring {
    int slot = 0;
    uint32_t phase = 0;
    template <int Size>
    __device__ __forceinline__ void advance() {
        if (++slot == Size) slot = 0, phase ^= 1;
    }
};
