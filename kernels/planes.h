// Channels first: sums along planes whose values lie side by side, and their transformation.

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
