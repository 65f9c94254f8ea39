// Decode attention over paged KV: one query token per row, softmax(q·Kᵀ·scale)·V for every query head.
//
// Every warp is a worker of its own: it takes a span of the plan (decode_plan.cuh), copies its KV tile by tile into
// its ring of stages in shared memory, and refills a stage once its fragments are in registers. So there is
// nothing to synchronise between warps. What it copies next is decode_walk.cuh's business, what becomes of a tile
// decode_sums.cuh's.
//
// Both products have the group's query heads as the 8 columns of mma.m16n8k16: Sᵀ (keys × heads) = K·Qᵀ and
// Oᵀ (head_dim × heads) += Vᵀ·Pᵀ. KV fills the 16 rows, so no tensor-core work is wasted on a group of 8, and each byte
// of KV is read from shared memory once. Online softmax: Milakov and Gimelshein, arXiv 1805.02867; its maximum is only
// raised when a weight would exceed 2^RAISE, which rounds no worse and spares reductions. What a span has of a group
// that it shares is left to decode_merge.cu: merging here would need a fence at gpu scope per part, which takes
// microseconds while the memory system is full.
//
// On few SMs a warp's own instructions are what limits it, with two other warps to take turns with. So the output of a
// tile is worked out while the next one is waited for and read (as in FlashAttention-3, Shah et al., arXiv 2407.08608),
// and nine tiles of ten, which need nothing else, go through a loop that has nothing else.
//
// Configuration: HEAD_DIM (64, 128), PAGE_SIZE (16, 32, 64), TILE keys per stage, WARPS of the CTA.
#include "decode_sums.cuh"
#include "decode_walk.cuh"

template <bool PLAIN_ONLY>
struct Tiles {
    static constexpr bool all_plain = PLAIN_ONLY;  // those in the ring, and the next to be copied
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) decode_attention(
    const char* q, const char* kv, char* out, const int* kv_lens, const int* kv_indptr, const int* kv_indices,
    void* plan_memory, float4* part_out, float4* part_stats, int num_kv_heads, int group, int q_stride,
    int out_stride, int window, int max_spans, int stages, float scale_log2) {
    extern __shared__ __align__(1024) char shared_memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Kept, or they are computed anew for every tile.
    const uint32_t all_notes = shared_address(shared_memory) + WARPS * stages * STAGE_BYTES;
    const uint32_t ring = kept(shared_address(shared_memory) + warp * stages * STAGE_BYTES);
    const uint32_t notes = kept(all_notes + warp * stages * sizeof(Note));
    const uint32_t barriers = kept(all_notes + WARPS * stages * sizeof(Note) + warp * stages * 8);
    // 0, as stages are few; worked out from an argument, because the assembler would see a constant.
    const uint32_t zero = kept(uint32_t(stages) >> 16);
    if (lane < stages) barrier_init(barriers + 8 * lane, 1);
    barrier_init_fence();
    __syncwarp();
    grid_dependency_wait();

    const Arguments arguments = {
        q, kv, out, kv_lens, kv_indptr, kv_indices, {part_out, part_stats},
        num_kv_heads, group, q_stride, out_stride, window, scale_log2};
    const Plan plan(plan_memory, max_spans);
    Source source{arguments, plan, WARPS * int(gridDim.x), lane, warp * int(gridDim.x) + int(blockIdx.x)};
    if (!source.enter_span()) return;

    // Lane's fragment addresses in stage 0; the step is in the address bits that the swizzle flips.
    const uint32_t k_lane = kept(ring + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16);
    const uint32_t v_lane = kept(ring + (lane % 8 + lane / 16 * 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16);

    int copying = 0, stage = 0, parity = 0;
    for (int i = 0; i < stages; ++i) {
        copying += source.copy(ring + i * STAGE_BYTES, barriers + 8 * i, notes + i * sizeof(Note));
    }
    __syncwarp();
    Note next = read_note(notes);

    // The tile before: its weights, its values, what is noted about it. In the beginning none.
    uint32_t q_now[STEPS][2];
    Accumulator sums;
    sums.clear();
    Weights weights = {};
    Values values = {};
    Note before = {};

    // Add the tile before; take the tile in the stage into registers, weigh it, and copy another there.
    const auto take_tile = [&](auto tiles) {
        constexpr bool ALL_PLAIN = tiles.all_plain;
        const uint32_t k_tile = k_lane + stage * STAGE_BYTES, v_tile = v_lane + stage * STAGE_BYTES;
        const uint32_t barrier = barriers + 8 * stage;
        uint32_t to = ring + stage * STAGE_BYTES;
        const Note note = next;
        const int flags = ALL_PLAIN ? PLAIN : note.flags;
        Source::Aim from;
        if constexpr (ALL_PLAIN) from = source.aim();
        sums.add(weights, values);
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

        Keys keys;
        Scores scores;
        load_keys(keys, k_tile, 0);
        load_values(values, v_tile);
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
            if (i > 0) load_keys(keys, k_tile, i);
            multiply_keys(scores[i], keys, q_now);
        }
        const auto advance = [&] {
            if (++stage == stages) stage = 0, parity ^= 1;
        };

        // The stage is refilled once nothing is on its way from there any more: of a plain tile in the end, when that costs
        // least, of others at once, as a segment may be closed before the tile is done with.
        if constexpr (!ALL_PLAIN) {
            async_proxy_fence();
            __syncwarp();
            if (!source.copy(to, barrier, notes + stage * sizeof(Note))) {
                --copying;
                grid_dependency_launch();
            }
            advance();
            if (before.flags & CLOSES) sums.close(arguments, before, lane);
            if (flags & OPENS) sums.clear();
            before = note;
        }
        if ((flags & ~0xFF) != PLAIN) hide_keys(scores, values, flags >> 8 & 0xFF, flags >> 16, lane);
        sums.weigh(weights, scores, scale_log2);
        __syncwarp();
        if constexpr (ALL_PLAIN) {
            to = known_after_tile(scores, values, to, zero);
            source.copy_quiet(to, barrier, from);
            advance();
        } else {
            next = read_note(notes + stage * sizeof(Note));
        }
        sums.make_room(weights, scores, scale_log2);
    };
    while (copying > 0) {
        take_tile(Tiles<false>{});
        if (source.plain >= stages) {
            do {
                while (source.quiet > 0) take_tile(Tiles<true>{});
            } while (source.turn_pages());
        }
    }
    sums.add(weights, values);
    sums.close(arguments, before, lane);
}
