/* After the kernels: `run` for ctypes, and a program for the sanitisers, which must be loaded first. */

static std::vector<Kernel *> variants();

extern "C" int run(int variant, void **inputs, void **outputs, const uint *grid, const uint *group,
                   int backwards, int flush, char *error, size_t room) {
    Job job;
    job.kernel = variants()[size_t(variant)];
    job.inputs = inputs;
    job.outputs = outputs;
    job.grid = {grid[0], grid[1], grid[2]};
    job.group = {group[0], group[1], group[2]};
    job.backwards = backwards;
    job.flush = flush;
    const char *found = run_job(job);
    std::snprintf(error, room, "%s", found);
    return *found ? 1 : 0;
}

/* Standard input: variant, backwards, flush, grid, group, and the numbers of inputs and outputs as
   uint32, then the size in bytes of each, then the inputs. Standard output: the outputs. */
#ifdef PROGRAM
static void read_all(void *to, size_t size) {
    if (std::fread(to, 1, size, stdin) != size) std::abort();
}

int main() {
    uint head[11];
    read_all(head, sizeof head);
    std::vector<uint> bytes(head[9] + head[10]);
    read_all(bytes.data(), bytes.size() * sizeof(uint));
    std::vector<std::vector<char>> arrays;
    std::vector<void *> inputs, outputs;
    for (uint size : bytes) arrays.emplace_back(size);
    for (size_t i = 0; i < arrays.size(); i++) {
        if (i < head[9]) read_all(arrays[i].data(), arrays[i].size());
        (i < head[9] ? inputs : outputs).push_back(arrays[i].data());
    }
    char error[200];
    int failed = run(int(head[0]), inputs.data(), outputs.data(), head + 3, head + 6, int(head[1]),
                     int(head[2]), error, sizeof error);
    if (failed) std::fprintf(stderr, "%s\n", error);
    for (size_t i = head[9]; i < arrays.size(); i++)
        std::fwrite(arrays[i].data(), 1, arrays[i].size(), stdout);
    return failed;
}
#endif
