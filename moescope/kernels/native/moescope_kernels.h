/* What the library exports, and the structs that cross its border. `native_ops.py` has the same
 * structs and checks MK_ABI, which is raised here and there when one of them changes.
 *
 * A decode step is a program: an array of operators that work on buffers of float32 rows, one row a
 * lane, whose values are rounded to the model's dtype. One call runs it for one token of N lanes.
 */
#ifndef MOESCOPE_KERNELS_H
#define MOESCOPE_KERNELS_H

#include <stdint.h>

#define MK_ABI 4
#if defined(_WIN32)
#define MK_EXPORT __declspec(dllexport)
#else
#define MK_EXPORT __attribute__((visibility("default")))
#endif

/* Places in `spec.MODEL_DTYPES`. */
enum { MK_FLOAT32, MK_BFLOAT16, MK_FLOAT16, MK_DTYPES };

enum { MK_GATES = 17 }; /* a gate as stored (0), and rounded to 2 .. 16 bits */

typedef enum {
    MK_OP_EMBED,   /* y = the rows of `weight` that the tokens name, times `number` */
    MK_OP_NORM,    /* y = norm of x, in `groups` groups of `cols` columns, `step` apart, from `at` on */
    MK_OP_LINEAR,  /* y = act(weight x + bias) */
    MK_OP_CLIP,    /* x clamped to +-`number`, `cols` columns from `at` on, in place */
    MK_OP_SCALE,   /* (x + bias) times weight, where there are, times `number`, `cols` columns from
                      `at` on, in place; WIDE: unrounded */
    MK_OP_WARM,    /* x times what its position makes of `number` and `floor`, likewise */
    MK_OP_COPY,    /* blocks of columns of x into y */
    MK_OP_GATED,   /* y times sigmoid or softplus of x, `groups` numbers for `cols` columns from `to` */
    MK_OP_TURN,    /* rope on `heads` heads of x, `step` apart from `at` on, in place */
    MK_OP_STORE,   /* columns of x from `at` on into `keys`, then those into `values` */
    MK_OP_ATTEND,  /* the queries in x look at the cache, in blocks of keys */
    MK_OP_MERGE,   /* y = what ATTEND found in its blocks of keys, put together */
    MK_OP_ABSORB,  /* y = queries in the space of the latent: see attention.c */
    MK_OP_EXPAND,  /* y = values from what was read of it */
    MK_OP_ADD,     /* y = keeps * y + number * x; FIRST: y = number * x */
    MK_OP_GATE,    /* router logits of x; with a shared expert, also its hidden row and its gate, of z */
    MK_OP_ROUTE,   /* logits to experts, for every lane and policy place */
    MK_OP_KEEP,    /* what somebody else decided, logits in x, into the record */
    MK_OP_EXPERTS, /* hidden rows of the chosen experts, of x */
    MK_OP_DOWN,    /* outputs of the chosen experts, each times its weight, and of the shared one */
    MK_OP_COMBINE, /* y = their sum, and what comes after it */
    MK_OP_HEAD,    /* logits of x, into the caller's array, and what is found of their blocks */
    MK_OP_EXPECT,  /* what those logits say of the next token, into the caller's arrays */
} mk_kind;

enum {
    MK_FIRST = 1,         /* ADD: nothing has been added yet */
    MK_WIDE = 2,          /* NORM: the weight is multiplied in float32; TURN: cos and sin are
                             float32; GATED, WARM: the factor is not rounded; SCALE, ADD: neither
                             is what comes of it */
    MK_CENTRED = 4,       /* NORM: less the mean */
    MK_WEIGHT_FIRST = 8,  /* EXPERTS: the combine weight is multiplied into x */
    MK_PAIRS = 16,        /* TURN: neighbours are turned; else columns half a head apart */
    MK_SOFTPLUS = 32,     /* GATED */
    MK_POWER = 64,        /* WARM: (1 + (p + 1) / floor) ^ number */
    MK_ONE_LESS = 128,    /* WARM: positions count from 0; else from 1 */
    MK_SUM = 256,         /* COMBINE: adds up; else y is there already */
    MK_FINISH = 512,      /* COMBINE: scale, bias and shared expert */
    MK_NULL = 1024,       /* COMBINE: null experts give z */
    MK_AVERAGE = 2048,    /* COMBINE: half the sum with the shared expert */
    MK_SHARES = 4096,     /* ATTEND, MERGE: shares are rounded, where one block holds all keys; else
                             what they are made of, as fused attention does */
    MK_ROUNDED = 8192,    /* ATTEND: scores are rounded at every step; COPY: so is what is copied */
};

