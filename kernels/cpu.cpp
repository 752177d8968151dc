// Block-sparse attention on CPUs: float and double, forward and backward. Compiled and called by cpu.py.
//
// Everything is one product of a tile of keys with a panel of queries, queries lying across the lanes of the
// vector registers. Scores are kept as [key][query] and outputs as [dim][query]: the softmax then needs no
// reduction across lanes, and K and V are read where they are, one broadcast element at a time, so nothing is
// packed but the query block, once for all the keys it reads.
//
// Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK), D head dim; W queries of a panel.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDEST = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, WIDEST = 2;
#else
constexpr int BYTES = 16, WIDEST = 2;
#endif
// Keys of a tile. More would push V's rows, which often share cache sets, out of the first-level cache.
constexpr long TILE = 64;
// A shorter run of consecutive keys is copied together with its neighbours to fill a tile.
constexpr long SHORT = 32;
// Query blocks too small for a vector: how many queries one key block is given at once, and out of how many.
constexpr size_t GATHERED = 128;
constexpr long ROUTED = 4096;

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(BYTES)));
  typedef int32_t Int __attribute__((vector_size(BYTES)));
  static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int MANTISSA = 23, TERMS = 7;
  static constexpr float LOWEST = -126;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(BYTES)));
  typedef int64_t Int __attribute__((vector_size(BYTES)));
  static constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int MANTISSA = 52, TERMS = 14;
  static constexpr double LOWEST = -1022;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int LANES = BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, BYTES);
  return x;
}
template <class T>
inline void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, BYTES);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// 2^x for x <= 0: Taylor's series of exp on |f| <= ln(2)/2 is exact to rounding with TERMS terms. NaN stays.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using S = Simd<T>;
  x = x < S::LOWEST ? splat<T>(S::LOWEST) : x;
  Vec<T> shifted = x + S::MAGIC;
  Vec<T> f = (x - (shifted - S::MAGIC)) * T(0.693147180559945309417);
  T factor = 1;
  for (int i = 2; i < S::TERMS; i++) factor /= i;
  Vec<T> y = splat<T>(factor);
#pragma GCC unroll 16
  for (int i = S::TERMS - 1; i > 0; i--) {
    factor *= i;
    y = y * f + factor;
  }
  typename S::Int bits, power;
  std::memcpy(&bits, &y, BYTES);
  std::memcpy(&power, &shifted, BYTES);
  bits += power << S::MANTISSA;
  std::memcpy(&y, &bits, BYTES);
  return y;
}

// C[r][lanes] (+)= sum over i of A[r, i] B[i][lanes], R rows by V vectors held in registers.
template <class T, int R, int V>
__attribute__((noinline)) void product_tile(long depth, const T* a, long a_row, long a_step, const T* b,
                                            long b_step, T* c, long c_row, bool add) {
  constexpr int L = LANES<T>;
  Vec<T> sum[R][V];
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = add ? load(c + r * c_row + v * L) : Vec<T>{};
  for (long i = 0; i < depth; i++) {
    Vec<T> line[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) line[v] = load(b + i * b_step + v * L);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      Vec<T> x = splat(a[r * a_row + i * a_step]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] += x * line[v];
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c + r * c_row + v * L, sum[r][v]);
}

// Rows held at once: as many accumulators as leave registers for a line of B and a broadcast element.
template <int V>
constexpr int ROWS = BYTES == 64 ? (V == 1 ? 12 : 24 / V) : (V == 1 ? 8 : 6);

template <class T, int R, int V, class... Rest>
inline void product_rows(int rows, Rest... rest) {
  if constexpr (R > 1)
    if (rows < R) return product_rows<T, R - 1, V>(rows, rest...);
  product_tile<T, R, V>(rest...);
}

// C[rows][V vectors] (+)= A B. Rows are dealt out evenly, so that no call is left with a few of them.
template <class T, int V>
void product_panel(long rows, long depth, const T* a, long a_row, long a_step, const T* b, long b_step, T* c,
                   long c_row, bool add) {
  const long groups = (rows + ROWS<V> - 1) / ROWS<V>;
  for (long g = 0; g < groups; g++) {
    const long first = rows * g / groups, last = rows * (g + 1) / groups;
    product_rows<T, ROWS<V>, V>(last - first, depth, a + first * a_row, a_row, a_step, b, b_step,
                                c + first * c_row, c_row, add);
  }
}

