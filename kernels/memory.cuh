// Accesses to global and shared memory, vectors of 8 bf16 values (16 bytes, the widest access of a thread), and words that
// hold the compiler to an order.
#pragma once
#include "hopper.cuh"

using int64_t = long long;

// Data that is read once passes by L1.
__device__ __forceinline__ uint4 load_16(const void* source) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(source))
                 : "memory");
    return v;
}

// Data that no kernel writes, and that is read again; stays on its side of grid_dependency_wait().
__device__ __forceinline__ uint4 load_constant_16(const void* source) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(source))
                 : "memory");
    return v;
}

// Batch arrays are copied to the device before the step's first kernel, so they may be read while the kernel before still
// runs; this keeps such a read on its side of grid_dependency_wait().
__device__ __forceinline__ int load_input(const int* source) {
    int value;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(source)) : "memory");
    return value;
}

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Reads that nobody waits for before their value is used. As plain conditional reads they would be waited for where control
// flow joins again.
template <class Word>
__device__ __forceinline__ void read_if(bool wanted, Word& value, const Word* from) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.b32 %0, [%1];\n}\n"
                 : "+r"(value)
                 : "l"(from), "r"(int(wanted))
                 : "memory");
}

__device__ __forceinline__ uint32_t load_early(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// The same value, which the compiler does not know: what follows from it is worked out anew where it is needed.
__device__ __forceinline__ float opaque(float x) {
    asm("" : "+f"(x));
    return x;
}

// The same value, worked out here and kept: where it is used it is not worked out anew, nor what follows from it before.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ uint4 kept(uint4 v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
    return v;
}

template <class T>
__device__ __forceinline__ const T* kept(const T* x) {
    asm volatile("" : "+l"(x));
    return x;
}

// The index, read again: what follows from it is not kept in registers from one use to the next.
__device__ __forceinline__ int thread_index_anew() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// The higher ones of two pairs.
__device__ __forceinline__ uint32_t max_bf16(uint32_t a, uint32_t b) {
    uint32_t highest;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(highest) : "r"(a), "r"(b));
    return highest;
}

__device__ __forceinline__ void unpack_bf16(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = bf16_low(words[i]);
        x[2 * i + 1] = bf16_high(words[i]);
    }
}

__device__ __forceinline__ uint4 pack_bf16(const float (&x)[8]) {
    return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void add_shared(uint32_t address, uint32_t value) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Copies from global to shared memory in the background, for this thread's own eyes until a barrier. copies_commit() makes
// a group of those since the last, and copies_wait<N>() waits for all groups but the last N.
__device__ __forceinline__ void copy_4(void* target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)),
                 "l"(__cvta_generic_to_global(source))
                 : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