/* Places in `native_ops.ACTIVATIONS`. */
enum { MK_NONE, MK_SILU, MK_GELU, MK_GELU_TANH, MK_RELU2, MK_SWISH };

/* act(x), or act(gate) * (up + shift) where the matrix has rows of both, the gate's first. */
typedef struct {
    int32_t kind, gated;
    int32_t after;       /* the gate is clamped after the activation; else before */
    float limit, alpha, shift; /* limit 0: none */
} mk_act;

/* Names as in `DecoderSpec`; what a kind does not use is 0. Weights are contiguous rows of the
 * model's dtype; biases, and weights of norms and scales, are float32. */
typedef struct {
    int32_t kind, flags;
    int32_t x, y, z;         /* buffers, by number */
    int32_t rows, cols;      /* of `weight`; the expert width and the hidden width of a MoE */
    int32_t at, groups, step; /* columns of x; `to` and `to_step` those of y */
    int32_t to, to_step;
    int32_t heads, kv_heads, head_dim, v_dim;
    int32_t key_step, value_step; /* columns of a row of `keys` and `values` */
    int32_t window, chunk;
    int32_t turned;          /* TURN: dims of a head that are turned */
    int32_t switch_at;       /* TURN: tokens from which the second half of the tables is meant */
    int32_t router;          /* which of the L */
    int32_t classes;         /* E: routed and null experts */
    int32_t experts;         /* routed experts */
    int32_t logits_dtype;    /* what a gate's output is rounded to */
    int32_t shared_width, shared_rows; /* 0: no shared expert */
    float number, eps;       /* `number`: a limit, a factor, or attention's scale */
    float keeps, cap, floor; /* `cap`: of scores or logits; 0: none */
    mk_act act, shared_act;
    const void *weight;
    const float *bias;
    const void *shared_up, *shared_down, *shared_gate; /* GATE, DOWN and COMBINE */
    const float *shared_up_bias, *shared_down_bias;
    const void *const *gates; /* GATE: [MK_GATES], some NULL */
    const float *correction_bias, *per_expert_scale; /* ROUTE: [E] or NULL */
    const float *sinks;       /* ATTEND, MERGE: [heads] or NULL */
    void *keys, *values;      /* [lanes, kv_heads, capacity, key_step or value_step] */
    const void *cos, *sin;    /* [capacity, turned] */
} mk_op;

/* Where routing is written: [lanes of the call, places, routers, ...], float32 or int32. What place
 * 0 decided is written once more as a trace keeps it, K = `picks`, E = `logits_width`: `ints` is
 * [N, L K + L], expert ids and runners-up; `floats` [N, 4 L + 2 L K + L E], score sum, mass, entropy
 * and margin, then weights and scores from `level` 1 on, then logits at `level` 2. */
typedef struct {
    const double *policies;  /* [opened lanes, places, routers, MK_POLICY_WIDTH] */
    int32_t places, routers;
    int32_t width;           /* K the arrays have room for */
    int32_t logits_width;    /* E the logits have room for */
    int32_t *expert_ids;     /* [N, P, L, width], -1 unused */
    int32_t *runner_up;      /* [N, P, L] */
    float *scores, *weights; /* [N, P, L, width] */
    float *scalars;          /* [N, P, L, 4]: score sum, mass, entropy, margin */
    int32_t level, picks;
    int16_t *ints;
    float *floats;
} mk_record;

/* What rows of logits say: log partition sums, NaN where a row is no distribution (NaN or +inf in
 * it, or nothing finite; the rest is then untouched), and their largest values, equal ones by id. Of
 * the id that comes next, where `next` names one (not -1), its logit and its rank. */
