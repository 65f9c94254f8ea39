// Decode attention over paged KV: one query token per row, softmax(q·Kᵀ·scale)·V for every query head.
//
// Every warp is a worker of its own: it takes spans of the plan (decode_plan.cuh), copies their KV tile by tile into
// its ring of stages in shared memory, and refills a stage as soon as its fragments are in registers. So there is
// nothing to synchronise between warps, and how many warps and stages a CTA has is a matter of launch.
//
// Both products have the group's query heads as the 8 columns of mma.m16n8k16: Sᵀ (keys × heads) = K·Qᵀ and
// Oᵀ (head_dim × heads) += Vᵀ·Pᵀ. KV fills the 16 rows, so no tensor-core work is wasted on a group of 8, and each byte
// of KV is read from shared memory once. Online softmax: Milakov and Gimelshein, arXiv 1805.02867; its maximum is only
// raised when a score exceeds it by 2^RAISE, which rounds no worse and spares reductions. What a span has of a group
// that it shares is left to decode_merge.cu: merging here would need a fence at gpu scope per part, which takes
// microseconds while the memory system is full.
//
// On few SMs a warp's own instructions are what limits it, with one other warp to take turns with. So the scores of a
// tile and the output of the tile before are worked out together, two chains of dependent products that the hardware
// interleaves (as in FlashAttention-3, Shah et al., arXiv 2407.08608), and nine tiles of ten, which need nothing else,
// go through a loop that has nothing else.
//
// Configuration: HEAD_DIM (64, 128), PAGE_SIZE (16, 32, 64), TILE keys per stage.
#include "decode_plan.cuh"
#include "hopper.cuh"
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
constexpr int MAX_THREADS = 256;
constexpr float RAISE = 8.0f;
constexpr unsigned ALL = ~0u;
constexpr float NEGATIVE_INFINITY = __builtin_bit_cast(float, 0xFF800000u);

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

// Where a lane finds its query fragments of a group, the second operand of K·Qᵀ: 4 bytes, and so every 16. Places
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

// ---- What to copy next ----

// Walks the tiles of this worker's spans: span by span, in a span group by group (what it has of one is a segment), in a
// segment tile by tile. The same in all lanes but for page indices (one per lane) and a ticket just drawn (lane 0's).
//
// A copy starts one tile, a ring of stages ahead of the products. What it needs was asked for earlier still, so that the
// walk seldom waits for memory:
// - Most tiles are plain, and before most of these there is nothing to do: they are counted off in `quiet`, and where they
//   are was found when the tile before was copied (`blocks`).
// - The others are the first and the last tile of a segment, every 32 pages one, and some near a span's end.
// - Pages are known 32 at a time: `pages` are those at hand. When they are taken up, the following 32 of the row are read
//   (`pages_after`), and when a group is entered, the first of the next group (`pages_then`).
// - When a row is entered, the next row's length and first page are read, if the span goes on there.
// - When a segment is entered, its queries are read, to be there when its first tile is. There is room for those of one:
//   where segments are so short that the last one's are still waiting, the consumer reads them itself (no HAS_Q).
// - The next span is looked up in three steps, begun 12, 8 and 4 tiles before this one's end: a ticket, the span's record,
//   its first pages.
struct Source {
    const Arguments& arguments;
    const Plan& plan;
    const int spans, workers, lane;

    int quiet = 0;           // how many plain tiles come next before which there is nothing to do
    int plain = 0;           // how many plain tiles were copied since the last other one
    int span = 0, left = 0;  // tiles of the span yet to be copied
    int row = 0, head = 0, kv_len = 0, page_begin = 0;
    int tile = 0, first_tile = 0, end_tile = 0;  // in the group, from the row's position 0
    bool opens = false, whole = false;           // the next tile is its segment's first; the segment begins the group
    const char* head_base = nullptr;             // this KV head in page 0
    unsigned blocks[BLOCKS];                     // pages of the next tile
    // A lane's page index: of page batch + lane of the row, of 32 pages on, of the first pages of the next group.
    int batch = 0, pages = 0, pages_after = 0, pages_then = 0;
    int next_kv_len = 0, next_page_begin = 0;    // of the next row
    int ahead = 0, ticket = 0, span_pages = 0;   // how far the next span is looked up (0 … FOUND), and what was found
    int4 span_head = {}, span_tail = {};
    uint32_t q[STEPS][2];                        // of a segment that has not opened yet, if q_held
    bool q_held = false, q_read = false;         // q_read: the latest segment's are in `q`
    static constexpr int FOUND = 3;

