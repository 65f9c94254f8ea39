// In place of kernels/hopper.cuh: CUDA's own words on a CPU, and the wrappers of PTX that emulated kernels use.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // what the CTA before left is still there
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// CUDA's 64-bit integers are long long, those of <cstdint> may not be; kernels name them themselves.
using cuda_int64 = long long;
using cuda_uint64 = unsigned long long;
#define int64_t cuda_int64
#define uint64_t cuda_uint64

struct alignas(8) int2 {
    int x, y;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct alignas(16) int4 {
    int x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

// ---- Threads ----

enum Meeting { SYNC, ANY, SHUFFLE, ELECT, LOAD_MATRICES, TRANSPOSE, MULTIPLY };

inline unsigned lane_of_thread() { return threadIdx.x % 32; }
inline void __syncthreads() { emulator::meet_cta(false); }
inline int __syncthreads_count(int predicate) { return emulator::meet_cta(predicate); }
inline void __syncwarp() { emulator::meet_warp(SYNC, nullptr, 0); }
inline bool __any_sync(unsigned, bool predicate) {
    const uint32_t word = predicate;
    const emulator::Brought* const lanes = emulator::meet_warp(ANY, &word, 1);
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= lanes[i].words[0];
    return any;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    static_assert(sizeof(T) == 4);
    uint32_t word;
    memcpy(&word, &value, 4);
    word = emulator::meet_warp(SHUFFLE, &word, 1)[lane & 31].words[0];
    memcpy(&value, &word, 4);
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, lane_of_thread() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
    const int lane = static_cast<int>(lane_of_thread()) - lanes;
    return __shfl_sync(mask, value, lane < 0 ? lane_of_thread() : lane);
}
// The lanes that came with the same value.
template <class T>
uint32_t __match_any_sync(unsigned mask, T value) {
    uint32_t same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= static_cast<uint32_t>(__shfl_sync(mask, value, lane) == value) << lane;
    return same;
}
inline uint32_t __ballot_sync(unsigned mask, bool predicate) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>(__shfl_sync(mask, int(predicate), lane)) << lane;
    return lanes;
}
inline bool elect_lane() { return emulator::meet_warp(ELECT, nullptr, 0), lane_of_thread() == 0; }
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
T __ldg(const T* from) {
    return *from;
}

// ---- Atomic operations ----

template <class T>
T exchange(T* at, T value) {
    const T before = *at;
    *at = value;
    return before;
}
template <class T, class U>
T atomicAdd(T* at, U value) {
    emulator::may_yield();
    return exchange(at, static_cast<T>(*at + value));
}
template <class T>
T atomicOr(T* at, T value) {
    emulator::may_yield();
    return exchange(at, *at | value);
}
template <class T>
T atomicMin(T* at, T value) {
    emulator::may_yield();
    return exchange(at, *at < value ? *at : value);
}
template <class T>
T atomicMax(T* at, T value) {
    emulator::may_yield();
    return exchange(at, *at > value ? *at : value);
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
    emulator::may_yield();
    return exchange(at, *at == expected ? value : *at);
}
inline uint32_t atomicInc(uint32_t* at, uint32_t most) { return exchange(at, *at >= most ? 0u : *at + 1); }

// ---- Arithmetic ----

inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // nothing is fused: see emulated_kernel.py
inline float __fadd_rn(float a, float b) { return a + b; }
template <class A, class B>
auto min(A a, B b) {
    using Both = std::common_type_t<A, B>;
    return static_cast<Both>(a) < static_cast<Both>(b) ? static_cast<Both>(a) : static_cast<Both>(b);
}
template <class A, class B>
auto max(A a, B b) {
    using Both = std::common_type_t<A, B>;
    return static_cast<Both>(a) > static_cast<Both>(b) ? static_cast<Both>(a) : static_cast<Both>(b);
}
inline float exp2_approximate(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;  // denormal numbers are flushed
}
inline float reciprocal_approximate(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline uint32_t round_to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }

// ---- As in kernels/hopper.cuh ----

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - shared_memory_bytes);
}
inline void grid_dependency_wait() { emulator::dependencies_met = true; }
inline void grid_dependency_launch() {}
inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulator::init_barrier(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::arrive_expecting(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::wait_for_barrier(barrier, parity); }
constexpr uint64_t EVICT_FIRST = 0, EVICT_NORMAL = 1;
inline void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier, uint64_t) {
    emulator::bulk_copy(target, source, bytes, barrier);
}
inline void async_proxy_fence() { emulator::end_reads(); }
inline uint32_t known_after(uint32_t value, uint32_t address, uint32_t zero) {
    emulator::end_reads();
    return address ^ (value & zero);
}
inline void global_async_proxy_fence() {}

// ---- Matrix fragments ----

inline const char* in_shared(uint32_t address, uint32_t bytes) {
    if (address % bytes || address + bytes > static_cast<uint32_t>(emulator::shared_bytes)) emulator::fail("an access beyond shared memory");
    return shared_memory_bytes + address;
}

// Element (row, column) of the 8 × 8 matrix whose rows are at the addresses that 8 lanes brought.
inline uint32_t matrix_element(const emulator::Brought* rows, int row, int column) {
    uint16_t element;
    memcpy(&element, in_shared(rows[row].words[0], 16) + 2 * column, 2);
    return element;
}

inline void load_matrices(uint32_t (&fragment)[4], uint32_t row) {
    emulator::begin_read(row);
    const emulator::Brought* const lanes = emulator::meet_warp(LOAD_MATRICES, &row, 1);
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    for (int i = 0; i < 4; ++i)
        fragment[i] = matrix_element(lanes + 8 * i, g, 2 * t) | matrix_element(lanes + 8 * i, g, 2 * t + 1) << 16;
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t row) {
    emulator::begin_read(row);
    const emulator::Brought* const lanes = emulator::meet_warp(LOAD_MATRICES, &row, 1);
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    for (int i = 0; i < 4; ++i)
        fragment[i] = matrix_element(lanes + 8 * i, 2 * t, g) | matrix_element(lanes + 8 * i, 2 * t + 1, g) << 16;
}

// Of a pair of bf16 values the first or the second.
inline uint32_t half_of(uint32_t pair, int which) { return pair >> 16 * which & 0xFFFF; }
inline float float_of(uint32_t pair, int which) { return __uint_as_float(half_of(pair, which) << 16); }

inline uint32_t transpose_matrix(uint32_t values) {
    const emulator::Brought* const lanes = emulator::meet_warp(TRANSPOSE, &values, 1);
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    const auto element = [=](int row, int column) { return half_of(lanes[4 * row + column / 2].words[0], column % 2); };
    return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const emulator::Brought* const lanes = emulator::meet_warp(MULTIPLY, words, 6);
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    for (int i = 0; i < 4; ++i) {
        const int lower = i / 2, column = 2 * t + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const float left = float_of(lanes[4 * g + k % 8 / 2].words[lower + 2 * (k / 8)], k % 2);
            sum += left * float_of(lanes[4 * column + k % 8 / 2].words[4 + k / 8], k % 2);
        }
        d[i] += sum;
    }
}
