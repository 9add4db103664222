/* Walks the grid of a launch: threadgroups one after another, their lanes as fibers or threads. */
#ifndef MOESCOPE_METAL_ENGINE_H
#define MOESCOPE_METAL_ENGINE_H

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <cstdio>
#include <string>
#include <vector>

#include "metal_shim.h"

/* Where a lane is, as the attributes of Metal tell it. */
struct Place {
    uint3 threadgroup_position_in_grid, threadgroups_per_grid, threads_per_threadgroup;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup;
    uint simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};

typedef void Kernel(void **inputs, void **outputs, const Place &place);

struct Job {
    Kernel *kernel;
    void **inputs, **outputs;
    uint3 grid, group;  /* in threads */
    int backwards;      /* lanes and threadgroups in reverse */
    int flush;          /* denormal float32 are 0, as on GPUs of Apple */
};

/* Posts are kept for two meetings in turn: nobody posts to one again before all have read it. */
struct Simdgroup {
    uint posts[2][32];
};

const char *run_job(const Job &job);

#if defined(__x86_64__)
enum : uint64_t { FLUSH = 0x8040 }; /* results, and operands */
inline uint64_t control() { return _mm_getcsr(); }
inline void set_control(uint64_t word) { _mm_setcsr(unsigned(word)); }
#elif defined(__aarch64__)
enum : uint64_t { FLUSH = 1u << 24 };
inline uint64_t control() {
    uint64_t word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
}
inline void set_control(uint64_t word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#endif

/* Sets flush-to-zero for as long as it lives. */
struct Flushing {
    uint64_t before;
    explicit Flushing(int on) : before(control()) { set_control(on ? before | FLUSH : before); }
    ~Flushing() { set_control(before); }
};

inline uint3 groups_of(const Job &job) {
    return {(job.grid.x + job.group.x - 1) / job.group.x,
            (job.grid.y + job.group.y - 1) / job.group.y,
            (job.grid.z + job.group.z - 1) / job.group.z};
}

inline Place place_of(const Job &job, uint group, uint thread) {
    uint3 n = groups_of(job);
    uint size = job.group.x * job.group.y * job.group.z;
    Place p;
    p.threadgroup_position_in_grid = {group % n.x, group / n.x % n.y, group / (n.x * n.y)};
    p.threadgroups_per_grid = n;
    p.threads_per_threadgroup = job.group;
    p.thread_index_in_threadgroup = thread;
    p.thread_index_in_simdgroup = thread % 32;
    p.simdgroup_index_in_threadgroup = thread / 32;
    p.simdgroups_per_threadgroup = size / 32;
    return p;
}

/* "" where the grid is one that the engines walk, else why not. */
inline const char *refused(const Job &job) {
    uint size = job.group.x * job.group.y * job.group.z;
    if (size == 0 || size % 32 || size > 1024) return "a threadgroup is of 32 to 1024 threads";
    if (job.grid.x % job.group.x || job.grid.y % job.group.y || job.grid.z % job.group.z)
        return "the grid is not of whole threadgroups";
    return "";
}

#ifdef THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

extern "C" int run(int variant, void **inputs, void **outputs, const uint *grid, const uint *group,
                   int backwards, int flush, char *error, size_t room);

#endif
