// Between the passes: equations 2 to 9 on (N, C) numbers, for W::count channels at a time.

static inline float root(float v) { return std::sqrt(v); }
static inline double root(double v) { return std::sqrt(v); }
template <class V>
static inline V root(V v) {
  for (size_t j = 0; j < sizeof(V) / sizeof(v[0]); j++) v[j] = std::sqrt(v[j]);
  return v;
}

static inline float exponential(float x) { return std::exp(x); }
static inline double exponential(double x) { return std::exp(x); }
static inline Doubles exponential(Doubles x) {
  for (int j = 0; j < 8; j++) x[j] = std::exp(x[j]);
  return x;
}

// 2^n e^r with |r| <= ln 2 / 2 (Cody and Waite), e^r by its series: 2 units in the last place at most.
static inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87, most = Floats{} + 88, infinity = Floats{} + HUGE_VALF;
  const Floats inside = x < least ? least : x > most ? most : x;  // a NaN stays one
  const Floats shifter = Floats{} + 12582912;  // 1.5 x 2^23: what is added to it is rounded to whole numbers
  const Floats n = (inside * 1.44269504F + shifter) - shifter;
  const Floats r = (inside - n * 0.693359375F) - n * -2.12194440e-4F;
  Floats series = Floats{} + 1 / 5040.F;
  series = series * r + 1 / 720.F;
  series = series * r + 1 / 120.F;
  series = series * r + 1 / 24.F;
  series = series * r + 1 / 6.F;
  series = series * r + 0.5F;
  series = series * r + 1.F;
  series = series * r + 1.F;
  const Floats finite = n == n ? n : Floats{};
  const Words power = (Words)(__builtin_convertvector(finite, Integers) + 127) << 23;
  return x > most ? infinity : series * copied<Floats>(&power);
}

template <class V>
static inline V restricted(int32_t restriction, V z) {
  const V none = V{}, one = none + 1;
  if (restriction == RBN_SIGMOID) return one / (one + exponential(-z));
  const V r = z / 6 + (one / 2);
  return r < none ? none : r > one ? one : r;  // a NaN stays one
}

template <class V>
static inline V restricted_slope(int32_t restriction, V r) {
  const V none = V{}, one = none + 1;
  if (restriction == RBN_SIGMOID) return r * (one - r);
  return r > none ? (r < one ? one / 6 : none) : none;
}

// Whether Y depends on a statistic of X, and with it dX on X.
static inline bool is_measured(const rbn_layer &l) {
  return l.batch_statistics || l.centering != RBN_NONE || l.scaling != RBN_NONE;
}

// Whether anything depends on the variance of a plane.
static inline bool varies(const rbn_layer &l) {
  return l.batch_statistics || l.centering == RBN_CHANNEL_STD || l.scaling == RBN_CHANNEL_STD;
}

// What channels are, and what a plane of each is; see `calibrate` of rbn_core/two_pass.py for the names.
template <class V>
struct Channel {
  V gamma, beta, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std;
};

template <class V>
struct Plane {
  V mu_0, shift, deviation, k, restriction, a, translation;
};

template <class W>
static inline typename W::Value parameter(const rbn_array &array, int64_t c, typename W::A otherwise) {
  return array.values ? W::at((const typename W::A *)array.values + c) : typename W::Value{} + otherwise;
}

// 1 / sqrt(Var + eps) of the running Var.
template <class W, class A>
static inline typename W::Value inverse_std_of(const rbn_layer &l, const rbn_parameters &p, int64_t c) {
  return 1 / root(parameter<W>(p.running_var, c, 1) + (A)l.eps);
}