// C[rows][width] (+)= A[rows, depth] B[depth][width]; width is a multiple of the lanes.
template <class T>
void product(long rows, long depth, const T* a, long a_row, long a_step, const T* b, long b_step, T* c,
             long c_row, bool add, long width) {
  constexpr int L = LANES<T>;
  for (long at = 0; at < width;) {
    const long left = (width - at) / L;
    const int V = left >= WIDEST ? WIDEST : left;
    auto run = [&](auto panel) { panel(rows, depth, a, a_row, a_step, b + at, b_step, c + at, c_row, add); };
    if constexpr (WIDEST == 4) {
      if (V == 4) run(product_panel<T, 4>);
      if (V == 3) run(product_panel<T, 3>);
    }
    if (V == 2) run(product_panel<T, 2>);
    if (V == 1) run(product_panel<T, 1>);
    at += V * L;
  }
}

}  // namespace

extern "C" {

struct Tensor4 {  // last axis contiguous; strides in elements
  void* data;
  int64_t batch, head, token;
};

struct Problem {
  Tensor4 q, k, v, out, lse;                           // lse: [B, H, SQ], token stride 1
  Tensor4 grad_out, grad_lse, grad_q, grad_k, grad_v;  // of the backward
  const int32_t *indices, *counts;                     // bits: null where the plan is lists
  const uint8_t *bits, *valid;                         // valid: null where every key exists
  int64_t list_batch, list_head, list_row;             // strides of indices, or of bits in bytes
  int64_t count_batch, count_head;
  int64_t valid_batch, valid_head, valid_heads;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  int64_t block_q, block_k, rows, columns;
  double scale;
  int64_t threads, parts;
};

}  // extern "C"

namespace {

constexpr double LOG2E = 1.44269504088896340736, LN2 = 0.693147180559945309417;

template <class T>
T* at(const Tensor4& x, long b, long h, long s) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + s * x.token;
}

long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

template <class T>
class Buffer {  // aligned, not initialised
 public:
  T* get(long size) {
    if (size > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T), 64))));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  long size_ = 0;
};

// Consecutive keys that exist.
struct Run {
  long first, last;
};

void append(std::vector<Run>& runs, long first, long last) {
  if (first >= last) return;
  if (!runs.empty() && runs.back().last == first) runs.back().last = last;
  else runs.push_back({first, last});
}

// what(j) for each key block j that query block i lists.
template <class What>
void for_each_listed(const Problem& p, long b, long h, long i, What what) {
  if (!p.bits) {
    const int32_t* list = p.indices + b * p.list_batch + h * p.list_head + i * p.list_row;
    const long count = p.counts[b * p.count_batch + h * p.count_head + i];
    for (long n = 0; n < count; n++) what(list[n]);
  } else {
    const uint8_t* bits = p.bits + b * p.list_batch + h * p.list_head + i * p.list_row;
    for (long j = 0; j < p.columns; j++)
      if (bits[j / 8] >> (7 - j % 8) & 1) what(j);
  }
}

long listed(const Problem& p, long b, long h, long i) {
  if (!p.bits) return p.counts[b * p.count_batch + h * p.count_head + i];
  long count = 0;
  for_each_listed(p, b, h, i, [&](long) { count++; });
  return count;
}

// Append the keys of block j that exist.
void append_block(const Problem& p, long b, long h, long j, std::vector<Run>& runs) {
  const long first = j * p.block_k, last = std::min(first + p.block_k, p.keys);
  if (!p.valid) return append(runs, first, last);
  const uint8_t* valid = p.valid + b * p.valid_batch + h * p.valid_heads / p.heads * p.valid_head;
  for (long s = first; s < last;) {
    while (s < last && !valid[s]) s++;
    const long start = s;
    while (s < last && valid[s]) s++;
    append(runs, start, s);
  }
}

// Queries that read the same keys.
struct Group {
  std::vector<long> tokens;
  std::vector<Run> runs;
};

