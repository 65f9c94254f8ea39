// The ceilings that memory-bound kernels are measured against. See stream.py.
//
// Configuration: PIECE bytes.
#include "memory.cuh"

// Read memory and drop it. Every warp copies pieces of PIECE bytes into its ring of stages in shared memory; worker i
// reads pieces i, i + workers, i + 2 workers, …
extern "C" __global__ void __launch_bounds__(256) stream_read(const char* memory, int pieces, int stages) {
    extern __shared__ __align__(1024) char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t ring = shared_address(shared) + warp * stages * PIECE;
    const uint32_t barriers = shared_address(shared) + warps * stages * PIECE + warp * stages * 8;
    if (lane < stages) barrier_init(barriers + 8 * lane, 1);
    barrier_init_fence();
    __syncwarp();
    grid_dependency_wait();

    const int workers = warps * gridDim.x;
    int next = warp * gridDim.x + blockIdx.x, copying = 0;
    const auto copy = [&](int stage) {
        if (next >= pieces) return 0;
        if (elect_lane()) {
            barrier_arrive_expect(barriers + 8 * stage, PIECE);
            bulk_copy(ring + stage * PIECE, memory + static_cast<uint64_t>(next) * PIECE, PIECE,
                      barriers + 8 * stage, EVICT_FIRST);
        }
        next += workers;
        return 1;
    };
    for (int stage = 0; stage < stages; ++stage) copying += copy(stage);
    for (int stage = 0, parity = 0; copying > 0;) {
        barrier_wait(barriers + 8 * stage, parity);
        __syncwarp();
        copying += copy(stage) - 1;
        if (++stage == stages) stage = 0, parity ^= 1;
    }
}

extern "C" __global__ void __launch_bounds__(1024) stream_copy(const uint4* source, uint4* target, int64_t vectors) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < vectors) __stcs(target + at, load_16(source + at));  // evicted first: written back early and in order
}
