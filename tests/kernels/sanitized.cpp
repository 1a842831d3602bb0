// Calls the loops on memory that ends where an array ends, for a sanitizer to see what is read or written beside it.

#include <cstdio>
#include <vector>

#include "rbn_kernels.cpp"

struct Shape {
  int64_t images, channels, positions;
};

static const Shape SHAPES[] = {{2, 1, 1},    {9, 33, 1},   {1, 5, 2},    {4, 16, 16},  {5, 17, 49},  {2, 31, 45},
                               {1, 3, 4355}, {2, 40, 81},  {1, 65, 300}, {3, 64, 257}, {2, 100, 196}, {1, 1100, 9}};

static std::vector<char *> blocks;

// Lines of memory begin where an image begins, so that it can be written past the caches.
static char *block(size_t bytes) {
  void *memory = nullptr;
  if (posix_memalign(&memory, 64, bytes)) exit(2);
  blocks.push_back((char *)memory);
  return (char *)memory;
}

template <class T>
static T *numbers(size_t count) {
  T *values = (T *)block(count * sizeof(T));
  for (size_t i = 0; i < count; i++) values[i] = (T)(0.5 + i % 97 * 0.01);
  return values;
}

static const int64_t DTYPES_OF_STATISTICS[] = {RBN_FLOAT32, RBN_FLOAT64, RBN_FLOAT32, RBN_FLOAT32};

struct Call {
  rbn_layer layer;
  rbn_forward_arrays forward;
  rbn_backward_arrays backward;
};

// bfloat16 values are given by their bits, any of which will do.
template <class T, class A>
static Call call_of(const Shape &s, int dtype, int flags, int centering, int scaling) {
  const int64_t images = s.images * s.channels * s.positions, planes = s.images * s.channels, wide = DTYPES_OF_STATISTICS[dtype];
  const auto image = [&] { return rbn_array{numbers<T>(images), images, dtype}; };
  const auto plane = [&] { return rbn_array{numbers<A>(planes), planes, wide}; };
  const auto own = [&] { return rbn_array{numbers<A>(s.channels), s.channels, wide}; };
  const rbn_layer layer = {s.images, s.channels,  s.positions, dtype,      flags & 1, centering,
                           scaling,  scaling % 2, flags >> 1 & 1, flags & 4 ? 3 : 1, 1e-5};
  const rbn_parameters parameters = {own(), own(), own(), own(), own(), own(), own()};
  const rbn_forward_arrays forward = {image(), image(), plane(), plane(), own(), own(), parameters};
  const rbn_backward_arrays backward = {
      image(), forward.x, forward.mu, forward.v, image(), parameters, {own(), own(), own(), own(), own()}};
  return {layer, forward, backward};
}

static void release() {
  for (char *each : blocks) free(each);
  blocks.clear();
}

template <class T, class A>
static int call(const Shape &s, int dtype, int flags, int centering, int scaling) {
  const Call call = call_of<T, A>(s, dtype, flags, centering, scaling);
  rbn_forward_arrays alone = call.forward;
  alone.mu = alone.v = rbn_array{};
  const int lacks = rbn_forward(&call.layer, &alone) | rbn_forward(&call.layer, &call.forward) |
                    rbn_backward(&call.layer, &call.backward);
  release();
  return lacks != RBN_DONE;
}

// Calls each of whose arrays in turn is shorter than the layer needs, or of another dtype: memory ends where it says.
template <class T, class A>
static void refused(const Shape &s, int dtype, int flags, int *calls, int *taken) {
  const auto each = [&](auto &arrays, int i, auto function, const rbn_layer &layer) {
    rbn_array &array = ((rbn_array *)&arrays)[i];
    const rbn_array fits = array;
    const int64_t lengths[] = {0, 1, array.count - 1};
    for (const int64_t length : lengths) {
      if (length == fits.count) continue;
      array = {block(length * sizeof(A) + 1), length, fits.dtype};
      *taken += function(&layer, &arrays) != RBN_DOES_NOT_FIT;
      *calls += 1;
    }
    for (int64_t other = -1; other < 5; other++) {
      if (other == fits.dtype) continue;
      const size_t bytes = other == RBN_FLOAT64 ? 8 : other == RBN_FLOAT32 ? 4 : 2;
      array = {block(fits.count * bytes), fits.count, other};
      *taken += function(&layer, &arrays) != RBN_DOES_NOT_FIT;
      *calls += 1;
    }
    array = fits;
  };
  Call call = call_of<T, A>(s, dtype, flags, RBN_CHANNEL_STD, RBN_CHANNEL_STD);
  for (size_t i = 0; i < sizeof call.forward / sizeof(rbn_array); i++) each(call.forward, i, rbn_forward, call.layer);
  for (size_t i = 0; i < sizeof call.backward / sizeof(rbn_array); i++) each(call.backward, i, rbn_backward, call.layer);
  release();
}

int main() {
  int calls = 0, lacking = 0, wrong = 0, taken = 0;
  for (int level = 0; level < 3 && rbn_limit_instructions(level) == level; level++)
    for (int cache = 0; cache < 2; cache++) {
      rbn_limit_cache(cache ? INT64_MAX : 0);
      for (const Shape &s : SHAPES)
        for (int flags = 0; flags < 8; flags++)
          for (int centering = RBN_NONE; centering <= RBN_CHANNEL_STD; centering++)
            for (int scaling = RBN_NONE; scaling <= RBN_INPUT_MEAN; scaling++, calls += 4)
              lacking += call<float, float>(s, RBN_FLOAT32, flags, centering, scaling) +
                         call<double, double>(s, RBN_FLOAT64, flags, centering, scaling) +
                         call<_Float16, float>(s, RBN_FLOAT16, flags, centering, scaling) +
                         call<uint16_t, float>(s, RBN_BFLOAT16, flags, centering, scaling);
    }
  for (const Shape &s : {SHAPES[3], SHAPES[7]})
    for (int flags = 0; flags < 4; flags++) {
      refused<float, float>(s, RBN_FLOAT32, flags, &wrong, &taken);
      refused<double, double>(s, RBN_FLOAT64, flags, &wrong, &taken);
      refused<_Float16, float>(s, RBN_FLOAT16, flags, &wrong, &taken);
      refused<uint16_t, float>(s, RBN_BFLOAT16, flags, &wrong, &taken);
    }
  printf("%d calls, %d failed; %d wrong calls, %d taken\n", calls, lacking, wrong, taken);
}
