// The loops for every instruction set, and the choice among them at run time: a library that is built elsewhere
// runs on any processor and uses what the one at hand has.

#include "rbn_kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace plain {
#include "loops.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RBN_CHOOSES

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "loops.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "loops.h"
}
#pragma GCC pop_options
#endif

static int best() {
#ifdef RBN_CHOOSES
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return 1;
  if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) return 1;
  return 2;
#else
  return 0;
#endif
}

static int level = best();

int rbn_instructions(void) { return level; }

int rbn_limit_instructions(int most) { return level = most < best() ? most : best(); }

int rbn_forward(const rbn_layer *layer, const rbn_parameters *parameters, const void *x, void *y, void *mu, void *v,
                void *mean, void *var) {
#ifdef RBN_CHOOSES
  if (level == 2) return avx512::forward_of_dtype(layer, parameters, x, y, mu, v, mean, var);
  if (level == 1) return avx2::forward_of_dtype(layer, parameters, x, y, mu, v, mean, var);
#endif
  return plain::forward_of_dtype(layer, parameters, x, y, mu, v, mean, var);
}

int rbn_backward(const rbn_layer *layer, const rbn_parameters *parameters, const void *dy, const void *x,
                 const void *mu, const void *v, void *dx, const rbn_gradients *gradients) {
#ifdef RBN_CHOOSES
  if (level == 2) return avx512::backward_of_dtype(layer, parameters, dy, x, mu, v, dx, gradients);
  if (level == 1) return avx2::backward_of_dtype(layer, parameters, dy, x, mu, v, dx, gradients);
#endif
  return plain::backward_of_dtype(layer, parameters, dy, x, mu, v, dx, gradients);
}
