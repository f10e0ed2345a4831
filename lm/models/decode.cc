// One token of each row through a whole Llama-like Transformer: what decoding does all day.
//
// With one row every weight is read once and used once, so memory is the limit, and XLA reads it
// several times: a scan over layers copies each layer's weights out of their stack before they are
// multiplied. Here the weights are read where they lie, in order. A product is cut along its rows
// (inputs) and, where it is wide, its columns; a task reads its piece and leaves partial sums, and
// whoever needs a sum adds the pieces in order, so results do not depend on the number of threads.
//
// Threads go through the phases of all layers together. A phase's tasks are taken from a counter, and
// nobody waits for a thread that has not come: what has to be done, one thread can do alone.

#include <cmath>
#include <thread>
#include <vector>

#include "simd.h"

namespace {

using Array = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// Weights of the three kinds as vectors of float32; int8 without its scale. Left to the compiler, the
// two narrow kinds are converted lane by lane.
INLINE F widen(const float* p) { return load<F>(p); }
#if defined(__AVX512F__)
INLINE F widen(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE F widen(const int8_t* p) {
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE float total(F x) { return _mm512_reduce_add_ps((__m512)x); }
#else
#if defined(__AVX2__)
INLINE F widen(const uint16_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE F widen(const int8_t* p) {
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#else
INLINE F widen(const uint16_t* p) {
  U x;
  for (int i = 0; i < L; i++) x[i] = (unsigned)p[i] << 16;
  return (F)x;
}
INLINE F widen(const int8_t* p) {
  F x;
  for (int i = 0; i < L; i++) x[i] = p[i];
  return x;
}
#endif
INLINE float total(F x) {
  float sum = 0;
  for (int i = 0; i < L; i++) sum += x[i];
  return sum;
}
#endif

// ---------------------------------------------------------------- threads

struct Phase {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// The phases of a call; every thread goes through all of them, with a counter of its own.
struct Team {
  std::unique_ptr<Phase[]> phases;
  explicit Team(int64_t count) : phases(new Phase[count]) {}
  template <class Work> void run(int64_t& at, int64_t tasks, const Work& work) {
    Phase& p = phases[at++];
    for (int64_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      work(i);
      p.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; p.done.load(std::memory_order_acquire) < tasks; spins++) {
#if defined(__AVX__)
      _mm_pause();
#endif
      if (spins > 4000) std::this_thread::yield();  // the others may need this core to get on
    }
  }
};

// ---------------------------------------------------------------- products

constexpr int ROWS = 8;        // of weights read side by side
constexpr long COLUMNS = 1024; // of a task: partial sums that stay in the first cache
constexpr long PARTS = 16;     // row pieces of a product, at most

// How a product [I, O] is cut.
struct Cut {
  long I, O, rows, parts, blocks;
  Cut(long I, long O) : I(I), O(O) {
    rows = std::max<long>(ROWS, (I + PARTS - 1) / PARTS);
    rows = (rows + ROWS - 1) / ROWS * ROWS;
    parts = (I + rows - 1) / rows;
    blocks = (O + COLUMNS - 1) / COLUMNS;
  }
  long tasks() const { return parts * blocks; }
  long floats(long B) const { return parts * B * O; }
};

// y[r][c] += sum over N rows i of x[r][i] w[i][c], for c < columns.
template <int N, int R, class W>
INLINE void add_rows(const W* w, long O, const float* x, long I, float* y, long columns) {
  float a[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) a[r][i] = x[r * I + i];
  for (long c = 0; c < columns; c += L) {
    F b[N];
    UNROLL for (int i = 0; i < N; i++) b[i] = widen(w + i * O + c);
    UNROLL for (int r = 0; r < R; r++) {
      F sum = load<F>(y + r * O + c);
      UNROLL for (int i = 0; i < N; i++) sum += a[r][i] * b[i];
      store<F>(y + r * O + c, sum);
    }
  }
}

// Task t of a product: part[piece][B][O] = the piece's rows of x [B, I] w [I, O].
template <class W>
void multiply(const Cut& cut, long t, const W* w, const float* x, long B, float* part) {
  const long piece = t / cut.blocks, block = t % cut.blocks;
  const long from = piece * cut.rows, to = std::min(cut.I, from + cut.rows);
  const long column = block * COLUMNS, columns = std::min(COLUMNS, cut.O - column);
  float* y = part + piece * B * cut.O + column;
  for (long b = 0; b < B; b++) std::memset(y + b * cut.O, 0, columns * sizeof(float));
  auto rows = [&](auto R, long b) {
    long i = from;
    auto add = [&](auto N) {
      add_rows<N.value, R.value>(w + i * cut.O + column, cut.O, x + b * cut.I + i, cut.I,
                                 y + b * cut.O, columns);
      i += N.value;
    };
    while (i + ROWS <= to) add(std::integral_constant<int, ROWS>{});
    while (i < to) add(std::integral_constant<int, 1>{});
  };
  long b = 0;
  for (; b + 4 <= B; b += 4) rows(std::integral_constant<int, 4>{}, b);
  for (; b < B; b++) rows(std::integral_constant<int, 1>{}, b);
}

// Elements c .. c + L of a product's row b: the pieces in order, times the scale if there is one.
INLINE F sum(const Cut& cut, const float* part, long B, long b, long c, const float* scale) {
  F x = F{};
  for (long p = 0; p < cut.parts; p++) x += load<F>(part + (p * B + b) * cut.O + c);
  return scale ? x * load<F>(scale + c) : x;
}

// ---------------------------------------------------------------- the model

struct Shape {
  int64_t B, S, V, D, layers, K, G, H, F_;
  float epsilon, logit_scale;
  long N() const { return K * G; }
  long Q() const { return K * (G + 2) * H; }
};

enum Name { EMBED, HEAD, QKV, OUT, UP, GATE, DOWN, MATRICES };

struct Operands {
  const void* matrix[MATRICES];
  const float* scale[MATRICES];  // null but for int8
  const float *norm, *norm1, *norm2, *cos, *sin;
  const int *tokens, *segments, *length;
  float *logits, *keys, *values;
};

INLINE F sigmoid(F x) {
  F e = exp2((x > 0.f ? -x : x) * LOG2E);
  return (x > 0.f ? splat(1.f) : e) / (1.f + e);
}

// h = x / rms(x) * scale.
void normalise(const float* x, const float* scale, long D, float epsilon, float* h) {
  F squares = F{};
  for (long d = 0; d < D; d += L) squares += load<F>(x + d) * load<F>(x + d);
  const float inverse = 1 / std::sqrt(total(squares) / D + epsilon);
  for (long d = 0; d < D; d += L) store<F>(h + d, load<F>(x + d) * inverse * load<F>(scale + d));
}

void rotate(float* x, long H, const float* cos, const float* sin) {
  for (long i = 0; i < H / 2; i++) {
    const float a = x[i], b = x[i + H / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + H / 2] = b * cos[i] + a * sin[i];
  }
}

// One query head of one row: its new key and value go into the cache (the first head of a group
// writes them, the others use their own copy), then softmax(q k') v over the columns of its segment.
void attend(const Shape& s, const Operands& o, const Cut& cut, const float* part, int64_t l, long b,
            long n, float* memory, float* out) {
  const long H = s.H, group = s.G + 2, k = n / s.G, at = *o.length, step = s.K * H;
  const float* scale = o.scale[QKV] ? o.scale[QKV] + l * s.Q() : nullptr;
  float *q = memory, *key = q + H, *value = key + H, *p = value + H;
  auto gather = [&](long index, float* to) {
    for (long h = 0; h < H; h += L) store<F>(to + h, sum(cut, part, s.B, b, (k * group + index) * H + h, scale));
  };
  gather(n % s.G, q), gather(s.G, key), gather(s.G + 1, value);
  const float *cos = o.cos + b * (H / 2), *sin = o.sin + b * (H / 2);
  rotate(q, H, cos, sin), rotate(key, H, cos, sin);
  const long first = ((l * s.B + b) * s.S * s.K + k) * H;
  float *keys = o.keys + first, *values = o.values + first;
  if (n % s.G == 0) {
    std::memcpy(keys + at * step, key, H * sizeof(float));
    std::memcpy(values + at * step, value, H * sizeof(float));
  }
  const float to2 = LOG2E / std::sqrt((float)H);
  const int* segments = o.segments + b * s.S;
  float top = -INFINITY;
  for (long c = 0; c <= at; c++) {
    p[c] = -INFINITY;
    if (segments[c] != segments[at]) continue;
    const float* other = c == at ? key : keys + c * step;
    F dot = F{};
    for (long h = 0; h < H; h += L) dot += load<F>(q + h) * load<F>(other + h);
    p[c] = total(dot) * to2;
    top = std::max(top, p[c]);
  }
  for (long c = at + 1; c % L; c++) p[c] = -INFINITY;
  F sums = F{};
  for (long c = 0; c <= at; c += L) {
    F e = exp2(load<F>(p + c) - top);
    sums += e;
    store<F>(p + c, e);
  }
  std::memset(out, 0, H * sizeof(float));
  for (long c = 0; c <= at; c++) {
    if (segments[c] != segments[at]) continue;
    const float* other = c == at ? value : values + c * step;
    for (long h = 0; h < H; h += L) store<F>(out + h, load<F>(out + h) + p[c] * load<F>(other + h));
  }
  const float share = 1 / total(sums);
  for (long h = 0; h < H; h += L) store<F>(out + h, load<F>(out + h) * share);
}

constexpr long HEAD_ROWS = 256;  // vocabulary of a task

template <class W> struct Step {
  Shape s;
  Operands o;
  Cut qkv, out, up, down;
  Team team;
  std::vector<float> memory;
  float *x, *h, *a, *part, *narrow, *heads;
  long room;  // of one query head's attention

  Step(const Shape& s, const Operands& o)
      : s(s), o(o), qkv(s.D, s.Q()), out(s.N() * s.H, s.D), up(s.D, s.F_), down(s.F_, s.D),
        team(8 * s.layers + 2), room(3 * s.H + (s.S + L) / L * L) {
    const long wide = std::max(qkv.floats(s.B), 2 * up.floats(s.B));
    const long thin = std::max(out.floats(s.B), down.floats(s.B));
    const long act = s.B * std::max<long>(s.N() * s.H, s.F_);
    memory.resize(2 * s.B * s.D + act + wide + thin + s.B * s.N() * room);
    x = memory.data(), h = x + s.B * s.D, a = h + s.B * s.D, part = a + act;
    narrow = part + wide, heads = narrow + thin;
  }
  const W* matrix(Name n, int64_t l, long size) const { return (const W*)o.matrix[n] + l * size; }
  const float* scale(Name n, int64_t l, long size) const {
    return o.scale[n] ? o.scale[n] + l * size : nullptr;
  }

  void embed(long b) {
    // As `jnp.take`: a token out of range is NaN.
    const long token = o.tokens[b];
    const bool known = 0 <= token && token < s.V;
    const W* row = (const W*)o.matrix[EMBED] + (known ? token : 0) * s.D;
    const float factor = !known ? NAN : o.scale[EMBED] ? o.scale[EMBED][token] : 1.f;
    for (long d = 0; d < s.D; d += L) store<F>(x + b * s.D + d, widen(row + d) * factor);
  }
  // x += a product's sums; h = norm(x).
  void residual(const Cut& cut, const float* factor, const float* norm) {
    for (long b = 0; b < s.B; b++) {
      float* row = x + b * s.D;
      for (long d = 0; d < s.D; d += L)
        store<F>(row + d, load<F>(row + d) + sum(cut, narrow, s.B, b, d, factor));
      normalise(row, norm, s.D, s.epsilon, h + b * s.D);
    }
  }
  // Rows [from, to) of silu(gate) * up.
  void activate(int64_t l, long from, long to) {
    const float *us = scale(UP, l, s.F_), *gs = scale(GATE, l, s.F_);
    for (long b = 0; b < s.B; b++)
      for (long f = from / L * L; f < to; f += L) {
        F g = sum(up, part + up.floats(s.B), s.B, b, f, gs);
        F u = sum(up, part, s.B, b, f, us) * g * sigmoid(g);
        store<F>(a + b * s.F_ + f, u);
      }
  }
  void logits(long task) {
    const Name head = o.matrix[HEAD] ? HEAD : EMBED;
    for (long v = task * HEAD_ROWS; v < std::min<long>(s.V, (task + 1) * HEAD_ROWS); v++) {
      const W* row = (const W*)o.matrix[head] + v * s.D;
      const float factor = s.logit_scale * (o.scale[head] ? o.scale[head][v] : 1.f);
      for (long b = 0; b < s.B; b++) {
        F one = F{}, two = F{};
        long d = 0;
        for (; d + 2 * L <= s.D; d += 2 * L) {
          one += widen(row + d) * load<F>(h + b * s.D + d);
          two += widen(row + d + L) * load<F>(h + b * s.D + d + L);
        }
        if (d < s.D) one += widen(row + d) * load<F>(h + b * s.D + d);
        o.logits[b * s.V + v] = total(one + two) * factor;
      }
    }
  }

  void go() {
    int64_t at = 0;
    team.run(at, 1, [&](long) {
      for (long b = 0; b < s.B; b++) {
        embed(b);
        normalise(x + b * s.D, o.norm1, s.D, s.epsilon, h + b * s.D);
      }
    });
    for (int64_t l = 0; l < s.layers; l++) {
      team.run(at, qkv.tasks(), [&](long t) {
        multiply(qkv, t, matrix(QKV, l, qkv.I * qkv.O), h, s.B, part);
      });
      team.run(at, s.B * s.N(), [&](long t) {
        attend(s, o, qkv, part, l, t / s.N(), t % s.N(), heads + t * room, a + t * s.H);
      });
      team.run(at, out.tasks(), [&](long t) {
        multiply(out, t, matrix(OUT, l, out.I * out.O), a, s.B, narrow);
      });
      team.run(at, 1, [&](long) { residual(out, scale(OUT, l, s.D), o.norm2 + l * s.D); });
      team.run(at, 2 * up.tasks(), [&](long t) {
        const bool gate = t >= up.tasks();
        multiply(up, gate ? t - up.tasks() : t, matrix(gate ? GATE : UP, l, up.I * up.O), h, s.B,
                 part + gate * up.floats(s.B));
      });
      team.run(at, 1, [&](long) { activate(l, 0, s.F_); });
      team.run(at, down.tasks(), [&](long t) {
        multiply(down, t, matrix(DOWN, l, down.I * down.O), a, s.B, narrow);
      });
      const float* next = l + 1 < s.layers ? o.norm1 + (l + 1) * s.D : o.norm;
      team.run(at, 1, [&](long) { residual(down, scale(DOWN, l, s.D), next); });
    }
    team.run(at, (s.V + HEAD_ROWS - 1) / HEAD_ROWS, [&](long t) { logits(t); });
  }
};

template <class W>
ffi::Error step(ffi::ThreadPool pool, const Shape& s, const Operands& o) {
  std::shared_ptr<Step<W>> shared;
  try {
    shared = std::make_shared<Step<W>>(s, o);
  } catch (const std::bad_alloc&) {
    return no_memory();
  }
  for (int64_t i = 1; i < pool.num_threads(); i++) pool.Schedule([shared] { shared->go(); });
  shared->go();
  return ffi::Error::Success();
}

ffi::Error Decode(ffi::ThreadPool pool, int64_t B, int64_t S, int64_t V, int64_t D, int64_t layers,
                  int64_t K, int64_t G, int64_t H, int64_t F_, int64_t bits, float epsilon,
                  float logit_scale, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Shape s{B, S, V, D, layers, K, G, H, F_, epsilon, logit_scale};
  // Operands: the matrices and their scales in the order of Name, the norms, cos and sin, tokens,
  // segments, length, keys, values. Results: logits, keys, values, of which the last two are the
  // operands themselves.
  int i = 0;
  auto next = [&]() -> const void* {
    auto array = args.get<Array>(i++);
    return array->element_count() ? array->untyped_data() : nullptr;
  };
  Operands o;
  for (auto& m : o.matrix) m = next();
  for (auto& m : o.scale) m = (const float*)next();
  for (auto* p : {&o.norm, &o.norm1, &o.norm2, &o.cos, &o.sin}) *p = (const float*)next();
  for (auto* p : {&o.tokens, &o.segments, &o.length}) *p = (const int*)next();
  for (int r = 0; r < 3; r++)
    (r == 0 ? o.logits : r == 1 ? o.keys : o.values) = (float*)(*rets.get<Array>(r))->untyped_data();
  if (next() != o.keys || next() != o.values)
    return ffi::Error(ffi::ErrorCode::kInternal, "the cache is not passed in place");
  return bits == 32 ? step<float>(pool, s, o) : bits == 16 ? step<uint16_t>(pool, s, o)
                                                           : step<int8_t>(pool, s, o);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeStep, Decode,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("B").Attr<int64_t>("S").Attr<int64_t>("V")
        .Attr<int64_t>("D").Attr<int64_t>("layers").Attr<int64_t>("K").Attr<int64_t>("G")
        .Attr<int64_t>("H").Attr<int64_t>("F").Attr<int64_t>("bits").Attr<float>("epsilon")
        .Attr<float>("logit_scale").RemainingArgs().RemainingRets());
