// What the kernels share: vectors of the machine's width in compiler extensions (AVX-512, AVX2, SSE,
// NEON), a micro-kernel for products, exp2 and log2, a transpose, and work spread over XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr float LOG2E = 1.44269504088896341f;

#if defined(__AVX512F__)
constexpr int L = 16, MR = 8;  // lanes; rows of a register tile, which divide them
#elif defined(__AVX__)
constexpr int L = 8, MR = 4;  // 16 registers: 4 x 2 accumulators and their operands
#else
constexpr int L = 4, MR = 4;  // SSE, NEON
#endif
static_assert(L % MR == 0, "a row tile must not reach over two vectors of queries");

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

template <int W> struct Lanes {
  typedef float f __attribute__((vector_size(4 * W), may_alias));
  typedef int i __attribute__((vector_size(4 * W), may_alias));
  typedef unsigned u __attribute__((vector_size(4 * W), may_alias));
};
using F = Lanes<L>::f;
using I = Lanes<L>::i;
using U = Lanes<L>::u;
using E = Lanes<8>::f;

template <class V> INLINE V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
template <class V> INLINE void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
INLINE F splat(float a) { return a - F{}; }
INLINE I splat(int a) { return a - I{}; }

INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

template <int... i> INLINE I iota(std::integer_sequence<int, i...>) { return I{i...}; }
INLINE I iota() { return iota(std::make_integer_sequence<int, L>{}); }

// 2^x to 2e-7 for x below 127, and exactly 0 below 2^-100: a hidden score leaves nothing, no subnormal
// is made. NaN and +inf give NaN, or a replica that diverges would not be seen to.
INLINE F exp2(F x) {
  F t = x + 12582912.f, r = x - (t - 12582912.f);  // 1.5 * 2^23 rounds to an integer
  F p = r * 0.0013333558f + 0.0096181291f;
  p = p * r + 0.0555041087f;
  p = p * r + 0.2402265070f;
  p = p * r + 0.6931471806f;
  p = p * r + 1.f;
  return x < -100.f ? F{} : (F)((U)p + ((U)t << 23));
}

// log2(x) of normal x > 0, by the series of atanh. Of anything else it is any number.
INLINE F log2(F x) {
  I e = ((I)x - 0x3f3504f3) >> 23;  // the mantissa lies in [sqrt(1/2), sqrt(2))
  F m = (F)((I)x - (e << 23)), s = (m - 1.f) / (m + 1.f), z = s * s;
  F p = z * (2 * LOG2E / 9) + 2 * LOG2E / 7;
  p = p * z + 2 * LOG2E / 5;
  p = p * z + 2 * LOG2E / 3;
  p = p * z + 2 * LOG2E;
  return p * s + __builtin_convertvector(e, F);
}

// acc[m][n] += sum over k0 <= k < k1 of a[m, k] b[k, n]: a broadcast element times a vector.
// a[m, k] lies at a[m * LDA + k], or at a[k * LDA + m] if TURNED.
template <bool TURNED, int LDA, int LDB, int M, int N, class V>
INLINE void multiply(V (&acc)[M][N], int k0, int k1, const float* a, const float* b) {
  constexpr int W = sizeof(V) / 4;
#pragma GCC unroll 2
  for (int k = k0; k < k1; k++) {
    V x[N];
    UNROLL for (int n = 0; n < N; n++) x[n] = load<V>(b + (long)k * LDB + n * W);
    UNROLL for (int m = 0; m < M; m++) {
      float y = TURNED ? a[(long)k * LDA + m] : a[(long)m * LDA + k];
      UNROLL for (int n = 0; n < N; n++) acc[m][n] += y * x[n];
    }
  }
}

// Transposes C x C squares side by side in the lanes of r, by exchanging ever smaller quarters.
constexpr int C = L < 8 ? L : 8;
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one only from 12 on
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
template <int S, int... i>
INLINE void exchange(F& a, F& b, std::integer_sequence<int, i...>) {
  F x = SHUFFLE(a, b, ((i & S) ? L + i - S : i)...);
  b = SHUFFLE(a, b, ((i & S) ? L + i : i + S)...);
  a = x;
}
template <int S> INLINE void transpose_step(F (&r)[C]) {
  UNROLL for (int i = 0; i < C; i++)
    if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, L>{});
}
INLINE void transpose(F (&r)[C]) {
  if constexpr (C == 8) transpose_step<4>(r);
  transpose_step<2>(r);
  transpose_step<1>(r);
}
// C elements of row 0 and, where a vector is two squares wide, of row C beside them.
#if defined(__AVX512F__)
INLINE F load_rows(const float* p, long stride) {
  __m512d low = (__m512d)_mm512_castps256_ps512(_mm256_loadu_ps(p));
  return (F)_mm512_insertf64x4(low, (__m256d)_mm256_loadu_ps(p + C * stride), 1);
}
INLINE void store_rows(float* p, long stride, F x) {
  _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)x));
  _mm256_storeu_ps(p + C * stride, (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
}
#else
INLINE F load_rows(const float* p, long) { return load<F>(p); }
INLINE void store_rows(float* p, long, F x) { store<F>(p, x); }
#endif

// ---------------------------------------------------------------- memory and threads

// Memory of one thread, kept from call to call.
struct Workspace {
  char* memory = nullptr;
  size_t capacity = 0, used = 0;
  ~Workspace() { std::free(memory); }
  void reserve(size_t floats) {
    size_t bytes = (floats * 4 + 8191) & ~size_t(4095);
    used = 0;
    if (bytes <= capacity) return;
    std::free(memory);
    memory = static_cast<char*>(std::aligned_alloc(4096, bytes));
    capacity = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  // `floats` of what was reserved, up to 15 more so that the next begin at a cache line.
  float* take(size_t floats) {
    float* p = reinterpret_cast<float*>(memory + used);
    used += (floats * 4 + 63) & ~size_t(63);
    assert(used <= capacity);
    return p;
  }
};
thread_local Workspace workspace;

// No exception may leave a handler: XLA is compiled without them.
ffi::Error no_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the sums of a kernel");
}
ffi::Future failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

// Runs work(0) .. work(tasks - 1) on the calling thread and the pool's; which thread takes which
// task changes no result.
template <class Work>
ffi::Future run(ffi::ThreadPool pool, int64_t tasks, double cost, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    Work work;
    explicit Shared(Work w) : work(std::move(w)) {}
  };
  // Waking a thread costs microseconds: below about 2^17 multiplications one does it all.
  int64_t threads = std::max<int64_t>(1, std::min({pool.num_threads(), tasks,
                                                  (int64_t)(cost / (1 << 17))}));
  int64_t grain = std::max<int64_t>(1, tasks / (threads * 16));
  auto shared = std::make_shared<Shared>(std::move(work));
  ffi::CountDownPromise promise(threads);
  ffi::Future future(promise);
  auto loop = [=]() mutable {
    ffi::Error error = ffi::Error::Success();
    try {
      for (int64_t i; (i = shared->next.fetch_add(grain)) < tasks;)
        for (int64_t j = i; j < std::min(tasks, i + grain); j++) shared->work(j);
    } catch (const std::bad_alloc&) {
      error = no_memory();
    }
    promise.CountDown(std::move(error));
  };
  for (int64_t i = 1; i < threads; i++) pool.Schedule(decltype(loop)(loop));
  loop();
  return future;
}

}  // namespace
