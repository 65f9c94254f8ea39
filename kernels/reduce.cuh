// Sums, maxima and scans over all threads of a CTA. Every thread calls them, with the same `scratch` in shared memory:
// 32 values of the type reduced. Results are the same in every run. They are the same in all threads if combine(a, b) and
// combine(b, a) agree to the last bit; if they do not, let one thread's result count wherever all must agree.
#pragma once
#include "hopper.cuh"

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

template <class T, class Shuffle>
__device__ __forceinline__ T shuffle_words(const T& value, Shuffle shuffle) {
    static_assert(sizeof(T) % 4 == 0, "moved in words of 4 bytes");
    T result;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i)
        reinterpret_cast<uint32_t*>(&result)[i] = shuffle(reinterpret_cast<const uint32_t*>(&value)[i]);
    return result;
}

template <class T, class Combine>
__device__ __forceinline__ T reduce_lanes(T value, Combine combine) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        value = combine(value, shuffle_words(value, [&](uint32_t word) { return __shfl_xor_sync(~0u, word, offset); }));
    return value;
}

template <class T, class Combine>
__device__ __forceinline__ T reduce_threads(T value, const T& identity, void* scratch, Combine combine) {
    T* const partial = static_cast<T*>(scratch);
    value = reduce_lanes(value, combine);
    __syncthreads();  // others may still read what the last call left
    if (lane_index() == 0) partial[warp_index()] = value;
    __syncthreads();
    return reduce_lanes(lane_index() < static_cast<int>(blockDim.x / 32) ? partial[lane_index()] : identity, combine);
}

template <class T>
__device__ __forceinline__ T sum_threads(const T& value, void* scratch) {
    return reduce_threads(value, T{}, scratch, [](const T& a, const T& b) { return a + b; });
}

template <class T>
__device__ __forceinline__ T scan_lanes(T value) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T before = shuffle_words(value, [&](uint32_t word) { return __shfl_up_sync(~0u, word, offset); });
        if (lane_index() >= offset) value = before + value;
    }
    return value;
}

// Sum of the values of all threads before this one; `total` becomes the sum of all.
template <class T>
__device__ __forceinline__ T scan_threads(const T& value, T& total, void* scratch) {
    T* const partial = static_cast<T*>(scratch);
    const T inclusive = scan_lanes(value);
    __syncthreads();
    if (lane_index() == 31) partial[warp_index()] = inclusive;
    __syncthreads();
    const int warps = blockDim.x / 32;
    const T sums = scan_lanes(lane_index() < warps ? partial[lane_index()] : T{});
    auto of_lane = [&](const T& values, int lane) {
        return shuffle_words(values, [&](uint32_t word) { return __shfl_sync(~0u, word, lane); });
    };
    total = of_lane(sums, warps - 1);
    const T of_warps = of_lane(sums, max(warp_index() - 1, 0));
    const T of_lanes = shuffle_words(inclusive, [&](uint32_t word) { return __shfl_up_sync(~0u, word, 1); });
    T before{};
    if (warp_index() > 0) before = of_warps;
    if (lane_index() > 0) before = before + of_lanes;
    return before;
}
