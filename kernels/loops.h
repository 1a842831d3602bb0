// The loops, compiled once for every instruction set: rbn_kernels.cpp includes this file in a namespace for each.

// 64 bytes: one register of AVX-512, two of AVX2, four of SSE.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef _Float16 Halves __attribute__((vector_size(32)));

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

// What a value's statistics are computed in: one of them (A), and a vector (V).
template <class T>
struct Of {
  typedef float A;
  typedef Floats V;
};
template <>
struct Of<double> {
  typedef double A;
  typedef Doubles V;
};

template <class To, class From>
static inline To copied(const From *from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

// One vector of values after another.
template <class T>
struct Wide {
  typedef typename Of<T>::A A;
  typedef typename Of<T>::V V;
  typedef V Value;
  static const int64_t count = sizeof(V) / sizeof(A);

  static V at(const A *p) { return copied<V>(p); }
  static void set(A *p, V v) { memcpy(p, &v, sizeof v); }
  static V load(const float *p) { return copied<V>(p); }
  static V load(const double *p) { return copied<V>(p); }
  static V load(const _Float16 *p) { return __builtin_convertvector(copied<Halves>(p), V); }
  static V load(const bfloat16 *p) {
    const Words words = __builtin_convertvector(copied<Shorts>(p), Words) << 16;
    return copied<V>(&words);
  }
  static void store(float *p, V v) { memcpy(p, &v, sizeof v); }
  static void store(double *p, V v) { memcpy(p, &v, sizeof v); }
  static void store(_Float16 *p, V v) {
    const Halves halves = __builtin_convertvector(v, Halves);
    memcpy(p, &halves, sizeof halves);
  }
  static void store(bfloat16 *p, V v) {
    const Words words = copied<Words>(&v);
    const Words nearest_even = (words + 0x7FFFu + ((words >> 16) & 1u)) >> 16;
    const Words quiet = (words >> 16) | 0x40u;  // rounding could turn a NaN into an infinity
    const Words picked = (words & 0x7FFFFFFFu) > 0x7F800000u ? quiet : nearest_even;
    const Shorts shorts = __builtin_convertvector(picked, Shorts);
    memcpy(p, &shorts, sizeof shorts);
  }
};

// One value after another: the rest that fills no vector.
template <class T>
struct Single {
  typedef typename Of<T>::A A;
  typedef A Value;
  static const int64_t count = 1;

  static A at(const A *p) { return *p; }
  static void set(A *p, A value) { *p = value; }
  static A load(const float *p) { return *p; }
  static A load(const double *p) { return *p; }
  static A load(const _Float16 *p) { return (A)*p; }
  static A load(const bfloat16 *p) {
    const uint32_t word = (uint32_t)p->bits << 16;
    return copied<float>(&word);
  }
  static void store(float *p, A value) { *p = value; }
  static void store(double *p, A value) { *p = value; }
  static void store(_Float16 *p, A value) { *p = (_Float16)value; }
  static void store(bfloat16 *p, A value) {
    const uint32_t word = copied<uint32_t>(&value);
    const bool nan = (word & 0x7FFFFFFFu) > 0x7F800000u;
    p->bits = (uint16_t)(nan ? (word >> 16) | 0x40u : (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);
  }
};

// body(Wide, i) for as long as a vector fits, then body(Single, i).
template <class T, class Body>
static inline void each(int64_t first, int64_t last, Body body) {
  int64_t i = first;
  for (; i + Wide<T>::count <= last; i += Wide<T>::count) body(Wide<T>(), i);
  for (; i < last; i++) body(Single<T>(), i);
}

// ---- sums along a plane whose values lie side by side ----

// How many values are summed before their mean and variance are combined with the others' (Chan et al. 1983):
// few enough to stay in the first cache, so that the variance's own pass costs no memory traffic.
static const int64_t BLOCK = 4096;

// Several sums at once, each in four vectors so that no addition waits for the last one.
template <class T, int sums, class Terms>
static inline void summed(int64_t first, int64_t last, double *results, Terms terms) {
  typedef typename Of<T>::A A;
  typedef typename Of<T>::V V;
  const int64_t L = Wide<T>::count;
  V wide[4][sums] = {}, more[sums];
  A rest[sums] = {}, one[sums];
  int64_t i = first;
  for (; i + 4 * L <= last; i += 4 * L)
    for (int lane = 0; lane < 4; lane++) {
      terms(Wide<T>(), i + lane * L, more);
      for (int s = 0; s < sums; s++) wide[lane][s] += more[s];
    }
  for (; i + L <= last; i += L) {
    terms(Wide<T>(), i, more);
    for (int s = 0; s < sums; s++) wide[0][s] += more[s];
  }
  for (; i < last; i++) {
    terms(Single<T>(), i, one);
    for (int s = 0; s < sums; s++) rest[s] += one[s];
  }
  for (int s = 0; s < sums; s++) {
    const V all = (wide[0][s] + wide[1][s]) + (wide[2][s] + wide[3][s]);
    results[s] = rest[s];
    for (int64_t j = 0; j < L; j++) results[s] += all[j];
  }
}

template <class T, class A>
static void plane_moments(const T *x, int64_t positions, A *mean, A *variance) {
  double all_mean = 0, all_squares = 0;
  for (int64_t begin = 0; begin < positions; begin += BLOCK) {
    const int64_t end = positions - begin < BLOCK ? positions : begin + BLOCK, count = end - begin;
    double sum, squares;
    summed<T, 1>(begin, end, &sum, [=](auto w, int64_t i, auto *term) { term[0] = w.load(x + i); });
    const A centre = (A)(sum / count);
    summed<T, 1>(begin, end, &squares, [=](auto w, int64_t i, auto *term) {
      const auto d = w.load(x + i) - centre;
      term[0] = d * d;
    });
    const double delta = sum / count - all_mean, share = (double)count / end;
    all_mean += delta * share;
    all_squares += squares + delta * delta * begin * share;
  }
  *mean = (A)all_mean;
  *variance = (A)(all_squares / positions);
}

// S0 = sum dY and S1 = sum dY (X - mu).
template <class T, class A>
static void plane_backward_sums(const T *dy, const T *x, int64_t positions, A mu, A *s0, A *s1) {
  double all[2] = {}, some[2];
  for (int64_t begin = 0; begin < positions; begin += BLOCK) {
    const int64_t end = positions - begin < BLOCK ? positions : begin + BLOCK;
    summed<T, 2>(begin, end, some, [=](auto w, int64_t i, auto *terms) {
      terms[0] = w.load(dy + i);
      terms[1] = terms[0] * (w.load(x + i) - mu);
    });
    all[0] += some[0];
    all[1] += some[1];
  }
  *s0 = (A)all[0];
  *s1 = (A)all[1];
}

// Y = a X + b.
template <class T, class A>
static void plane_affine(const T *x, int64_t positions, A a, A b, T *y) {
  each<T>(0, positions, [=](auto w, int64_t i) { w.store(y + i, w.load(x + i) * a + b); });
}

// dX = a dY + e (X - mu) + f.
template <class T, class A>
static void plane_backward_affine(const T *dy, const T *x, int64_t positions, A mu, A a, A e, A f, T *dx) {
  each<T>(0, positions, [=](auto w, int64_t i) {
    w.store(dx + i, w.load(dy + i) * a + ((w.load(x + i) - mu) * e + f));
  });
}

// ---- the same for channels [0, channels) of an image, channels last: rows of `stride` values ----

// Rows that are measured together: they stay in the second cache, and no sum gets long enough to lose digits.
template <class T>
static inline int64_t rows_per_block(int64_t channels) {
  const int64_t rows = ((int64_t)256 << 10) / (channels * (int64_t)sizeof(T));
  return rows < 16 ? 16 : rows > 256 ? 256 : rows;
}

// sums[s][c] += terms(w, offset of the value, c) of these rows, four of them at a time.
template <class T, int sums, class A, class Terms>
static inline void summed_rows(int64_t rows, int64_t stride, int64_t channels, A *results, Terms terms) {
  for (int64_t begin = 0; begin < rows; begin += 4) {
    const int64_t end = rows - begin < 4 ? rows : begin + 4;
    each<T>(0, channels, [=](auto w, int64_t c) {
      typename decltype(w)::Value totals[sums] = {}, more[sums];
      for (int s = 0; begin && s < sums; s++) totals[s] = w.at(results + s * channels + c);
      for (int64_t r = begin; r < end; r++) {
        terms(w, r * stride + c, c, more);
        for (int s = 0; s < sums; s++) totals[s] += more[s];
      }
      for (int s = 0; s < sums; s++) w.set(results + s * channels + c, totals[s]);
    });
  }
}

// Room for what `image_moments` and `image_backward_sums` keep of every channel.
template <class A>
struct Room {
  double *totals;  // 2 x channels
  A *some;         // 2 x channels
};

template <class T, class A>
static void image_moments(const T *x, int64_t rows, int64_t stride, int64_t channels, A *mean, A *variance,
                          Room<A> room) {
  if (rows == 1) {
    each<T>(0, channels, [=](auto w, int64_t c) { w.set(mean + c, w.load(x + c)); });
    for (int64_t c = 0; c < channels; c++) variance[c] = mean[c] - mean[c];  // 0, and NaN of what is not finite
    return;
  }
  double *means = room.totals, *squares = room.totals + channels;
  A *centre = room.some, *some = room.some + channels;
  for (int64_t c = 0; c < channels; c++) means[c] = squares[c] = 0;
  const int64_t block = rows_per_block<T>(channels);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = rows - begin < block ? rows : begin + block, count = end - begin;
    const T *p = x + begin * stride;
    summed_rows<T, 1>(count, stride, channels, centre,
                      [=](auto w, int64_t i, int64_t, auto *term) { term[0] = w.load(p + i); });
    for (int64_t c = 0; c < channels; c++) centre[c] /= count;
    summed_rows<T, 1>(count, stride, channels, some, [=](auto w, int64_t i, int64_t c, auto *term) {
      const auto d = w.load(p + i) - w.at(centre + c);
      term[0] = d * d;
    });
    const double share = (double)count / end;
    for (int64_t c = 0; c < channels; c++) {
      const double delta = centre[c] - means[c];
      means[c] += delta * share;
      squares[c] += some[c] + delta * delta * begin * share;
    }
  }
  for (int64_t c = 0; c < channels; c++) {
    mean[c] = (A)means[c];
    variance[c] = (A)(squares[c] / rows);
  }
}

template <class T, class A>
static void image_backward_sums(const T *dy, const T *x, int64_t rows, int64_t stride, int64_t channels,
                                const A *mu, A *s0, A *s1, Room<A> room) {
  for (int64_t c = 0; c < 2 * channels; c++) room.totals[c] = 0;
  const int64_t block = rows_per_block<T>(2 * channels);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    const T *g = dy + begin * stride, *p = x + begin * stride;
    summed_rows<T, 2>(count, stride, channels, room.some, [=](auto w, int64_t i, int64_t c, auto *terms) {
      terms[0] = w.load(g + i);
      terms[1] = terms[0] * (w.load(p + i) - w.at(mu + c));
    });
    for (int64_t c = 0; c < 2 * channels; c++) room.totals[c] += room.some[c];
  }
  for (int64_t c = 0; c < channels; c++) {
    s0[c] = (A)room.totals[c];
    s1[c] = (A)room.totals[channels + c];
  }
}

