// Fused attention on a CPU, forward and backward, for one head size, through XLA's foreign-function
// interface. docs/attention.md explains the algorithm with its arithmetic; in short:
//
//   forward    for each block of queries, over blocks of keys, with running maximum m and sum l:
//                s = k q' (scaled by log2(e), in units of powers of two)   p = 2^(s - m)   o += p' v
//   backward   p = 2^(s - L) again from the saved L = m + log2(l), then
//                dv += p do    ds = p (v do' - <do, o>)    dk += ds q    dq += ds' k
//
// Scores are kept transposed, keys in rows and queries in vector lanes: the softmax needs no
// shuffles, and of all operands only q and do are turned while they are packed. One micro-kernel
// does all five products. Numbers are float32 inside; bfloat16 is converted while it is packed.
//
// HEAD_SIZE is a macro, so that every stride of the inner loops is known when this is compiled.

#include <tuple>
#include <vector>

#include "simd.h"

namespace {

constexpr int H = HEAD_SIZE;
constexpr int HP = (H + 7) / 8 * 8;      // rows are padded with zeros to whole half-vectors
constexpr int BQ = 64;                   // queries of a block
constexpr int BKF = 128, BKB = 64;       // keys of a block, forward and backward: 32 KiB of scores
constexpr bool NARROW = HP <= 8;         // output rows shorter than a vector: queries lie in lanes
constexpr float HIDDEN = -1e30f;         // a hidden score; finite, so that no difference is NaN

// ---------------------------------------------------------------- what a query sees

struct Range {
  int lo, hi;  // [lo, hi)
};
INLINE Range within(Range a, int lo, int hi) {
  lo = std::max(a.lo, lo), hi = std::min(a.hi, hi);
  return {lo, std::max(lo, hi)};
}

// The mask of one batch row (lm/attention/mask.py); S counts the keys within `lengths`.
struct Visible {
  int T, S, window, prefix, start;  // window 0: none; query 0 stands at key `start`
  bool causal;
  const int *q_segments, *k_segments;

  // Queries [lo, hi) that see key s, segments aside.
  Range queries(int s) const {
    if (s >= S) return {0, 0};
    if (s < prefix) return {0, T};
    const int at = s - start;
    int lo = causal ? std::max(at, 0) : 0, hi = T;
    if (window) lo = std::max(lo, at - window + 1), hi = std::min(hi, at + window);
    return {lo, std::max(lo, hi)};
  }
  // A range with all queries that see some key of [a, b].
  Range queries(int a, int b) const {
    if (a >= S) return {0, 0};
    b = std::min(b, S - 1);
    if (a < prefix) return {0, T};
    a -= start, b -= start;
    int lo = causal ? std::max(a, 0) : 0, hi = T;
    if (window) lo = std::max(lo, a - window + 1), hi = std::min(hi, b + window);
    return {lo, std::max(lo, hi)};
  }
  // A range with all keys that some query of [a, b] sees.
  Range keys(int a, int b) const {
    a += start, b = std::min(b, T - 1) + start;
    int lo = 0, hi = causal ? b + 1 : S;
    if (window) lo = std::max(0, a - window + 1), hi = std::min(hi, b + window);
    if (prefix) lo = 0, hi = std::max(hi, prefix);
    return within({lo, hi}, 0, S);
  }
  // Whether key s is hidden from the queries before it and from no other.
  bool only_causal(int s) const { return causal && !window && !prefix && s < S; }
  // Whether every query of [ta, tb] sees every key of [sa, sb], segments aside.
  bool all(int ta, int tb, int sa, int sb) const {
    if (sb >= S) return false;
    if (sb < prefix) return true;
    ta += start, tb += start;
    return (!causal || sb <= ta) && (!window || (tb - sa < window && sb - ta < window));
  }
};

enum class Segments { hidden, same, mixed };

// How a block of queries and a block of keys see each other by their segments.
INLINE Segments compare(const Visible& see, int t, int nt, int s, int ns) {
  if (!see.q_segments) return Segments::same;
  auto scan = [](const int* x, int n, int& low, int& high, bool& zero) {
    low = INT32_MAX, high = INT32_MIN, zero = false;
    for (int i = 0; i < n; i++) {
      zero |= x[i] == 0;
      low = std::min(low, x[i] == 0 ? INT32_MAX : x[i]);
      high = std::max(high, x[i] == 0 ? INT32_MIN : x[i]);
    }
  };
  int ql, qh, kl, kh;
  bool qz, kz;
  scan(see.q_segments + t, std::min(nt, see.T - t), ql, qh, qz);
  scan(see.k_segments + s, std::min(ns, see.S - s), kl, kh, kz);
  if (qh < kl || kh < ql || ql > qh || kl > kh) return Segments::hidden;
  return ql == qh && kl == kh && ql == kl && !qz && !kz ? Segments::same : Segments::mixed;
}

// Puts `hidden` where queries t.. (in lanes) do not see keys s.. (in rows).
template <int N>
INLINE void hide(F (&x)[MR][N], const Visible& see, const int* segments, int t, int s,
                 float hidden) {
  if (!segments && see.only_causal(s + MR - 1)) {
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int n = 0; n < N; n++)
        x[m][n] = iota() >= splat(s + m - see.start - t - n * L) ? x[m][n] : splat(hidden);
    return;
  }
  UNROLL for (int m = 0; m < MR; m++) {
    Range r = see.queries(s + m);
    int segment = segments ? (s + m < see.S ? see.k_segments[s + m] : 0) : 1;
    if (segment == 0) r = {0, 0};
    UNROLL for (int n = 0; n < N; n++) {
      I lane = iota() + (t + n * L);
      I seen = (lane >= splat(r.lo)) & (lane < splat(r.hi));
      if (segments) {
        I q;
        std::memcpy(&q, segments + n * L, sizeof q);
        seen &= q == splat(segment);
      }
      x[m][n] = seen ? x[m][n] : splat(hidden);
    }
  }
}

