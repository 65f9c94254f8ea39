// What a worker of decode_attention.cu copies next.
#pragma once
#include "decode_shared.cuh"

// Walks the tiles of this worker's span group by group (what it has of one is a segment), in a segment tile by tile. The
// same in all lanes but for page indices, one per lane.
//
// A copy starts one tile, a ring of stages ahead of the products. What it needs was asked for earlier still, so that the
// walk seldom waits for memory:
// - Most tiles are plain, and before most of these there is nothing to do: they are counted off in `quiet`, and where they
//   are was found when the tile before was copied (`next_pages`).
// - The others are the first and the last tile of a segment.
// - Pages are known 32 at a time: `pages` are those at hand. When they are taken up, the following 32 of the row are read
//   (`pages_after`), and when a group is entered, the first of the next group (`pages_then`).
// - When a row is entered, the next row's length and first page are read, if the span goes on there.
// - When a segment is entered, its queries are read, to be there when its first tile is. There is room for those of one:
//   where segments are so short that the last one's are still waiting, the consumer reads them itself (no HAS_Q).
//
// A worker has one span. On fewer SMs than were planned for it goes on to the one that many workers further on, which it
// waits for.
struct Source {
    const Arguments& arguments;
    const Plan& plan;
    const int workers, lane;
    int span;

    int quiet = 0;           // how many plain tiles come next before which there is nothing to do
    int plain = 0;           // how many plain tiles were copied since the last other one
    int left = 0;            // tiles of the span yet to be copied
    int row = 0, head = 0, kv_len = 0, page_begin = 0;
    int tile = 0, first_tile = 0, end_tile = 0;  // in the group, from the row's position 0
    bool opens = false, whole = false;           // the next tile is its segment's first; the segment begins the group
    const char* head_base = nullptr;             // this KV head in page 0
    unsigned next_pages[BLOCKS];                 // of the next tile
    // A lane's page index: of page batch + lane of the row, of 32 pages on, of the first pages of the next group.
    int batch = 0, pages = 0, pages_after = 0, pages_then = 0;
    int next_kv_len = 0, next_page_begin = 0;    // of the next row
    uint32_t q[STEPS][2];                        // of a segment that has not opened yet, if q_held
    bool q_held = false, q_read = false;         // q_read: the latest segment's are in `q`

    __device__ __forceinline__ static int page_of(int tile) { return tile * BLOCKS / TILES_PER_PAGE; }
    __device__ __forceinline__ int first_tile_of(int length) const {
        return first_key(length, arguments.window) / TILE;
    }

    // Where lane finds its page index, of page `from` + lane of the row whose pages begin at `begin`.
    __device__ __forceinline__ const int* page_at(int begin, int length, int from) const {
        return arguments.kv_indices + begin + min(from + lane, (length - 1) / PAGE_SIZE);
    }

    // Begin the span; false if there is none.
    __device__ __forceinline__ bool enter_span() {
        if (span >= plan.max_spans) return false;
        const int4* record = reinterpret_cast<const int4*>(plan.spans + span);
        const int4 head_of = record[0], tail_of = record[1];
        if (head_of.w == 0 | tail_of.x == 0) return false;  // asked of both to read them at once
        row = head_of.x, head = head_of.y, tile = head_of.z, left = head_of.w;
        kv_len = tail_of.x, page_begin = tail_of.y;
        enter_row();
        pages = *page_at(page_begin, kv_len, page_of(tile));
        open(true);
        return true;
    }

    __device__ __forceinline__ void enter_row() {
        first_tile = first_tile_of(kv_len);
        end_tile = (kv_len + TILE - 1) / TILE;
    }

    // Go to the next group of the span.
    __device__ __forceinline__ void enter_group() {
        pages = pages_then;
        const bool new_row = ++head == arguments.num_kv_heads;
        if (new_row) {
            ++row, head = 0, kv_len = next_kv_len, page_begin = next_page_begin;
            enter_row();
        }
        tile = first_tile;
        open(new_row);
    }

    // Begin a segment at the tile.
    __device__ __forceinline__ void open(bool new_row) {
        opens = true, whole = tile == first_tile;
        head_base = arguments.kv + head * PAGE_BYTES;
        batch = page_of(tile);
        locate();  // before more is read: waiting for these pages could mean waiting for that as well
        read_ahead(new_row);
    }

    // Read what the segment just entered will need, and the one after it.
    __device__ __forceinline__ void read_ahead(bool new_row) {
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
        read_if(true, pages_after, page_at(page_begin, kv_len, batch + 32));
    }

    // Take up the following pages, if the next tile begins them; true if there is nothing else to do before that tile.
    __device__ __forceinline__ bool turn_pages() {
        if (left == 0 || tile == end_tile || page_of(tile) != batch + 32) return false;
        batch += 32, pages = pages_after;
        locate();  // before more is read, as above
        read_if(true, pages_after, page_at(page_begin, kv_len, batch + 32));
        count_quiet();
        return quiet > 0;
    }

    __device__ __forceinline__ void count_quiet() {
        const int batch_end = (batch + 32) * TILES_PER_PAGE / BLOCKS;
        quiet = min(min(left, end_tile - tile) - 1, batch_end - tile);
    }

    // Where the blocks of a tile are in memory.
    struct Aim {
        const char* block[BLOCKS];
    };

    // Of the next tile, worked out here.
    __device__ __forceinline__ Aim aim() const {
        Aim from;
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            from.block[i] = kept(head_base + tile % TILES_PER_PAGE * SLAB_BYTES +
                                 static_cast<uint64_t>(next_pages[i]) * unsigned(arguments.num_kv_heads * PAGE_BYTES));
        }
        return from;
    }

    // Start copying the next tile into a stage; false if there is none.
    __device__ __forceinline__ bool copy(uint32_t stage, uint32_t barrier, uint32_t note) {
        if (quiet > 0 || turn_pages()) {
            if (lane == 0) write_note(note, {PLAIN});
            copy_quiet(stage, barrier, aim());
            return true;
        }
        if (left == 0) {
            span += workers;
            if (!enter_span()) return false;
        } else if (tile == end_tile) {
            enter_group();
        }
        const int end = min(TILE, kv_len - tile * TILE);
        const int begin = max(0, first_key(kv_len, arguments.window) - tile * TILE);
        const bool group_ends = tile + 1 == end_tile;
        const int flags = (opens ? OPENS : 0) | (group_ends || left == 1 ? CLOSES : 0) |
                          (group_ends && whole ? WHOLE : 0) | (opens && q_read ? HAS_Q : 0) | begin << 8 | end << 16;
        if (lane == 0) write_note(note, {flags, row, head, part_slot(span, whole)});
        copy_tile(stage, barrier, end, aim());
        opens = false, plain = 0;
        count_quiet();
        return true;
    }

    // The same while `quiet` counts any, without a note, from where aim() said.
    __device__ __forceinline__ void copy_quiet(uint32_t stage, uint32_t barrier, const Aim& from) {
        copy_tile(stage, barrier, TILE, from);
        --quiet, ++plain;
    }

    // Where the next tile is: found early, while nobody waits for it.
    __device__ __forceinline__ void locate() {
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) next_pages[i] = __shfl_sync(ALL, pages, page_of(tile) + i - batch);
    }

    __device__ __forceinline__ void copy_tile(uint32_t stage, uint32_t barrier, int keys, const Aim& from) {
        if (elect_lane()) {
            barrier_arrive_expect(barrier, keys * HEAD_DIM * 4);
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                copy_block(stage + i * BLOCK_BYTES, from.block[i], min(BLOCK, keys - i * BLOCK), barrier);
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
