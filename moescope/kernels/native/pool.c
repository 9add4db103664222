#define _POSIX_C_SOURCE 200809L /* nanosleep */

#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ __volatile__("isb")
#else
#define PAUSE() ((void)0)
#endif

enum { SPINS_INSIDE = 4000, SPINS_BETWEEN = 2000 }; /* about 100 and 50 microseconds */

/* `ticket` says everything about the present phase in one word: its serial number (32 bits), how
 * many chunks it has (16) and which is next (16). A thread owns the chunk it moves the word past;
 * serial numbers never repeat, so nobody takes a chunk of a phase that is over. */
struct mk_pool {
    _Alignas(128) _Atomic uint64_t ticket;
    _Alignas(128) _Atomic int left; /* chunks of the phase that are not done */
    _Alignas(128) mk_chunk chunk;   /* read by owners of a chunk only, as are the next two */
    mk_next next;
    void *job;
    _Atomic bool finished;
    _Alignas(128) _Atomic int asleep;
    _Atomic bool closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int threads;
    pthread_t others[];
};

static uint64_t pack(uint64_t serial, uint64_t chunks) { return serial << 32 | chunks << 16; }
static uint64_t serial_of(uint64_t ticket) { return ticket >> 32; }
static int chunks_of(uint64_t ticket) { return (int)(ticket >> 16 & 0xffff); }
static int next_of(uint64_t ticket) { return (int)(ticket & 0xffff); }

/* Somebody who has the last chunk was put aside: leave the core, so that he can come here. */
static void nap(void) {
    const struct timespec while_away = {0, 50000};
    nanosleep(&while_away, NULL);
}

/* Called by the only thread that has a say: the caller before a job, or who did the last chunk. */
static void publish(mk_pool *pool) {
    uint64_t serial = serial_of(atomic_load_explicit(&pool->ticket, memory_order_relaxed)) + 1;
    int chunks = pool->next(pool->job, &pool->chunk);
    atomic_store_explicit(&pool->left, chunks, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, pack(serial & 0xffffffffu, (uint64_t)chunks),
                          memory_order_release);
    if (chunks == 0) atomic_store_explicit(&pool->finished, true, memory_order_release);
}

/* Takes one chunk and does it; false where none is to be had. */
static bool work(mk_pool *pool, int thread) {
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    for (;;) {
        if (next_of(ticket) >= chunks_of(ticket)) return false;
        if (atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1,
                                                  memory_order_acquire, memory_order_acquire))
            break;
    }
    pool->chunk(pool->job, next_of(ticket), thread);
    if (atomic_fetch_sub_explicit(&pool->left, 1, memory_order_acq_rel) == 1) publish(pool);
    return true;
}

static void sleep_until_a_job(mk_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->asleep, 1);
    /* sequentially consistent against mk_pool_run: either it sees us, or we see its job */
    while (atomic_load(&pool->finished) && !atomic_load(&pool->closing))
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->asleep, 1);
    pthread_mutex_unlock(&pool->lock);
}

typedef struct {
    mk_pool *pool;
    int thread;
} place;

static void *stand_by(void *given) {
    place at = *(place *)given;
    free(given);
    int idle = 0;
    while (!atomic_load_explicit(&at.pool->closing, memory_order_relaxed)) {
        if (work(at.pool, at.thread)) {
            idle = 0;
        } else if (++idle < SPINS_BETWEEN) {
            PAUSE();
        } else if (!atomic_load_explicit(&at.pool->finished, memory_order_acquire)) {
            nap(); /* a job goes on: more chunks will come */
        } else {
            sleep_until_a_job(at.pool);
            idle = 0;
        }
    }
    return NULL;
}

void mk_pool_run(mk_pool *pool, mk_next next, void *job) {
    pool->next = next;
    pool->job = job;
    atomic_store_explicit(&pool->finished, false, memory_order_relaxed);
    publish(pool);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load(&pool->asleep) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    for (int idle = 0; !atomic_load_explicit(&pool->finished, memory_order_acquire);) {
        if (work(pool, 0)) idle = 0;
        else if (++idle < SPINS_INSIDE) PAUSE();
        else nap();
    }
}

mk_pool *mk_pool_create(int32_t threads) {
    if (threads < 1) threads = 1;
    if (threads > MK_MOST_THREADS) threads = MK_MOST_THREADS;
    size_t size = sizeof(mk_pool) + (size_t)(threads - 1) * sizeof(pthread_t);
    mk_pool *pool = aligned_alloc(128, (size + 127) / 128 * 128);
    if (pool == NULL) return NULL;
    atomic_init(&pool->ticket, 0);
    atomic_init(&pool->left, 0);
    atomic_init(&pool->finished, true);
    atomic_init(&pool->asleep, 0);
    atomic_init(&pool->closing, false);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = 1;
    for (int i = 1; i < threads; i++) { /* fewer threads than wanted is no error */
        place *at = malloc(sizeof *at);
        if (at == NULL) break;
        *at = (place){pool, i};
        if (pthread_create(&pool->others[i - 1], NULL, stand_by, at) != 0) {
            free(at);
            break;
        }
        pool->threads = i + 1;
    }
    return pool;
}

void mk_pool_destroy(mk_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->closing, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->others[i - 1], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    free(pool);
}

int32_t mk_pool_threads(const mk_pool *pool) { return pool->threads; }
