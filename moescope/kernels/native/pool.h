/* A pool of threads that runs phases: so many chunks of a task, taken one by one.
 *
 * A phase is over when its last chunk is done, not when every thread has arrived: a thread that the
 * system has put aside between two chunks holds nobody up. Whoever does the last chunk prepares the
 * next phase. The caller takes part, so a pool of one thread has no other, and a pool whose threads
 * are gone (after a fork) still finishes.
 */
#ifndef MOESCOPE_POOL_H
#define MOESCOPE_POOL_H

#include "moescope_kernels.h"

/* Does chunk `index`; `thread` is in 0 .. threads - 1. */
typedef void (*mk_chunk)(void *job, int index, int thread);

/* Prepares the next phase and returns how many chunks it has; 0 ends the job. */
typedef int (*mk_next)(void *job, mk_chunk *chunk);

enum { MK_MOST_CHUNKS = 65535, MK_MOST_THREADS = 256 };

/* Runs phases until `next` returns 0. One call at a time. */
void mk_pool_run(mk_pool *pool, mk_next next, void *job);

#endif