// Y = a X + b.
template <class T, class A>
static void image_affine(const T *x, int64_t rows, int64_t stride, int64_t channels, const A *a, const A *b, T *y) {
  for (int64_t r = 0; r < rows; r++)
    each<T>(0, channels, [=](auto w, int64_t c) {
      w.store(y + r * stride + c, w.load(x + r * stride + c) * w.at(a + c) + w.at(b + c));
    });
}

// dX = a dY + e (X - mu) + f.
template <class T, class A>
static void image_backward_affine(const T *dy, const T *x, int64_t rows, int64_t stride, int64_t channels,
                                  const A *mu, const A *a, const A *e, const A *f, T *dx) {
  for (int64_t r = 0; r < rows; r++)
    each<T>(0, channels, [=](auto w, int64_t c) {
      const int64_t i = r * stride + c;
      w.store(dx + i, w.load(dy + i) * w.at(a + c) + ((w.load(x + i) - w.at(mu + c)) * w.at(e + c) + w.at(f + c)));
    });
}

// ---- between the passes: equations 2 to 9 on (N, C) numbers, for the channels [first, last) ----

template <class A>
static inline A restricted(int32_t restriction, A z) {
  if (restriction == RBN_SIGMOID) return 1 / (1 + std::exp(-z));
  const A r = z / 6 + A(0.5);
  return r < 0 ? A(0) : r > 1 ? A(1) : r;  // a NaN stays one
}