    __device__ __forceinline__ static int page_of(int tile) { return tile * BLOCKS / TILES_PER_PAGE; }
    __device__ __forceinline__ int first_tile_of(int length) const {
        return first_key(length, arguments.window) / TILE;
    }

    // Where lane finds its page index, of page `from` + lane of the row whose pages begin at `begin`.
    __device__ __forceinline__ const int* page_at(int begin, int length, int from) const {
        return arguments.kv_indices + begin + min(from + lane, (length - 1) / PAGE_SIZE);
    }

    // One step of looking up a span; done a few tiles apart, no step waits for the one before.
    __device__ __forceinline__ void look_up(int step) {
        // Every worker draws once in vain, so there are as many draws as spans, and the last leaves zero behind.
        count_if(step == 0 && lane == 0, ticket, &plan.header->tickets, spans - 1);
        if (step == 1) ticket = workers + __shfl_sync(ALL, ticket, 0);
        const bool exists = ticket < spans;
        const int4* record = reinterpret_cast<const int4*>(plan.spans + ticket);
        read_if(step == 1 && exists, span_head, record);
        read_if(step == 1 && exists, span_tail, record + 1);
        if (step == 2) read_if(exists, span_pages, page_at(span_tail.y, span_tail.x, page_of(span_head.z)));
        ahead = step + 1;
    }

    __device__ __forceinline__ void start(int index, const int4& record_head, const int4& record_tail) {
        ticket = index, span_head = record_head, span_tail = record_tail;
        span_pages = *page_at(span_tail.y, span_tail.x, page_of(span_head.z));
        ahead = FOUND;
    }

    // Go to the next span; false if there is none.
    __device__ __forceinline__ bool enter_span() {
        if (ahead < FOUND && spans <= workers) return false;
#pragma unroll 1
        while (ahead < FOUND) look_up(ahead);
        if (ticket >= spans) return false;
        span = ticket, ahead = 0;
        row = span_head.x, head = span_head.y, tile = span_head.z, left = span_head.w;
        kv_len = span_tail.x, page_begin = span_tail.y, pages = span_pages;
        return true;
    }

    // Tiles left in the span at which the next step of looking up is due; none is if each worker has but one span.
    __device__ __forceinline__ int due() const { return ahead < FOUND && spans > workers ? 12 - 4 * ahead : 0; }

    // Go to the next segment, whose row may be new; false if there is none.
    __device__ __forceinline__ bool enter_segment(bool& new_row) {
        const bool new_span = left == 0;
        if (new_span && !enter_span()) return false;
        new_row = new_span;
        if (!new_span) {
            pages = pages_then;
            new_row = ++head == arguments.num_kv_heads;
            if (new_row) ++row, head = 0, kv_len = next_kv_len, page_begin = next_page_begin;
        }
        if (new_row) {
            first_tile = first_tile_of(kv_len);
            end_tile = (kv_len + TILE - 1) / TILE;
        }
        if (!new_span) tile = first_tile;
        opens = true, whole = tile == first_tile;
        head_base = arguments.kv + head * PAGE_BYTES;
        batch = page_of(tile);
        return true;
    }

