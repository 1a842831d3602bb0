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

// bfloat16 values are given by their bits, any of which will do.
template <class T, class A>
static int call(const Shape &s, int dtype, int flags, int centering, int scaling) {
  const size_t images = s.images * s.channels * s.positions, planes = s.images * s.channels, channels = s.channels;
  const T *x = numbers<T>(images), *dy = numbers<T>(images);
  T *y = numbers<T>(images), *dx = numbers<T>(images);
  A *mu = numbers<A>(planes), *v = numbers<A>(planes), *own[14];
  for (A *&each : own) each = numbers<A>(channels);
  const rbn_layer layer = {s.images, s.channels,  s.positions, dtype,      flags & 1, centering,
                           scaling,  scaling % 2, flags >> 1 & 1, flags & 4 ? 3 : 1, 1e-5};
  const rbn_parameters parameters = {own[0], own[1], own[2], own[3], own[4], own[5], own[6]};
  const rbn_gradients gradients = {own[7], own[8], own[9], own[10], own[11]};
  const int lacks = rbn_forward(&layer, &parameters, x, y, nullptr, nullptr, own[12], own[13]) |
                    rbn_forward(&layer, &parameters, x, y, mu, v, own[12], own[13]) |
                    rbn_backward(&layer, &parameters, dy, x, mu, v, dx, &gradients);
  for (char *each : blocks) free(each);
  blocks.clear();
  return lacks;
}

int main() {
  int calls = 0, lacking = 0;
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
  printf("%d calls, %d without memory\n", calls, lacking);
}