typedef struct {
    int32_t count;        /* at most the vocabulary */
    double *log_sum;      /* [rows] */
    int32_t *ids;         /* [rows, count] */
    float *values;        /* [rows, count] */
    const int64_t *next;  /* [rows] or NULL, and where it is told: */
    float *told;          /* [rows] */
    int32_t *rank;        /* [rows]; 1: the most likely, equal logits by id */
} mk_expected;

/* Rows of logits in any of the dtypes; `stride` in elements. */
typedef struct {
    const void *from;
    int64_t rows, n, stride;
    int32_t dtype;
} mk_logits;

/* The experts of many rows in bfloat16 (uint16). */
typedef struct {
    int32_t tokens, picks, experts, hidden, width; /* T, K, E, H, I; H and I multiples of 32 */
    int32_t weight_first;      /* inputs are multiplied with the weights, not outputs */
    const int32_t *expert_ids; /* [T, K]; ids outside 0 .. E - 1 are no experts */
    const float *weights;      /* [T, K], already rounded to the dtype they are combined in */
    const void *h;             /* [T, H] */
    const void *gate_up;       /* [E, 2 I, H] */
    const void *down;          /* [E, H, I] */
    void *out;                 /* [T, H] */
} mk_experts;

typedef struct mk_pool mk_pool;
typedef struct mk_step mk_step;

MK_EXPORT int32_t mk_abi(void);
MK_EXPORT int64_t mk_size_of(int32_t which); /* mk_op, mk_record, mk_expected, mk_logits */

/* The instruction set in use; `wanted` names another ("": the best). NULL: this CPU lacks it. */
MK_EXPORT const char *mk_isa_name(const char *wanted);

MK_EXPORT mk_pool *mk_pool_create(int32_t threads);
MK_EXPORT void mk_pool_destroy(mk_pool *pool);
MK_EXPORT int32_t mk_pool_threads(const mk_pool *pool);

/* A step for at most `lanes` lanes at once. `widths` are the columns of each buffer; `lanes` and
 * `capacity` are the cache's too. NULL: no memory. The program is copied; weights are not. */
MK_EXPORT mk_step *mk_step_create(mk_pool *pool, const char *isa, int32_t dtype, const mk_op *ops,
                                  int32_t count, const int32_t *widths, int32_t buffers,
                                  int32_t lanes, int32_t capacity, int32_t width);
MK_EXPORT void mk_step_destroy(mk_step *step);

/* Where a buffer is: [lanes, `stride`] float32. */
MK_EXPORT float *mk_step_buffer(mk_step *step, int32_t buffer, int64_t *stride);

/* Operators `first` to `last` - 1 of one token for each of `count` lanes. logits [count, vocabulary]
 * float32. Returns the first router that met logits which are not finite, -1 where none did; that
 * is known when all operators ran. */
MK_EXPORT int32_t mk_step_run(mk_step *step, int32_t first, int32_t last, int32_t count,
                              const int32_t *lanes, const int32_t *starts,
                              const int64_t *token_ids, const mk_record *record, float *logits,
                              const mk_expected *expected);

/* 0: done; -1: not with this instruction set or these sizes, or no memory. */
MK_EXPORT int32_t mk_experts_run(mk_pool *pool, const char *isa, const mk_experts *given);

/* For tests and measurements. y [count, rows] = x [count, cols] times weight [rows, cols], x in
 * float32, values already of `dtype`; GB/s are the caller's to compute. 0: done, -1: no memory. */
MK_EXPORT int32_t mk_linear(mk_pool *pool, const char *isa, int32_t dtype, const void *weight,
                            int32_t rows, int32_t cols, const float *x, int32_t count, float *y);
MK_EXPORT uint64_t mk_read(mk_pool *pool, const char *isa, const void *from, int64_t bytes);

/* `pool` NULL: by this thread alone. 0: done; -1: the instruction set is not there, too many rows, or
 * no memory. */
MK_EXPORT int32_t mk_expect(mk_pool *pool, const char *isa, const mk_logits *logits,
                            const mk_expected *expected);

/* sum of P (log P - log Q) over two rows of logits with their log partition sums; infinite where
 * only Q gives nothing. NaN: the instruction set is not there. */
MK_EXPORT double mk_divergence(const char *isa, const float *p, const float *q, int64_t n,
                               double log_sum_p, double log_sum_q);

#endif