// ---------------------------------------------------------------- rows in and out

// Rows of one head in a larger array; with angles [T, H / 2] they are rotated when they are read,
// element i with i + H / 2, and rotated back when they are written.
struct Rows {
  char* data;
  long stride;  // elements between rows
  bool half;    // bfloat16, else float32
  const float *cos = nullptr, *sin = nullptr;
  float* row(int t) const { return (float*)data + t * stride; }  // float32 only
  uint16_t* half_row(int t) const { return (uint16_t*)data + t * stride; }
};

INLINE uint16_t to_half(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;  // NaN stays NaN
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

INLINE void rotate(float* x, const float* cos, const float* sin, float sign) {
  for (int h = 0; h < H / 2; h++) {
    const float a = x[h], b = x[h + H / 2], c = cos[h], s = sign * sin[h];
    x[h] = a * c - b * s;
    x[h + H / 2] = b * c + a * s;
  }
}

// out[i][h] = x[first + i][h] for i < n, then zeros up to `padded` rows.
INLINE void read(const Rows& x, int first, int n, int padded, float* out) {
  for (int i = 0; i < n; i++, out += HP) {
    if (x.half) {
      const uint16_t* p = x.half_row(first + i);
      for (int h = 0; h < H; h++) {
        uint32_t u = (uint32_t)p[h] << 16;
        std::memcpy(out + h, &u, 4);
      }
    } else {
      std::memcpy(out, x.row(first + i), H * 4);
    }
    if (x.cos) rotate(out, x.cos + (first + i) * (H / 2), x.sin + (first + i) * (H / 2), 1);
    for (int h = H; h < HP; h++) out[h] = 0;
  }
  std::memset(out, 0, (long)(padded - n) * HP * 4);
}

// x[first + i][h] = in[i][h] * factor[i] for i < n; a null factor is 1.
INLINE void write(const Rows& x, int first, int n, const float* in, const float* factor) {
  alignas(64) float rotated[HP];
  for (int i = 0; i < n; i++, in += HP) {
    float f = factor ? factor[i] : 1.f;
    const float* from = in;
    if (x.cos) {
      std::memcpy(rotated, in, sizeof rotated);
      rotate(rotated, x.cos + (first + i) * (H / 2), x.sin + (first + i) * (H / 2), -1);
      from = rotated;
    }
    if (x.half) {
      uint16_t* p = x.half_row(first + i);
      for (int h = 0; h < H; h++) p[h] = to_half(from[h] * f);
    } else {
      float* p = x.row(first + i);
      for (int h = 0; h < H; h++) p[h] = from[h] * f;
    }
  }
}

// out[h][q] = factor * x[q][h], rows of BQ, for h < W, q < n, and zeros up to a multiple of L.
template <int W = HP>
INLINE void turn(const float* x, long stride, int n, float factor, float* out) {
  for (int q = 0; q < n; q += L) {
    const float* from = x + q * stride;
    long step = stride;
    alignas(64) float tail[L * W];
    if (q + L > n) {
      std::memset(tail, 0, sizeof tail);
      for (int i = q; i < n; i++) std::memcpy(tail + (i - q) * W, x + i * stride, W * 4);
      from = tail, step = W;
    }
    for (int h = 0; h < W; h += C) {
      F r[C];
      UNROLL for (int i = 0; i < C; i++) r[i] = load_rows(from + i * step + h, step);
      transpose(r);
      UNROLL for (int i = 0; i < C; i++) store<F>(out + (h + i) * BQ + q, r[i] * factor);
    }
  }
}

// out[q][h] = in[h][q] for n (rounded up to L) queries.
INLINE void turn_back(const float* in, int n, float* out) {
  for (int q = 0; q < n; q += L)
    for (int h = 0; h < HP; h += C) {
      F r[C];
      UNROLL for (int i = 0; i < C; i++) r[i] = load<F>(in + (h + i) * BQ + q);
      transpose(r);
      UNROLL for (int i = 0; i < C; i++) store_rows(out + (q + i) * HP + h, HP, r[i]);
    }
}

// ---------------------------------------------------------------- products over a block

constexpr int WH = HP % L == 0 ? L : 8;  // lanes along the head
using G = Lanes<(WH < L ? WH : L)>::f;
constexpr int NV = HP / (int)(sizeof(G) / 4);
constexpr int NH = NV % 2 == 0 ? 2 : NV % 3 == 0 && MR == 8 ? 3 : 1;  // vectors of a tile

// o[q][h] = o[q][h] * alpha[q] + sum over keys of p[key][q] w[key][h]; keys from s on, `n` of them.
// NARROW: o is kept as [h][q]. The first block starts from zero; a null alpha is 1.
template <bool FIRST>
INLINE void add_keys(const float* p, const float* w, float* o, const float* alpha,
                     const Visible& see, int t, int nq, int s, int n) {
  if constexpr (NARROW) {
    for (int c = 0; c < nq; c += L) {
      Range r = within(see.keys(t + c, t + c + L - 1), s, s + n);
      if (!FIRST && r.lo >= r.hi) continue;
      for (int h = 0; h < HP; h += MR) {
        F acc[MR][1];
        UNROLL for (int m = 0; m < MR; m++) {
          acc[m][0] = FIRST ? F{} : load<F>(o + (h + m) * BQ + c);
          if (!FIRST && alpha) acc[m][0] *= load<F>(alpha + c);
        }
        multiply<true, HP, BQ>(acc, r.lo - s, r.hi - s, w + h, p + c);
        UNROLL for (int m = 0; m < MR; m++) store<F>(o + (h + m) * BQ + c, acc[m][0]);
      }
    }
  } else {
    constexpr int W = sizeof(G) / 4;
    for (int q = 0; q < nq; q += MR) {
      Range r = within(see.keys(t + q, t + q + MR - 1), s, s + n);
      if (!FIRST && r.lo >= r.hi) continue;
      for (int h = 0; h < HP; h += NH * W) {
        G acc[MR][NH];
        UNROLL for (int m = 0; m < MR; m++)
          UNROLL for (int i = 0; i < NH; i++) {
            acc[m][i] = FIRST ? G{} : load<G>(o + (q + m) * HP + h + i * W);
            if (!FIRST && alpha) acc[m][i] *= alpha[q + m];
          }
        multiply<true, BQ, HP>(acc, r.lo - s, r.hi - s, p + q, w + h);
        UNROLL for (int m = 0; m < MR; m++)
          UNROLL for (int i = 0; i < NH; i++) store<G>(o + (q + m) * HP + h + i * W, acc[m][i]);
      }
    }
  }
}

// d[key][h] += sum over queries of p[key][q] w[q][h]; queries from t on, `nq` of them.
INLINE void add_queries(const float* p, const float* w, float* d, const Visible& see, int t, int nq,
                        int s, int n) {
  constexpr int W = sizeof(G) / 4;
  for (int k = 0; k < n; k += MR) {
    Range r = within(see.queries(s + k, s + k + MR - 1), t, t + nq);
    if (r.lo >= r.hi) continue;
    for (int h = 0; h < HP; h += NH * W) {
      G acc[MR][NH];
      UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int i = 0; i < NH; i++) acc[m][i] = load<G>(d + (k + m) * HP + h + i * W);
      multiply<false, BQ, HP>(acc, r.lo - t, r.hi - t, p + k * BQ, w + h);
      UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int i = 0; i < NH; i++) store<G>(d + (k + m) * HP + h + i * W, acc[m][i]);
    }
  }
}