// what(group) for the query blocks first ... last - 1 of a head: one block after the other or, where blocks
// are too small to fill a vector (per-token routing), one key block after the other, the queries that list
// it gathered. Then a query is met once for each block it lists.
template <class What>
void for_each_group(const Problem& p, long b, long h, long first, long last, bool routed, Group& group,
                    What what) {
  auto add_tokens = [&](long i) {
    for (long s = i * p.block_q; s < std::min((i + 1) * p.block_q, p.queries); s++) group.tokens.push_back(s);
  };
  if (!routed) {
    for (long i = first; i < last; i++) {
      group.tokens.clear(), group.runs.clear();
      add_tokens(i);
      for_each_listed(p, b, h, i, [&](long j) { append_block(p, b, h, j, group.runs); });
      what(group);
    }
    return;
  }
  std::vector<std::vector<long>> readers(p.columns);
  for (long i = first; i < last; i++) for_each_listed(p, b, h, i, [&](long j) { readers[j].push_back(i); });
  for (long j = 0; j < p.columns; j++) {
    group.runs.clear();
    append_block(p, b, h, j, group.runs);
    if (group.runs.empty()) continue;
    group.tokens.clear();
    for (long i : readers[j]) {
      add_tokens(i);
      if (group.tokens.size() < GATHERED && i != readers[j].back()) continue;
      what(group);
      group.tokens.clear();
    }
  }
}

// Keys and values of one tile: where they are, or copied together where runs are short.
template <class T>
struct Keys {
  const T *k, *v;
  long k_row, v_row, count;
  std::vector<long> from;  // token of each, when copied
};

// what(keys, first) for each tile of the runs; `first` is the token of its first key, unless keys are copied.
template <class T, class What>
void for_each_tile(const Problem& p, const T* k, const T* v, const std::vector<Run>& runs, T* copy,
                   What what) {
  Keys<T> keys;
  const long D = p.dim;
  for (size_t r = 0; r < runs.size();) {
    long s = runs[r].first;
    // A long run is cut evenly, so that no tile is short.
    const long length = runs[r].last - s, parts = (length + TILE - 1) / TILE;
    if (length >= SHORT || runs.size() == 1) {
      keys.from.clear();
      for (long part = 0; part < parts; part++) {
        const long first = s + length * part / parts, last = s + length * (part + 1) / parts;
        keys.k = k + first * p.k.token, keys.v = v + first * p.v.token;
        keys.k_row = p.k.token, keys.v_row = p.v.token, keys.count = last - first;
        what(keys, first);
      }
      r++;
      continue;
    }
    keys.from.clear();
    for (; r < runs.size() && runs[r].last - runs[r].first < SHORT; r++) {
      if (keys.from.size() + runs[r].last - runs[r].first > TILE) break;
      for (s = runs[r].first; s < runs[r].last; s++) {
        const long n = keys.from.size();
        std::memcpy(copy + n * D, k + s * p.k.token, D * sizeof(T));
        std::memcpy(copy + (TILE + n) * D, v + s * p.v.token, D * sizeof(T));
        keys.from.push_back(s);
      }
    }
    keys.k = copy, keys.v = copy + TILE * D, keys.k_row = keys.v_row = D, keys.count = keys.from.size();
    what(keys, 0);
  }
}

// to[dim][W] = the rows of some tokens, as columns; columns beyond `count` are zeros.
template <class T>
void transpose_in(const T* from, long row, const long* tokens, long count, long D, T* to, long W) {
  for (long d = 0; d < D; d++)
    for (long w = 0; w < W; w++) to[d * W + w] = w < count ? from[tokens[w] * row + d] : T(0);
}

// Fold one tile's scores [count][W] into the running peak and sum (base two): scores become weights, `out`
// [D][W] is rescaled where a peak has risen.
template <class T>
void online_softmax(T* scores, long count, long W, T scale, T* peak, T* sum, T* out, long D) {
  constexpr int L = LANES<T>;
  for (long w = 0; w < W; w += L) {
    Vec<T> top = load(scores + w);
    for (long j = 1; j < count; j++) top = larger<T>(top, load(scores + j * W + w));
    const Vec<T> old = load(peak + w), high = larger<T>(old, top * scale);
    const Vec<T> decay = exp2<T>(old - high);
    Vec<T> total = load(sum + w) * decay;
    for (long j = 0; j < count; j++) {
      const Vec<T> weight = exp2<T>(load(scores + j * W + w) * scale - high);
      store(scores + j * W + w, weight);
      total += weight;
    }
    store(peak + w, high);
    store(sum + w, total);
    bool risen = false;
    for (int n = 0; n < L; n++) risen |= old[n] != high[n];
    if (risen)
      for (long d = 0; d < D; d++) store(out + d * W + w, load(out + d * W + w) * decay);
  }
}

