// The loops, compiled once for every instruction set: rbn_kernels.cpp includes this file in a namespace for each.

// 64 bytes: one register of AVX-512, two of AVX2, four of SSE.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef _Float16 Halves __attribute__((vector_size(32)));
typedef double Sums __attribute__((vector_size(128)));  // as many as Floats holds

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

// What a value's statistics are computed in: one of them (A), a vector (V), and what long sums of those are (S).
template <class T>
struct Of {
  typedef float A;
  typedef Floats V;
  typedef Sums S;
};
template <>
struct Of<double> {
  typedef double A;
  typedef Doubles V;
  typedef Doubles S;
};

template <class To, class From>
static inline To copied(const From *from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

// Whole lines of memory, past the caches: they need not be read for being overwritten.
template <class Bits>
static inline void streamed(void *to, Bits bits) {
#ifdef __SSE2__
  for (size_t k = 0; k < sizeof bits / 16; k++)
    _mm_stream_ps((float *)to + 4 * k, copied<__m128>((const char *)&bits + 16 * k));
#else
  memcpy(to, &bits, sizeof bits);
#endif
}

// What was written past the caches is to be seen by the other threads.
static inline void all_written() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// One vector of values after another.
template <class T>
struct Wide {
  typedef typename Of<T>::A A;
  typedef typename Of<T>::V V;
  typedef V Value;
  typedef typename Of<T>::S Sum;
  static const int64_t count = sizeof(V) / sizeof(A);

  static Sum widened(V v) { return __builtin_convertvector(v, Sum); }
  static V rounded(Sum s) { return __builtin_convertvector(s, V); }
  static V at(const A *p) { return copied<V>(p); }
  static void set(A *p, V v) { memcpy(p, &v, sizeof v); }
  static Sum sums_at(const double *p) { return copied<Sum>(p); }
  static void set_sums(double *p, Sum s) { memcpy(p, &s, sizeof s); }
  static V load(const float *p) { return copied<V>(p); }
  static V load(const double *p) { return copied<V>(p); }
  static V load(const _Float16 *p) { return __builtin_convertvector(copied<Halves>(p), V); }
  static V load(const bfloat16 *p) {
    const Words words = __builtin_convertvector(copied<Shorts>(p), Words) << 16;
    return copied<V>(&words);
  }
  static V bits(const float *, V v) { return v; }
  static V bits(const double *, V v) { return v; }
  static Halves bits(const _Float16 *, V v) { return __builtin_convertvector(v, Halves); }
  static Shorts bits(const bfloat16 *, V v) {
    const Words words = copied<Words>(&v);
    const Words nearest_even = (words + 0x7FFFu + ((words >> 16) & 1u)) >> 16;
    const Words quiet = (words >> 16) | 0x40u;  // rounding could turn a NaN into an infinity
    const Words picked = (words & 0x7FFFFFFFu) > 0x7F800000u ? quiet : nearest_even;
    return __builtin_convertvector(picked, Shorts);
  }
  static void store(T *p, V v, bool past_the_caches) {
    const auto b = bits(p, v);
    if (past_the_caches)
      streamed(p, b);
    else
      memcpy(p, &b, sizeof b);
  }
};

// One value after another: the rest that fills no vector.
template <class T>
struct Single {
  typedef typename Of<T>::A A;
  typedef A Value;
  typedef double Sum;
  static const int64_t count = 1;

  static double widened(A value) { return value; }
  static A rounded(double sum) { return (A)sum; }
  static A at(const A *p) { return *p; }
  static void set(A *p, A value) { *p = value; }
  static double sums_at(const double *p) { return *p; }
  static void set_sums(double *p, double sum) { *p = sum; }
  static A load(const float *p) { return *p; }
  static A load(const double *p) { return *p; }
  static A load(const _Float16 *p) { return (A)*p; }
  static A load(const bfloat16 *p) {
    const uint32_t word = (uint32_t)p->bits << 16;
    return copied<float>(&word);
  }
  static void store(float *p, A value, bool) { *p = value; }
  static void store(double *p, A value, bool) { *p = value; }
  static void store(_Float16 *p, A value, bool) { *p = (_Float16)value; }
  static void store(bfloat16 *p, A value, bool) {
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

// 0, 1, 2, ...
template <class V>
static inline V numbered() {
  V v;
  for (size_t j = 0; j < sizeof(V) / sizeof(v[0]); j++) v[j] = j;
  return v;
}

// The sum of a vector's values, added in pairs.
static inline double total(Doubles v) {
  const auto four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  return two[0] + two[1];
}

static inline double total(Floats v) {
  const auto low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return total(__builtin_convertvector(low, Doubles) + __builtin_convertvector(high, Doubles));
}

// Several sums at once, each in four vectors so that no addition waits for the last one. What fills no vector at the
// end is read together with values before it, which do not count again.
template <class T, int sums, class Terms>
static inline void summed(int64_t first, int64_t last, double *results, Terms terms) {
  typedef typename Of<T>::A A;
  typedef typename Of<T>::V V;
  const int64_t L = Wide<T>::count;
  V wide[4][sums] = {}, more[sums];
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
  if (i < last && last - first >= L) {
    terms(Wide<T>(), last - L, more);
    for (int s = 0; s < sums; s++) wide[1][s] += numbered<V>() < (A)(L - (last - i)) ? V{} : more[s];
    i = last;
  }
  for (int s = 0; s < sums; s++) results[s] = total((wide[0][s] + wide[1][s]) + (wide[2][s] + wide[3][s]));
  for (A one[sums]; i < last; i++) {
    terms(Single<T>(), i, one);
    for (int s = 0; s < sums; s++) results[s] += one[s];
  }
}

template <class T, class A>
static void plane_moments(const T *x, int64_t positions, A *mean, A *variance) {
  double all_mean = 0, all_squares = 0;
  for (int64_t begin = 0; begin < positions; begin += BLOCK) {
    const int64_t end = positions - begin < BLOCK ? positions : begin + BLOCK, count = end - begin;
    double sum, sums[2];
    summed<T, 1>(begin, end, &sum, [=](auto w, int64_t i, auto *term) { term[0] = w.load(x + i); });
    const A centre = (A)(sum / count);  // near the mean: the second pass corrects what rounding left
    summed<T, 2>(begin, end, sums, [=](auto w, int64_t i, auto *terms) {
      terms[0] = w.load(x + i) - centre;
      terms[1] = terms[0] * terms[0];
    });
    const double off = sums[0] / count, block_mean = centre + off, squares = sums[1] - sums[0] * off;
    const double delta = block_mean - all_mean, share = count == positions ? 1 : (double)count / end;
    all_mean += delta * share;
    all_squares += squares + delta * delta * begin * share;
  }
  *mean = (A)all_mean;
  *variance = (A)(all_squares / positions);
}

// The mean of a plane, while `beside(w, i)` does at every value what else is to be done, sometimes twice.
template <class T, class A, class Beside>
static void plane_mean(const T *x, int64_t positions, A *mean, Beside beside) {
  double all = 0, sum;
  for (int64_t begin = 0; begin < positions; begin += BLOCK) {
    const int64_t end = positions - begin < BLOCK ? positions : begin + BLOCK;
    summed<T, 1>(begin, end, &sum, [=](auto w, int64_t i, auto *term) {
      term[0] = w.load(x + i);
      beside(w, i);
    });
    all += sum;
  }
  *mean = (A)(all / positions);
}

// The sums of neighbouring values, of one vector and then of the other.
static inline Floats paired(Floats u, Floats v) {
  return __builtin_shufflevector(u, v, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(u, v, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

static inline Doubles paired(Doubles u, Doubles v) {
  return __builtin_shufflevector(u, v, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(u, v, 1, 3, 5, 7, 9, 11, 13, 15);
}

// Whether planes are so small that the ends of their sums weigh as much as the sums: as many planes as a vector has
// values are then measured together, and share the ends.
template <class T>
static inline bool are_small(int64_t positions) {
  return positions >= Wide<T>::count && positions <= 256;
}

// Sums of so many planes, a vector for each of the sums with a plane in every value: terms(k, offset, more) gives what
// is added of the plane k, whose values begin at k * positions.
template <class T, int sums, class Terms>
static inline void summed_planes(int64_t positions, typename Of<T>::V *results, Terms terms) {
  typedef typename Of<T>::V V;
  const int64_t L = Wide<T>::count;
  V all[sums][L], more[sums];
  for (int64_t k = 0; k < L; k++) {
    const int64_t begin = k * positions, end = begin + positions;
    V totals[sums] = {};
    int64_t i = begin;
    for (; i + L <= end; i += L) {
      terms(k, i, more);
      for (int s = 0; s < sums; s++) totals[s] += more[s];
    }
    if (i < end) {
      terms(k, end - L, more);
      for (int s = 0; s < sums; s++)  // those before have been counted
        totals[s] += numbered<V>() < (typename Of<T>::A)(L - (end - i)) ? V{} : more[s];
    }
    for (int s = 0; s < sums; s++) all[s][k] = totals[s];
  }
  for (int s = 0; s < sums; s++) {
    for (int64_t left = L / 2; left; left /= 2)
      for (int64_t k = 0; k < left; k++) all[s][k] = paired(all[s][2 * k], all[s][2 * k + 1]);
    results[s] = all[s][0];
  }
}

// Their means, while `beside(k, offset)` does at every value what else is to be done, sometimes twice.
template <class T, class A, class Beside>
static void small_means(const T *x, int64_t positions, A *mean, Beside beside) {
  typename Of<T>::V sum;
  summed_planes<T, 1>(positions, &sum, [=](int64_t k, int64_t i, auto *term) {
    term[0] = Wide<T>::load(x + i);
    beside(k, i);
  });
  Wide<T>::set(mean, sum / (A)positions);
}

template <class T, class A>
static void small_moments(const T *x, int64_t positions, A *mean, A *variance) {
  typename Of<T>::V sums[2];
  small_means(x, positions, mean, [](int64_t, int64_t) {});
  summed_planes<T, 2>(positions, sums, [=](int64_t k, int64_t i, auto *terms) {
    terms[0] = Wide<T>::load(x + i) - mean[k];
    terms[1] = terms[0] * terms[0];
  });
  const auto off = sums[0] / (A)positions;
  Wide<T>::set(mean, Wide<T>::at(mean) + off);
  Wide<T>::set(variance, sums[1] / (A)positions - off * off);
}

template <class T, class A>
static void small_backward_sums(const T *dy, const T *x, int64_t positions, const A *mu, A *s0, A *s1) {
  typename Of<T>::V sums[2];
  summed_planes<T, 2>(positions, sums, [=](int64_t k, int64_t i, auto *terms) {
    terms[0] = Wide<T>::load(dy + i);
    terms[1] = terms[0] * (Wide<T>::load(x + i) - mu[k]);
  });
  Wide<T>::set(s0, sums[0]);
  Wide<T>::set(s1, sums[1]);
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
static void plane_affine(const T *x, int64_t positions, A a, A b, T *y, bool past) {
  each<T>(0, positions, [=](auto w, int64_t i) { w.store(y + i, w.load(x + i) * a + b, past); });
}

// dX = a dY + e (X - mu) + f.
template <class T, class A>
static void plane_backward_affine(const T *dy, const T *x, int64_t positions, A mu, A a, A e, A f, T *dx,
                                  bool past) {
  each<T>(0, positions, [=](auto w, int64_t i) {
    w.store(dx + i, w.load(dy + i) * a + ((w.load(x + i) - mu) * e + f), past);
  });
}

// ---- the same for channels [0, channels) of an image, channels last: rows of `stride` values ----

template <int number>
struct Vectors {
  static const int count = number;
};

// body(Wide, four vectors, c) for as long as they fit, then one vector, then one value.
template <class T, class Body>
static inline void each_strip(int64_t channels, Body body) {
  const int64_t L = Wide<T>::count;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) body(Wide<T>(), Vectors<4>(), c);
  for (; c + L <= channels; c += L) body(Wide<T>(), Vectors<1>(), c);
  for (; c < channels; c++) body(Single<T>(), Vectors<1>(), c);
}

// Rows that a strip of channels is followed through, for its sums to stay in registers: few enough for the other
// strips to find them in the first cache. Counted from whole rows and not from the share of one thread, so that
// results do not depend on the threads.
template <class T>
static inline int64_t rows_together(int64_t stride) {
  const int64_t rows = ((int64_t)32 << 10) / (stride * (int64_t)sizeof(T));
  return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

// No sum gets longer before it is added to others in double precision, or it would lose digits.
static const int64_t ROWS = 64;

// sums[s][c] = terms(w, offset of the value, c) of these rows, added.
template <class T, int sums, class A, class Terms>
static inline void summed_rows(int64_t rows, int64_t stride, int64_t channels, A *results, Terms terms) {
  const int64_t together = rows_together<T>(stride);
  for (int64_t begin = 0; begin < rows; begin += together) {
    const int64_t end = rows - begin < together ? rows : begin + together;
    each_strip<T>(channels, [=](auto w, auto strip, int64_t first) {
      typename decltype(w)::Value totals[strip.count][sums] = {}, more[sums];
      for (int64_t r = begin; r < end; r++)
        for (int j = 0; j < strip.count; j++) {
          const int64_t c = first + j * w.count;
          terms(w, r * stride + c, c, more);
          for (int s = 0; s < sums; s++) totals[j][s] += more[s];
        }
      for (int j = 0; j < strip.count; j++)
        for (int s = 0; s < sums; s++) {
          A *result = results + s * channels + first + j * w.count;
          w.set(result, begin ? w.at(result) + totals[j][s] : totals[j][s]);
        }
    });
  }
}

// Room for what `image_moments` and `image_backward_sums` keep of every channel.
template <class A>
struct Room {
  double *totals;  // 2 x channels
  A *some;         // 3 x channels
};

template <class T, class A>
static void image_means(const T *x, int64_t rows, int64_t stride, int64_t channels, A *mean, Room<A> room) {
  if (rows == 1) {
    each<T>(0, channels, [=](auto w, int64_t c) { w.set(mean + c, w.load(x + c)); });
    return;
  }
  for (int64_t c = 0; c < channels; c++) room.totals[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += ROWS) {
    const int64_t count = rows - begin < ROWS ? rows - begin : ROWS;
    const T *p = x + begin * stride;
    summed_rows<T, 1>(count, stride, channels, room.some,
                      [=](auto w, int64_t i, int64_t, auto *term) { term[0] = w.load(p + i); });
    for (int64_t c = 0; c < channels; c++) room.totals[c] += room.some[c];
  }
  for (int64_t c = 0; c < channels; c++) mean[c] = (A)(room.totals[c] / rows);
}

// One pass: of every block the sums of X - c and of its square, c the mean of all before it. No block is longer than
// all before it, so that what c is off by is part of the variance and its square costs no digits (the first block's c
// is its own mean). Blocks are combined as in Chan et al. 1983.
template <class T, class A>
static void image_moments(const T *x, int64_t rows, int64_t stride, int64_t channels, A *mean, A *variance,
                          Room<A> room) {
  if (rows == 1) {
    image_means(x, rows, stride, channels, mean, room);
    for (int64_t c = 0; c < channels; c++) variance[c] = mean[c] - mean[c];  // 0, and NaN of what is not finite
    return;
  }
  double *means = room.totals, *squares = room.totals + channels;
  A *centre = room.some, *some = room.some + channels;
  for (int64_t c = 0; c < channels; c++) means[c] = squares[c] = 0;
  for (int64_t begin = 0, count; begin < rows; begin += count) {
    const int64_t most = begin == 0 ? 16 : begin < ROWS ? begin : ROWS;
    count = rows - begin < most ? rows - begin : most;
    const T *p = x + begin * stride;
    if (begin == 0) {
      summed_rows<T, 1>(count, stride, channels, centre,
                        [=](auto w, int64_t i, int64_t, auto *term) { term[0] = w.load(p + i); });
      for (int64_t c = 0; c < channels; c++) centre[c] /= count;
    }
    summed_rows<T, 2>(count, stride, channels, some, [=](auto w, int64_t i, int64_t c, auto *terms) {
      terms[0] = w.load(p + i) - w.at(centre + c);
      terms[1] = terms[0] * terms[0];
    });
    const double share = (double)count / (begin + count);
    each<A>(0, channels, [=](auto w, int64_t c) {
      const auto sum = w.widened(w.at(some + c)), off = sum / (double)count;
      const auto delta = w.widened(w.at(centre + c)) - w.sums_at(means + c) + off;
      const auto mean = w.sums_at(means + c) + delta * share;
      w.set_sums(means + c, mean);
      w.set_sums(squares + c, w.sums_at(squares + c) + (w.widened(w.at(some + channels + c)) - sum * off) +
                                  delta * delta * ((double)begin * share));
      w.set(centre + c, w.rounded(mean));
    });
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
  for (int64_t begin = 0; begin < rows; begin += ROWS) {
    const int64_t count = rows - begin < ROWS ? rows - begin : ROWS;
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

// Rows that are transformed together: one after another, as they lie in memory, unless what is known of the channels
// fits into registers, or does not fit into the first cache.
template <class A>
static inline int64_t rows_transformed_together(int64_t stride) {
  const int64_t bytes = stride * (int64_t)sizeof(A);
  return bytes <= 256 ? ROWS : bytes <= 4096 ? 1 : 16;
}

// Y = a X + b.
template <class T, class A>
static void image_affine(const T *x, int64_t rows, int64_t stride, int64_t channels, const A *a, const A *b, T *y,
                         bool past) {
  const int64_t together = rows_transformed_together<A>(stride);
  for (int64_t begin = 0; begin < rows; begin += together) {
    const int64_t end = rows - begin < together ? rows : begin + together;
    each_strip<T>(channels, [=](auto w, auto strip, int64_t c) {
      typename decltype(w)::Value scale[strip.count], offset[strip.count];
      for (int j = 0; j < strip.count; j++) {
        scale[j] = w.at(a + c + j * w.count);
        offset[j] = w.at(b + c + j * w.count);
      }
      for (int64_t r = begin; r < end; r++)
        for (int j = 0; j < strip.count; j++) {
          const int64_t i = r * stride + c + j * w.count;
          w.store(y + i, w.load(x + i) * scale[j] + offset[j], past);
        }
    });
  }
}

// dX = a dY + e (X - mu) + f.
template <class T, class A>
static void image_backward_affine(const T *dy, const T *x, int64_t rows, int64_t stride, int64_t channels,
                                  const A *mu, const A *a, const A *e, const A *f, T *dx, bool past) {
  const int64_t together = rows_transformed_together<A>(stride);
  for (int64_t begin = 0; begin < rows; begin += together) {
    const int64_t end = rows - begin < together ? rows : begin + together;
    each_strip<T>(channels, [=](auto w, auto strip, int64_t c) {
      typename decltype(w)::Value of[strip.count][4];
      for (int j = 0; j < strip.count; j++) {
        const A *const from[] = {mu, a, e, f};
        for (int k = 0; k < 4; k++) of[j][k] = w.at(from[k] + c + j * w.count);
      }
      for (int64_t r = begin; r < end; r++)
        for (int j = 0; j < strip.count; j++) {
          const int64_t i = r * stride + c + j * w.count;
          const auto slope = (w.load(x + i) - of[j][0]) * of[j][2] + of[j][3];
          w.store(dx + i, w.load(dy + i) * of[j][1] + slope, past);
        }
    });
  }
}

// ---- between the passes: equations 2 to 9 on (N, C) numbers, for W::count channels at a time ----

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

// What channels are, and what a plane of each is; see `calibrate` of rbn_core/fused.py for the names.
template <class V>
struct Channel {
  V gamma, beta, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std;
};

template <class V>
struct Plane {
  V mu_0, shift, deviation, k, restriction, a, translation;
};

template <class W>
static inline typename W::Value parameter(const void *values, int64_t c, typename W::A otherwise) {
  return values ? W::at((const typename W::A *)values + c) : typename W::Value{} + otherwise;
}

// From all planes of the channels [c, c + W::count); the E and biased Var of the batch go to `mean` and `var`.
template <class W, class A>
static inline Channel<typename W::Value> channel_of(const rbn_layer &l, const rbn_parameters &p, int64_t c,
                                                    const A *mu, const A *v, A *mean, A *var) {
  typedef typename W::Value V;
  typedef typename W::Sum Sum;
  Channel<V> ch;
  ch.gamma = parameter<W>(p.gamma, c, 1);
  ch.beta = parameter<W>(p.beta, c, 0);
  ch.center_weight = parameter<W>(p.center_weight, c, 0);
  ch.scale_weight = parameter<W>(p.scale_weight, c, 0);
  ch.scale_bias = parameter<W>(p.scale_bias, c, 0);
  const A eps = (A)l.eps;
  if (!l.batch_statistics) {
    ch.origin = V{};
    ch.mean_0 = parameter<W>(p.running_mean, c, 0);
    ch.inverse_std = 1 / root(parameter<W>(p.running_var, c, 1) + eps);
    return ch;
  }
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
// the parameters, for the channels [c, c + W::count): `calibrate_backward` of rbn_core/fused.py.
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
  const auto give = [c](void *gradient, Sum sum) {
    if (gradient) W::set((A *)gradient + c, W::rounded(sum));
  };
  give(gradients.gamma, dgamma);
  give(gradients.beta, dbeta);
  give(gradients.center_weight, dcenter_weight);
  give(gradients.scale_weight, dscale_weight);
  give(gradients.scale_bias, dscale_bias);
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
    double *totals = (double *)malloc(sizeof(double) * 5 * (width ? width : 1));
#pragma omp for schedule(static) nowait
    for (int64_t share = 0; share < shares; share++) {
      const int64_t n = share % l.images, first = share / l.images * width;
      const int64_t channels = l.channels - first < width ? l.channels - first : width;
      if (totals) work(n, first, channels, Room<A>{totals, (A *)(totals + 2 * width)});
    }
    all_written();
    if (!totals) {
#pragma omp atomic write
      enough = false;
    }
    free(totals);
  }
  return enough;
}

// Calls work(Wide or Single, c) for groups of channels; which there are does not depend on the threads.
template <class A, class Work>
static void each_channel(const rbn_layer &l, Work work) {
  const int64_t width = Wide<A>::count;
#pragma omp parallel for schedule(static) num_threads(l.threads)
  for (int64_t c = 0; c < l.channels; c += width)
    each<A>(c, l.channels - c < width ? l.channels : c + width, work);
}

// Calls work(begin, end) for groups of planes: of one, or of small ones as many as are measured together.
template <class T, class Work>
static void each_plane(const rbn_layer &l, Work work) {
  const int64_t planes = l.images * l.channels, width = are_small<T>(l.positions) ? Wide<T>::count : 1;
#pragma omp parallel num_threads(l.threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < planes; i += width) work(i, planes - i < width ? planes : i + width);
    all_written();
  }
}

// Planes side by side or channels last; a plane of one value is both, and the latter is faster.
static inline bool in_rows(const rbn_layer &l) { return l.channels_last || l.positions == 1; }

// Whether what is written is too much for the last cache to keep until it is read, beside what else is used; and it
// must consist of whole lines, or the rest of a line is read after all.
template <class T>
static inline bool is_past_the_caches(const rbn_layer &l, const T *written) {
  const int64_t together = (in_rows(l) ? l.channels : l.positions) * (int64_t)sizeof(T);
  return l.images * l.channels * l.positions * (int64_t)sizeof(T) > last_cache / 3 && together % 64 == 0 &&
         (uintptr_t)written % 64 == 0;
}

// What is measured of the planes [begin, end).
template <class T, class A>
static inline void measure_planes(const T *x, int64_t rows, int64_t begin, int64_t end, bool varying, A *mu, A *v) {
  if (are_small<T>(rows) && end - begin == Wide<T>::count) {
    if (varying)
      small_moments(x + begin * rows, rows, mu + begin, v + begin);
    else
      small_means(x + begin * rows, rows, mu + begin, [](int64_t, int64_t) {});
    return;
  }
  for (int64_t i = begin; i < end; i++)
    if (varying)
      plane_moments(x + i * rows, rows, mu + i, v + i);
    else
      plane_mean(x + i * rows, rows, mu + i, [](auto, int64_t) {});
}

// `calibrate` of the planes [begin, end) of an image, with the running statistics.
template <class A>
static inline void calibrate_known(const rbn_layer &l, const rbn_parameters &p, int64_t begin, int64_t end, A *mu, A *v,
                                   A *a, A *b) {
  each<A>(begin, end, [=](auto w, int64_t i) {
    const auto ch = channel_of<decltype(w), A>(l, p, i % l.channels, mu, v, (A *)nullptr, (A *)nullptr);
    calibrate<decltype(w), A>(l, ch, i, mu, v, a, b);
  });
}

// Planes side by side, with the running statistics: each is measured and transformed while it is near, some at a time
// whose calibrations are computed together. Where means are all that is measured, those of the next ones are taken
// while these are written, for memory to be read and written at once.
template <class T, class A>
static void evaluate_planes(const rbn_layer &l, const rbn_parameters &p, const T *x, T *y, A *mu, A *v, A *a, A *b,
                            bool past) {
  struct Planes {
    int64_t begin, end;
  };
  const int64_t rows = l.positions, most = Wide<T>::count, fit = ((int64_t)64 << 10) / (rows * (int64_t)sizeof(T));
  const int64_t width = fit < 1 ? 1 : fit < most ? fit : most, in_image = (l.channels + width - 1) / width;
  const bool measured = is_measured(l), varying = varies(l), at_once = measured && !varying && rows >= most;
  const bool small = are_small<T>(rows);
  const auto planes_of = [=](int64_t group) {
    const int64_t c = group % in_image * width, begin = group / in_image * l.channels + c;
    return Planes{begin, begin + (l.channels - c < width ? l.channels - c : width)};
  };
  const auto measure = [=](int64_t begin, int64_t end) {
    if (measured) measure_planes(x, rows, begin, end, varying, mu, v);
  };
#pragma omp parallel num_threads(l.threads)
  {
    const int64_t groups = l.images * in_image, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = groups * thread / threads, last = groups * (thread + 1) / threads;
    Planes planes = planes_of(first);
    if (first < last) measure(planes.begin, planes.end);
    for (int64_t group = first; group < last; group++) {
      calibrate_known(l, p, planes.begin, planes.end, mu, v, a, b);
      const Planes next = group + 1 < last ? planes_of(group + 1) : Planes{planes.end, planes.end};
      int64_t i = planes.begin, k = next.begin;
      const T *from = x + i * rows;
      T *to = y + i * rows;
      if (at_once && small && planes.end - i == most && next.end - k == most) {
        const A *scale = a + i, *offset = b + i;
        small_means(x + k * rows, rows, mu + k, [=](int64_t plane, int64_t j) {
          Wide<T>::store(to + j, Wide<T>::load(from + j) * scale[plane] + offset[plane], past);
        });
        i = planes.end;
        k = next.end;
      }
      for (; at_once && !small && i < planes.end && k < next.end; i++, k++, from += rows, to += rows) {
        const A scale = a[i], offset = b[i];
        plane_mean(x + k * rows, rows, mu + k,
                   [=](auto w, int64_t j) { w.store(to + j, w.load(from + j) * scale + offset, past); });
      }
      for (; i < planes.end; i++) plane_affine(x + i * rows, rows, a[i], b[i], y + i * rows, past);
      measure(k, next.end);
      planes = next;
    }
    all_written();
  }
}

template <class T>
static bool forward(const rbn_layer &l, const rbn_parameters &p, const T *x, T *y, void *mu_, void *v_, void *mean,
                    void *var) {
  typedef typename Of<T>::A A;
  const int64_t planes = l.images * l.channels, rows = l.positions, stride = l.channels, size = rows * stride;
  const bool measured = is_measured(l), varying = varies(l), past = is_past_the_caches(l, y);
  A *a = (A *)malloc(sizeof(A) * 4 * (planes ? planes : 1)), *b = a + planes;
  if (!a) return false;
  A *mu = mu_ ? (A *)mu_ : b + planes, *v = v_ ? (A *)v_ : b + 2 * planes;
  bool enough = true;
  const auto measure_image = [=](int64_t n, int64_t c, int64_t channels, Room<A> room) {
    const int64_t i = n * stride + c;
    if (varying)
      image_moments(x + n * size + c, rows, stride, channels, mu + i, v + i, room);
    else
      image_means(x + n * size + c, rows, stride, channels, mu + i, room);
  };
  const auto transform_image = [=](int64_t n, int64_t c, int64_t channels, Room<A>) {
    image_affine(x + n * size + c, rows, stride, channels, a + n * stride + c, b + n * stride + c, y + n * size + c,
                 past);
  };
  if (l.batch_statistics) {
    if (in_rows(l))
      enough &= each_image<A>(l, measure_image);
    else
      each_plane<T>(l, [=](int64_t begin, int64_t end) { measure_planes(x, rows, begin, end, true, mu, v); });
    each_channel<A>(l, [=](auto w, int64_t c) {
      const auto ch = channel_of<decltype(w), A>(l, p, c, mu, v, (A *)mean, (A *)var);
      for (int64_t n = 0; n < l.images; n++) calibrate<decltype(w), A>(l, ch, n * stride + c, mu, v, a, b);
    });
    if (in_rows(l))
      enough &= each_image<A>(l, transform_image);
    else
      each_plane<T>(l, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) plane_affine(x + i * rows, rows, a[i], b[i], y + i * rows, past);
      });
  } else if (in_rows(l)) {  // E and Var are known: every image is measured and transformed while it is near
    enough &= each_image<A>(l, [=](int64_t n, int64_t first, int64_t channels, Room<A> room) {
      if (measured) measure_image(n, first, channels, room);
      calibrate_known(l, p, n * stride + first, n * stride + first + channels, mu, v, a, b);
      transform_image(n, first, channels, room);
    });
  } else {
    evaluate_planes(l, p, x, y, mu, v, a, b, past);
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
    each_plane<T>(l, [=](int64_t begin, int64_t end) {
      if (are_small<T>(rows) && end - begin == Wide<T>::count)
        small_backward_sums(dy + begin * rows, x + begin * rows, rows, mu + begin, s0 + begin, s1 + begin);
      else
        for (int64_t i = begin; i < end; i++)
          plane_backward_sums(dy + i * rows, x + i * rows, rows, mu[i], s0 + i, s1 + i);
    });
  each_channel<A>(l, [=](auto w, int64_t c) {
    channel_backward<decltype(w), A>(l, p, c, mu, v, s0, s1, a, gradients);
  });
  const A *e = s0, *f = s1;
  const bool past = is_past_the_caches(l, dx);
  const bool measured = is_measured(l);  // else e and f are 0, and a value that is not finite stays where it is
  if (!dx) {
  } else if (in_rows(l)) {
    enough &= each_image<A>(l, [=](int64_t n, int64_t c, int64_t channels, Room<A>) {
      const int64_t at = n * size + c, i = n * stride + c;
      if (!measured)
        image_affine(dy + at, rows, stride, channels, a + i, f + i, dx + at, past);
      else
        image_backward_affine(dy + at, x + at, rows, stride, channels, mu + i, a + i, e + i, f + i, dx + at, past);
    });
  } else {
    each_plane<T>(l, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        if (const int64_t at = i * rows; !measured)
          plane_affine(dy + at, rows, a[i], f[i], dx + at, past);
        else
          plane_backward_affine(dy + at, x + at, rows, mu[i], a[i], e[i], f[i], dx + at, past);
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