// Calls tile(integral_constant<N>, c, k) for every tile of N x L queries and MR keys of a block of
// which something may be seen: two columns at once where both see the keys, else one.
template <class Tile>
INLINE void visit(const Visible& see, int t, int nq, int s, int n, const Tile& tile) {
  for (int c = 0; c < nq; c += 2 * L) {
    auto keys = [&](int column) {
      if (column >= nq) return Range{0, 0};
      Range r = within(see.keys(t + column, t + column + L - 1), s, s + n);
      return Range{(r.lo - s) / MR * MR, r.lo < r.hi ? (r.hi - s + MR - 1) / MR * MR : 0};
    };
    Range a = keys(c), b = keys(c + L), both = within(a, b.lo, b.hi);
    if (both.lo >= both.hi) both = {a.hi, a.hi};
    for (int k = both.lo; k < both.hi; k += MR) tile(std::integral_constant<int, 2>{}, c, k);
    for (int k = a.lo; k < std::min(a.hi, both.lo); k += MR)
      tile(std::integral_constant<int, 1>{}, c, k);
    for (int k = both.hi; k < a.hi; k += MR) tile(std::integral_constant<int, 1>{}, c, k);
    if (both.lo >= both.hi) both = {b.hi, b.hi};
    for (int k = b.lo; k < std::min(b.hi, both.lo); k += MR)
      tile(std::integral_constant<int, 1>{}, c + L, k);
    for (int k = both.hi; k < b.hi; k += MR) tile(std::integral_constant<int, 1>{}, c + L, k);
  }
}

