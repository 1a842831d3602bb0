// The layer in loops, compiled once for every instruction set: rbn_kernels.cpp includes this file, and it the others, in
// a namespace for each. So none of them guards against being included again.

#include "vectors.h"

#include "calibration.h"
#include "planes.h"
#include "rows.h"

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
static inline void calibrate_known(const rbn_layer &l, const rbn_parameters &p, const A *inverse_std, int64_t begin,
                                   int64_t end, A *mu, A *v, A *a, A *b) {
  each<A>(begin, end, [=](auto w, int64_t i) {
    const auto ch = channel_of<decltype(w), A>(l, p, i % l.channels, mu, v, nullptr, nullptr, inverse_std);
    calibrate<decltype(w), A>(l, ch, i, mu, v, a, b);
  });
}

// Planes side by side, with the running statistics: each is measured and transformed while it is near, some at a time
// whose calibrations are computed together. Where means are all that is measured, those of the next ones are taken
// while these are written, for memory to be read and written at once.
template <class T, class A>
static void evaluate_planes(const rbn_layer &l, const rbn_parameters &p, const A *inverse_std, const T *x, T *y, A *mu,
                            A *v, A *a, A *b, bool past) {
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
      calibrate_known(l, p, inverse_std, planes.begin, planes.end, mu, v, a, b);
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
  A *a = (A *)malloc(sizeof(A) * (4 * planes + stride + 1)), *b = a + planes, *inverse_std = a + 4 * planes;
  if (!a) return false;
  A *mu = mu_ ? (A *)mu_ : b + planes, *v = v_ ? (A *)v_ : b + 2 * planes;
  if (!l.batch_statistics)
    each<A>(0, stride, [=](auto w, int64_t c) { w.set(inverse_std + c, inverse_std_of<decltype(w), A>(l, p, c)); });
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
      calibrate_known(l, p, inverse_std, n * stride + first, n * stride + first + channels, mu, v, a, b);
      transform_image(n, first, channels, room);
    });
  } else {
    evaluate_planes(l, p, inverse_std, x, y, mu, v, a, b, past);
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

template <class T>
static int forward_of(const rbn_layer &l, const rbn_forward_arrays &a) {
  const bool enough = forward(l, a.parameters, (const T *)a.x.values, (T *)a.y.values, a.mu.values, a.v.values,
                              a.mean.values, a.var.values);
  return enough ? RBN_DONE : RBN_NO_MEMORY;
}

static int forward_of_dtype(const rbn_layer &l, const rbn_forward_arrays &a) {
  switch (l.dtype) {
    case RBN_FLOAT32: return forward_of<float>(l, a);
    case RBN_FLOAT64: return forward_of<double>(l, a);
    case RBN_FLOAT16: return forward_of<_Float16>(l, a);
    default: return forward_of<bfloat16>(l, a);
  }
}

template <class T>
static int backward_of(const rbn_layer &l, const rbn_backward_arrays &a) {
  const bool enough = backward(l, a.parameters, (const T *)a.dy.values, (const T *)a.x.values, a.mu.values, a.v.values,
                               (T *)a.dx.values, a.gradients);
  return enough ? RBN_DONE : RBN_NO_MEMORY;
}

static int backward_of_dtype(const rbn_layer &l, const rbn_backward_arrays &a) {
  switch (l.dtype) {
    case RBN_FLOAT32: return backward_of<float>(l, a);
    case RBN_FLOAT64: return backward_of<double>(l, a);
    case RBN_FLOAT16: return backward_of<_Float16>(l, a);
    default: return backward_of<bfloat16>(l, a);
  }
}
