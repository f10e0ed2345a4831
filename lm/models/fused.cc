// The loss of a small Transformer and its gradient in one call, for many replicas at once.
//
// XLA runs a model of width 16 as some 250 small loops over [rows * length, width] arrays, and most
// of the time goes into starting them and into memory. Here one sequence runs through all layers,
// the head, the loss and all the way back before the next one begins, in memory that fits a core's
// cache. Arrays are kept feature by token, [features][TP], tokens in the vector lanes: norms,
// softmax, rotary positions and activations need no sums across lanes, and no width, head or
// vocabulary size is padded. Only weight gradients sum over tokens; for those one side is turned.
//
// The rows of a batch are cut into at most four parts; parts add up their gradients by themselves,
// and the last of a replica to end adds those of all in order.

#include <cmath>
#include <vector>

#include "simd.h"

namespace {

struct Shape {
  int64_t B, T, V, D, layers, K, G, H, F;
  bool gated, tied;
  float rope_base, epsilon, logit_scale;
  int64_t N() const { return K * G; }
  int64_t qkv() const { return K * (G + 2) * H; }
};

constexpr long up(long n, long to = L) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- parameters

enum Name { EMBED, HEAD, NORM, NORM1, QKV, OUT, NORM2, UP, GATE, DOWN, NAMES };

// Rows and columns of a parameter of one layer; a norm has one row.
struct Size {
  long rows, columns;
  bool stacked;
};
Size size(const Shape& s, Name name) {
  switch (name) {
    case EMBED: return {s.V, s.D, false};
    case HEAD: return {s.tied ? 0 : s.V, s.D, false};
    case NORM: return {1, s.D, false};
    case NORM1: case NORM2: return {1, s.D, true};
    case QKV: return {s.D, s.qkv(), true};
    case OUT: return {s.N() * s.H, s.D, true};
    case UP: return {s.D, s.F, true};
    case GATE: return {s.gated ? s.D : 0, s.F, true};
    default: return {s.F, s.D, true};
  }
}
bool is_norm(Name name) { return name == NORM || name == NORM1 || name == NORM2; }

// Where the sums of a parameter's gradient begin in a part's memory: rows padded to whole vectors,
// norms as [D][L] sums that are added across in the end.
struct Layout {
  long at[NAMES], layer[NAMES], total = 0;
  explicit Layout(const Shape& s) {
    for (int i = 0; i < NAMES; i++) {
      Size z = size(s, (Name)i);
      layer[i] = is_norm((Name)i) ? z.columns * L : z.rows * up(z.columns);
      at[i] = total;
      total += layer[i] * (z.stacked ? s.layers : 1);
    }
  }
};

// ---------------------------------------------------------------- products

// y[o][t] (+)= sum over i < I of a[i * lda + o] x[i][t], for M rows o and N vectors of tokens.
template <int TP, bool ADD, int M, int N>
INLINE void tile(const float* a, long lda, int I, const float* x, float* y) {
  F acc[M][N];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) acc[m][n] = ADD ? load<F>(y + m * TP + n * L) : F{};
#pragma GCC unroll 2
  for (int i = 0; i < I; i++) {
    F b[N];
    UNROLL for (int n = 0; n < N; n++) b[n] = load<F>(x + (long)i * TP + n * L);
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int n = 0; n < N; n++) acc[m][n] += a[i * lda + m] * b[n];
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) store<F>(y + m * TP + n * L, acc[m][n]);
}

template <int TP, bool ADD>
static void product(const float* a, long lda, int I, int O, const float* x, float* y) {
  constexpr int N = TP >= 2 * L ? 2 : 1;
  int o = 0;
  for (; o + MR <= O; o += MR)
    for (int t = 0; t < TP; t += N * L) tile<TP, ADD, MR, N>(a + o, lda, I, x + t, y + o * TP + t);
  for (; o + 2 <= O; o += 2)
    for (int t = 0; t < TP; t += N * L) tile<TP, ADD, 2, N>(a + o, lda, I, x + t, y + o * TP + t);
  for (; o < O; o++)
    for (int t = 0; t < TP; t += N * L) tile<TP, ADD, 1, N>(a + o, lda, I, x + t, y + o * TP + t);
}