template <class A>
static inline A restricted_slope(int32_t restriction, A r) {
  if (restriction == RBN_SIGMOID) return r * (1 - r);
  return r > 0 && r < 1 ? A(1) / 6 : A(0);
}

// What a layer's channel is, and what every plane of it is; see `calibrate` of rbn_core/fused.py for the names.
template <class A>
struct Channel {
  A gamma, beta, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std;
};

template <class A>
struct Plane {
  A mu_0, shift, deviation, k, restriction, a, translation;
};

template <class A>
static inline A parameter(const void *values, int64_t c, A otherwise) {
  return values ? ((const A *)values)[c] : otherwise;
}

// Fills a channel from all its planes; the E and biased Var of the batch go to `mean` and `var`.
template <class A>
static inline Channel<A> channel_of(const rbn_layer &l, const rbn_parameters &p, int64_t c, const A *mu,
                                    const A *v, A *mean, A *var) {
  Channel<A> ch;
  ch.gamma = parameter<A>(p.gamma, c, 1);
  ch.beta = parameter<A>(p.beta, c, 0);
  ch.center_weight = parameter<A>(p.center_weight, c, 0);
  ch.scale_weight = parameter<A>(p.scale_weight, c, 0);
  ch.scale_bias = parameter<A>(p.scale_bias, c, 0);
  const A eps = (A)l.eps;
  if (!l.batch_statistics) {
    ch.origin = 0;
    ch.mean_0 = ((const A *)p.running_mean)[c];
    ch.inverse_std = 1 / std::sqrt(((const A *)p.running_var)[c] + eps);
    return ch;
  }
  double sum = 0;
  for (int64_t n = 0; n < l.images; n++) sum += mu[n * l.channels + c];
  ch.origin = (A)(sum / l.images);
  const auto shifted = [&](int64_t n) {
    const A mu_0 = mu[n * l.channels + c] - ch.origin;
    if (l.centering == RBN_CHANNEL_MEAN) return mu_0 + ch.center_weight * mu_0;
    if (l.centering == RBN_CHANNEL_STD) return mu_0 + ch.center_weight * std::sqrt(v[n * l.channels + c] + eps);
    return mu_0;
  };
  sum = 0;
  for (int64_t n = 0; n < l.images; n++) sum += shifted(n);
  const double mean_0 = sum / l.images;
  sum = 0;
  for (int64_t n = 0; n < l.images; n++) {
    const double d = shifted(n) - mean_0;
    sum += v[n * l.channels + c] + d * d;
  }
  ch.mean_0 = (A)mean_0;
  const A variance = (A)(sum / l.images);
  ch.inverse_std = 1 / std::sqrt(variance + eps);
  if (mean) mean[c] = ch.mean_0 + (l.centering == RBN_CHANNEL_MEAN ? ch.origin + ch.center_weight * ch.origin : ch.origin);
  if (var) var[c] = variance;
  return ch;
}

