// Channels last: the same for channels [0, channels) of an image, in rows of `stride` values.

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