// dw[i][o] += sum over tokens of x[i][t] y[t][o]; y and dw have rows of `ld`.
template <int TP, int M, int N, class V>
INLINE void outer_tile(const float* x, const float* y, int T, long ld, float* dw) {
  constexpr int W = sizeof(V) / 4;
  V acc[M][N];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) acc[m][n] = load<V>(dw + m * ld + n * W);
#pragma GCC unroll 2
  for (int t = 0; t < T; t++) {
    V b[N];
    UNROLL for (int n = 0; n < N; n++) b[n] = load<V>(y + t * ld + n * W);
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int n = 0; n < N; n++) acc[m][n] += x[m * TP + t] * b[n];
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) store<V>(dw + m * ld + n * W, acc[m][n]);
}
template <int TP, int N, class V>
INLINE void outer_columns(const float* x, int I, const float* y, int T, long ld, float* dw) {
  int i = 0;
  for (; i + MR <= I; i += MR) outer_tile<TP, MR, N, V>(x + i * TP, y, T, ld, dw + i * ld);
  for (; i < I; i++) outer_tile<TP, 1, N, V>(x + i * TP, y, T, ld, dw + i * ld);
}
template <int TP>
static void outer(const float* x, int I, const float* y, int O, int T, float* dw) {
  const long ld = up(O);
  if (O <= 8 && L > 8) return outer_columns<TP, 1, E>(x, I, y, T, ld, dw);
  long o = 0;
  for (; o + 2 * L <= ld; o += 2 * L) outer_columns<TP, 2, F>(x, I, y + o, T, ld, dw + o);
  if (o < ld) outer_columns<TP, 1, F>(x, I, y + o, T, ld, dw + o);
}

// out[t][o] = x[o][t]; rows of `ld` in out. Reads whole vectors of rows of x.
template <int TP> static void turn(const float* x, int O, long ld, float* out) {
  for (int o = 0; o < O; o += L)
    for (int t = 0; t < TP; t += C) {
      F r[C];
      UNROLL for (int i = 0; i < C; i++) r[i] = load_rows(x + (o + i) * TP + t, TP);
      transpose(r);
      UNROLL for (int i = 0; i < C; i++) store<F>(out + (t + i) * ld + o, r[i]);
    }
}

// ---------------------------------------------------------------- elementwise

