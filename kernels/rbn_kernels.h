// RBN and IEBN on the CPU in as many passes over memory as BatchNorm: the two-pass form of rbn_core/fused.py.
//
// An image batch is N x C planes of M values, either (N, C, M) or, channels last, (N, M, C), without gaps. Values
// are float32, float64, float16 or bfloat16; statistics, parameters and their gradients are float32, or float64
// beside float64 values. Arrays of (N, C) and (C) numbers have no gaps either. Nothing is kept between calls.
// Results do not depend on the number of threads.

#ifndef RBN_KERNELS_H
#define RBN_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum rbn_dtype { RBN_FLOAT32, RBN_FLOAT64, RBN_FLOAT16, RBN_BFLOAT16 };
enum rbn_statistic { RBN_NONE, RBN_CHANNEL_MEAN, RBN_CHANNEL_STD, RBN_INPUT_MEAN };
enum rbn_restriction { RBN_SIGMOID, RBN_HARD_SIGMOID };

// What a layer is and on what it runs.
typedef struct {
  int64_t images, channels, positions;  // N, C, M
  int32_t dtype;                        // rbn_dtype of X, Y and their gradients
  int32_t channels_last;
  int32_t centering, scaling;           // rbn_statistic: K_m of eq. 5 and K_s of eq. 9
  int32_t restriction;                  // R of eq. 9
  int32_t batch_statistics;             // E and Var of the batch, or the running ones
  int32_t threads;
  double eps;
} rbn_layer;

// (C) numbers each; a null pointer where the layer lacks the parameter.
typedef struct {
  const void *gamma, *beta, *center_weight, *scale_weight, *scale_bias;
  const void *running_mean, *running_var;  // not read with batch statistics
} rbn_parameters;

// (C) numbers each, written; a null pointer where the gradient is not wanted.
typedef struct {
  void *gamma, *beta, *center_weight, *scale_weight, *scale_bias;
} rbn_gradients;

// Y of eq. 12; `mu` and `v`, (N, C), get the mean and biased variance of every plane, as far as anything depends on
// them, which the backward pass takes (both null where there is none), `mean` and `var`, (C), the E and biased Var of
// eq. 2 and 3 (with batch statistics alone).
// Returns 0, or 1 where memory lacks.
int rbn_forward(const rbn_layer *, const rbn_parameters *, const void *x, void *y, void *mu, void *v, void *mean,
                void *var);

// The gradients of X, where `dx` is not null, and of the parameters, from that of Y.
int rbn_backward(const rbn_layer *, const rbn_parameters *, const void *dy, const void *x, const void *mu,
                 const void *v, void *dx, const rbn_gradients *);

// Eq. 3, in place: running <- running + new_weight (correction * batch - running), (C) numbers each; `wide` and
// `wide_batch` say which are float64, and not float32.
void rbn_accumulate(int64_t channels, int wide, int wide_batch, void *running, const void *batch, double new_weight,
                    double correction);

// How many of so many threads are worth waking for a batch.
int32_t rbn_worthwhile_threads(int64_t images, int64_t channels, int64_t positions, int32_t most);

// The instruction set in use: 0 the compiler's own, 1 AVX2 with FMA and F16C, 2 AVX-512.
int rbn_instructions(void);

// Use at most this one; returns the one in use. For tests: the best that the processor has is in use at first.
int rbn_limit_instructions(int level);

// Take the last cache to have at most so many bytes; returns how many. For tests: at first as many as it has.
int64_t rbn_limit_cache(int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