template <class A>
static inline Plane<A> plane_of(const rbn_layer &l, const Channel<A> &ch, A mu, A v) {
  Plane<A> pl;
  const A eps = (A)l.eps;
  pl.mu_0 = mu - ch.origin;
  pl.shift = l.centering == RBN_CHANNEL_MEAN  ? ch.center_weight * pl.mu_0
             : l.centering == RBN_CHANNEL_STD ? ch.center_weight * std::sqrt(v + eps)
                                              : A(0);
  pl.deviation = pl.mu_0 + pl.shift - ch.mean_0;
  pl.k = l.scaling == RBN_CHANNEL_MEAN  ? pl.deviation * ch.inverse_std
         : l.scaling == RBN_CHANNEL_STD ? std::sqrt(v * (ch.inverse_std * ch.inverse_std) + eps)
                                        : mu;
  pl.restriction =
      l.scaling == RBN_NONE ? A(1) : restricted(l.restriction, ch.scale_weight * pl.k + ch.scale_bias);
  pl.a = ch.gamma * (pl.restriction * ch.inverse_std);
  pl.translation = pl.shift - ch.mean_0 - ch.origin;
  return pl;
}

// From S0 and S1 of every plane the e and f of its second pass (in their place) and its a, and the gradients of
// the channel's parameters: `calibrate_backward` of rbn_core/fused.py.
template <class A>
static inline void channel_backward(const rbn_layer &l, const rbn_parameters &p, int64_t c, const A *mu, const A *v,
                                    A *s0_e, A *s1_f, A *a, const rbn_gradients &gradients) {
  const Channel<A> ch = channel_of<A>(l, p, c, mu, v, nullptr, nullptr);
  const A eps = (A)l.eps, inv = ch.inverse_std;
  double dbeta = 0, dgamma = 0, dscale_weight = 0, dscale_bias = 0, dcenter_weight = 0, dmean = 0, dinverse_std = 0;
  for (int64_t n = 0; n < l.images; n++) {
    const int64_t i = n * l.channels + c;
    const Plane<A> pl = plane_of(l, ch, mu[i], v[i]);
    const A db = s0_e[i], da = s1_f[i] + db * pl.deviation;
    dbeta += db;
    dgamma += da * pl.restriction * inv;
    dmean -= db * pl.a;
    dinverse_std += da * ch.gamma * pl.restriction;
    if (l.scaling == RBN_NONE) continue;
    const A dz = da * ch.gamma * inv * restricted_slope(l.restriction, pl.restriction);
    const A dk = dz * ch.scale_weight;
    dscale_weight += dz * pl.k;
    dscale_bias += dz;
    if (l.scaling == RBN_CHANNEL_MEAN) {
      dmean -= dk * inv;
      dinverse_std += dk * pl.deviation;
    } else if (l.scaling == RBN_CHANNEL_STD) {
      dinverse_std += dk * v[i] * inv / pl.k;
    }
  }
  // V = mean_n v + mean_n deviation^2, whose own mean term cancels.
  const A dvar = l.batch_statistics ? (A)(-0.5 * dinverse_std * inv * inv * inv / l.images) : A(0);
  const A dmean_each = l.batch_statistics ? (A)(dmean / l.images) : A(0);
  for (int64_t n = 0; n < l.images; n++) {
    const int64_t i = n * l.channels + c;
    const Plane<A> pl = plane_of(l, ch, mu[i], v[i]);
    const A db = s0_e[i], da = s1_f[i] + db * pl.deviation;
    A dshifted = 2 * dvar * pl.deviation + dmean_each, dmu = 0, dv = dvar;
    if (l.scaling != RBN_NONE) {
      const A dk = da * ch.gamma * inv * restricted_slope(l.restriction, pl.restriction) * ch.scale_weight;
      if (l.scaling == RBN_CHANNEL_MEAN) dshifted += dk * inv;
      if (l.scaling == RBN_CHANNEL_STD) dv += dk * (inv * inv) / (2 * pl.k);
      if (l.scaling == RBN_INPUT_MEAN) dmu += dk;
    }
    const A dshift = db * pl.a + dshifted;
    dmu += dshifted;
    if (l.centering == RBN_CHANNEL_MEAN) {
      dcenter_weight += dshift * pl.mu_0;
      dmu += dshift * ch.center_weight;
    } else if (l.centering == RBN_CHANNEL_STD) {
      const A deviation = std::sqrt(v[i] + eps);
      dcenter_weight += dshift * deviation;
      dv += dshift * ch.center_weight / (2 * deviation);
    }
    a[i] = pl.a;
    s0_e[i] = 2 * dv / l.positions;
    s1_f[i] = dmu / l.positions;
  }
  if (gradients.gamma) ((A *)gradients.gamma)[c] = (A)dgamma;
  if (gradients.beta) ((A *)gradients.beta)[c] = (A)dbeta;
  if (gradients.center_weight) ((A *)gradients.center_weight)[c] = (A)dcenter_weight;
  if (gradients.scale_weight) ((A *)gradients.scale_weight)[c] = (A)dscale_weight;
  if (gradients.scale_bias) ((A *)gradients.scale_bias)[c] = (A)dscale_bias;
}

