// RBN and IEBN on the CPU in as many passes over memory as BatchNorm: the two-pass form of rbn_core/two_pass.py.
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

// Counts the changes of this file that callers must follow; `rbn_interface` says which one a library was compiled for.
#define RBN_INTERFACE 2

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

// Numbers without gaps in memory: where they lie, how many there are, and their rbn_dtype. All 0 where there are none.
typedef struct {
  void *values;
  int64_t count, dtype;
} rbn_array;

// (C) numbers each, read; none where the layer lacks the parameter.
typedef struct {
  rbn_array gamma, beta, center_weight, scale_weight, scale_bias;
  rbn_array running_mean, running_var;  // not read with batch statistics
} rbn_parameters;

// (C) numbers each, written; none where the gradient is not wanted.
typedef struct {
  rbn_array gamma, beta, center_weight, scale_weight, scale_bias;
} rbn_gradients;

// Of a forward pass: X, read, and what is written: Y; `mu` and `v`, (N, C), the mean and biased variance of every plane,
// as far as anything depends on them, which the backward pass takes (both none where there is none); `mean` and `var`,
// (C), the E and biased Var of eq. 2 and 3 (with batch statistics alone; none where nobody asks).
typedef struct {
  rbn_array x, y, mu, v, mean, var;
  rbn_parameters parameters;
} rbn_forward_arrays;

// Of a backward pass: the gradient of Y, X, and what the forward pass left, all read, and what is written: the
// gradients of X, where it is wanted, and of the parameters.
typedef struct {
  rbn_array dy, x, mu, v, dx;
  rbn_parameters parameters;
  rbn_gradients gradients;
} rbn_backward_arrays;

// Of an update of the running statistics, float32 or float64 numbers each: the running ones, changed, and the batch's.
typedef struct {
  rbn_array running_mean, running_var, mean, var;
} rbn_statistics;

// What the functions below return. What does not fit is an option that is not known, or an array that is missing or of
// another length or dtype than the layer needs: nothing is read or written then, and `rbn_refusal` says what.
enum rbn_result { RBN_DONE, RBN_NO_MEMORY, RBN_DOES_NOT_FIT };

// Y of eq. 12.
int rbn_forward(const rbn_layer *, const rbn_forward_arrays *);

// The gradients of X and of the parameters, from that of Y.
int rbn_backward(const rbn_layer *, const rbn_backward_arrays *);

// Eq. 3, in place: running <- running + new_weight (batch - running), where Var of the batch is multiplied with
// `correction` first.
int rbn_accumulate(const rbn_statistics *, double new_weight, double correction);

// What the last call of this thread refused: what was expected, and what came.
const char *rbn_refusal(void);

// How many of so many threads are worth waking for a batch.
int32_t rbn_worthwhile_threads(int64_t images, int64_t channels, int64_t positions, int32_t most);

int rbn_interface(void);

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
