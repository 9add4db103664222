/* Lanes as fibers of one thread: fast, the same every time, and a lane that goes its own way is
   found at once. */
#include <ucontext.h>

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Place place;
    bool done, waiting;
    Meeting meeting;
    int kind, line;
    unsigned met;  /* meetings of its simdgroup so far */
};

static std::vector<Fiber> fibers;
static std::vector<Simdgroup> simdgroups;
static ucontext_t scheduler;
static Fiber *current;
static const Job *running;

uint lane_index() { return current->place.thread_index_in_simdgroup; }

const uint *meet(Meeting meeting, int kind, int line, uint mine) {
    Fiber &f = *current;
    uint *posts = simdgroups[f.place.simdgroup_index_in_threadgroup].posts[f.met++ % 2];
    posts[f.place.thread_index_in_simdgroup] = mine;
    f.waiting = true;
    f.meeting = meeting;
    f.kind = kind;
    f.line = line;
    swapcontext(&f.context, &scheduler);
    return posts;
}

static void fiber_main() {
    running->kernel(running->inputs, running->outputs, current->place);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

static void start(Fiber &f, const Place &place) {
    f.stack.resize(256 * 1024);
    f.place = place;
    f.done = f.waiting = false;
    f.met = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
}

/* Releases the fibers [first, last) if all of them wait at one and the same operation. */
static bool release(size_t first, size_t last, bool whole_group, std::string &error) {
    const Fiber &one = fibers[first];
    size_t waiting = 0, here = 0;
    for (size_t i = first; i < last; i++) {
        const Fiber &f = fibers[i];
        if (f.done || !f.waiting) continue;
        waiting++;
        here += (f.meeting == Meeting::threadgroup) == whole_group;
    }
    if (waiting == 0 || (here == 0)) return false;
    if (here < last - first) {
        if (!whole_group || waiting == here) error = "lanes do not all come to an operation";
        return false;
    }
    for (size_t i = first; i < last; i++) {
        if (fibers[i].kind != one.kind || fibers[i].line != one.line) {
            error = "lanes are at different operations: lines " + std::to_string(one.line) +
                    " and " + std::to_string(fibers[i].line);
            return false;
        }
        fibers[i].waiting = false;
    }
    return true;
}

static std::string run_group(const Job &job, uint group) {
    uint size = job.group.x * job.group.y * job.group.z;
    fibers.resize(size);
    simdgroups.resize(size / 32);
    for (uint i = 0; i < size; i++) start(fibers[i], place_of(job, group, i));
    std::string error;
    for (;;) {
        for (uint i = 0; i < size; i++) {
            Fiber &f = fibers[job.backwards ? size - 1 - i : i];
            if (f.done || f.waiting) continue;
            current = &f;
            swapcontext(&scheduler, &f.context);
        }
        bool progress = false, over = true;
        for (const Fiber &f : fibers) over = over && f.done;
        if (over) return "";
        for (uint s = 0; s < size; s += 32) progress |= release(s, s + 32, false, error);
        if (!progress && error.empty()) progress = release(0, size, true, error);
        if (!error.empty()) return error;
        if (!progress) return "lanes wait for each other";
    }
}

const char *run_job(const Job &job) {
    static std::string error;
    Flushing flushing(job.flush);
    running = &job;
    uint3 n = groups_of(job);
    uint groups = n.x * n.y * n.z;
    error = refused(job);
    for (uint g = 0; g < groups && error.empty(); g++)
        error = run_group(job, job.backwards ? groups - 1 - g : g);
    return error.c_str();
}
