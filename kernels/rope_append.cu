// One pass over qkv: norm and rotate heads, append keys and values to the paged cache. See rope_append.py for the arrays.
//
// A thread has the same 16 columns — vector c of the first half of a head and its partner in the second half — of the K
// head, the V head and every query head of one group of one token. So the angles are read once for all of them, and what
// the K head must know of the V head is in the same lanes.
//
// Configuration: HEAD_DIM (64, 128), PAGE_SIZE, QK_NORM.
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int CTAS_PER_SM = 2;
constexpr int LANES = HEAD_DIM / 16;  // threads that share a head
constexpr int AT_ONCE = 4;            // query heads in flight
constexpr int HALF = LANES;           // vectors from a value to its partner
constexpr int64_t HEAD_BYTES = static_cast<int64_t>(PAGE_SIZE) * HEAD_DIM * 2;  // K or V of a page and head
constexpr uint32_t NANS = 0x7FC07FC0u;

struct Pair {
    uint4 first, second;
};

__device__ __forceinline__ Pair load_pair(const uint4* source) { return {load_16(source), load_16(source + HALF)}; }

__device__ __forceinline__ void store_pair(uint4* target, const Pair& pair) {
    target[0] = pair.first;
    target[HALF] = pair.second;
}

// Root-mean-square norm over a head, whose LANES threads are neighbours.
__device__ __forceinline__ void norm_head(float (&x)[8], float (&y)[8], const Pair& weight, float eps) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], fmaf(y[j], y[j], squares));
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    const float factor = rsqrtf(squares / HEAD_DIM + eps);
    float w[8];
    unpack_bf16(weight.first, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= factor * w[j];
    unpack_bf16(weight.second, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] *= factor * w[j];
}

__device__ __forceinline__ Pair rotate(const Pair& pair, const uint4 (&angles)[4], const Pair& weight, float eps) {
    float x[8], y[8];
    unpack_bf16(pair.first, x);
    unpack_bf16(pair.second, y);
    if constexpr (QK_NORM) norm_head(x, y, weight, eps);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float cosine = __uint_as_float(j % 2 ? angles[j / 2].z : angles[j / 2].x);
        const float sine = __uint_as_float(j % 2 ? angles[j / 2].w : angles[j / 2].y);
        const float a = x[j], b = y[j];
        x[j] = a * cosine - b * sine;
        y[j] = b * cosine + a * sine;
    }
    return {pack_bf16(x), pack_bf16(y)};
}

// Replace values that are not finite by 0; whether there were any.
__device__ __forceinline__ bool clear_non_finite(uint4& v) {
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool low = (words[i] & 0x7F80u) == 0x7F80u, high = (words[i] & 0x7F800000u) == 0x7F800000u;
        if (low) words[i] &= 0xFFFF0000u;
        if (high) words[i] &= 0xFFFFu;
        found |= low | high;
    }
    v = {words[0], words[1], words[2], words[3]};
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) rope_append(
    const uint4* qkv,     // [*, (group + 2) · kv_heads · HEAD_DIM] bf16
    uint4* q,             // [*, q_stride vectors]; may be `qkv` itself
    char* kv,             // [pages, kv_heads, 2, HEAD_DIM / 64, PAGE_SIZE, 64] bf16, rows swizzled
    const uint4* table,   // fp32 [positions, HEAD_DIM / 2] pairs (cosine, sine)
    const int* rows,      // [*] row of the cache
    const int* positions,
    const uint4* q_norm,  // [HEAD_DIM] bf16, QK_NORM
    const uint4* k_norm,
    const int* count,     // [1] tokens there are
    int start,
    int stop,
    int group,
    int kv_heads,
    int q_stride,
    float eps) {
    const int lane = threadIdx.x % LANES;
    Pair q_weight = {}, k_weight = {};
    if constexpr (QK_NORM) {
        q_weight = {q_norm[lane], q_norm[lane + HALF]};
        k_weight = {k_norm[lane], k_norm[lane + HALF]};
    }
    grid_dependency_launch();
    const int end = min(stop, load_input(count));
    const int per_token = kv_heads * LANES;
    const int stride = (group + 2) * kv_heads * 2 * LANES;  // vectors of a row of qkv
    // Whole CTAs go on together: lanes of a head exchange values.
    for (int base = blockIdx.x * THREADS; start + base / per_token < end; base += gridDim.x * THREADS) {
        const int item = base + threadIdx.x;
        const int wanted = start + item / per_token;
        const bool valid = wanted < end;
        const int token = valid ? wanted : end - 1;  // idle lanes read what is there and store nothing
        const int head = item % per_token / LANES;
        const uint4* const source = qkv + static_cast<int64_t>(token) * stride + lane;
        const uint4* const own =
            table + static_cast<int64_t>(load_input(positions + token)) * (HEAD_DIM / 4) + 4 * lane;
        uint4 angles[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) angles[i] = load_constant_16(own + i);
        grid_dependency_wait();

        const Pair k = load_pair(source + (group * kv_heads + head) * 2 * LANES);
        Pair v = load_pair(source + ((group + 1) * kv_heads + head) * 2 * LANES);
        const int row = rows[token];
        const uint4* const heads = source + head * group * 2 * LANES;
        uint4* const target = q + static_cast<int64_t>(token) * q_stride + head * group * 2 * LANES + lane;

        for (int first = 0; first < group; first += AT_ONCE) {
            Pair x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < group) x[i] = load_pair(heads + (first + i) * 2 * LANES);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < group) {
                    const Pair rotated = rotate(x[i], angles, q_weight, eps);
                    if (valid) store_pair(target + (first + i) * 2 * LANES, rotated);
                }
        }

        // Attention multiplies values of masked positions by zero, and 0 · NaN is NaN: values that are not finite would
        // leak into the next owner of the page. They are stored as 0 and their key as NaN, which a mask does cover.
        Pair key = rotate(k, angles, k_weight, eps);
        const bool broken = clear_non_finite(v.first) | clear_non_finite(v.second);
        const uint32_t heads_lanes = ((1u << LANES) - 1) << (threadIdx.x % 32 / LANES * LANES);
        if (__ballot_sync(~0u, broken) & heads_lanes) key = {{NANS, NANS, NANS, NANS}, {NANS, NANS, NANS, NANS}};
        if (valid) {
            const int offset = row % PAGE_SIZE;
            char* const page = kv + (static_cast<int64_t>(row / PAGE_SIZE) * kv_heads + head) * 2 * HEAD_BYTES;
            constexpr int SECOND_SLAB = HEAD_DIM == 128 ? PAGE_SIZE * 128 : 0;  // bytes
            const int second_chunk = HEAD_DIM == 128 ? lane : lane + HALF;
            const int first_at = offset * 128 + (lane ^ (offset % 8)) * 16;
            const int second_at = SECOND_SLAB + offset * 128 + (second_chunk ^ (offset % 8)) * 16;
            *reinterpret_cast<uint4*>(page + first_at) = key.first;
            *reinterpret_cast<uint4*>(page + second_at) = key.second;
            *reinterpret_cast<uint4*>(page + HEAD_BYTES + first_at) = v.first;
            *reinterpret_cast<uint4*>(page + HEAD_BYTES + second_at) = v.second;
        }
    }
    grid_dependency_wait();  // CTAs without work as well: the kernel must not end before those it depends on
}