INLINE F sigmoid(F x) {
  F e = exp2((x > 0.f ? -x : x) * LOG2E);
  return (x > 0.f ? splat(1.f) : e) / (1.f + e);
}
INLINE F square_root(F x) {
#if defined(__AVX512F__)
  return (F)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// h = x / rms(x) * scale; keeps 1 / rms.
template <int TP>
static void norm(const float* x, const float* scale, int D, float epsilon, float* inverse, float* h) {
  for (int t = 0; t < TP; t += L) {
    F sum = F{};
    for (int d = 0; d < D; d++) sum += load<F>(x + d * TP + t) * load<F>(x + d * TP + t);
    F inv = 1.f / square_root(sum * (1.f / D) + epsilon);
    store<F>(inverse + t, inv);
    for (int d = 0; d < D; d++) store<F>(h + d * TP + t, load<F>(x + d * TP + t) * inv * scale[d]);
  }
}

// dx += the gradient of norm, dscale[d][lane] += that of the scale.
template <int TP>
static void norm_back(const float* x, const float* scale, int D, const float* inverse,
                      const float* dh, float* dx, float* dscale) {
  for (int t = 0; t < TP; t += L) {
    F sum = F{}, inv = load<F>(inverse + t);
    for (int d = 0; d < D; d++) {
      F g = load<F>(dh + d * TP + t) * load<F>(x + d * TP + t);
      store<F>(dscale + d * L, load<F>(dscale + d * L) + g * inv);
      sum += g * scale[d];
    }
    F c = sum * inv * inv * inv * (1.f / D);
    for (int d = 0; d < D; d++)
      store<F>(dx + d * TP + t, load<F>(dx + d * TP + t) + load<F>(dh + d * TP + t) * inv * scale[d] -
                                    load<F>(x + d * TP + t) * c);
  }
}

// Rotates rows i and i + H/2; backwards with SIGN = -1.
template <int TP, int SIGN>
static void rotate(float* x, int H, const float* cos, const float* sin) {
  for (int i = 0; i < H / 2; i++)
    for (int t = 0; t < TP; t += L) {
      F a = load<F>(x + i * TP + t), b = load<F>(x + (i + H / 2) * TP + t);
      F c = load<F>(cos + i * TP + t), s = load<F>(sin + i * TP + t) * (float)SIGN;
      store<F>(x + i * TP + t, a * c - b * s);
      store<F>(x + (i + H / 2) * TP + t, b * c + a * s);
    }
}

// ---------------------------------------------------------------- attention of one head

constexpr float HIDDEN = -1e30f;

struct Tokens {
  int T;
  bool one;  // one document without padding: only causality hides
  int* segments;
};

// p[s][t] = sum over h of k[h][s] q[h][t] for keys that some token of column c may see.
template <int TP>
INLINE void pairs(const float* k, const float* q, int H, int c, int S, float* p) {
  for (int s = 0; s < S; s += MR)
    tile<TP, false, MR, 1>(k + s, TP, H, q + c, p + s * TP + c);
}

// out[h] (+)= sum over low <= s < high of x[h][s] square[s], in one column of tokens.
template <int TP, bool ADD, int M>
INLINE void mix_rows(const float* x, int low, int high, const float* square, float* out) {
  F acc[M][1];
  UNROLL for (int m = 0; m < M; m++) acc[m][0] = ADD ? load<F>(out + m * TP) : F{};
  multiply<false, TP, TP>(acc, low, high, x, square);
  UNROLL for (int m = 0; m < M; m++) store<F>(out + m * TP, acc[m][0]);
}
template <int TP, bool ADD>
INLINE void mix(const float* x, int H, int low, int high, const float* square, float* out) {
  int h = 0;
  for (; h + MR <= H; h += MR) mix_rows<TP, ADD, MR>(x + h * TP, low, high, square, out + h * TP);
  for (; h < H; h++) mix_rows<TP, ADD, 1>(x + h * TP, low, high, square, out + h * TP);
}

template <int TP>
static void attend(const float* q, const float* k, const float* v, int H, const Tokens& tokens,
                   float* p, float* a) {
  const float scale = LOG2E / std::sqrt((float)H);
  for (int c = 0; c < TP; c += L) {
    const int S = c + L;
    pairs<TP>(k, q, H, c, S, p);
    F top = splat(HIDDEN / 2);
    I lane = iota() + c, mine;
    std::memcpy(&mine, tokens.segments + c, sizeof mine);
    for (int s = 0; s < S; s++) {
      F x = load<F>(p + s * TP + c) * scale;
      if (s >= c || !tokens.one) {
        I seen = lane >= splat(s);
        if (!tokens.one) seen &= (mine == splat(tokens.segments[s])) & (mine != splat(0));
        x = seen ? x : splat(HIDDEN);
      }
      top = maximum(top, x);
      store<F>(p + s * TP + c, x);
    }
    F sum = F{};
    for (int s = 0; s < S; s++) {
      F e = exp2(load<F>(p + s * TP + c) - top);
      sum += e;
      store<F>(p + s * TP + c, e);
    }
    F share = sum > 0.5f ? 1.f / sum : F{};
    for (int s = 0; s < S; s++) store<F>(p + s * TP + c, load<F>(p + s * TP + c) * share);
    mix<TP, false>(v, H, 0, S, p + c, a + c);
  }
}

// dq, and adds to dk and dv; all [H][TP]. `work` holds three [TP][TP] squares.
template <int TP>
static void attend_back(const float* q, const float* k, const float* v, const float* a,
                        const float* da, const float* p, int H, const Tokens& tokens, float* work,
                        float* dq, float* dk, float* dv) {
  const float scale = 1 / std::sqrt((float)H);
  float *ds = work, *turned_p = work + TP * TP, *turned_ds = work + 2 * TP * TP;
  const int T = (int)up(tokens.T);
  for (int c = 0; c < TP; c += L) {
    const int S = c + L;
    pairs<TP>(v, da, H, c, S, ds);
    F delta = F{};
    for (int h = 0; h < H; h++) delta += load<F>(a + h * TP + c) * load<F>(da + h * TP + c);
    for (int s = 0; s < S; s++) {
      float* x = ds + s * TP + c;
      store<F>(x, load<F>(p + s * TP + c) * (load<F>(x) - delta) * scale);
    }
    mix<TP, false>(k, H, 0, S, ds + c, dq + c);
  }
  // Keys of column c are seen from tokens c on; above them the squares hold nothing.
  for (int c = 0; c < T; c += L) {
    for (int t = c; t < T; t += C)
      for (int half = 0; half < 2; half++) {
        const float* from = half ? ds : p;
        float* to = half ? turned_ds : turned_p;
        F r[C];
        UNROLL for (int i = 0; i < C; i++) r[i] = load_rows(from + (c + i) * TP + t, TP);
        transpose(r);
        UNROLL for (int i = 0; i < C; i++) store<F>(to + (t + i) * TP + c, r[i]);
      }
    mix<TP, true>(q, H, c, T, turned_ds + c, dk + c);
    mix<TP, true>(da, H, c, T, turned_p + c, dv + c);
  }
}

// ---------------------------------------------------------------- one sequence

struct Weights {
  const float* at[NAMES];      // as XLA holds them
  const float* turned[NAMES];  // [columns][rows] of each layer, for gradients of inputs
  const float *cos, *sin;      // of positions below T: [T][H / 2]
  const float* layer(const Shape& s, Name n, int64_t l) const {
    return at[n] + l * size(s, n).rows * size(s, n).columns;
  }
  const float* back(const Shape& s, Name n, int64_t l) const {
    return turned[n] + l * size(s, n).rows * size(s, n).columns;
  }
};

INLINE bool known(int i, int count) { return 0 <= i && i < count; }
float frequency(const Shape& s, int i) { return std::pow(s.rope_base, -2.f * i / s.H); }

struct Row {  // of a batch
  const int *tokens, *targets, *segments, *positions;
  const float* weights;
};

// What a layer keeps for the way back.
struct Kept {
  float *x, *inverse1, *h1, *qkv, *p, *a, *y, *inverse2, *h2, *u, *g, *act;
};

// Adds the gradients of one row to `sums` and returns its weighted sum of nats; `share` is the weight
// of one nat in the loss.
template <int TP>
static double run_row(const Shape& s, const Weights& w, const Layout& layout, const Row& row,
                      float share, float* sums) {
  const int T = (int)s.T, D = (int)s.D, H = (int)s.H, N = (int)s.N(), Q = (int)s.qkv(),
            F_ = (int)s.F, V = (int)s.V, G = (int)s.G;
  auto take = [](long rows) { return workspace.take(up(rows) * TP); };
  std::vector<Kept> kept(s.layers);
  for (Kept& k : kept)
    k = {take(D), take(1), take(D), take(Q), take((long)N * TP), take((long)N * H), take(D), take(1),
         take(D), take(F_), take(F_), take(F_)};
  float *x = take(D), *last = take(D), *inverse = take(1), *z = take(V);
  float *cos = take(H / 2), *sin = take(H / 2);

  alignas(64) int segments[TP] = {};
  std::copy_n(row.segments, T, segments);
  Tokens tokens{T, true, segments};
  for (int t = 0; t < T; t++) tokens.one &= segments[t] == segments[0] && segments[t] != 0;
  std::memset(cos, 0, sizeof(float) * (H / 2) * TP);
  std::memset(sin, 0, sizeof(float) * (H / 2) * TP);
  for (int t = 0; t < T; t++) {
    const int at = row.positions[t];
    for (int i = 0; i < H / 2; i++) {
      const float angle = known(at, T) ? 0 : at * frequency(s, i);
      cos[i * TP + t] = known(at, T) ? w.cos[at * (H / 2) + i] : std::cos(angle);
      sin[i * TP + t] = known(at, T) ? w.sin[at * (H / 2) + i] : std::sin(angle);
    }
  }
  // As `jnp.take`: a negative token counts from the end, one out of range is NaN.
  auto token = [&](int t) { return row.tokens[t] + (row.tokens[t] < 0 ? V : 0); };
  std::memset(x, 0, sizeof(float) * D * TP);
  for (int t = 0; t < T; t++)
    for (int d = 0; d < D; d++)
      x[d * TP + t] = known(token(t), V) ? w.at[EMBED][(long)token(t) * D + d] : NAN;

  for (int64_t l = 0; l < s.layers; l++) {
    Kept& k = kept[l];
    std::memcpy(k.x, x, sizeof(float) * D * TP);
    norm<TP>(x, w.layer(s, NORM1, l), D, s.epsilon, k.inverse1, k.h1);
    product<TP, false>(w.layer(s, QKV, l), Q, D, Q, k.h1, k.qkv);
    for (int head = 0; head < s.K; head++) {
      float* q = k.qkv + (long)head * (G + 2) * H * TP;
      for (int g = 0; g <= G; g++) rotate<TP, 1>(q + (long)g * H * TP, H, cos, sin);
      for (int g = 0; g < G; g++) {
        const int n = head * G + g;
        attend<TP>(q + (long)g * H * TP, q + (long)G * H * TP, q + (long)(G + 1) * H * TP, H, tokens,
                   k.p + (long)n * TP * TP, k.a + (long)n * H * TP);
      }
    }
    product<TP, true>(w.layer(s, OUT, l), D, N * H, D, k.a, x);
    std::memcpy(k.y, x, sizeof(float) * D * TP);
    norm<TP>(x, w.layer(s, NORM2, l), D, s.epsilon, k.inverse2, k.h2);
    product<TP, false>(w.layer(s, UP, l), F_, D, F_, k.h2, k.u);
    if (s.gated) product<TP, false>(w.layer(s, GATE, l), F_, D, F_, k.h2, k.g);
    for (long i = 0; i < (long)F_ * TP; i += L) {
      F u = load<F>(k.u + i);
      if (s.gated) {
        F g = load<F>(k.g + i);
        store<F>(k.act + i, g * sigmoid(g) * u);
      } else {
        store<F>(k.act + i, u * sigmoid(1.5957691216f * (u + 0.044715f * u * u * u)));
      }
    }
    product<TP, true>(w.layer(s, DOWN, l), D, F_, D, k.act, x);
  }

  // The head. z becomes the gradient of the products before they are scaled to logits.
  const Name head = s.tied ? EMBED : HEAD;
  norm<TP>(x, w.at[NORM], D, s.epsilon, inverse, last);
  product<TP, false>(w.turned[head], V, D, V, last, z);
  double loss = 0;
  for (int t = 0; t < TP; t += L) {
    F top = splat(HIDDEN), sum = F{};
    for (int v = 0; v < V; v++) top = maximum(top, load<F>(z + v * TP + t));
    const float to2 = s.logit_scale * LOG2E;  // positive, so the largest product has the largest logit
    // As in lm/objectives.py, a target out of range has the logit 0.
    auto target = [&](int lane) {
      const int v = row.targets[t + lane];
      return known(v, V) ? z + (long)v * TP + t + lane : nullptr;
    };
    for (int lane = 0; lane < L && t + lane < T; lane++) {
      const float chosen = target(lane) ? *target(lane) : 0;
      loss -= (double)row.weights[t + lane] * s.logit_scale * (chosen - top[lane]);
    }
    for (int v = 0; v < V; v++) {
      F e = exp2((load<F>(z + v * TP + t) - top) * to2);
      sum += e;
      store<F>(z + v * TP + t, e);
    }
    F nats = sum > 0.f ? log2(sum) * (1 / LOG2E) : sum, factor = F{};  // NaN stays NaN
    for (int lane = 0; lane < L && t + lane < T; lane++) {
      loss += (double)row.weights[t + lane] * nats[lane];
      factor[lane] = row.weights[t + lane] * share * s.logit_scale;
    }
    F divided = factor / sum;
    for (int v = 0; v < V; v++) store<F>(z + v * TP + t, load<F>(z + v * TP + t) * divided);
    for (int lane = 0; lane < L && t + lane < T; lane++)
      if (target(lane)) *target(lane) -= factor[lane];
  }

  // The way back. dx is the gradient of the residual stream.
  const long widest = up(std::max({(long)D, (long)Q, (long)F_, (long)N * H}));
  float *dx = take(D), *dh = take(widest), *du = take(F_), *dg = take(F_), *dqkv = take(Q);
  float *da = take((long)N * H), *squares = workspace.take(3L * TP * TP);
  float* turned = workspace.take(widest * TP);
  auto sum_of = [&](Name n, int64_t l) { return sums + layout.at[n] + l * layout.layer[n]; };
  auto add_outer = [&](const float* in, int I, const float* out, int O, float* to) {
    turn<TP>(out, O, up(O), turned);
    outer<TP>(in, I, turned, O, T, to);
  };

  add_outer(z, V, last, D, sum_of(head, 0));
  product<TP, false>(w.at[head], D, V, D, z, dh);
  std::memset(dx, 0, sizeof(float) * D * TP);
  norm_back<TP>(x, w.at[NORM], D, inverse, dh, dx, sum_of(NORM, 0));
  for (int64_t l = s.layers - 1; l >= 0; l--) {
    Kept& k = kept[l];
    add_outer(k.act, F_, dx, D, sum_of(DOWN, l));
    product<TP, false>(w.back(s, DOWN, l), F_, D, F_, dx, dh);
    for (long i = 0; i < (long)F_ * TP; i += L) {
      F u = load<F>(k.u + i), d = load<F>(dh + i);
      if (s.gated) {
        F g = load<F>(k.g + i), c = sigmoid(g);
        store<F>(du + i, d * g * c);
        store<F>(dg + i, d * u * (c + g * c * (1.f - c)));
      } else {
        F c = sigmoid(1.5957691216f * (u + 0.044715f * u * u * u));
        store<F>(du + i, d * (c + u * c * (1.f - c) * 1.5957691216f * (1.f + 0.134145f * u * u)));
      }
    }
    add_outer(k.h2, D, du, F_, sum_of(UP, l));
    product<TP, false>(w.back(s, UP, l), D, F_, D, du, dh);
    if (s.gated) {
      add_outer(k.h2, D, dg, F_, sum_of(GATE, l));
      product<TP, true>(w.back(s, GATE, l), D, F_, D, dg, dh);
    }
    norm_back<TP>(k.y, w.layer(s, NORM2, l), D, k.inverse2, dh, dx, sum_of(NORM2, l));

    add_outer(k.a, N * H, dx, D, sum_of(OUT, l));
    product<TP, false>(w.back(s, OUT, l), N * H, D, N * H, dx, da);
    for (int head_ = 0; head_ < s.K; head_++) {
      const long at = (long)head_ * (G + 2) * H * TP;
      const float *q = k.qkv + at, *key = q + (long)G * H * TP, *value = key + (long)H * TP;
      float *dq = dqkv + at, *dk = dq + (long)G * H * TP, *dv = dk + (long)H * TP;
      std::memset(dk, 0, sizeof(float) * 2 * H * TP);
      for (int g = 0; g < G; g++) {
        const long n = head_ * G + g;
        attend_back<TP>(q + (long)g * H * TP, key, value, k.a + n * H * TP, da + n * H * TP,
                        k.p + n * TP * TP, H, tokens, squares, dq + (long)g * H * TP, dk, dv);
        rotate<TP, -1>(dq + (long)g * H * TP, H, cos, sin);
      }
      rotate<TP, -1>(dk, H, cos, sin);
    }
    add_outer(k.h1, D, dqkv, Q, sum_of(QKV, l));
    product<TP, false>(w.back(s, QKV, l), D, Q, D, dqkv, dh);
    norm_back<TP>(k.x, w.layer(s, NORM1, l), D, k.inverse1, dh, dx, sum_of(NORM1, l));
  }
  const long ld = up(D);
  for (int t = 0; t < T; t++)
    for (int d = 0; d < D && known(token(t), V); d++)
      sums[layout.at[EMBED] + token(t) * ld + d] += dx[d * TP + t];
  return loss;
}

// Floats of workspace that run_row takes, with room for the rounding of each.
template <int TP> long needed(const Shape& s) {
  const long N = s.N(), Q = s.qkv(), wide = std::max({s.D, Q, s.F, N * s.H});
  const long layer = 4 * up(s.D) + 2 * up(1) + up(Q) + up(N * TP) + up(N * s.H) + 3 * up(s.F);
  const long rest = 3 * up(s.D) + up(1) + up(s.V) + 2 * up(s.H / 2) + up(wide) + 2 * up(s.F) +
                    up(Q) + up(N * s.H) + 3 * TP + up(wide);
  return (layer * s.layers + rest) * TP + 16 * (12 * s.layers + 24);
}

// ---------------------------------------------------------------- all replicas

using Array = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

template <int TP>
static double run_part(const Shape& s, const Layout& layout, const float* const* parameters,
                       const Row& rows, int64_t first, int64_t last, float share, float* sums) {
  long turned_size = 0;
  for (int i = 0; i < NAMES; i++) {
    const Size z = size(s, (Name)i);
    turned_size += up(z.rows * z.columns * (z.stacked ? s.layers : 1));
  }
  const long angles = s.T * (s.H / 2);
  workspace.reserve(turned_size + 2 * angles + 16 * (NAMES + 2) + needed<TP>(s));
  Weights w;
  float *cos = workspace.take(angles), *sin = workspace.take(angles);
  for (int i = 0; i < s.H / 2; i++)
    for (int t = 0; t < s.T; t++) {
      cos[t * (s.H / 2) + i] = std::cos(t * frequency(s, i));
      sin[t * (s.H / 2) + i] = std::sin(t * frequency(s, i));
    }
  w.cos = cos, w.sin = sin;
  for (int i = 0; i < NAMES; i++) {
    const Size z = size(s, (Name)i);
    w.at[i] = parameters[i];
    if (is_norm((Name)i)) continue;
    const int64_t layers = z.stacked ? s.layers : 1;
    float* out = workspace.take(z.rows * z.columns * layers);
    w.turned[i] = out;
    for (int64_t l = 0; l < layers; l++, out += z.rows * z.columns)
      for (long r = 0; r < z.rows; r++)
        for (long c = 0; c < z.columns; c++)
          out[c * z.rows + r] = parameters[i][(l * z.rows + r) * z.columns + c];
  }
  std::memset(sums, 0, layout.total * sizeof(float));
  double loss = 0;
  const size_t used = workspace.used;
  for (int64_t b = first; b < last; b++) {
    workspace.used = used;
    const int64_t at = b * s.T;
    loss += run_row<TP>(s, w, layout, {rows.tokens + at, rows.targets + at, rows.segments + at,
                                       rows.positions + at, rows.weights + at}, share, sums);
  }
  return loss;
}

ffi::Future LossAndGradient(ffi::ThreadPool pool, int64_t B, int64_t T, int64_t V, int64_t D,
                            int64_t layers, int64_t K, int64_t G, int64_t H, int64_t F_, bool gated,
                            bool tied, float rope_base, float epsilon, float logit_scale,
                            ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Shape s{B, T, V, D, layers, K, G, H, F_, gated, tied, rope_base, epsilon, logit_scale};
  // Operands: the parameters in the order of Name, tokens, targets, segments, positions, weights,
  // and the weight of one nat in the loss. Results: the loss and the gradients.
  const float* parameters[NAMES];
  float* gradients[NAMES];
  for (int i = 0; i < NAMES; i++) {
    parameters[i] = (const float*)args.get<Array>(i)->untyped_data();
    gradients[i] = (float*)(*rets.get<Array>(i + 1))->untyped_data();
  }
  auto ints = [&](int i) { return (const int*)args.get<Array>(NAMES + i)->untyped_data(); };
  const Row rows{ints(0), ints(1), ints(2), ints(3),
                 (const float*)args.get<Array>(NAMES + 4)->untyped_data()};
  const float* share = (const float*)args.get<Array>(NAMES + 5)->untyped_data();
  float* losses = (float*)(*rets.get<Array>(0))->untyped_data();
  const int64_t R = args.get<Array>(NAMES)->element_count() / (B * T);

  // The order of sums depends on the parts, so they depend on nothing but the batch: a replica has
  // the same bits among other replicas and on any number of threads.
  const int64_t parts = std::clamp<int64_t>(B / 4, 1, 4);
  const Layout layout(s);
  struct Sums {
    std::unique_ptr<float[]> memory;
    std::unique_ptr<double[]> losses;
    std::unique_ptr<std::atomic<int64_t>[]> done;
  };
  auto sums = std::make_shared<Sums>();
  sums->memory.reset(new (std::nothrow) float[R * parts * layout.total]);
  if (!sums->memory) return failed(no_memory());
  sums->losses.reset(new double[R * parts]);
  sums->done.reset(new std::atomic<int64_t>[R]());
  return run(pool, R * parts, 1e9, [=](int64_t task) {
    const int64_t r = task / parts, part = task % parts;
    const float* mine[NAMES];
    for (int i = 0; i < NAMES; i++) {
      const Size z = size(s, (Name)i);
      mine[i] = parameters[i] + r * z.rows * z.columns * (z.stacked ? layers : 1);
    }
    const int64_t at = r * B * T;
    const Row own{rows.tokens + at, rows.targets + at, rows.segments + at, rows.positions + at,
                  rows.weights + at};
    float* total = sums->memory.get() + r * parts * layout.total;
    auto part_of = T <= 32 ? run_part<32> : T <= 64 ? run_part<64> : run_part<128>;
    sums->losses[task] = part_of(s, layout, mine, own, B * part / parts, B * (part + 1) / parts,
                                 share[r], total + part * layout.total);
    if (sums->done[r].fetch_add(1) + 1 < parts) return;
    double loss = 0;
    for (int64_t i = 0; i < parts; i++) loss += sums->losses[r * parts + i];
    losses[r] = (float)(loss * share[r]);
    for (int64_t i = 1; i < parts; i++)
      for (long j = 0; j < layout.total; j++) total[j] += total[i * layout.total + j];
    for (int i = 0; i < NAMES; i++) {
      const Size z = size(s, (Name)i);
      const int64_t count = z.stacked ? layers : 1;
      float* out = gradients[i] + r * z.rows * z.columns * count;
      for (int64_t l = 0; l < count; l++) {
        const float* from = total + layout.at[i] + l * layout.layer[i];
        if (is_norm((Name)i))
          for (long c = 0; c < z.columns; c++, out++) {
            *out = 0;
            for (int lane = 0; lane < L; lane++) *out += from[c * L + lane];
          }
        else
          for (long row = 0; row < z.rows; row++, out += z.columns)
            std::copy_n(from + row * up(z.columns), z.columns, out);
      }
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FusedLossAndGradient, LossAndGradient,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("B").Attr<int64_t>("T").Attr<int64_t>("V")
        .Attr<int64_t>("D").Attr<int64_t>("layers").Attr<int64_t>("K").Attr<int64_t>("G")
        .Attr<int64_t>("H").Attr<int64_t>("F").Attr<bool>("gated").Attr<bool>("tied")
        .Attr<float>("rope_base").Attr<float>("epsilon").Attr<float>("logit_scale").RemainingArgs()
        .RemainingRets());
