// In place of kernels/memory.cuh.
#pragma once
#include "hopper.cuh"

inline uint4 load_16(const void* source) {
    emulator::check_read(source, 16);
    return *static_cast<const uint4*>(source);
}
inline uint4 load_constant_16(const void* source) { return *static_cast<const uint4*>(source); }
inline int load_input(const int* source) { return *source; }

inline void prefetch_to_l2(const void*) {}

template <class Word>
void read_if(bool wanted, Word& value, const Word* from) {
    if (!wanted) return;
    emulator::check_read(from, sizeof(Word));
    value = *from;
}
inline uint32_t load_early(const uint32_t* from) {
    emulator::check_read(from, 4);
    return *from;
}

inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
inline float opaque(float x) { return x; }
template <class T>
T kept(const T& x) {
    return x;
}
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

inline uint4 pack_bf16(const float (&x)[8]) {
    return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

inline uint4 load_shared_16(uint32_t address) {
    emulator::begin_read(address);
    return *reinterpret_cast<const uint4*>(in_shared(address, 16));
}
inline void store_shared_16(uint32_t address, const uint4& v) { memcpy(const_cast<char*>(in_shared(address, 16)), &v, 16); }

inline void add_shared(uint32_t address, uint32_t value) {
    char* const at = const_cast<char*>(in_shared(address, 4));
    emulator::may_yield();
    *reinterpret_cast<uint32_t*>(at) += value;
}

inline void copy_4(void* target, const void* source) { emulator::copy(target, source, 4); }
inline void copies_commit() { emulator::commit_copies(); }
template <int GROUPS>
inline void copies_wait() {
    emulator::wait_for_copies(GROUPS);
}