    // Read what the tiles to come will need.
    __device__ __forceinline__ void read_ahead(bool new_row, bool new_batch) {
        if (opens) {
            // Now: later, registers for it would have to wait for the reads below.
            const uint32_t* q_from = kept(q_at(arguments, row, head, lane));
            const bool last_head = head + 1 == arguments.num_kv_heads;
            const int row_left = (arguments.num_kv_heads - head) * (end_tile - first_tile) - (tile - first_tile);
            const bool into_next_row = left > row_left, into_next_group = left > end_tile - tile;
            read_if(new_row && into_next_row, next_kv_len, arguments.kv_lens + row + 1);
            read_if(new_row && into_next_row, next_page_begin, arguments.kv_indptr + row + 1);
            if (into_next_group) {
                if (last_head) {
                    read_if(true, pages_then, page_at(next_page_begin, next_kv_len, page_of(first_tile_of(next_kv_len))));
                } else {
                    read_if(true, pages_then, page_at(page_begin, kv_len, page_of(first_tile)));
                }
            }
            q_read = !q_held;
            if (q_read) read_q(q, q_from);
            q_held = true;
        }
        read_if(opens || new_batch, pages_after, page_at(page_begin, kv_len, batch + 32));
        if (left <= due()) look_up(ahead);
    }

    // Start copying the next tile into a stage; false if there is none.
    __device__ __forceinline__ bool copy(uint32_t stage, uint32_t barrier, uint32_t note) {
        if (quiet > 0) {
            if (lane == 0) write_note(note, {PLAIN});
            copy_quiet(stage, barrier);
            return true;
        }
        const bool new_segment = left == 0 || tile == end_tile;
        const bool new_batch = !new_segment && page_of(tile) == batch + 32;
        bool new_row = false;
        if (new_segment && !enter_segment(new_row)) return false;
        if (new_batch) batch += 32, pages = pages_after;
        locate();  // before more is read: waiting for these pages could mean waiting for that as well
        read_ahead(new_row, new_batch);
        const int end = min(TILE, kv_len - tile * TILE);
        const int begin = max(0, first_key(kv_len, arguments.window) - tile * TILE);
        const bool group_ends = tile + 1 == end_tile;
        const int flags = (opens ? OPENS : 0) | (group_ends || left == 1 ? CLOSES : 0) |
                          (group_ends && whole ? WHOLE : 0) | (opens && q_read ? HAS_Q : 0) | begin << 8 | end << 16;
        if (lane == 0) write_note(note, {flags, row, head, part_slot(span, whole)});
        plain = flags == PLAIN ? plain + 1 : 0;
        copy_tile(stage, barrier, end);
        opens = false;
        const int batch_end = (batch + 32) * TILES_PER_PAGE / BLOCKS;
        quiet = min(min(min(left, end_tile - tile) - 1, batch_end - tile), left - due());
        return true;
    }

    // The same while `quiet` counts any, without a note.
    __device__ __forceinline__ void copy_quiet(uint32_t stage, uint32_t barrier) {
        copy_tile(stage, barrier, TILE);
        --quiet, ++plain;
    }

    // Where the next tile is: found early, while nobody waits for it.
    __device__ __forceinline__ void locate() {
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) blocks[i] = __shfl_sync(ALL, pages, page_of(tile) + i - batch);
    }

    __device__ __forceinline__ void copy_tile(uint32_t stage, uint32_t barrier, int keys) {
        if (elect_lane()) {
            barrier_arrive_expect(barrier, keys * HEAD_DIM * 4);
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                const char* block = head_base + tile % TILES_PER_PAGE * SLAB_BYTES +
                                    static_cast<uint64_t>(blocks[i]) * unsigned(arguments.num_kv_heads * PAGE_BYTES);
                copy_block(stage + i * BLOCK_BYTES, block, min(BLOCK, keys - i * BLOCK), barrier);
            }
        }
        ++tile, --left;
        locate();
    }

    __device__ __forceinline__ static void copy_block(uint32_t to, const char* from, int keys, uint32_t barrier) {
        if (TILES_PER_PAGE == 1 && keys == BLOCK) {
            bulk_copy(to, from, BLOCK_BYTES, barrier, EVICT_FIRST);
        } else if (keys > 0) {
#pragma unroll
            for (int slab = 0; slab < 2 * HALVES; ++slab) {
                bulk_copy(to + slab * SLAB_BYTES, from + slab * PAGE_SIZE * 128, keys * 128, barrier, EVICT_FIRST);
            }
        }
    }
};

