// Prefill attention over a paged KV cache on Hopper: see prefill_attention.py for the arrays and the algorithm.
//
// A CTA is one producer warpgroup, whose warps take work (0), copy K (1) and V (2) and load queries (3), and two
// consumer warpgroups, which multiply and store. They hand things over through barriers in shared memory.
//
// Configuration: HEAD_DIM (64, 128), CLUSTER (1, 2): CTAs that share a tile, SHARED_BYTES of a CTA.
#include "prefill_consumer.cuh"
#include "prefill_producer.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 + 32 * CONSUMER_WARPS, 1)
    prefill_attention(const uint8_t* q, const uint8_t* cache, uint8_t* out, Plan* plan, const int* kv_indices,
                      int q_stride, int num_kv_heads, int page_shift, int group_size, int inverse_group, int window,
                      float scale_log2) {
    if (threadIdx.x == 0) {
        shared->scale_log2 = scale_log2;
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(&shared->item_full[i]), 1);
            barrier_init(shared_address(&shared->item_empty[i]), CLUSTER * CONSUMER_WARPS);
            barrier_init(shared_address(&shared->q_full[i]), 32);
        }
        for (int i = 0; i < K_STAGES; ++i) {
            barrier_init(shared_address(&shared->k_full[i]), 1);
            barrier_init(shared_address(&shared->k_empty[i]), CLUSTER * CONSUMER_WARPS);
        }
        for (int i = 0; i < V_STAGES; ++i) {
            barrier_init(shared_address(&shared->v_full[i]), 1);
            barrier_init(shared_address(&shared->v_empty[i]), CLUSTER * CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
    grid_dependency_wait();
    const Group group{group_size, inverse_group};
    if (threadIdx.x < 128) {
        release_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
        if (warp == 0 && cluster_rank() == 0) produce_items(plan, num_kv_heads);
        if (warp == 1) produce_kv<false>(cache, kv_indices, num_kv_heads, page_shift, window);
        if (warp == 2) produce_kv<true>(cache, kv_indices, num_kv_heads, page_shift, window);
        if (warp == 3) produce_q(q, int64_t(q_stride) * 2, group);
        grid_dependency_launch();
    } else {
        claim_registers<CONSUMER_REGISTERS>();
        consume(out, num_kv_heads, group, window);
    }
    __syncwarp();
    cluster_sync();  // no CTA leaves while others may still write to its shared memory
}
