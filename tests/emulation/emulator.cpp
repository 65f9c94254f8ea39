// Runs a kernel's CTAs on a CPU, one after the other. The threads of a CTA are fibers: one runs until it has to wait — at a
// barrier, for its warp, for a copy — or gives way at an atomic operation, and who is next is drawn. Copies in the background
// are done at once, as late as they may be, or either by chance. So what a kernel must not rely on differs from run to run,
// and what happens depends on the seed alone.
//
// A launch fails, with a reason, where a kernel would hang, read beyond its arrays, leave copies under way, or might have them
// overtake its reads.
#include "emulator.h"

#include <csetjmp>
#include <cstring>
#include <map>
#include <string>
#include <ucontext.h>
#include <vector>

Dim threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) char shared_memory_bytes[227 * 1024];  // the most that a CTA of compute capability 9.0 has

namespace emulator {

int shared_bytes;
bool dependencies_met;

namespace {

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;

struct Copy {
    void* target;
    const void* source;
    int bytes;
};

enum class Waits { NOT, FOR_CTA, FOR_WARP };

struct Fiber {
    std::vector<char> stack;
    ucontext_t beginning;
    jmp_buf place;
    bool begun, done, predicate;
    Waits waits;
    unsigned meetings;                        // of its warp so far
    std::vector<std::vector<Copy>> committed;  // groups of copies, oldest first
    std::vector<Copy> open;
    std::vector<uint32_t> reads;  // of shared memory, perhaps under way
};

struct Barrier {
    uint32_t arrivals, missing;
    long bytes;
    unsigned phase;
};

struct BulkCopy {
    uint32_t target;
    const void* source;
    uint32_t bytes, barrier;
};

struct Range {
    const char *begin, *end;
    bool constant;
};

enum Promptness { AT_ONCE, LATE, BY_CHANCE };

Fiber fibers[MOST_THREADS];
Brought brought[2][MOST_THREADS];  // two, since one lane may come to the next while others still look at the last
std::map<uint32_t, Barrier> barriers;
std::vector<BulkCopy> bulk_copies;
std::vector<Range> readable;
int promptness, cta_count;
uint32_t random_state;
jmp_buf scheduler, launch_end;
std::string failure;
void (*start)(void**);
void** arguments;

uint32_t draw() {  // xorshift; Marsaglia 2003
    random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
    return random_state;
}

bool late() { return promptness == LATE || (promptness == BY_CHANCE && draw() % 2); }

Fiber& self() { return fibers[threadIdx.x]; }

void yield(Waits waits) {
    const unsigned own = threadIdx.x;
    fibers[own].waits = waits;
    if (!_setjmp(fibers[own].place)) _longjmp(scheduler, 1);
    threadIdx.x = own;
}

void begin_fiber() {
    start(arguments);
    self().done = true;
    commit_copies();
    for (const auto& group : self().committed)
        if (!group.empty()) fail("a thread ends with copies under way");
    _longjmp(scheduler, 1);
}

void run(int thread) {
    threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.beginning);
}

void reset(Fiber& fiber) {
    fiber.stack.resize(STACK_BYTES);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack = {fiber.stack.data(), 0, STACK_BYTES};
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, begin_fiber, 0);
    fiber.begun = fiber.done = false;
    fiber.waits = Waits::NOT;
    fiber.meetings = 0;
    fiber.committed.clear(), fiber.open.clear(), fiber.reads.clear();
}

// Let everyone of a warp go on who has met the others.
bool release_warp(int first) {
    for (int i = first; i < first + WARP; ++i)
        if (fibers[i].done || fibers[i].waits != Waits::FOR_WARP) return false;
    for (int i = first; i < first + WARP; ++i) fibers[i].waits = Waits::NOT;
    return true;
}

bool release_cta(int threads) {
    int count = 0;
    for (int i = 0; i < threads; ++i) {
        if (fibers[i].done || fibers[i].waits != Waits::FOR_CTA) return false;
        count += fibers[i].predicate;
    }
    cta_count = count;
    for (int i = 0; i < threads; ++i) fibers[i].waits = Waits::NOT;
    return true;
}

void run_cta(int threads) {
    memset(shared_memory_bytes, 0xCD, sizeof shared_memory_bytes);
    barriers.clear(), bulk_copies.clear();
    dependencies_met = false;
    for (int i = 0; i < threads; ++i) reset(fibers[i]);
    const int warps = threads / WARP;
    std::vector<bool> lags(warps);
    for (bool alive = true; alive;) {
        bool went_on = false, lagging = false;
        alive = false;
        if (draw() % 8 == 0)
            for (int warp = 0; warp < warps; ++warp) lags[warp] = draw() % 2;
        for (int i = 0, from = draw() % warps; i < warps; ++i) {
            const int warp = (from + i) % warps, turn = draw() % WARP;
            if (lags[warp]) {
                lagging = alive = true;
                continue;
            }
            for (int lane = 0; lane < WARP; ++lane) {
                const int thread = warp * WARP + (turn + lane) % WARP;
                if (!fibers[thread].done && fibers[thread].waits == Waits::NOT) run(thread), went_on = true;
                alive |= !fibers[thread].done;
            }
            went_on |= release_warp(warp * WARP);
        }
        went_on |= release_cta(threads);
        if (!went_on && lagging)
            lags.assign(warps, false);
        else if (!went_on && alive)
            fail("threads wait for each other forever");
    }
    if (!bulk_copies.empty()) fail("a CTA ends with bulk copies under way");
}

