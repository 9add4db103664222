/* Lanes as threads of the system, for the sanitisers. */
#include <sched.h>

#include <atomic>
#include <memory>
#include <thread>

/* Waits for `count` threads. What orders memory is `simdgroup_barrier`, never a reduction: with
   relaxed operations the sanitiser sees no order, though on this machine there is one. */
struct Rendezvous {
    std::atomic<uint> arrived{0}, turn{0};

    void wait(uint count, bool orders) {
        auto both = orders ? std::memory_order_acq_rel : std::memory_order_relaxed;
        auto in = orders ? std::memory_order_acquire : std::memory_order_relaxed;
        auto out = orders ? std::memory_order_release : std::memory_order_relaxed;
        uint now = turn.load(in);
        if (arrived.fetch_add(1, both) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, out);
        } else {
            while (turn.load(in) == now) sched_yield();
        }
    }
};

struct Shared32 {
    Rendezvous ordering, bare;
    std::atomic<uint> posts[2][32];
};

static std::unique_ptr<Shared32[]> simdgroups;
static Rendezvous whole;
static thread_local Place here;
static thread_local unsigned met;
static thread_local uint values[32];

uint lane_index() { return here.thread_index_in_simdgroup; }

const uint *meet(Meeting meeting, int, int, uint mine) {
    if (meeting == Meeting::threadgroup) {
        whole.wait(here.simdgroups_per_threadgroup * 32, true);
        return values;
    }
    Shared32 &s = simdgroups[here.simdgroup_index_in_threadgroup];
    std::atomic<uint> *posts = s.posts[met++ % 2];
    posts[here.thread_index_in_simdgroup].store(mine, std::memory_order_relaxed);
    if (meeting == Meeting::simdgroup)
        s.ordering.wait(32, true);
    else
        s.bare.wait(32, false);
    for (int i = 0; i < 32; i++) values[i] = posts[i].load(std::memory_order_relaxed);
    return values;
}

static void lane_main(const Job &job, uint thread) {
    Flushing flushing(job.flush);
    uint3 n = groups_of(job);
    uint size = job.group.x * job.group.y * job.group.z;
    static Rendezvous between;
    for (uint g = 0; g < n.x * n.y * n.z; g++) {
        here = place_of(job, g, thread);
        met = 0;
        job.kernel(job.inputs, job.outputs, here);
        between.wait(size, true);
    }
}

const char *run_job(const Job &job) {
    const char *error = refused(job);
    if (*error) return error;
    uint size = job.group.x * job.group.y * job.group.z;
    simdgroups.reset(new Shared32[size / 32]);
    std::vector<std::thread> lanes;
    for (uint i = 0; i < size; i++) lanes.emplace_back([&job, i] { lane_main(job, i); });
    for (std::thread &lane : lanes) lane.join();
    return "";
}