// ---------------------------------------------------------------- one head

// Whether rows can be used where they lie, as a contiguous [S, HP] panel.
INLINE bool is_panel(const Rows& x, int S) {
  return !x.half && !x.cos && H == HP && x.stride == HP && S % MR == 0;
}
INLINE long padded(long n) { return (n + MR - 1) / MR * MR; }
// All rows of keys or values as a panel: themselves, or a copy padded to whole tiles.
INLINE const float* panel(const Rows& x, int S) {
  if (is_panel(x, S)) return x.row(0);
  float* copy = workspace.take(padded(S) * HP);
  read(x, 0, S, padded(S), copy);
  return copy;
}

// One head; the next of its group lies H elements further in every row.
struct Head {
  Rows q, k, v, o;
  float* lse;  // [T], in powers of two
};
INLINE Rows next(Rows x, int g) {
  x.data += g * H * (x.half ? 2 : 4);
  return x;
}

// The blocks of queries first, first + every.. of the heads of one group.
static void forward(const Head& head, int group, const Visible& see, int S, float scale, int first,
                    int every) {
  workspace.reserve(2 * padded(S) * HP * !is_panel(head.k, S) + 3L * HP * BQ + BKF * BQ + 256);
  const float *K = panel(head.k, S), *V = panel(head.v, S);
  float *turned = workspace.take(HP * BQ), *o = workspace.take(HP * BQ);
  float *rows = workspace.take(HP * BQ), *scores = workspace.take(BKF * BQ);
  alignas(64) float top[BQ], maxima[BQ], sums[BQ], alpha[BQ];

  for (int g = 0; g < group; g++)
    for (int t = first * BQ; t < see.T; t += every * BQ) {
      const Rows q = next(head.q, g);
      const int n = std::min(BQ, see.T - t), nq = (n + L - 1) / L * L;
      if (q.half || q.cos || H != HP) {
        read(q, t, n, n, rows);
        turn(rows, HP, n, scale * LOG2E, turned);
      } else {
        turn(q.row(t), q.stride, n, scale * LOG2E, turned);
      }
      int segments[BQ] = {};
      if (see.q_segments) std::copy_n(see.q_segments + t, n, segments);
      for (int c = 0; c < nq; c += L) store<F>(maxima + c, splat(HIDDEN / 2)), store<F>(sums + c, F{});

      bool begun = false;
      const Range range = see.keys(t, t + nq - 1);
      for (int s = range.lo / MR * MR; s < range.hi; s += BKF) {
        const int ns = std::min<int>(BKF, padded(range.hi - s));
        const Segments relation = compare(see, t, n, s, ns);
        if (relation == Segments::hidden) continue;
        const bool mixed = relation == Segments::mixed;
        for (int c = 0; c < nq; c += L) store<F>(top + c, splat(HIDDEN));
        visit(see, t, nq, s, ns, [&](auto columns, int c, int k) __attribute__((always_inline)) {
          constexpr int N = decltype(columns)::value;
          F acc[MR][N] = {};
          multiply<false, HP, BQ>(acc, 0, H, K + (long)(s + k) * HP, turned + c);
          if (mixed || !see.all(t + c, t + c + N * L - 1, s + k, s + k + MR - 1))
            hide(acc, see, mixed ? segments + c : nullptr, t + c, s + k, HIDDEN);
          UNROLL for (int i = 0; i < N; i++) {
            F x = load<F>(top + c + i * L);
            UNROLL for (int m = 0; m < MR; m++) {
              x = maximum(x, acc[m][i]);
              store<F>(scores + (k + m) * BQ + c + i * L, acc[m][i]);
            }
            store<F>(top + c + i * L, x);
          }
        });
        for (int c = 0; c < nq; c += L) {
          const Range r = within(see.keys(t + c, t + c + L - 1), s, s + ns);
          const F before = load<F>(maxima + c), now = maximum(before, load<F>(top + c));
          const F a = exp2(before - now);
          F l[4] = {load<F>(sums + c) * a};
          float* p = scores + (r.lo - s) * BQ + c;
          int j = r.lo;
          for (; j + 4 <= r.hi; j += 4, p += 4 * BQ)
            UNROLL for (int i = 0; i < 4; i++) {
              F e = exp2(load<F>(p + i * BQ) - now);
              store<F>(p + i * BQ, e);
              l[i] += e;
            }
          for (; j < r.hi; j++, p += BQ) {
            F e = exp2(load<F>(p) - now);
            store<F>(p, e);
            l[0] += e;
          }
          store<F>(maxima + c, now), store<F>(alpha + c, a);
          store<F>(sums + c, (l[0] + l[1]) + (l[2] + l[3]));
        }
        if (begun)
          add_keys<false>(scores, V + (long)s * HP, o, alpha, see, t, nq, s, ns);
        else
          add_keys<true>(scores, V + (long)s * HP, o, alpha, see, t, nq, s, ns);
        begun = true;
      }
      if (!begun) std::memset(o, 0, sizeof(float) * HP * BQ);
      for (int c = 0; c < nq; c += L) {
        // A row that sees a key has a sum of at least 1; one that sees none gets 0 and an L at
        // which every 2^(s - L) is 0.
        F l = load<F>(sums + c);
        store<F>(alpha + c, l > 0.5f ? 1.f / l : F{});
        store<F>(sums + c, l > 0.5f ? load<F>(maxima + c) + log2(l) : splat(-HIDDEN));
      }
      std::memcpy(head.lse + (long)g * see.T + t, sums, n * 4);
      if (NARROW) turn_back(o, n, rows);
      write(next(head.o, g), t, n, NARROW ? rows : o, alpha);
    }
}