// From all planes of the channels [c, c + W::count); the E and biased Var of the batch go to `mean` and `var`.
// Roots take long: who asks for the same channels again and again has taken those of the running Var before.
template <class W, class A>
static inline Channel<typename W::Value> channel_of(const rbn_layer &l, const rbn_parameters &p, int64_t c,
                                                    const A *mu, const A *v, A *mean, A *var,
                                                    const A *known_inverse_std = nullptr) {
  typedef typename W::Value V;
  typedef typename W::Sum Sum;
  Channel<V> ch;
  ch.gamma = parameter<W>(p.gamma, c, 1);
  ch.beta = parameter<W>(p.beta, c, 0);
  ch.center_weight = parameter<W>(p.center_weight, c, 0);
  ch.scale_weight = parameter<W>(p.scale_weight, c, 0);
  ch.scale_bias = parameter<W>(p.scale_bias, c, 0);
  if (!l.batch_statistics) {
    ch.origin = V{};
    ch.mean_0 = parameter<W>(p.running_mean, c, 0);
    ch.inverse_std = known_inverse_std ? W::at(known_inverse_std + c) : inverse_std_of<W, A>(l, p, c);
    return ch;
  }
  const A eps = (A)l.eps;
  const double images = (double)l.images;
  Sum sum = {};
  for (int64_t n = 0; n < l.images; n++) sum += W::widened(W::at(mu + n * l.channels + c));
  ch.origin = W::rounded(sum / images);
  const auto shifted = [&](int64_t n) -> V {
    const V mu_0 = W::at(mu + n * l.channels + c) - ch.origin;
    if (l.centering == RBN_CHANNEL_MEAN) return mu_0 + ch.center_weight * mu_0;
    if (l.centering == RBN_CHANNEL_STD) return mu_0 + ch.center_weight * root(W::at(v + n * l.channels + c) + eps);
    return mu_0;
  };
  sum = Sum{};
  for (int64_t n = 0; n < l.images; n++) sum += W::widened(shifted(n));
  const Sum mean_0 = sum / images;
  sum = Sum{};
  for (int64_t n = 0; n < l.images; n++) {
    const Sum d = W::widened(shifted(n)) - mean_0;
    sum += W::widened(W::at(v + n * l.channels + c)) + d * d;
  }
  ch.mean_0 = W::rounded(mean_0);
  const V variance = W::rounded(sum / images);
  ch.inverse_std = 1 / root(variance + eps);
  const V moved = l.centering == RBN_CHANNEL_MEAN ? ch.origin + ch.center_weight * ch.origin : ch.origin;
  if (mean) W::set(mean + c, ch.mean_0 + moved);
  if (var) W::set(var + c, variance);
  return ch;
}

template <class V, class A>
static inline Plane<V> plane_of(const rbn_layer &l, A eps, const Channel<V> &ch, V mu, V v) {
  Plane<V> pl;
  pl.mu_0 = mu - ch.origin;
  if (l.centering == RBN_CHANNEL_MEAN)
    pl.shift = ch.center_weight * pl.mu_0;
  else if (l.centering == RBN_CHANNEL_STD)
    pl.shift = ch.center_weight * root(v + eps);
  else
    pl.shift = V{};
  pl.deviation = pl.mu_0 + pl.shift - ch.mean_0;
  if (l.scaling == RBN_CHANNEL_MEAN)
    pl.k = pl.deviation * ch.inverse_std;
  else if (l.scaling == RBN_CHANNEL_STD)
    pl.k = root(v * (ch.inverse_std * ch.inverse_std) + eps);
  else
    pl.k = mu;
  pl.restriction =
      l.scaling == RBN_NONE ? V{} + 1 : restricted(l.restriction, ch.scale_weight * pl.k + ch.scale_bias);
  pl.a = ch.gamma * (pl.restriction * ch.inverse_std);
  pl.translation = pl.shift - ch.mean_0 - ch.origin;
  return pl;
}

// The a and b of Y = a X + b for planes of the channels [c, c + W::count), the first of which is plane i. Where no
// statistic of X is in Y, mu is not measured, and any will do for the backward pass; so for v where nothing varies.
template <class W, class A>
static inline void calibrate(const rbn_layer &l, const Channel<typename W::Value> &ch, int64_t i, A *mu, A *v, A *a,
                             A *b) {
  if (!is_measured(l)) W::set(mu + i, ch.mean_0);
  if (!varies(l)) W::set(v + i, typename W::Value{});
  const auto plane = plane_of(l, (A)l.eps, ch, W::at(mu + i), W::at(v + i));
  W::set(a + i, plane.a);
  W::set(b + i, plane.a * plane.translation + ch.beta);
}