// ---- Arithmetic ----

__device__ __forceinline__ float max_over_keys(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
}

__device__ __forceinline__ float sum_over_keys(float x) {
    x += __shfl_xor_sync(ALL, x, 4);
    x += __shfl_xor_sync(ALL, x, 8);
    return x + __shfl_xor_sync(ALL, x, 16);
}

// Shared-memory offset of the fragment of 16 keys and 16 columns: K has slabs 0 … HALVES - 1, V those after.
__device__ __forceinline__ constexpr int fragment_offset(int subtile, int step, int slab) {
    return 16 * subtile / BLOCK * BLOCK_BYTES + (slab + step / 4) * SLAB_BYTES + 16 * subtile % BLOCK * 128;
}

using Scores = float[SUBTILES][4];            // lane (g, t): keys g and g + 8 of 16, heads 2t and 2t + 1
using Values = uint32_t[SUBTILES][STEPS][4];  // lane (g, t): columns g and g + 8, keys 2t, 2t + 1, and 8 on

// K·Qᵀ of a tile; `k_tile` is lane's fragment address. Two sums per score halve the chain of dependent products.
__device__ __forceinline__ void multiply_keys(Scores& scores, uint32_t k_tile, const uint32_t (&q)[STEPS][2]) {
#pragma unroll
    for (int i = 0; i < SUBTILES; ++i) {
        float even[4] = {}, odd[4] = {};
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            uint32_t keys[4];
            load_matrices(keys, (k_tile ^ k % 4 * 32) + fragment_offset(i, k, 0));
            mma_16x8x16(k % 2 ? odd : even, keys, q[k][0], q[k][1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][e] = even[e] + odd[e];
    }
}

__device__ __forceinline__ void load_values(Values& values, uint32_t v_tile) {
#pragma unroll
    for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            load_matrices_transposed(values[i][j], (v_tile ^ j % 4 * 32) + fragment_offset(i, j, HALVES));
        }
    }
}

// Keys outside [begin, end) are not the row's: they count nothing, whatever is there.
__device__ __forceinline__ void hide_keys(Scores& scores, Values& values, int begin, int end, int lane) {
    const auto hidden = [=](int key) { return key < begin || key >= end; };
#pragma unroll
    for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int of_score = 16 * i + 8 * h + lane / 4, of_value = 16 * i + 8 * h + 2 * (lane % 4);
            if (hidden(of_score)) scores[i][2 * h] = scores[i][2 * h + 1] = NEGATIVE_INFINITY;
            const uint32_t kept = (hidden(of_value) ? 0 : 0xFFFF) | (hidden(of_value + 1) ? 0 : 0xFFFF0000);
#pragma unroll
            for (int j = 0; j < STEPS; ++j) values[i][j][2 * h] &= kept, values[i][j][2 * h + 1] &= kept;
        }
    }
}

// Softmax-weighted sum of values so far. Lane (g, t) = (lane / 4, lane % 4) has heads 2t and 2t + 1 of columns
// 16j + g (out[j][0], [1]) and 16j + 8 + g (out[j][2], [3]); sums are of the lane's own keys until summed up.
struct Accumulator {
    float out[STEPS][4];
    float top[2], sum[2];  // top: the exponent (base 2) that weights are relative to

    __device__ __forceinline__ void clear() {
        top[0] = top[1] = NEGATIVE_INFINITY;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
    }