struct Gradient {
  Head head;
  Rows dout, dq;
};

// Adds to dk and dv, panels [S, HP], what blocks of queries first, first + every.. give.
static void backward(const Gradient& of, int group, const Visible& see, int S, float scale,
                     int first, int every, float* dk, float* dv) {
  const Head& head = of.head;
  const float *K = panel(head.k, S), *V = panel(head.v, S);
  float *turned = workspace.take(HP * BQ), *dout_turned = workspace.take(HP * BQ);
  float *q = workspace.take(HP * BQ), *dout = workspace.take(HP * BQ);
  float *dq = workspace.take(HP * BQ), *rows = workspace.take(HP * BQ);
  float *p = workspace.take(BKB * BQ), *ds = workspace.take(BKB * BQ);
  alignas(64) float lse[BQ], delta[BQ];

  for (int g = 0; g < group; g++)
    for (int t = first * BQ; t < see.T; t += every * BQ) {
      const int n = std::min(BQ, see.T - t), nq = (n + L - 1) / L * L;
      read(next(head.q, g), t, n, nq, q);
      read(next(of.dout, g), t, n, nq, dout);
      turn(q, HP, nq, scale * LOG2E, turned);
      turn(dout, HP, nq, scale, dout_turned);
      read(next(head.o, g), t, n, nq, rows);
      // delta = <do, o>: eight partial sums a row, turned, and added across.
      for (int i = 0; i < nq; i++) {
        E x = E{};
        for (int h = 0; h < HP; h += 8)
          x += load<E>(rows + i * HP + h) * load<E>(dout + i * HP + h);
        store<E>(p + i * 8, x);
      }
      turn<8>(p, 8, nq, scale, ds);
      for (int c = 0; c < nq; c += L) {
        F x = load<F>(ds + c);
        UNROLL for (int j = 1; j < 8; j++) x += load<F>(ds + j * BQ + c);
        store<F>(delta + c, x);
      }
      for (int i = 0; i < nq; i++) lse[i] = i < n ? head.lse[(long)g * see.T + t + i] : -HIDDEN;
      int segments[BQ] = {};
      if (see.q_segments) std::copy_n(see.q_segments + t, n, segments);

      bool begun = false;
      const Range range = see.keys(t, t + nq - 1);
      for (int s = range.lo / MR * MR; s < range.hi; s += BKB) {
        const int ns = std::min<int>(BKB, padded(range.hi - s));
        const Segments relation = compare(see, t, n, s, ns);
        if (relation == Segments::hidden) continue;
        const bool mixed = relation == Segments::mixed;
        visit(see, t, nq, s, ns, [&](auto columns, int c, int k) __attribute__((always_inline)) {
          constexpr int N = decltype(columns)::value;
          F acc[MR][N] = {};
          multiply<false, HP, BQ>(acc, 0, H, K + (long)(s + k) * HP, turned + c);
          if (mixed || !see.all(t + c, t + c + N * L - 1, s + k, s + k + MR - 1))
            hide(acc, see, mixed ? segments + c : nullptr, t + c, s + k, HIDDEN);
          UNROLL for (int i = 0; i < N; i++) {
            const F l = load<F>(lse + c + i * L);
            UNROLL for (int m = 0; m < MR; m++)
              store<F>(p + (k + m) * BQ + c + i * L, exp2(acc[m][i] - l));
          }
          F product[MR][N] = {};
          multiply<false, HP, BQ>(product, 0, H, V + (long)(s + k) * HP, dout_turned + c);
          UNROLL for (int i = 0; i < N; i++) {
            const F d = load<F>(delta + c + i * L);
            UNROLL for (int m = 0; m < MR; m++) {
              const long at = (k + m) * BQ + c + i * L;
              store<F>(ds + at, load<F>(p + at) * (product[m][i] - d));
            }
          }
        });
        add_queries(p, dout, dv + (long)s * HP, see, t, nq, s, ns);
        add_queries(ds, q, dk + (long)s * HP, see, t, nq, s, ns);
        if (begun)
          add_keys<false>(ds, K + (long)s * HP, dq, nullptr, see, t, nq, s, ns);
        else
          add_keys<true>(ds, K + (long)s * HP, dq, nullptr, see, t, nq, s, ns);
        begun = true;
      }
      if (!begun) std::memset(dq, 0, sizeof(float) * HP * BQ);
      if (NARROW) turn_back(dq, n, rows);
      write(next(of.dq, g), t, n, NARROW ? rows : dq, nullptr);
    }
}