// Attention of a group. `meets`: its queries meet other keys in other groups, so what is there is combined
// with what is found here.
template <class T>
void forward_group(const Problem& p, long b, long h, const Group& group, bool meets, Buffer<T>& memory) {
  constexpr long WIDE = WIDEST * LANES<T>;
  const long D = p.dim, kv = h * p.kv_heads / p.heads, count = group.tokens.size();
  const long panels = (count + WIDE - 1) / WIDE, per_panel = (2 * D + 2) * WIDE;
  T* space = memory.get(panels * per_panel + TILE * WIDE + 2 * TILE * D);
  T *scores = space + panels * per_panel, *copy = scores + TILE * WIDE;
  auto width = [&](long n) { return round_up(std::min(WIDE, count - n * WIDE), LANES<T>); };
  for (long n = 0; n < panels; n++) {
    const long W = width(n);
    T *query = space + n * per_panel, *out = query + D * W, *peak = out + D * W, *sum = peak + W;
    transpose_in(at<T>(p.q, b, h, 0), p.q.token, &group.tokens[n * WIDE], count - n * WIDE, D, query, W);
    std::fill(out, out + D * W, T(0));
    std::fill(peak, peak + W, -INFINITY);
    std::fill(sum, sum + W, T(0));
  }
  for_each_tile<T>(
      p, at<T>(p.k, b, kv, 0), at<T>(p.v, b, kv, 0), group.runs, copy, [&](const Keys<T>& keys, long) {
        for (long n = 0; n < panels; n++) {
          const long W = width(n);
          T *query = space + n * per_panel, *out = query + D * W, *peak = out + D * W, *sum = peak + W;
          product<T>(keys.count, D, keys.k, keys.k_row, 1, query, W, scores, W, false, W);
          online_softmax<T>(scores, keys.count, W, p.scale * LOG2E, peak, sum, out, D);
          product<T>(D, keys.count, keys.v, 1, keys.v_row, scores, W, out, W, true, W);
        }
      });
  for (long w = 0; w < count; w++) {
    const long n = w / WIDE, W = width(n), lane = w % WIDE;
    const T *out = space + n * per_panel + D * W + lane, *peak = out - lane + D * W, *sum = peak + W;
    T *to = at<T>(p.out, b, h, group.tokens[w]), *lse = at<T>(p.lse, b, h, group.tokens[w]);
    const bool some = sum[lane] != 0;
    const T found = some ? T((peak[lane] + std::log2(sum[lane])) * LN2) : T(-INFINITY);
    T share = some ? 1 / sum[lane] : T(0);
    if (!meets || *lse == T(-INFINITY)) {
      for (long d = 0; d < D; d++) to[d] = out[d * W] * share;
      *lse = found;
    } else {
      const T high = std::max(*lse, found);
      const T all = high + std::log(std::exp(*lse - high) + std::exp(found - high));
      const T keep = std::exp(*lse - all);
      share *= std::exp(found - all);
      for (long d = 0; d < D; d++) to[d] = to[d] * keep + out[d * W] * share;
      *lse = all;
    }
  }
}

template <class T>
bool is_routed(const Problem& p) {
  return p.block_q < LANES<T> / 2;
}

template <class T>
void forward(const Problem& p) {
  const bool routed = is_routed<T>(p);
  const long step = routed ? std::max(1L, ROUTED / long(p.block_q)) : 1, chunks = (p.rows + step - 1) / step;
#pragma omp parallel num_threads(p.threads)
  {
    Buffer<T> memory;
    Group group;
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < p.batch * p.heads * chunks; task++) {
      const long h = task / chunks % p.heads, b = task / chunks / p.heads;
      const long first = task % chunks * step, last = std::min(first + step, long(p.rows));
      if (routed)
        for (long s = first * p.block_q; s < std::min(last * p.block_q, p.queries); s++) {
          std::fill_n(at<T>(p.out, b, h, s), p.dim, T(0));
          *at<T>(p.lse, b, h, s) = -INFINITY;
        }
      for_each_group(p, b, h, first, last, routed, group,
                     [&](const Group& g) { forward_group<T>(p, b, h, g, routed, memory); });
    }
  }
}