// From S0 and S1 of every plane the e and f of its second pass (in their place) and its a, and the gradients of
// the parameters, for the channels [c, c + W::count): `calibrate_backward` of rbn_core/two_pass.py.
template <class W, class A>
static inline void channel_backward(const rbn_layer &l, const rbn_parameters &p, int64_t c, const A *mu, const A *v,
                                    A *s0_e, A *s1_f, A *a, const rbn_gradients &gradients) {
  typedef typename W::Value V;
  typedef typename W::Sum Sum;
  const auto ch = channel_of<W, A>(l, p, c, mu, v, nullptr, nullptr);
  const A eps = (A)l.eps;
  const V inv = ch.inverse_std;
  Sum dbeta = {}, dgamma = {}, dscale_weight = {}, dscale_bias = {}, dcenter_weight = {}, dmean = {},
      dinverse_std = {};
  for (int64_t n = 0; n < l.images; n++) {
    const int64_t i = n * l.channels + c;
    const auto pl = plane_of(l, eps, ch, W::at(mu + i), W::at(v + i));
    const V db = W::at(s0_e + i), da = W::at(s1_f + i) + db * pl.deviation;
    dbeta += W::widened(db);
    dgamma += W::widened(da * pl.restriction * inv);
    dmean -= W::widened(db * pl.a);
    dinverse_std += W::widened(da * ch.gamma * pl.restriction);
    if (l.scaling == RBN_NONE) continue;
    const V dz = da * ch.gamma * inv * restricted_slope(l.restriction, pl.restriction);
    const V dk = dz * ch.scale_weight;
    dscale_weight += W::widened(dz * pl.k);
    dscale_bias += W::widened(dz);
    if (l.scaling == RBN_CHANNEL_MEAN) {
      dmean -= W::widened(dk * inv);
      dinverse_std += W::widened(dk * pl.deviation);
    } else if (l.scaling == RBN_CHANNEL_STD) {
      dinverse_std += W::widened(dk * W::at(v + i) * inv / pl.k);
    }
  }
  V dvar = {}, dmean_each = {};
  if (l.batch_statistics) {  // V = mean_n v + mean_n deviation^2, whose own mean term cancels
    const double images = (double)l.images;
    const Sum wide = W::widened(inv);
    dvar = W::rounded(-0.5 * dinverse_std * wide * wide * wide / images);
    dmean_each = W::rounded(dmean / images);
  }
  const A positions = (A)l.positions;
  for (int64_t n = 0; n < l.images; n++) {
    const int64_t i = n * l.channels + c;
    const auto pl = plane_of(l, eps, ch, W::at(mu + i), W::at(v + i));
    const V db = W::at(s0_e + i), da = W::at(s1_f + i) + db * pl.deviation;
    V dshifted = 2 * dvar * pl.deviation + dmean_each, dmu = {}, dv = dvar;
    if (l.scaling != RBN_NONE) {
      const V dk = da * ch.gamma * inv * restricted_slope(l.restriction, pl.restriction) * ch.scale_weight;
      if (l.scaling == RBN_CHANNEL_MEAN) dshifted += dk * inv;
      if (l.scaling == RBN_CHANNEL_STD) dv += dk * (inv * inv) / (2 * pl.k);
      if (l.scaling == RBN_INPUT_MEAN) dmu += dk;
    }
    const V dshift = db * pl.a + dshifted;
    dmu += dshifted;
    if (l.centering == RBN_CHANNEL_MEAN) {
      dcenter_weight += W::widened(dshift * pl.mu_0);
      dmu += dshift * ch.center_weight;
    } else if (l.centering == RBN_CHANNEL_STD) {
      const V deviation = root(W::at(v + i) + eps);
      dcenter_weight += W::widened(dshift * deviation);
      dv += dshift * ch.center_weight / (2 * deviation);
    }
    W::set(a + i, pl.a);
    W::set(s0_e + i, 2 * dv / positions);
    W::set(s1_f + i, dmu / positions);
  }
  const auto give = [c](const rbn_array &gradient, Sum sum) {
    if (gradient.values) W::set((A *)gradient.values + c, W::rounded(sum));
  };
  give(gradients.gamma, dgamma);
  give(gradients.beta, dbeta);
  give(gradients.center_weight, dcenter_weight);
  give(gradients.scale_weight, dscale_weight);
  give(gradients.scale_bias, dscale_bias);
}