// ---------------------------------------------------------------- all heads, on XLA's threads

using Array = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// The sizes and the mask of a call; all leading axes are the batch.
struct Call {
  int B, T, S, N, K;
  bool causal;
  int window;
  const int *q_segments, *k_segments, *prefix, *lengths, *start;

  Call(const std::vector<int64_t>& shape, Array& qs, Array& ks, Array& prefix_, Array& lengths_,
       Array& start_, bool causal_, int64_t window_)
      : B((int)shape[0]), T((int)shape[1]), S((int)shape[2]), N((int)shape[3]), K((int)shape[4]),
        causal(causal_), window((int)window_) {
    auto ints = [](Array& a) {
      return a.element_count() ? static_cast<const int*>(a.untyped_data()) : nullptr;
    };
    q_segments = ints(qs), k_segments = ints(ks), prefix = ints(prefix_), lengths = ints(lengths_);
    start = ints(start_);
  }
  Visible visible(int b) const {
    return {T, lengths ? std::clamp(lengths[b], 0, S) : S, window, prefix ? prefix[b] : 0,
            start ? std::clamp(start[b], 0, S) : 0, causal,
            q_segments ? q_segments + (long)b * T : nullptr,
            k_segments ? k_segments + (long)b * S : nullptr};
  }
  int group() const { return N / K; }
};

