// Whether a layer is one, and whether the arrays of a call are what it needs: nothing is read or written before.

static const char *const DTYPES[] = {"float32", "float64", "float16", "bfloat16"};
static const int64_t BYTES[] = {4, 8, 2, 2};

static thread_local char refusal[256];

static bool is_one_of(int64_t value, int64_t choices) { return 0 <= value && value < choices; }

static bool is_layer(const rbn_layer &l) {
  int64_t planes, values, bytes;
  const bool known = is_one_of(l.dtype, 4) && is_one_of(l.channels_last, 2) && is_one_of(l.centering, RBN_INPUT_MEAN) &&
                     is_one_of(l.scaling, RBN_INPUT_MEAN + 1) && is_one_of(l.restriction, 2) &&
                     is_one_of(l.batch_statistics, 2) && l.threads > 0;
  const bool sized = l.images >= 0 && l.channels >= 0 && l.positions >= 0 &&
                     !__builtin_mul_overflow(l.images, l.channels, &planes) &&
                     !__builtin_mul_overflow(planes, l.positions, &values) &&
                     !__builtin_mul_overflow(planes, 64, &bytes) && !__builtin_mul_overflow(values, 8, &bytes);
  if (known && sized) return true;
  snprintf(refusal, sizeof refusal,
           "expected options of rbn_kernels.h and sizes that can be counted, got N %lld, C %lld, M %lld, dtype %d, "
           "channels_last %d, centering %d, scaling %d, restriction %d, batch_statistics %d, threads %d",
           (long long)l.images, (long long)l.channels, (long long)l.positions, l.dtype, l.channels_last, l.centering,
           l.scaling, l.restriction, l.batch_statistics, l.threads);
  return false;
}

static bool fits(const char *name, const rbn_array &array, int64_t count, int64_t dtype, bool needed) {
  if (!array.values && !array.count && !needed) return true;
  const bool there = array.values || !count, aligned = (uintptr_t)array.values % BYTES[dtype] == 0;
  if (there && aligned && array.count == count && array.dtype == dtype) return true;
  snprintf(refusal, sizeof refusal, "expected %s to be %lld numbers of %s, got %lld of %s at %p", name, (long long)count,
           DTYPES[dtype], (long long)array.count, is_one_of(array.dtype, 4) ? DTYPES[array.dtype] : "another dtype",
           array.values);
  return false;
}

static int64_t dtype_of_statistics(const rbn_layer &l) { return l.dtype == RBN_FLOAT64 ? RBN_FLOAT64 : RBN_FLOAT32; }

static bool parameters_fit(const rbn_layer &l, const rbn_parameters &p) {
  const auto one = [&](const char *name, const rbn_array &array, bool needed) {
    return fits(name, array, l.channels, dtype_of_statistics(l), needed);
  };
  return one("gamma", p.gamma, false) && one("beta", p.beta, false) &&
         one("center_weight", p.center_weight, l.centering != RBN_NONE) &&
         one("scale_weight", p.scale_weight, l.scaling != RBN_NONE) &&
         one("scale_bias", p.scale_bias, l.scaling != RBN_NONE) &&
         one("running_mean", p.running_mean, !l.batch_statistics) &&
         one("running_var", p.running_var, !l.batch_statistics);
}

static bool forward_fits(const rbn_layer &l, const rbn_forward_arrays &a) {
  if (!is_layer(l)) return false;
  const int64_t planes = l.images * l.channels, values = planes * l.positions, dtype = dtype_of_statistics(l);
  const bool kept = a.mu.values || a.v.values;
  return fits("x", a.x, values, l.dtype, true) && fits("y", a.y, values, l.dtype, true) &&
         fits("mu", a.mu, planes, dtype, kept) && fits("v", a.v, planes, dtype, kept) &&
         fits("mean", a.mean, l.channels, dtype, false) && fits("var", a.var, l.channels, dtype, false) &&
         parameters_fit(l, a.parameters);
}

static bool backward_fits(const rbn_layer &l, const rbn_backward_arrays &a) {
  if (!is_layer(l)) return false;
  const int64_t planes = l.images * l.channels, values = planes * l.positions, dtype = dtype_of_statistics(l);
  const auto gradient = [&](const char *name, const rbn_array &array) {
    return fits(name, array, l.channels, dtype, false);
  };
  return fits("dy", a.dy, values, l.dtype, true) && fits("x", a.x, values, l.dtype, true) &&
         fits("mu", a.mu, planes, dtype, true) && fits("v", a.v, planes, dtype, true) &&
         fits("dx", a.dx, values, l.dtype, false) && parameters_fit(l, a.parameters) &&
         gradient("the gradient of gamma", a.gradients.gamma) && gradient("the gradient of beta", a.gradients.beta) &&
         gradient("the gradient of center_weight", a.gradients.center_weight) &&
         gradient("the gradient of scale_weight", a.gradients.scale_weight) &&
         gradient("the gradient of scale_bias", a.gradients.scale_bias);
}

static bool statistics_fit(const rbn_statistics &s) {
  const auto one = [&](const char *name, const rbn_array &array) {
    return fits(name, array, s.running_mean.count, array.dtype == RBN_FLOAT64 ? RBN_FLOAT64 : RBN_FLOAT32, true);
  };
  return one("running_mean", s.running_mean) && one("running_var", s.running_var) && one("mean", s.mean) &&
         one("var", s.var);
}
