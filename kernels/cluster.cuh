// Clusters of CTAs: shared memory and barriers of the other CTAs, and copies that land in all of them.
#pragma once

#include "hopper.cuh"

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Address, for the *_cluster functions, of what lies at `address` in the shared memory of the CTA of this rank.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Wait for every thread of the cluster; their earlier accesses to shared memory are visible afterwards.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrive at a barrier of any CTA. Says that this thread has read what the barrier guards, and no more: it does not make
// this thread's writes visible to other CTAs, which would cost a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and make this thread's writes visible to those that wait with barrier_wait_acquire.
__device__ __forceinline__ void barrier_arrive_release(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait_acquire(uint32_t barrier, uint32_t parity) {
    barrier_wait(barrier, parity);
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
}

__device__ __forceinline__ void store_cluster(uint32_t target, int4 value) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// bulk_copy to the same place in every CTA whose bit in `ranks` is set; completes on the same barrier of each.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t destination, const void* source, uint32_t bytes,
                                                  uint32_t barrier, unsigned short ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(destination),
        "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier), "h"(ranks)
        : "memory");
}