// q [..., T, N, H] and k [..., S, K, H] -> B, T, S, N, K.
std::vector<int64_t> shape_of(Array& q, Array& k) {
  auto x = q.dimensions(), y = k.dimensions();
  const size_t n = x.size();
  const int64_t B = (int64_t)q.element_count() / (x[n - 3] * x[n - 2] * x[n - 1]);
  return {B, x[n - 3], y[n - 3], x[n - 2], y[n - 2]};
}
// qkv [..., T, K, N / K + 2, H] -> the same.
std::vector<int64_t> shape_of(Array& qkv) {
  auto x = qkv.dimensions();
  const size_t n = x.size();
  const int64_t T = x[n - 4], K = x[n - 3], G = x[n - 2] - 2;
  return {(int64_t)qkv.element_count() / (T * K * (G + 2) * H), T, T, K * G, K};
}

// Where the rows of each kv head, or of its group of heads, lie in an array; strides in elements.
struct Operand {
  Rows first;
  long batch, head, angles = 0;
  Operand(Array& a, long length, long heads, long group)
      : first{(char*)a.untyped_data(), heads * group * H, a.element_type() == ffi::BF16},
        batch(length * heads * group * H), head(group * H) {}
  // The part from head `at` of a group on, rotated by angles if there are any.
  Operand part(long at, Array* cos, Array* sin) const {
    Operand x = *this;
    x.first = next(x.first, (int)at);
    if (cos) {
      x.first.cos = (const float*)cos->untyped_data(), x.first.sin = (const float*)sin->untyped_data();
      x.angles = batch / first.stride * (H / 2);
    }
    return x;
  }
  Rows at(int b, int kv) const {
    Rows x = first;
    x.data += (b * batch + kv * head) * (x.half ? 2 : 4);
    if (x.cos) x.cos += b * angles, x.sin += b * angles;
    return x;
  }
};

double products(const Call& call, int count) {
  return (double)call.B * call.N * call.T * call.S * H * count * (call.causal ? 0.5 : 1);
}

ffi::Future forward_all(ffi::ThreadPool pool, float scale, Call call, Operand q, Operand k, Operand v,
                        Out o, Out lse) {
  const int blocks = (call.T + BQ - 1) / BQ, groups = call.B * call.K;
  // Few heads are cut along the queries.
  const int parts = groups >= 2 * pool.num_threads() ? 1 : std::min(blocks, 8);
  const Operand out(*o, call.T, call.K, call.group());
  float* sums = (float*)lse->untyped_data();
  return run(pool, (int64_t)groups * parts, products(call, 2), [=](int64_t task) {
    const int part = (int)(task % parts), group = (int)(task / parts);
    const int b = group / call.K, kv = group % call.K, G = call.group();
    const Head head = {q.at(b, kv), k.at(b, kv), v.at(b, kv), out.at(b, kv),
                       sums + ((long)b * call.N + kv * G) * call.T};
    forward(head, G, call.visible(b), call.S, scale, part, parts);
  });
}

ffi::Future backward_all(ffi::ThreadPool pool, float scale, Call call, Operand q, Operand k,
                         Operand v, Array o, Array lse, Array dout, Operand dq, Operand dk,
                         Operand dv) {
  const Operand out(o, call.T, call.K, call.group()), grad(dout, call.T, call.K, call.group());
  const float* saved = (const float*)lse.untyped_data();
  const int blocks = (call.T + BQ - 1) / BQ, groups = call.B * call.K;
  const long size = padded(call.S) * HP;
  // Too few heads for the threads are cut along the queries. Every part but the first then has its
  // own sums, which the part that ends last adds in a fixed order.
  const int threads = (int)pool.num_threads();
  const int parts = std::min(blocks, groups >= threads ? 1 : (threads + groups - 1) / groups);
  const bool panel = is_panel(dk.first, call.S);
  struct Sums {
    std::unique_ptr<float[]> memory;
    std::unique_ptr<std::atomic<int>[]> done;
    float* of(int group, int parts, int part, long size) {
      return memory.get() + ((long)group * parts + part) * 2 * size;
    }
  };
  auto sums = std::make_shared<Sums>();
  const int own = parts > 1 ? parts - panel : 0;  // part 0 adds up in the output if it is a panel
  if (own > 0) {
    sums->memory.reset(new (std::nothrow) float[2 * size * own * groups]);
    if (!sums->memory) return failed(no_memory());
    sums->done.reset(new std::atomic<int>[groups]());
  }
  return run(pool, (int64_t)groups * parts, products(call, 5), [=](int64_t task) mutable {
    const int part = (int)(task % parts), group = (int)(task / parts);
    const int b = group / call.K, kv = group % call.K, G = call.group();
    const Gradient head = {{q.at(b, kv), k.at(b, kv), v.at(b, kv), out.at(b, kv),
                            const_cast<float*>(saved) + ((long)b * call.N + kv * G) * call.T},
                           grad.at(b, kv), dq.at(b, kv)};
    const Rows outk = dk.at(b, kv), outv = dv.at(b, kv);
    workspace.reserve(4 * size + 6L * HP * BQ + 2 * BKB * BQ + 512);
    auto place = [&](int i) -> std::pair<float*, float*> {
      if (panel && i == 0) return {outk.row(0), outv.row(0)};
      float* at = own > 0 ? sums->of(group, own, i - panel, size) : workspace.take(2 * size);
      return {at, at + size};
    };
    auto [sk, sv] = place(part);
    std::memset(sk, 0, size * 4);
    std::memset(sv, 0, size * 4);
    backward(head, G, call.visible(b), call.S, scale, part, parts, sk, sv);
    if (parts > 1) {
      if (sums->done[group].fetch_add(1) + 1 < parts) return;
      std::tie(sk, sv) = place(0);
      for (int i = 1; i < parts; i++) {
        auto [xk, xv] = place(i);
        for (long j = 0; j < size; j++) sk[j] += xk[j], sv[j] += xv[j];
      }
    }
    if (panel) return;
    write(outk, 0, call.S, sk, nullptr);
    write(outv, 0, call.S, sv, nullptr);
  });
}

