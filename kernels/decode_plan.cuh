// How decode attention is cut into spans: written by the planning kernel, read by the attention and the merging kernel.
//
// A tile is `tile_keys` consecutive KV positions of one (row, KV head), called a group. All tiles of all groups, row by
// row, head by head, form a line; a span is a run of places on it. A group that several spans share is attended in
// parts, one per span, and merged afterwards.
#pragma once

constexpr unsigned ALL = ~0u;  // lanes
constexpr float NEGATIVE_INFINITY = __builtin_bit_cast(float, 0xFF800000u);

// 32 bytes; the row's length and pages ride along to save a dependent read.
struct __align__(16) Span {
    int row, head, tile, tiles;  // its first tile, numbered from the row's position 0, and how many tiles it has
    int kv_len, page_begin;      // of the row: kv_lens[row], kv_indptr[row]
    int place;                   // of its first tile on the line
    int unused;
};

// Merge the parts of a group that spans first … last have.
struct __align__(16) Merge {
    int row, head, first, last;
    int columns;  // block of 16 columns; ALL_COLUMNS where one warp each is enough for the parts of a block
    int unused[3];
};

constexpr int ALL_COLUMNS = -1;
constexpr int FEW_PARTS = 8;  // as many as a warp merges at once

// The line, priced, cut into spans of `price`, but for the first `longer` spans, which have 1 more.
struct Cut {
    int spans, price, longer;

    __device__ __forceinline__ int begin(int span) const { return span * price + min(span, longer); }

    // The span that holds this place on the priced line.
    __device__ __forceinline__ int span_of(int place) const {
        const int in_longer = longer * (price + 1);
        return place < in_longer ? place / (price + 1) : longer + (place - in_longer) / price;
    }
};

struct __align__(16) PlanHeader {
    int merges;
    int unused[7];
};

// The plan in memory: header, spans (those beyond the last are empty), merges (no more than spans: a group in n parts
// takes n - 1 at most).
struct Plan {
    int max_spans;
    PlanHeader* header;
    Span* spans;
    Merge* merges;

    __device__ __forceinline__ Plan(void* memory, int max_spans)
        : max_spans(max_spans),
          header(static_cast<PlanHeader*>(memory)),
          spans(reinterpret_cast<Span*>(header + 1)),
          merges(reinterpret_cast<Merge*>(spans + max_spans)) {}
};

// Where a span keeps its part of a group: it has at most one group that began before it and one that begins in it and
// goes on behind it.
__device__ __forceinline__ int part_slot(int span, bool begins_group) { return 2 * span + begins_group; }

// Parts in memory, as lanes of a warp hold the accumulators of mma.m16n8k16: lane (g, t) = (lane / 4, lane % 4) has, of
// heads 2t and 2t + 1 (x and y) of 16 columns, column g and (z and w) column g + 8.
struct Parts {
    float4* out;    // [2 · spans, blocks of 16 columns, 32 lanes]; lanes of heads beyond the group are not written
    float4* stats;  // [2 · spans, 4 values of t]: exponents (base 2) that out is relative to, and sums, of both heads
};

// Over the lanes that have the same heads, which are those with the same t: of keys, or of parts.
__device__ __forceinline__ float max_for_heads(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
}

__device__ __forceinline__ float sum_for_heads(float x) {
    x += __shfl_xor_sync(ALL, x, 4);
    x += __shfl_xor_sync(ALL, x, 8);
    return x + __shfl_xor_sync(ALL, x, 16);
}

// Positions below this one are outside the window; 0 is no window.
__device__ __forceinline__ int first_key(int kv_len, int window) {
    return window > 0 && kv_len > window ? kv_len - window : 0;
}
