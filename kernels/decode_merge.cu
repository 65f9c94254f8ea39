// Merges the parts of groups that several spans share, after decode_attention.cu: see decode_plan.cuh.
//
// A CTA takes merges in turn. Of a group with few parts each warp merges one block of 16 columns; of one with many, all
// warps share the parts of one block. Parts are summed in the order of spans, so results are the same in every run.
//
// Configuration: WARPS of the CTA, 8: one for each block of 16 columns.
#include "decode_plan.cuh"
#include "hopper.cuh"

constexpr int THREADS = 32 * WARPS;
static_assert(FEW_PARTS == 8, "a warp reads the statistics of a part with four lanes");

struct Arguments {
    Parts parts;
    char* out;  // bf16
    int head_dim, group, out_stride;
};

// A lane's share of one block of columns, like that of a part.
struct Sum {
    float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
    float top0 = NEGATIVE_INFINITY, top1 = NEGATIVE_INFINITY, sum0 = 0.0f, sum1 = 0.0f;

    // Add up to 8 parts: `stats` of part lane / 4 and heads of lane % 4, `values` of all.
    __device__ __forceinline__ void add(const float4& stats, const float4 (&values)[FEW_PARTS], int lane) {
        const float new0 = fmaxf(top0, max_for_heads(stats.x)), new1 = fmaxf(top1, max_for_heads(stats.y));
        const float shrink0 = exp2_approximate(top0 - new0), shrink1 = exp2_approximate(top1 - new1);
        const float weight0 = exp2_approximate(stats.x - new0), weight1 = exp2_approximate(stats.y - new1);
        top0 = new0, top1 = new1;
        sum0 = sum0 * shrink0 + sum_for_heads(stats.z * weight0);
        sum1 = sum1 * shrink1 + sum_for_heads(stats.w * weight1);
        out.x *= shrink0, out.y *= shrink1, out.z *= shrink0, out.w *= shrink1;
#pragma unroll
        for (int i = 0; i < FEW_PARTS; ++i) {
            const float w0 = __shfl_sync(ALL, weight0, 4 * i + lane % 4);
            const float w1 = __shfl_sync(ALL, weight1, 4 * i + lane % 4);
            out.x += w0 * values[i].x, out.y += w1 * values[i].y, out.z += w0 * values[i].z, out.w += w1 * values[i].w;
        }
    }

    // Parts of spans begin, begin + stride, … last of a group that begins in span `first`; `block` of 16 columns.
    __device__ __forceinline__ void add_parts(
        const Arguments& arguments, int first, int last, int begin, int stride, int block, int lane) {
        const bool in_use = 2 * (lane % 4) < arguments.group;
        const int blocks = arguments.head_dim / 16;
        for (int span = begin; span <= last; span += FEW_PARTS * stride) {
            float4 stats = {NEGATIVE_INFINITY, NEGATIVE_INFINITY, 0.0f, 0.0f}, values[FEW_PARTS] = {};
            const int own = span + lane / 4 * stride;
            if (own <= last) stats = __ldcg(arguments.parts.stats + part_slot(own, own == first) * 4 + lane % 4);
#pragma unroll
            for (int i = 0; i < FEW_PARTS; ++i) {
                const int of = span + i * stride;
                const long long slot = part_slot(of, of == first);
                if (in_use && of <= last) {
                    values[i] = __ldcg(arguments.parts.out + (slot * blocks + block) * 32 + lane);
                }
            }
            add(stats, values, lane);
        }
    }

    __device__ __forceinline__ void write(const Arguments& arguments, const Merge& merge, int block, int lane) const {
        const float scale0 = reciprocal_approximate(sum0), scale1 = reciprocal_approximate(sum1);
        const uint32_t low = transpose_matrix(pack_bf16(out.x * scale0, out.y * scale1));
        const uint32_t high = transpose_matrix(pack_bf16(out.z * scale0, out.w * scale1));
        if (lane / 4 >= arguments.group) return;
        const int column = (merge.head * arguments.group + lane / 4) * arguments.head_dim + 16 * block + 2 * (lane % 4);
        uint32_t* to = reinterpret_cast<uint32_t*>(
            arguments.out + 2 * (static_cast<long long>(merge.row) * arguments.out_stride + column));
        to[0] = low, to[4] = high;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) decode_merge(
    void* plan_memory, float4* part_out, float4* part_stats, char* out, int head_dim, int group, int out_stride,
    int max_spans) {
    __shared__ float4 shared_stats[WARPS * 4], shared_out[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Arguments arguments = {{part_out, part_stats}, out, head_dim, group, out_stride};
    const Plan plan(plan_memory, max_spans);
    // The plan was there before attention began, and attention had begun before this kernel was launched.
    const int merges = plan.header->merges;
    Merge merge = plan.merges[min(blockIdx.x, max_spans - 1)];
    grid_dependency_wait();
    for (int index = blockIdx.x; index < merges; index += gridDim.x) {
        if (index != blockIdx.x) merge = plan.merges[index];
        Sum sum;
        if (merge.columns == ALL_COLUMNS) {
            if (warp >= head_dim / 16) continue;
            sum.add_parts(arguments, merge.first, merge.last, merge.first, 1, warp, lane);
            sum.write(arguments, merge, warp, lane);
            continue;
        }
        sum.add_parts(arguments, merge.first, merge.last, merge.first + warp, WARPS, merge.columns, lane);
        if (lane < 4) shared_stats[4 * warp + lane] = {sum.top0, sum.top1, sum.sum0, sum.sum1};
        shared_out[warp][lane] = sum.out;
        __syncthreads();
        if (warp == 0) {
            Sum all;
            float4 values[FEW_PARTS];
#pragma unroll
            for (int i = 0; i < FEW_PARTS; ++i) values[i] = shared_out[i][lane];
            all.add(shared_stats[lane], values, lane);
            all.write(arguments, merge, merge.columns, lane);
        }
        __syncthreads();
    }
}