ffi::Future Forward(ffi::ThreadPool pool, float scale, bool causal, int64_t window, Array q, Array k,
                    Array v, Array qs, Array ks, Array prefix, Array lengths, Array start, Out o,
                    Out lse) {
  Call call(shape_of(q, k), qs, ks, prefix, lengths, start, causal, window);
  const Operand keys(k, call.S, call.K, 1), values(v, call.S, call.K, 1);
  return forward_all(pool, scale, call, {q, call.T, call.K, call.group()}, keys, values, o, lse);
}

ffi::Future Backward(ffi::ThreadPool pool, float scale, bool causal, int64_t window, Array q,
                     Array k, Array v, Array qs, Array ks, Array prefix, Array lengths, Array start,
                     Array o, Array lse, Array dout, Out dq, Out dk, Out dv) {
  Call call(shape_of(q, k), qs, ks, prefix, lengths, start, causal, window);
  const int T = call.T, S = call.S, K = call.K, G = call.group();
  return backward_all(pool, scale, call, {q, T, K, G}, {k, S, K, 1}, {v, S, K, 1}, o, lse, dout,
                      {*dq, T, K, G}, {*dk, S, K, 1}, {*dv, S, K, 1});
}

// Queries, keys and values as one product leaves them, rotated here.
ffi::Future PackedForward(ffi::ThreadPool pool, float scale, bool causal, int64_t window, Array qkv,
                          Array cos, Array sin, Array qs, Array ks, Array prefix, Array lengths,
                          Array start, Out o, Out lse) {
  Call call(shape_of(qkv), qs, ks, prefix, lengths, start, causal, window);
  const int G = call.group();
  const Operand x(qkv, call.T, call.K, G + 2);
  return forward_all(pool, scale, call, x.part(0, &cos, &sin), x.part(G, &cos, &sin),
                     x.part(G + 1, nullptr, nullptr), o, lse);
}

ffi::Future PackedBackward(ffi::ThreadPool pool, float scale, bool causal, int64_t window, Array qkv,
                           Array cos, Array sin, Array qs, Array ks, Array prefix, Array lengths,
                           Array start, Array o, Array lse, Array dout, Out dqkv) {
  Call call(shape_of(qkv), qs, ks, prefix, lengths, start, causal, window);
  const int G = call.group();
  const Operand x(qkv, call.T, call.K, G + 2), y(*dqkv, call.T, call.K, G + 2);
  return backward_all(pool, scale, call, x.part(0, &cos, &sin), x.part(G, &cos, &sin),
                      x.part(G + 1, nullptr, nullptr), o, lse, dout, y.part(0, &cos, &sin),
                      y.part(G, &cos, &sin), y.part(G + 1, nullptr, nullptr));
}

}  // namespace

#define OPERANDS                                                                               \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Attr<bool>("causal")             \
      .Attr<int64_t>("window").Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>() \
      .Arg<Array>().Arg<Array>().Arg<Array>()
#define SAVED .Arg<Array>().Arg<Array>().Arg<Array>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionForward, Forward, OPERANDS.Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionBackward, Backward,
                              OPERANDS SAVED.Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(PackedAttentionForward, PackedForward,
                              OPERANDS.Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(PackedAttentionBackward, PackedBackward,
                              OPERANDS SAVED.Ret<Array>());