// ---- the layer ----

// Calls work(n, first channel, channels, room) for shares of the images that the threads take: whole images where
// there are enough of them, else some of the channels.
template <class A, class Work>
static bool each_image(const rbn_layer &l, Work work) {
  const int64_t parts = l.images >= l.threads ? 1 : (l.threads + l.images - 1) / (l.images ? l.images : 1);
  const int64_t width = ((l.channels + parts - 1) / parts + 15) / 16 * 16;
  const int64_t shares = l.images * ((l.channels + width - 1) / width);
  bool enough = true;
#pragma omp parallel num_threads(l.threads)
  {
    double *totals = (double *)malloc(sizeof(double) * 4 * (width ? width : 1));
#pragma omp for schedule(static)
    for (int64_t share = 0; share < shares; share++) {
      const int64_t n = share % l.images, first = share / l.images * width;
      const int64_t channels = l.channels - first < width ? l.channels - first : width;
      if (totals) work(n, first, channels, Room<A>{totals, (A *)(totals + 2 * width)});
    }
    if (!totals) {
#pragma omp atomic write
      enough = false;
    }
    free(totals);
  }
  return enough;
}

template <class A, class Work>
static void each_channel(const rbn_layer &l, Work work) {
#pragma omp parallel for schedule(static) num_threads(l.threads)
  for (int64_t c = 0; c < l.channels; c++) work(c);
}

