// In place of kernels/memory.cuh.
#pragma once
#include "hopper.cuh"

inline uint4 load_16(const void* source) {
    emulator::check_read(source, 16);
    return *static_cast<const uint4*>(source);
}
inline uint4 load_constant_16(const void* source) { return *static_cast<const uint4*>(source); }
inline int load_input(const int* source) { return *source; }

inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
inline float opaque(float x) { return x; }
inline int thread_index_anew() { return static_cast<int>(threadIdx.x); }

// As max.bf16x2: of NaN and a number the number.
inline uint32_t max_bf16(uint32_t a, uint32_t b) {
    auto higher = [](float x, float y) { return __float_as_uint(fmaxf(x, y)) & 0xFFFF0000u; };
    return higher(bf16_high(a), bf16_high(b)) | higher(bf16_low(a), bf16_low(b)) >> 16;
}

inline void unpack_bf16(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) x[2 * i] = bf16_low(words[i]), x[2 * i + 1] = bf16_high(words[i]);
}

inline uint4 load_shared_16(uint32_t address) {
    if (address % 16 || address + 16 > static_cast<uint32_t>(emulator::shared_bytes)) emulator::fail("a read beyond shared memory");
    return *reinterpret_cast<const uint4*>(shared_memory_bytes + address);
}

inline void add_shared(uint32_t address, uint32_t value) {
    if (address % 4 || address + 4 > static_cast<uint32_t>(emulator::shared_bytes)) emulator::fail("an addition beyond shared memory");
    emulator::may_yield();
    *reinterpret_cast<uint32_t*>(shared_memory_bytes + address) += value;
}

inline void copy_4(void* target, const void* source) { emulator::copy(target, source, 4); }
inline void copies_commit() { emulator::commit_copies(); }
template <int GROUPS>
inline void copies_wait() {
    emulator::wait_for_copies(GROUPS);
}
