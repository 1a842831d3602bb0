// The loops for every instruction set, and the choice among them at run time: a library that is built elsewhere
// runs on any processor and uses what the one at hand has.

#include "rbn_kernels.h"

#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "fit.h"

// The bytes of the processor's last cache, or what is usual where the system does not say.
static int64_t bytes_of_last_cache() {
  long long kilobytes = 0;
  if (FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
    fclose(file);
  }
  return (kilobytes > 0 ? kilobytes : 32 << 10) << 10;
}

static int64_t last_cache = bytes_of_last_cache();

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

int rbn_interface(void) { return RBN_INTERFACE; }

int rbn_instructions(void) { return level; }

int rbn_limit_instructions(int most) { return level = most < best() ? most : best(); }

int64_t rbn_limit_cache(int64_t most) {
  const int64_t bytes = bytes_of_last_cache();
  return last_cache = most < bytes ? most : bytes;
}

const char *rbn_refusal(void) { return refusal; }

int rbn_forward(const rbn_layer *layer, const rbn_forward_arrays *arrays) {
  if (!forward_fits(*layer, *arrays)) return RBN_DOES_NOT_FIT;
#ifdef RBN_CHOOSES
  if (level == 2) return avx512::forward_of_dtype(*layer, *arrays);
  if (level == 1) return avx2::forward_of_dtype(*layer, *arrays);
#endif
  return plain::forward_of_dtype(*layer, *arrays);
}

int rbn_backward(const rbn_layer *layer, const rbn_backward_arrays *arrays) {
  if (!backward_fits(*layer, *arrays)) return RBN_DOES_NOT_FIT;
#ifdef RBN_CHOOSES
  if (level == 2) return avx512::backward_of_dtype(*layer, *arrays);
  if (level == 1) return avx2::backward_of_dtype(*layer, *arrays);
#endif
  return plain::backward_of_dtype(*layer, *arrays);
}

static double number(const rbn_array &array, int64_t i) {
  return array.dtype == RBN_FLOAT64 ? ((const double *)array.values)[i] : ((const float *)array.values)[i];
}

static void accumulate(const rbn_array &running, const rbn_array &batch, double new_weight, double correction) {
  for (int64_t c = 0; c < running.count; c++) {
    const double from = number(running, c), to = number(batch, c) * correction;
    // From the one that weighs more: with the weight 1 nothing is left of the other.
    const double between = new_weight < 0.5 ? from + new_weight * (to - from) : to - (1 - new_weight) * (to - from);
    if (running.dtype == RBN_FLOAT64)
      ((double *)running.values)[c] = between;
    else
      ((float *)running.values)[c] = (float)between;
  }
}

int rbn_accumulate(const rbn_statistics *statistics, double new_weight, double correction) {
  if (!statistics_fit(*statistics)) return RBN_DOES_NOT_FIT;
  accumulate(statistics->running_mean, statistics->mean, new_weight, 1);
  accumulate(statistics->running_var, statistics->var, new_weight, correction);
  return RBN_DONE;
}

int32_t rbn_worthwhile_threads(int64_t images, int64_t channels, int64_t positions, int32_t most) {
  // A plane's own numbers take about as long as two values; waking a thread as long as 32768.
  const int64_t worth = 1 + images * channels * (positions + 2) / (32768 + 1);
  return most < worth ? most : (int32_t)worth;
}