template <class Work>
static void each_plane(const rbn_layer &l, Work work) {
  const int64_t planes = l.images * l.channels;
#pragma omp parallel for schedule(static) num_threads(l.threads)
  for (int64_t i = 0; i < planes; i++) work(i, i * l.positions);
}

// Planes side by side or channels last; a plane of one value is both, and the latter is faster.
static inline bool in_rows(const rbn_layer &l) { return l.channels_last || l.positions == 1; }

// Whether Y depends on a statistic of X, and with it dX on X.
static inline bool is_measured(const rbn_layer &l) {
  return l.batch_statistics || l.centering != RBN_NONE || l.scaling != RBN_NONE;
}

template <class T>
static bool forward(const rbn_layer &l, const rbn_parameters &p, const T *x, T *y, void *mu_, void *v_, void *mean,
                    void *var) {
  typedef typename Of<T>::A A;
  A *mu = (A *)mu_, *v = (A *)v_;
  const int64_t planes = l.images * l.channels, rows = l.positions, stride = l.channels, size = rows * stride;
  const bool measured = is_measured(l);
  A *a = (A *)malloc(sizeof(A) * 2 * (planes ? planes : 1)), *b = a + planes;
  if (!a) return false;
  bool enough = true;
  const auto calibrate = [&](const Channel<A> &ch, int64_t i) {
    if (!measured) {  // any mu will do for the backward pass
      mu[i] = ch.mean_0;
      v[i] = 0;
    }
    const Plane<A> plane = plane_of(l, ch, mu[i], v[i]);
    a[i] = plane.a;
    b[i] = plane.a * plane.translation + ch.beta;
  };
  const auto measure_image = [=](int64_t n, int64_t c, int64_t channels, Room<A> room) {
    image_moments(x + n * size + c, rows, stride, channels, mu + n * stride + c, v + n * stride + c, room);
  };
  const auto transform_image = [=](int64_t n, int64_t c, int64_t channels, Room<A>) {
    image_affine(x + n * size + c, rows, stride, channels, a + n * stride + c, b + n * stride + c, y + n * size + c);
  };
  if (l.batch_statistics) {
    if (in_rows(l))
      enough &= each_image<A>(l, measure_image);
    else
      each_plane(l, [=](int64_t i, int64_t at) { plane_moments(x + at, rows, mu + i, v + i); });
    each_channel<A>(l, [&](int64_t c) {
      const Channel<A> ch = channel_of(l, p, c, mu, v, (A *)mean, (A *)var);
      for (int64_t n = 0; n < l.images; n++) calibrate(ch, n * stride + c);
    });
    if (in_rows(l))
      enough &= each_image<A>(l, transform_image);
    else
      each_plane(l, [=](int64_t i, int64_t at) { plane_affine(x + at, rows, a[i], b[i], y + at); });
  } else if (in_rows(l)) {  // E and Var are known: every image is measured and transformed while it is near
    enough &= each_image<A>(l, [&](int64_t n, int64_t first, int64_t channels, Room<A> room) {
      if (measured) measure_image(n, first, channels, room);
      for (int64_t c = first; c < first + channels; c++)
        calibrate(channel_of<A>(l, p, c, mu, v, nullptr, nullptr), n * stride + c);
      transform_image(n, first, channels, room);
    });
  } else {
    each_plane(l, [&](int64_t i, int64_t at) {
      if (measured) plane_moments(x + at, rows, mu + i, v + i);
      calibrate(channel_of<A>(l, p, i % stride, mu, v, nullptr, nullptr), i);
      plane_affine(x + at, rows, a[i], b[i], y + at);
    });
  }
  free(a);
  return enough;
}

