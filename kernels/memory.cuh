// Vectors of 8 bf16 values (16 bytes, the widest access of a thread) and their fp32 values.
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

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

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

__device__ __forceinline__ void add_shared(uint32_t address, uint32_t value) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