    __device__ __forceinline__ void raise(float top0, float top1) {
        const float shrink0 = exp2_approximate(top[0] - top0), shrink1 = exp2_approximate(top[1] - top1);
        top[0] = top0, top[1] = top1;
        sum[0] *= shrink0, sum[1] *= shrink1;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            out[j][0] *= shrink0, out[j][1] *= shrink1, out[j][2] *= shrink0, out[j][3] *= shrink1;
        }
    }

    // Raise the exponents if scores exceed them by far; before the scores are added.
    __device__ __forceinline__ void make_room(const Scores& scores, float scale_log2) {
        float top0 = scores[0][0], top1 = scores[0][1];
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
            top0 = fmaxf(top0, fmaxf(scores[i][0], scores[i][2]));
            top1 = fmaxf(top1, fmaxf(scores[i][1], scores[i][3]));
        }
        top0 *= scale_log2, top1 *= scale_log2;
        if (__any_sync(ALL, top0 > top[0] + RAISE || top1 > top[1] + RAISE)) {
            raise(fmaxf(top[0], max_over_keys(top0)), fmaxf(top[1], max_over_keys(top1)));
        }
    }

    // Add a tile: softmax weights of its scores, then Vᵀ·Pᵀ. A transposed pair of scores is the product's operand.
    __device__ __forceinline__ void add(const Scores& scores, const Values& values, float scale_log2) {
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
            float weights[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                weights[e] = exp2_approximate(scores[i][e] * scale_log2 - top[e % 2]);
                sum[e % 2] += weights[e];
            }
            const uint32_t low = transpose_matrix(pack_bf16(weights[0], weights[1]));
            const uint32_t high = transpose_matrix(pack_bf16(weights[2], weights[3]));
#pragma unroll
            for (int j = 0; j < STEPS; ++j) mma_16x8x16(out[j], values[i][j], low, high);
        }
    }

    // Write what a segment adds up to.
    __device__ __forceinline__ void close(const Arguments& arguments, const Note& note, int lane) {
        sum[0] = sum_over_keys(sum[0]), sum[1] = sum_over_keys(sum[1]);
        if (note.flags & WHOLE) {
            write(arguments, note.row, note.head, lane);
        } else {
            store(arguments, note.slot, lane);
        }
    }

    __device__ __forceinline__ void write(const Arguments& arguments, int row, int head, int lane) const {
        const float scale0 = reciprocal_approximate(sum[0]), scale1 = reciprocal_approximate(sum[1]);
        const long long column = (head * arguments.group + lane / 4) * HEAD_DIM + 2 * (lane % 4);
        uint32_t* to = reinterpret_cast<uint32_t*>(
            arguments.out + 2 * (static_cast<long long>(row) * arguments.out_stride + column));
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const uint32_t low = transpose_matrix(pack_bf16(out[j][0] * scale0, out[j][1] * scale1));
            const uint32_t high = transpose_matrix(pack_bf16(out[j][2] * scale0, out[j][3] * scale1));
            if (lane / 4 < arguments.group) to[8 * j] = low, to[8 * j + 4] = high;
        }
    }

    __device__ __forceinline__ void store(const Arguments& arguments, int slot, int lane) const {
        if (lane < 4) arguments.parts.stats[slot * 4 + lane] = {top[0], top[1], sum[0], sum[1]};
        if (2 * (lane % 4) >= arguments.group) return;
        float4* to = arguments.parts.out + static_cast<long long>(slot) * STEPS * 32 + lane;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) to[32 * j] = {out[j][0], out[j][1], out[j][2], out[j][3]};
    }
};

// ---- The kernel ----