// Add a group's gradients: of its queries to grad_q, of the keys and values it reads to grad_k and grad_v
// [SK][padded], padded being D and what completes a vector of the widest machine.
template <class T>
void backward_group(const Problem& p, long b, long h, const Group& group, T* grad_k, T* grad_v,
                    Buffer<T>& memory) {
  constexpr long WIDE = WIDEST * LANES<T>, CHUNK = 12;
  const long D = p.dim, padded = p.grad_k.token, kv = h * p.kv_heads / p.heads;
  const long count = group.tokens.size(), panels = (count + WIDE - 1) / WIDE;
  const long* tokens = group.tokens.data();
  const long per_panel = (3 * D + 2) * WIDE;
  T* space = memory.get(panels * per_panel + 2 * count * padded + 2 * TILE * (WIDE + D + padded));
  T *queries = space + panels * per_panel, *outer = queries + count * padded;
  T *weights = outer + count * padded, *slopes = weights + TILE * WIDE, *copy = slopes + TILE * WIDE;
  T* shares = copy + 2 * TILE * D;
  // dS = P * (dP - delta): the gradient of lse is P itself, so it enters with the opposite sign.
  auto delta = [&](long w) {
    const T *a = outer + w * padded, *c = at<T>(p.out, b, h, tokens[w]);
    T sum = -*at<T>(p.grad_lse, b, h, tokens[w]);
    for (long d = 0; d < D; d++) sum += a[d] * c[d];
    return sum;
  };
  auto width = [&](long n) { return round_up(std::min(WIDE, count - n * WIDE), LANES<T>); };

  for (long w = 0; w < count; w++) {
    std::fill(queries + w * padded + D, queries + (w + 1) * padded, T(0));
    std::fill(outer + w * padded + D, outer + (w + 1) * padded, T(0));
    std::memcpy(queries + w * padded, at<T>(p.q, b, h, tokens[w]), D * sizeof(T));
    std::memcpy(outer + w * padded, at<T>(p.grad_out, b, h, tokens[w]), D * sizeof(T));
  }
  for (long n = 0; n < panels; n++) {
    const long W = width(n), start = n * WIDE, left = count - start;
    T *query = space + n * per_panel, *slope = query + D * W, *grad_q = slope + D * W, *lse = grad_q + D * W;
    transpose_in(at<T>(p.q, b, h, 0), p.q.token, tokens + start, left, D, query, W);
    transpose_in(at<T>(p.grad_out, b, h, 0), p.grad_out.token, tokens + start, left, D, slope, W);
    std::fill(grad_q, grad_q + D * W, T(0));
    for (long w = 0; w < W; w++) {  // a padding lane has zero gradient, so any finite value does
      lse[w] = w < left ? T(*at<T>(p.lse, b, h, tokens[start + w]) * LOG2E) : T(0);
      lse[W + w] = w < left ? delta(start + w) : T(0);
    }
  }
  for_each_tile<T>(
      p, at<T>(p.k, b, kv, 0), at<T>(p.v, b, kv, 0), group.runs, copy, [&](const Keys<T>& keys, long s) {
        const bool copied = !keys.from.empty();
        T* to_k = copied ? shares : grad_k + s * padded;
        T* to_v = copied ? shares + TILE * padded : grad_v + s * padded;
        if (copied) std::fill(shares, shares + 2 * TILE * padded, T(0));
        for (long n = 0; n < panels; n++) {
          const long W = width(n), start = n * WIDE, here = std::min(WIDE, count - start);
          T *query = space + n * per_panel, *slope = query + D * W, *grad_q = slope + D * W;
          T* lse = grad_q + D * W;
          for (long j = 0; j < keys.count; j += CHUNK) {
            const long rows = std::min(CHUNK, keys.count - j);
            if (n == 0)  // needed last, and often far from the cache: fetched a little at a time
              for (long line = j * padded; line < (j + rows) * padded; line += 64 / sizeof(T)) {
                __builtin_prefetch(to_k + line, 1);
                __builtin_prefetch(to_v + line, 1);
              }
            product<T>(rows, D, keys.k + j * keys.k_row, keys.k_row, 1, query, W, weights + j * W, W, false,
                       W);
          }
          product<T>(keys.count, D, keys.v, keys.v_row, 1, slope, W, slopes, W, false, W);
          for (long w = 0; w < W; w += LANES<T>) {
            const Vec<T> base = load(lse + w), shift = load(lse + W + w);
            for (long j = 0; j < keys.count; j++) {
              const Vec<T> weight = exp2<T>(load(weights + j * W + w) * T(p.scale * LOG2E) - base);
              store(weights + j * W + w, weight);
              store(slopes + j * W + w, weight * (load(slopes + j * W + w) - shift) * T(p.scale));
            }
          }
          product<T>(D, keys.count, keys.k, 1, keys.k_row, slopes, W, grad_q, W, true, W);
          product<T>(keys.count, here, weights, W, 1, outer + start * padded, padded, to_v, padded, true,
                     padded);
          product<T>(keys.count, here, slopes, W, 1, queries + start * padded, padded, to_k, padded, true,
                     padded);
        }
        for (size_t j = 0; j < keys.from.size(); j++)
          for (long d = 0; d < padded; d++) {
            grad_k[keys.from[j] * padded + d] += shares[j * padded + d];
            grad_v[keys.from[j] * padded + d] += shares[(TILE + j) * padded + d];
          }
      });
  for (long n = 0; n < panels; n++) {
    const long W = width(n), start = n * WIDE;
    const T* grad_q = space + n * per_panel + 2 * D * W;
    for (long w = 0; w < std::min(WIDE, count - start); w++) {
      T* to = at<T>(p.grad_q, b, h, tokens[start + w]);
      for (long d = 0; d < D; d++) to[d] += grad_q[d * W + w];
    }
  }
}

