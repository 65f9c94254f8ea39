// Thin wrappers of PTX that several kernels use: barriers in shared memory, bulk copies, matrix fragments, order of
// launches.
//
// Shared memory is addressed by 32-bit shared-window addresses (`shared_address`). Names follow the PTX ISA; "asm
// volatile" with a memory clobber keeps the order in which they are written.
#pragma once

using uint32_t = unsigned int;  // NVRTC brings no <cstdint>
using uint64_t = unsigned long long;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// True in one lane of the warp, which must be converged. The compiler knows that what is inside `if (elect_lane())`
// runs in one lane, which spares bulk copies a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(elected)::"memory");
    return elected;
}

// ---- Order of launches (programmatic dependent launch) ----

// Wait until the kernels this one depends on have ended and their writes are visible; returns at once otherwise.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the dependent kernel start launching; what this kernel has yet to write is still waited for by its wait.
__device__ __forceinline__ void grid_dependency_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- Barriers in shared memory (mbarrier) ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After barrier_init and before the barrier's first use by the copy engine or another thread (which also needs a
// __syncthreads or __syncwarp).
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and expect `bytes` of copies to complete on the barrier in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait for the phase of this parity (0, 1, 0, …) to complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- Bulk copies ----

// L2 policies: of data that is read once, and of data that may be read again.
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000;

// Copy `bytes` (a multiple of 16, both sides 16-byte aligned) from global to shared memory; completes on `barrier`.
__device__ __forceinline__ void bulk_copy(
    uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(destination),
        "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Order this thread's own accesses to shared memory before later bulk copies and WGMMA operands (the async proxy). Reads
// too: one that is held up, e.g. behind other warps' stores, is overtaken by a copy into what it reads, even by one that is
// begun after the read was issued and a barrier has been arrived at.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for its own accesses to global memory.
__device__ __forceinline__ void global_async_proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same address, known only once the value is. A read whose value has been used is over, so a copy to this address
// comes after the read: a cheaper order than a fence's, which waits for more. `zero` is 0, but the compiler does not know
// that.
__device__ __forceinline__ uint32_t known_after(uint32_t value, uint32_t address, uint32_t zero) {
    return address ^ (value & zero);
}

// ---- Matrix fragments (mma.sync) ----

// Four 8 × 8 matrices of bf16: lane l gives the address of row l % 8 (16 bytes) of matrix l / 8, and receives row
// l / 4, columns 2 (l % 4) and + 1 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}

// The same matrices, each transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}

// Transpose an 8 × 8 matrix of bf16 that a warp holds as two values of a row per lane.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t values) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(values));
    return result;
}

// d (16 × 8, fp32) += a (16 × 16) · b (16 × 8), bf16. Lane l holds, with g = l / 4 and t = l % 4: a[0], a[1] rows g
// and g + 8 of columns 2t, 2t + 1, a[2], a[3] the same of columns + 8; b0, b1 rows 2t, 2t + 1 and + 8 of column g;
// d[0], d[1] row g of columns 2t, 2t + 1, d[2], d[3] row g + 8.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to bf16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