template <class T>
static bool backward(const rbn_layer &l, const rbn_parameters &p, const T *dy, const T *x, const void *mu_,
                     const void *v_, T *dx, const rbn_gradients &gradients) {
  typedef typename Of<T>::A A;
  const A *mu = (const A *)mu_, *v = (const A *)v_;
  const int64_t planes = l.images * l.channels, rows = l.positions, stride = l.channels, size = rows * stride;
  A *s0 = (A *)malloc(sizeof(A) * 3 * (planes ? planes : 1)), *s1 = s0 + planes, *a = s1 + planes;
  if (!s0) return false;
  bool enough = true;
  if (in_rows(l))
    enough &= each_image<A>(l, [=](int64_t n, int64_t c, int64_t channels, Room<A> room) {
      const int64_t at = n * size + c, i = n * stride + c;
      image_backward_sums(dy + at, x + at, rows, stride, channels, mu + i, s0 + i, s1 + i, room);
    });
  else
    each_plane(l, [=](int64_t i, int64_t at) {
      plane_backward_sums(dy + at, x + at, rows, mu[i], s0 + i, s1 + i);
    });
  each_channel<A>(l, [&](int64_t c) { channel_backward(l, p, c, mu, v, s0, s1, a, gradients); });
  const A *e = s0, *f = s1;
  const bool measured = is_measured(l);  // else e and f are 0, and a value that is not finite stays where it is
  if (!dx) {
  } else if (in_rows(l)) {
    enough &= each_image<A>(l, [=](int64_t n, int64_t c, int64_t channels, Room<A>) {
      const int64_t at = n * size + c, i = n * stride + c;
      if (!measured)
        image_affine(dy + at, rows, stride, channels, a + i, f + i, dx + at);
      else
        image_backward_affine(dy + at, x + at, rows, stride, channels, mu + i, a + i, e + i, f + i, dx + at);
    });
  } else {
    each_plane(l, [=](int64_t i, int64_t at) {
      if (!measured)
        plane_affine(dy + at, rows, a[i], f[i], dx + at);
      else
        plane_backward_affine(dy + at, x + at, rows, mu[i], a[i], e[i], f[i], dx + at);
    });
  }
  free(s0);
  return enough;
}

static int forward_of_dtype(const rbn_layer *l, const rbn_parameters *p, const void *x, void *y, void *mu, void *v,
                            void *mean, void *var) {
  switch (l->dtype) {
    case RBN_FLOAT32: return !forward(*l, *p, (const float *)x, (float *)y, mu, v, mean, var);
    case RBN_FLOAT64: return !forward(*l, *p, (const double *)x, (double *)y, mu, v, mean, var);
    case RBN_FLOAT16: return !forward(*l, *p, (const _Float16 *)x, (_Float16 *)y, mu, v, mean, var);
    default: return !forward(*l, *p, (const bfloat16 *)x, (bfloat16 *)y, mu, v, mean, var);
  }
}

static int backward_of_dtype(const rbn_layer *l, const rbn_parameters *p, const void *dy, const void *x,
                             const void *mu, const void *v, void *dx, const rbn_gradients *g) {
  switch (l->dtype) {
    case RBN_FLOAT32: return !backward(*l, *p, (const float *)dy, (const float *)x, mu, v, (float *)dx, *g);
    case RBN_FLOAT64: return !backward(*l, *p, (const double *)dy, (const double *)x, mu, v, (double *)dx, *g);
    case RBN_FLOAT16:
      return !backward(*l, *p, (const _Float16 *)dy, (const _Float16 *)x, mu, v, (_Float16 *)dx, *g);
    default: return !backward(*l, *p, (const bfloat16 *)dy, (const bfloat16 *)x, mu, v, (bfloat16 *)dx, *g);
  }
}
