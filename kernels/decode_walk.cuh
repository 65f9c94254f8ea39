// What a worker of decode_attention.cu copies next.
#pragma once
#include "decode_shared.cuh"

// Walks the tiles of this worker's spans: span by span, in a span group by group (what it has of one is a segment), in a
// segment tile by tile. The same in all lanes but for page indices (one per lane) and a ticket just drawn (lane 0's).
//
// A copy starts one tile, a ring of stages ahead of the products. What it needs was asked for earlier still, so that the
// walk seldom waits for memory:
// - Most tiles are plain, and before most of these there is nothing to do: they are counted off in `quiet`, and where they
//   are was found when the tile before was copied (`next_pages`).
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
    unsigned next_pages[BLOCKS];                 // of the next tile
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
        if (quiet > 0) {
            if (lane == 0) write_note(note, {PLAIN});
            copy_quiet(stage, barrier, aim());
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
        copy_tile(stage, barrier, end, aim());
        opens = false;
        const int batch_end = (batch + 32) * TILES_PER_PAGE / BLOCKS;
        quiet = min(min(min(left, end_tile - tile) - 1, batch_end - tile), left - due());
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
