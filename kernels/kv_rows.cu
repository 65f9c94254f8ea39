// Where each token's keys and values go, worked out once per step for all layers. See rope_append.py.
//
// Configuration: PAGE_SIZE.
#include "hopper.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) kv_rows(
    int* rows,              // [*] page · PAGE_SIZE + offset of each token
    const int* positions,   // [*]
    const int* qo_indptr,   // [sequences + 1]
    const int* kv_indptr,   // [sequences + 1]
    const int* kv_indices,
    const int* num_tokens,  // [1]
    const int* num_seqs) {  // [1]
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = *num_tokens;
    for (int token = blockIdx.x * THREADS + threadIdx.x; token < end; token += gridDim.x * THREADS) {
        // The last sequence that starts at or before the token.
        int low = 0, high = *num_seqs - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (qo_indptr[middle] <= token)
                low = middle;
            else
                high = middle - 1;
        }
        const int position = positions[token];
        const int page = kv_indices[kv_indptr[low] + position / PAGE_SIZE];
        rows[token] = page * PAGE_SIZE + position % PAGE_SIZE;
    }
}
