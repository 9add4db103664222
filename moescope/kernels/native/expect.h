/* What rows of next-token logits say, shared by the step's head and `mk_expect`. */
#ifndef MOESCOPE_EXPECT_H
#define MOESCOPE_EXPECT_H

#include <stddef.h>
#include <stdint.h>

#include "numbers.h"
#include "products.h"

MK_INLINE size_t mk_blocks(int64_t n) { return (size_t)((n + MK_BLOCK - 1) / MK_BLOCK); }

/* The row's answers from what `sum_up` found of its blocks: most and sum [mk_blocks(n)]. */
void mk_conclude(const mk_isa *isa, const float *x, int64_t n, const float *most,
                 const float *sum, const mk_expected *out, int64_t row);

#endif
