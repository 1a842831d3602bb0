// Vectors, and one value after another: what loops are written in, for every dtype.

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