template <bool PLAIN_ONLY>
struct Tiles {
    static constexpr bool all_plain = PLAIN_ONLY;  // those in the ring, and the next to be copied
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS) decode_attention(
    const char* q, const char* kv, char* out, const int* kv_lens, const int* kv_indptr, const int* kv_indices,
    void* plan_memory, float4* part_out, float4* part_stats, int num_kv_heads, int group, int q_stride,
    int out_stride, int window, int max_spans, int stages, float scale_log2) {
    extern __shared__ __align__(1024) char shared_memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    // Kept, or they are computed anew for every tile.
    const uint32_t all_notes = shared_address(shared_memory) + warps * stages * STAGE_BYTES;
    const uint32_t ring = kept(shared_address(shared_memory) + warp * stages * STAGE_BYTES);
    const uint32_t notes = kept(all_notes + warp * stages * sizeof(Note));
    const uint32_t barriers = kept(all_notes + warps * stages * sizeof(Note) + warp * stages * 8);
    if (lane < stages) barrier_init(barriers + 8 * lane, 1);
    barrier_init_fence();
    __syncwarp();
    grid_dependency_wait();

    const Arguments arguments = {
        q, kv, out, kv_lens, kv_indptr, kv_indices, {part_out, part_stats},
        num_kv_heads, group, q_stride, out_stride, window, scale_log2};
    const Plan plan(plan_memory, max_spans);
    const int worker = warp * gridDim.x + blockIdx.x;
    if (worker >= max_spans) return;
    const int4* record = reinterpret_cast<const int4*>(plan.spans + worker);
    const int4 span_head = record[0], span_tail = record[1];
    const int spans = plan.header->spans;
    if (span_head.w == 0 | span_tail.x == 0 | spans == 0) return;  // no span; asked of all three to read them at once
    Source source{arguments, plan, spans, warps * int(gridDim.x), lane};
    source.start(worker, span_head, span_tail);

    // Lane's fragment addresses in stage 0; the step is in the address bits that the swizzle flips.
    const uint32_t k_lane = kept(ring + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16);
    const uint32_t v_lane = kept(ring + (lane % 8 + lane / 16 * 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16);

    int copying = 0, stage = 0, parity = 0;
    for (int i = 0; i < stages; ++i) {
        copying += source.copy(ring + i * STAGE_BYTES, barriers + 8 * i, notes + i * sizeof(Note));
    }
    __syncwarp();
    Note next = read_note(notes);

    // The tile before: its scores, its values, what is noted about it. In the beginning none, and what adding it yields is
    // cleared when the first segment opens.
    uint32_t q_now[STEPS][2];
    Accumulator sums;
    sums.clear();
    Scores scores = {};
    Values values = {};
    Note before = {};

    // Take the tile in the stage into registers and copy another there; add the tile before.
    const auto take_tile = [&](auto tiles) {
        constexpr bool ALL_PLAIN = tiles.all_plain;
        const uint32_t k_tile = k_lane + stage * STAGE_BYTES, v_tile = v_lane + stage * STAGE_BYTES;
        const uint32_t to = ring + stage * STAGE_BYTES, barrier = barriers + 8 * stage;
        const Note note = next;
        const int flags = ALL_PLAIN ? PLAIN : note.flags;
        barrier_wait(barrier, parity);
        if (flags & OPENS) {
            if (flags & HAS_Q) {
#pragma unroll
                for (int k = 0; k < STEPS; ++k) q_now[k][0] = source.q[k][0], q_now[k][1] = source.q[k][1];
                source.q_held = false;
            } else {
                read_q(q_now, q_at(arguments, note.row, note.head, lane));
                // Wait here, or every tile would wait for whatever is being read.
#pragma unroll
                for (int i = 0; i < 2 * STEPS; ++i) q_now[i / 2][i % 2] = __shfl_sync(ALL, q_now[i / 2][i % 2], lane);
            }
        }

        Scores new_scores;
        multiply_keys(new_scores, k_tile, q_now);
        sums.add(scores, values, scale_log2);
        load_values(values, v_tile);
        __syncwarp();
        if constexpr (ALL_PLAIN) {
            source.copy_quiet(to, barrier);
        } else if (!source.copy(to, barrier, notes + stage * sizeof(Note))) {
            --copying;
            grid_dependency_launch();
        }
        if (++stage == stages) stage = 0, parity ^= 1;

        if constexpr (!ALL_PLAIN) {
            if (before.flags & CLOSES) sums.close(arguments, before, lane);
            if (flags & OPENS) sums.clear();
            before = note;
        }
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[i][e] = new_scores[i][e];
        }
        if ((flags & ~0xFF) != PLAIN) hide_keys(scores, values, flags >> 8 & 0xFF, flags >> 16, lane);
        sums.make_room(scores, scale_log2);
        if constexpr (!ALL_PLAIN) {
            __syncwarp();
            next = read_note(notes + stage * sizeof(Note));
        }
    };
    while (copying > 0) {
        take_tile(Tiles<false>{});
        if (source.plain >= stages) {
            while (source.quiet > 0) take_tile(Tiles<true>{});
        }
    }
    sums.add(scores, values, scale_log2);
    sums.close(arguments, before, lane);
}