Barrier& barrier_at(uint32_t offset) {
    const auto found = barriers.find(offset);
    if (found == barriers.end()) fail("a barrier that was not initialised");
    return found->second;
}

void complete(Barrier& barrier) {
    if (!barrier.missing && !barrier.bytes) ++barrier.phase, barrier.missing = barrier.arrivals;
}

void do_copy(const BulkCopy& copy) {
    memcpy(shared_memory_bytes + copy.target, copy.source, copy.bytes);
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.bytes;
    complete(barrier);
}

}  // namespace

void fail(const char* why) {
    failure = std::string(why) + " (CTA " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
    _longjmp(launch_end, 1);
}

int meet_cta(bool predicate) {
    self().predicate = predicate;
    yield(Waits::FOR_CTA);
    return cta_count;
}

const Brought* meet_warp(int kind, const uint32_t* words, int count) {
    const unsigned own = threadIdx.x, first = own / WARP * WARP;
    Brought* const meeting = brought[self().meetings++ % 2];
    meeting[own].kind = kind;
    memcpy(meeting[own].words, words, count * sizeof *words);
    yield(Waits::FOR_WARP);
    for (int i = 0; i < WARP; ++i)
        if (meeting[first + i].kind != kind) fail("lanes of a warp meet at different places");
    return meeting + first;
}

void may_yield() {
    if (draw() % 64 == 0) yield(Waits::NOT);
}

void check_read(const void* source, int bytes) {
    const char* const begin = static_cast<const char*>(source);
    for (const Range& range : readable) {
        if (begin < range.begin || range.end < begin + bytes) continue;
        if (!dependencies_met && !range.constant) fail("a read of what the kernel before may still write");
        return;
    }
    fail("a read beyond the arrays");
}

void copy(void* target, const void* source, int bytes) {
    if (late())
        self().open.push_back({target, source, bytes});
    else
        memcpy(target, source, bytes);
}

void commit_copies() {
    self().committed.push_back(self().open);
    self().open.clear();
}

void wait_for_copies(int groups_left) {
    auto& groups = self().committed;
    for (; static_cast<int>(groups.size()) > groups_left; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front()) memcpy(copy.target, copy.source, copy.bytes);
}

void init_barrier(uint32_t barrier, uint32_t arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0}; }

void arrive_expecting(uint32_t offset, uint32_t bytes) {
    Barrier& barrier = barrier_at(offset);
    if (!barrier.missing) fail("one arrival too many at a barrier");
    barrier.bytes += bytes;
    --barrier.missing;
    complete(barrier);
}

void wait_for_barrier(uint32_t offset, uint32_t parity) {
    for (int tries = 0; barrier_at(offset).phase % 2 == parity; ++tries) {
        std::vector<BulkCopy> due, others;
        for (const BulkCopy& copy : bulk_copies) (copy.barrier == offset ? due : others).push_back(copy);
        bulk_copies = others;
        for (const BulkCopy& copy : due) do_copy(copy);
        if (tries > 100000) fail("a barrier that never completes");
        if (due.empty()) yield(Waits::NOT);
    }
}

void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
    if ((reinterpret_cast<uintptr_t>(source) | target | bytes) % 16) fail("a bulk copy that is not aligned");
    if (target + bytes > static_cast<uint32_t>(shared_bytes)) fail("a bulk copy beyond shared memory");
    check_read(source, bytes);
    const int first = threadIdx.x / WARP * WARP;
    for (int i = first; i < first + WARP; ++i)
        for (uint32_t read : fibers[i].reads)
            if (read + 16 > target && read < target + bytes) fail("a bulk copy that may overtake a read");
    memset(shared_memory_bytes + target, 0xEE, bytes);  // nobody may read there any more what was there
    const BulkCopy copy{target, source, bytes, barrier};
    if (late())
        bulk_copies.push_back(copy);
    else
        do_copy(copy);
}

void begin_read(uint32_t address) { self().reads.push_back(address); }

void end_reads() { self().reads.clear(); }

}  // namespace emulator

// Run `entry`, which takes `values` apart. Returns why it failed; null if it did not.
extern "C" const char* emulate(
    void (*entry)(void**), void** values, int grid, int block, int shared_bytes, int promptness, int seed, int arrays,
    int constants, const char** begins, const long* sizes) {
    using namespace emulator;
    start = entry, arguments = values;
    emulator::shared_bytes = shared_bytes, emulator::promptness = promptness;
    random_state = static_cast<uint32_t>(seed) * 2654435761u | 1;
    readable.clear();
    for (int i = 0; i < arrays; ++i) readable.push_back({begins[i], begins[i] + sizes[i], i < constants});
    gridDim.x = grid, blockDim.x = block;
    if (_setjmp(launch_end)) return failure.c_str();
    for (int cta = 0; cta < grid; ++cta) blockIdx.x = cta, run_cta(block);
    return nullptr;
}
