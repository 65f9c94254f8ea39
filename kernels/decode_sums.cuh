// What a worker of decode_attention.cu does with a tile that has arrived: its two products and the softmax between them.
#pragma once
#include "decode_shared.cuh"

constexpr float RAISE = 8.0f;

// Shared-memory offset of the fragment of 16 keys and 16 columns: K has slabs 0 … HALVES - 1, V those after.
__device__ __forceinline__ constexpr int fragment_offset(int subtile, int step, int slab) {
    return 16 * subtile / BLOCK * BLOCK_BYTES + (slab + step / 4) * SLAB_BYTES + 16 * subtile % BLOCK * 128;
}

using Scores = float[SUBTILES][4];            // lane (g, t): keys g and g + 8 of 16, heads 2t and 2t + 1
using Weights = Scores;                       // of the softmax, where the scores were
using Keys = uint32_t[STEPS][4];              // of 16 keys
using Values = uint32_t[SUBTILES][STEPS][4];  // lane (g, t): columns g and g + 8, keys 2t, 2t + 1, and 8 on

// 16 keys of a tile; `k_tile` is lane's fragment address.
__device__ __forceinline__ void load_keys(Keys& keys, uint32_t k_tile, int subtile) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) load_matrices(keys[k], (k_tile ^ k % 4 * 32) + fragment_offset(subtile, k, 0));
}

// K·Qᵀ of 16 keys. Two sums per score halve the chain of dependent products.
__device__ __forceinline__ void multiply_keys(float (&scores)[4], const Keys& keys, const uint32_t (&q)[STEPS][2]) {
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; ++k) mma_16x8x16(k % 2 ? odd : even, keys[k], q[k][0], q[k][1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[e] = even[e] + odd[e];
}

__device__ __forceinline__ void load_values(Values& values, uint32_t v_tile) {
#pragma unroll
    for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            load_matrices_transposed(values[i][j], (v_tile ^ j % 4 * 32) + fragment_offset(i, j, HALVES));
        }
    }
}

// The same address, known only once all of a tile has been read: its scores are known, and a word of each fragment of its
// values, which is read for all lanes at once. The compiler reads the last of these first.
__device__ __forceinline__ uint32_t known_after_tile(
    const Scores& scores, const Values& values, uint32_t address, uint32_t zero) {
    uint32_t words = 0;
#pragma unroll
    for (int i = SUBTILES - 1; i >= 0; --i) {
        words ^= __float_as_uint(scores[i][0]);
#pragma unroll
        for (int j = STEPS - 1; j >= 0; --j) words ^= values[i][j][0];
    }
    return known_after(words, address, zero);
}

// Keys outside [begin, end) are not the row's: they count nothing, whatever is there.
__device__ __forceinline__ void hide_keys(Scores& scores, Values& values, int begin, int end, int lane) {
    const auto hidden = [=](int key) { return key < begin || key >= end; };
#pragma unroll
    for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int of_score = 16 * i + 8 * h + lane / 4, of_value = 16 * i + 8 * h + 2 * (lane % 4);
            if (hidden(of_score)) scores[i][2 * h] = scores[i][2 * h + 1] = NEGATIVE_INFINITY;
            const uint32_t seen = (hidden(of_value) ? 0 : 0xFFFF) | (hidden(of_value + 1) ? 0 : 0xFFFF0000);
#pragma unroll
            for (int j = 0; j < STEPS; ++j) values[i][j][2 * h] &= seen, values[i][j][2 * h + 1] &= seen;
        }
    }
}

// Softmax-weighted sum of values so far. Lane (g, t) = (lane / 4, lane % 4) has heads 2t and 2t + 1 of columns
// 16j + g (out[j][0], [1]) and 16j + 8 + g (out[j][2], [3]); sums are of the lane's own keys until summed up.
struct Accumulator {
    float out[STEPS][4];
    float top[2], sum[2];  // top: the exponent (base 2) that weights are relative to