// grad_q is zeros. grad_k and grad_v are zeros [parts, B, KV, SK, padded D], to be summed over parts: the
// query blocks that read one KV head are dealt out in `parts` runs of equal work, each with a sum of its own,
// so the result depends neither on timing nor on who ran what.
template <class T>
void backward(const Problem& p) {
  const long heads = p.heads / p.kv_heads, units = p.batch * p.kv_heads;
#pragma omp parallel num_threads(p.threads)
  {
    Buffer<T> memory;
    Group group;
#pragma omp for schedule(dynamic, 1)
    for (long unit = 0; unit < units * p.parts; unit++) {
      const long part = unit % p.parts, kv = unit / p.parts % p.kv_heads, b = unit / p.parts / p.kv_heads;
      long total = 0, seen = 0;
      for (long h = kv * heads; h < (kv + 1) * heads; h++)
        for (long i = 0; i < p.rows; i++) total += listed(p, b, h, i);
      const long from = total * part / p.parts, until = total * (part + 1) / p.parts;
      const long slab = (part * p.batch + b) * p.kv_heads + kv;
      T* grad_k = static_cast<T*>(p.grad_k.data) + slab * p.grad_k.head;
      T* grad_v = static_cast<T*>(p.grad_v.data) + slab * p.grad_v.head;
      for (long h = kv * heads; h < (kv + 1) * heads; h++) {
        long first = 0, last = 0;
        for (long i = 0; i < p.rows; i++) {
          if (seen < from) first = i + 1;
          if (seen < until) last = i + 1;
          seen += listed(p, b, h, i);
        }
        for_each_group(p, b, h, first, last, is_routed<T>(p), group,
                       [&](const Group& g) { backward_group<T>(p, b, h, g, grad_k, grad_v, memory); });
      }
    }
  }
}

}  // namespace

extern "C" void forward_float(const Problem* p) { forward<float>(*p); }
extern "C" void forward_double(const Problem* p) { forward<double>(*p); }
extern "C" void backward_float(const Problem* p) { backward<float>(*p); }
extern "C" void backward_double(const Problem* p) { backward<double>(*p); }
