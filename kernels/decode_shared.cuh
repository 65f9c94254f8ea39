// What the parts of decode_attention.cu share: how a stage is laid out, the arguments, what is noted about a tile.
//
// Configuration: HEAD_DIM, PAGE_SIZE, TILE; see there.
#pragma once
#include "decode_plan.cuh"
#include "memory.cuh"

constexpr int HALVES = HEAD_DIM / 64;                       // slabs of 64 columns (128-byte rows) of K, and of V
constexpr int BLOCK = PAGE_SIZE < TILE ? PAGE_SIZE : TILE;  // keys of a stage that come from one page
constexpr int BLOCKS = TILE / BLOCK;                        // pages per stage
constexpr int TILES_PER_PAGE = PAGE_SIZE / BLOCK;           // 1 where a stage holds whole pages
constexpr int PAGE_BYTES = PAGE_SIZE * HEAD_DIM * 4;        // K and V of one KV head
constexpr int BLOCK_BYTES = BLOCK * HEAD_DIM * 4;
constexpr int SLAB_BYTES = BLOCK * 128;
constexpr int STAGE_BYTES = TILE * HEAD_DIM * 4;
constexpr int SUBTILES = TILE / 16;                         // of 16 keys: the rows of an mma
constexpr int STEPS = HEAD_DIM / 16;                        // blocks of 16 columns

struct Arguments {
    const char* q;   // bf16 rows of q_stride elements, `group` heads per KV head
    const char* kv;  // of the layer: [pages, num_kv_heads, 2, HALVES, PAGE_SIZE, 64], rows swizzled
    char* out;       // bf16 rows of out_stride elements
    const int* kv_lens;
    const int* kv_indptr;
    const int* kv_indices;
    Parts parts;
    int num_kv_heads, group, q_stride, out_stride, window;
    float scale_log2;
};

// What a worker notes about a tile when it starts to copy it, for when it has arrived. Of a plain tile — all keys
// valid, neither the first nor the last of its segment (the part of a group that a span has) — only the flags count.
struct Note {
    int flags;  // OPENS, … | first valid key << 8 | end of valid keys << 16
    int row, head;
    int slot;  // of the part, if the segment is not WHOLE
};
enum : int { OPENS = 1, CLOSES = 2, WHOLE = 4, HAS_Q = 8, PLAIN = TILE << 16 };

__device__ __forceinline__ Note read_note(uint32_t from) {
    const uint4 words = load_shared_16(from);
    return {int(words.x), int(words.y), int(words.z), int(words.w)};
}

__device__ __forceinline__ void write_note(uint32_t to, const Note& note) {
    store_shared_16(to, {uint32_t(note.flags), uint32_t(note.row), uint32_t(note.head), uint32_t(note.slot)});
}

// Where a lane finds its query fragments of a group, the second operand of K·Qᵀ: 4 bytes there, and 4 more every 16. Places
// beyond the group repeat its last head.
__device__ __forceinline__ const uint32_t* q_at(const Arguments& arguments, int row, int head, int lane) {
    const int column = (head * arguments.group + min(lane / 4, arguments.group - 1)) * HEAD_DIM + 2 * (lane % 4);
    return reinterpret_cast<const uint32_t*>(
        arguments.q + 2 * (static_cast<long long>(row) * arguments.q_stride + column));
}

__device__ __forceinline__ void read_q(uint32_t (&q)[STEPS][2], const uint32_t* from) {
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) q[i / 2][i % 2] = load_early(from + 4 * i);
}