    __device__ __forceinline__ void clear() {
        top[0] = top[1] = NEGATIVE_INFINITY;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
    }

    __device__ __forceinline__ void raise(float top0, float top1) {
        const float shrink0 = exp2_approximate(top[0] - top0), shrink1 = exp2_approximate(top[1] - top1);
        top[0] = top0, top[1] = top1;
        sum[0] *= shrink0, sum[1] *= shrink1;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            out[j][0] *= shrink0, out[j][1] *= shrink1, out[j][2] *= shrink0, out[j][3] *= shrink1;
        }
    }

    // Softmax weights of a tile's scores, relative to the exponents so far.
    __device__ __forceinline__ void weigh(Weights& weights, const Scores& scores, float scale_log2) const {
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) weights[i][e] = exp2_approximate(scores[i][e] * scale_log2 - top[e % 2]);
        }
    }

    // Raise the exponents if scores exceed them by far, and weigh these again. That is rare, so they are not waited for
    // to be compared.
    __device__ __forceinline__ void make_room(Weights& weights, const Scores& scores, float scale_log2) {
        float top0 = scores[0][0], top1 = scores[0][1];
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
            top0 = fmaxf(top0, fmaxf(scores[i][0], scores[i][2]));
            top1 = fmaxf(top1, fmaxf(scores[i][1], scores[i][3]));
        }
        top0 *= scale_log2, top1 *= scale_log2;
        if (__any_sync(ALL, top0 > top[0] + RAISE || top1 > top[1] + RAISE)) {
            raise(fmaxf(top[0], max_for_heads(top0)), fmaxf(top[1], max_for_heads(top1)));
            weigh(weights, scores, scale_log2);
        }
    }

    // Add a tile, Vᵀ·Pᵀ. A transposed pair of weights is the product's operand.
    __device__ __forceinline__ void add(const Weights& weights, const Values& values) {
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e % 2] += weights[i][e];
            const uint32_t low = transpose_matrix(pack_bf16(weights[i][0], weights[i][1]));
            const uint32_t high = transpose_matrix(pack_bf16(weights[i][2], weights[i][3]));
#pragma unroll
            for (int j = 0; j < STEPS; ++j) mma_16x8x16(out[j], values[i][j], low, high);
        }
    }

    // Write what a segment adds up to.
    __device__ __forceinline__ void close(const Arguments& arguments, const Note& note, int lane) {
        sum[0] = sum_for_heads(sum[0]), sum[1] = sum_for_heads(sum[1]);
        if (note.flags & WHOLE) {
            write(arguments, note.row, note.head, lane);
        } else {
            store(arguments, note.slot, lane);
        }
    }

    __device__ __forceinline__ void write(const Arguments& arguments, int row, int head, int lane) const {
        const float scale0 = reciprocal_approximate(sum[0]), scale1 = reciprocal_approximate(sum[1]);
        const long long column = (head * arguments.group + lane / 4) * HEAD_DIM + 2 * (lane % 4);
        uint32_t* to = reinterpret_cast<uint32_t*>(
            arguments.out + 2 * (static_cast<long long>(row) * arguments.out_stride + column));
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const uint32_t low = transpose_matrix(pack_bf16(out[j][0] * scale0, out[j][1] * scale1));
            const uint32_t high = transpose_matrix(pack_bf16(out[j][2] * scale0, out[j][3] * scale1));
            if (lane / 4 < arguments.group) to[8 * j] = low, to[8 * j + 4] = high;
        }
    }

    __device__ __forceinline__ void store(const Arguments& arguments, int slot, int lane) const {
        if (lane < 4) arguments.parts.stats[slot * 4 + lane] = {top[0], top[1], sum[0], sum[1]};
        if (2 * (lane % 4) >= arguments.group) return;
        float4* to = arguments.parts.out + static_cast<long long>(slot) * STEPS * 32 + lane;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) to[32 * j] = {out[j][0], out[j][1], out[j][2], out[j][3]};
    }
};
