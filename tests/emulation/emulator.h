// What emulated kernels ask of the emulator. See emulator.cpp.
#pragma once
#include <cstdint>

struct Dim {
    unsigned x;
};

extern Dim threadIdx, blockIdx, blockDim, gridDim;
extern char shared_memory_bytes[];  // dynamic; kernels have a name of their own for it

namespace emulator {

extern int shared_bytes;       // of dynamic shared memory
extern bool dependencies_met;  // grid_dependency_wait() was called in this CTA

// End the launch; the caller is told.
[[noreturn]] void fail(const char* why);

// All threads of the CTA; returns how many of them came with a true predicate.
int meet_cta(bool predicate);

// All lanes of the warp; `kind` must be the same for all. Returns what each lane brought, up to MOST_WORDS words of it,
// until the warp's next meeting but one.
constexpr int MOST_WORDS = 6;
struct Brought {
    int kind;
    uint32_t words[MOST_WORDS];
};
const Brought* meet_warp(int kind, const uint32_t* words, int count);

// Sometimes let others go first: where threads race, so that tests see more than one outcome.
void may_yield();

// Bytes that a kernel reads by wide loads and bulk copies have to lie in the arrays of the launch.
void check_read(const void* source, int bytes);

// Copies in the background that a thread waits for itself (cp.async).
void copy(void* target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int groups_left);

// Barriers in shared memory, by their offset there, and bulk copies that complete on them.
void init_barrier(uint32_t barrier, uint32_t arrivals);
void arrive_expecting(uint32_t barrier, uint32_t bytes);
void wait_for_barrier(uint32_t barrier, uint32_t parity);
void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier);

// 16 bytes of shared memory are read, and nobody knows when, until this thread's reads are known to be over: a bulk copy to
// where a lane of its warp reads might come first.
void begin_read(uint32_t address);
void end_reads();

}  // namespace emulator
