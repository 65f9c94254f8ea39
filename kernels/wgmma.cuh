// Warpgroup matrix products (wgmma, sm_90a) on bf16 operands with fp32 accumulators.
//
// A product is asynchronous: it starts with mma_*, belongs to the group closed by the next wgmma_commit, and its
// accumulators and register operands belong to the tensor core until wgmma_wait says that the group has ended.
// Lane l of warp w of the warpgroup holds, of a 64 × N accumulator, d[4j + 2h + e]: row 16w + 8h + l/4, column
// 8j + 2(l%4) + e. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "hopper.cuh"

// ---- Warpgroups ----

// Named barriers: `threads` threads, in whole warps, arrive at barrier `id` (1 to 15) or also wait for the others.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Every warp of a warpgroup gives up registers down to, or waits for registers up to, `Count` per thread.
template <int Count>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// Store four 8 × 8 matrices of bf16: lane l gives the address of row l % 8 of matrix l / 8. Undoes load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(fragment[0]),
                 "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

// ---- Products ----

// Order register and shared-memory accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `Pending` of the latest groups are still running.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keep the compiler from moving uses of an accumulator across this point; costs nothing.
template <int Count>
__device__ __forceinline__ void wgmma_pin(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a bf16 operand in shared memory under the 128-byte swizzle: 128-byte rows, 16-byte chunk c of row r at
// chunk c ^ (r % 8), groups of 8 rows 1024 bytes apart; `address` is that of a row with r % 8 == 0 (+ 32 bytes for each
// step of 16 columns inside the 64 of a row). `panel_bytes` separates panels of 64 columns where an MN-major operand
// is wider than one; K-major operands do not use it.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, uint32_t panel_bytes) {
    constexpr uint64_t rows = uint64_t(1024 >> 4) << 32, swizzle_128 = uint64_t(1) << 62;
    return swizzle_128 | rows | uint64_t(panel_bytes >> 4) << 16 | uint64_t((address & 0x3FFFF) >> 4);
}

#define WGMMA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D16(i) WGMMA_D4(i), WGMMA_D4(i + 4), WGMMA_D4(i + 8), WGMMA_D4(i + 12)

// d (64 × 128) = a·bᵀ + (accumulate ? d : 0) over 16 columns; a (64 rows) and b (128) K-major in shared memory.
__device__ __forceinline__ void mma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}\n"
        : WGMMA_D16(0), WGMMA_D16(16), WGMMA_D16(32), WGMMA_D16(48)
        : "l"(a), "l"(b), "r"(int(accumulate)));
}

// d (64 × 128) = a·b + (accumulate ? d : 0) over 16 rows of b; a in registers in the layout of bf16 pairs of an
// accumulator (rows r, r + 8, then columns + 8), b MN-major in shared memory: 16 rows of 128 columns.
__device__ __forceinline__ void mma_64xNx16(float (&d)[64], const uint32_t* a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : WGMMA_D16(0), WGMMA_D16(16), WGMMA_D16(32), WGMMA_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}

// The same for 64 columns.
__device__ __forceinline__ void mma_64xNx16(float (&d)[32], const uint32_t* a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
        : WGMMA_D16(0), WGMMA_D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}

#undef WGMMA_D4
#undef WGMMA_D16
