// Exact causal attention inside packed documents for the CPU, forward and backward, after FlashAttention-2 (Dao 2023).
//
// A task is a chunk of queries of one document and one key/value head. It packs the keys and values that it sees once,
// then goes through them by tiles; the query heads of a group are folded into the rows of one product. The cut into
// tasks does not depend on the number of threads, and sums across tasks have a fixed order, so neither do the bits.
//
// The products are ATen's brgemm, C[M][N] (+)= A[M][K] B[K][N] into float, which picks AMX, AVX-512 or AVX2. For
// bfloat16 the rows of B are interleaved in pairs, [K/2][N][2]. It compiles one kernel for each shape and strides on
// each thread: so strides are constants of the head dimension and the group, and sizes multiples of a few dozen.
//
// The forward keeps scores as [queries][keys]. The backward keeps them transposed, [keys][queries]: so the
// probabilities and their gradients are the left operands of dV = P^T dO and dK = dS^T Q as they are, and dS^T with its
// rows interleaved is the right one of dQ^T = K^T dS^T. Only operands of tokens x head_dim are ever transposed.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;

// ------------------------------------------------------------------------------------------------------------ vectors

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

constexpr int SIDE = 8; // of the blocks that are transposed in registers
typedef float F8 __attribute__((vector_size(4 * SIDE)));
typedef uint32_t U8 __attribute__((vector_size(4 * SIDE)));
typedef uint16_t H8 __attribute__((vector_size(2 * SIDE)));

template <typename V>
inline V get(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void put(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline F splat(float x) { return F{} + x; }
inline I lanes() {
  I v{};
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// The intrinsics here are what the compiler spells badly from the generic form. `larger` gives b where one is NaN.
#if defined(__AVX512F__)
inline U widen(H v) { return (U)_mm512_cvtepu16_epi32((__m256i)v); }
inline F larger(F a, F b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline U widen(H v) { return (U)_mm256_cvtepu16_epi32((__m128i)v); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); }
#else
inline U widen(H v) { return __builtin_convertvector(v, U); }
inline F larger(F a, F b) { return a > b ? a : b; }
#endif
inline F sum(F a, F b) { return a + b; }

// Bits of floats -> of bfloat16, to nearest even. NaN stays NaN: those that arithmetic makes have no low bits to carry.
template <typename V>
inline V rounded(V bits) {
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline F load(const float* p) { return get<F>(p); }
inline F load(const BFloat16* p) { return (F)(widen(get<H>(p)) << 16); }
inline void store(float* p, F v) { put(p, v); }
inline void store(BFloat16* p, F v) {
#ifdef __AVX512BF16__
  put(p, _mm512_cvtneps_pbh(v));
#else
  put(p, __builtin_convertvector(rounded((U)v), H));
#endif
}
inline void store8(float* p, F8 v) { put(p, v); }
inline void store8(BFloat16* p, F8 v) { put(p, __builtin_convertvector(rounded((U8)v), H8)); }

// Two rows, and for bfloat16 once more as interleaved pairs.
inline void store_pair(float* a, float* b, float*, F x, F y) {
  put(a, x);
  put(b, y);
}
inline void store_pair(BFloat16* a, BFloat16* b, BFloat16* pairs, F x, F y) {
#ifdef __AVX512BF16__
  typedef uint16_t H32 __attribute__((vector_size(64)));
  constexpr H32 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  auto both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
  put(a, _mm512_castsi512_si256(both));
  put(b, _mm512_extracti64x4_epi64(both, 1));
  put(pairs, _mm512_permutexvar_epi16((__m512i)order, both));
#else
  store(a, x);
  store(b, y);
  put(pairs, widen(get<H>(a)) | widen(get<H>(b)) << 16);
#endif
}

template <int STEP, std::size_t... L>
inline F swapped(F v, std::index_sequence<L...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (int(L) ^ STEP)...);
#else
  return __builtin_shuffle(v, I{(int(L) ^ STEP)...});
#endif
}
template <typename Op>
inline float reduce(F v, Op op) {
  auto all = std::make_index_sequence<W>();
  if (W == 16) v = op(v, swapped<8 % W>(v, all));
  v = op(v, swapped<4>(v, all));
  v = op(v, swapped<2>(v, all));
  v = op(v, swapped<1>(v, all));
  return v[0];
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x < 128, relative error 2e-7; 0 from -127 down; NaN for NaN.
inline F exp2(F x) {
  x = larger(splat(-127.0f), x);
  constexpr float magic = 12582912.0f + 127.0f; // so near 1.5 * 2^23, the low bits of t are those of round(x) + 127
  F t = x + magic;
  F f = x - (t - magic);
  F p = f * 1.326472725e-3f + 9.671512786e-3f; // minimax on [-1/2, 1/2]
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return p * (F)((U)t << 23);
}

// ------------------------------------------------------------------------------------------------------------ packing

template <typename C>
constexpr int PAIR = 4 / sizeof(C); // as many rows does a right operand of C interleave

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// C[m][n] (+)= A[m][k] B[k][n]
template <typename C>
inline void product(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIR<C> == 2);
}

template <std::size_t... L>
inline void transpose_block(U8* r, std::index_sequence<L...>) {
  for (int round = 0; round < 3; round++) { // log2(SIDE) perfect shuffles
    U8 next[SIDE];
    for (int i = 0; i < SIDE / 2; i++) {
      U8 a = r[i], b = r[i + SIDE / 2];
#ifdef __clang__
      next[2 * i] = __builtin_shufflevector(a, b, (L / 2 + L % 2 * SIDE)...);
      next[2 * i + 1] = __builtin_shufflevector(a, b, (L / 2 + SIDE / 2 + L % 2 * SIDE)...);
#else
      next[2 * i] = __builtin_shuffle(a, b, U8{(L / 2 + L % 2 * SIDE)...});
      next[2 * i + 1] = __builtin_shuffle(a, b, U8{(L / 2 + SIDE / 2 + L % 2 * SIDE)...});
#endif
    }
    for (int i = 0; i < SIDE; i++) r[i] = next[i];
  }
}

// Calls use(row, column, r) for each block of words[n][width], r[j] being the 8 words from `row` on of column + j.
template <typename Use>
inline void each_transposed(const void* words, int64_t n, int64_t width, int64_t stride, Use use) {
  for (int64_t i = 0; i < n; i += SIDE)
    for (int64_t j = 0; j < width; j += SIDE) {
      U8 r[SIDE];
      for (int l = 0; l < SIDE; l++) r[l] = get<U8>((const uint32_t*)words + (i + l) * stride + j);
      transpose_block(r, std::make_index_sequence<SIDE>());
      use(i, j, r);
    }
}

// rows[n][dim] -> the right operand that has them as columns: [dim / PAIR][ld][PAIR].
template <typename C>
void pack_columns(const C* rows, int64_t n, int64_t dim, C* out, int64_t ld) {
  each_transposed(rows, n, dim / PAIR<C>, dim / PAIR<C>, [=](int64_t i, int64_t j, const U8* r) {
    for (int l = 0; l < SIDE; l++) put((uint32_t*)out + (j + l) * ld + i, r[l]);
  });
}

// rows[n][dim] -> the right operand that has them as rows: [n / 2][dim][2], or for float just the rows.
inline const float* pack_rows(const float* rows, int64_t, int64_t, float*) { return rows; }
inline const BFloat16* pack_rows(const BFloat16* rows, int64_t n, int64_t dim, BFloat16* out) {
  for (int64_t i = 0; i < n; i += 2) {
    const BFloat16 *a = rows + i * dim, *b = a + dim;
    auto* pairs = (uint32_t*)(out + i * dim);
#pragma omp simd
    for (int64_t d = 0; d < dim; d++) pairs[d] = uint32_t(a[d].x) | uint32_t(b[d].x) << 16;
  }
  return out;
}

// rows[n][dim] -> the left operand that has them as columns: [dim][ld].
inline void transpose(const float* rows, int64_t n, int64_t dim, float* out, int64_t ld) {
  pack_columns(rows, n, dim, out, ld);
}
inline void transpose(const BFloat16* rows, int64_t n, int64_t dim, BFloat16* out, int64_t ld) {
  each_transposed(rows, n, dim / 2, dim / 2, [=](int64_t i, int64_t j, const U8* r) {
    for (int l = 0; l < SIDE; l++) {
      put(out + 2 * (j + l) * ld + i, __builtin_convertvector(r[l] & 0xffff, H8));
      put(out + (2 * (j + l) + 1) * ld + i, __builtin_convertvector(r[l] >> 16, H8));
    }
  });
}

// -------------------------------------------------------------------------------------------------------------- tasks

struct Shape {
  int64_t rows, heads, length, group, dim; // heads: of keys and values
};

// A tensor (rows, heads, length[, group], dim) with strides in elements; that of the last dimension is 1.
template <typename T>
struct View {
  T* data;
  int64_t row, head, token, member;
};

struct Task {
  int64_t row, head, first; // the document begins at this token of the row
  int64_t begin, end;       // these queries of the document, over its keys before `end`
  float* sums;              // dK and dV of those keys where a document has several chunks, else null

  template <typename T>
  T* at(const View<T>& x, int64_t token, int64_t member = 0) const {
    return x.data + row * x.row + head * x.head + (first + token) * x.token + member * x.member;
  }
};

// Tokens begin..end and in each its group -> rows[padded][dim] in C; zeros behind.
template <typename T, typename C>
void gather(const View<T>& x, const Task& task, int64_t begin, int64_t end, int64_t group, int64_t dim, int64_t padded,
            C* rows) {
  int64_t run = x.member == dim ? group * dim : dim;
  C* o = rows;
  for (int64_t t = begin; t < end; t++)
    for (int64_t m = 0; m * run < group * dim; m++, o += run) {
      const T* in = task.at(x, t, m);
      if constexpr (sizeof(C) == sizeof(T))
        std::memcpy((void*)o, in, run * sizeof(C));
      else
        for (int64_t d = 0; d < run; d += W) store(o + d, load(in + d));
    }
  std::memset((void*)o, 0, (rows + padded * dim - o) * sizeof(C));
}

struct Scratch {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    auto* p = (T*)next;
    next += round_up(count * sizeof(T), 64);
    return p;
  }
};

// Memory that each thread keeps for its next call: touching fresh pages would cost as much as the work on them.
template <int USE>
Scratch scratch(std::size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local std::size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset((char*)std::aligned_alloc(64, round_up(bytes, 1 << 16)));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return {memory.get()};
}

constexpr int64_t KEYS = 32;       // keys and tiles are multiples of so many tokens
constexpr int64_t SLACK = 1 << 12; // bytes for the alignment of a task's buffers

// Queries go by tiles of `tile` tokens, about `target` rows of a product; the last is cut to a multiple of `unit`.
struct Tiling {
  int64_t tile = KEYS, unit = 16, rows;
  Tiling(int64_t group, int64_t target) {
    while (tile < 128 && 2 * tile * group <= target) tile *= 2;
    while (unit < tile && unit * group < 64) unit *= 2;
    rows = tile * group;
  }
};

// ------------------------------------------------------------------------------------------------------------ forward

template <typename T, typename C>
struct Forward {
  Shape shape;
  float scale;
  View<const T> q, k, v;
  View<T> out;
  float* lse; // (rows, heads, length, group): the base-2 logarithm of sum(exp(scores))

  static constexpr int64_t BLOCK = 256; // keys at a time; tiles divide it, so every query has a key in each block

  Tiling tiles() const { return Tiling(shape.group, 96); }
  int64_t chunk(int64_t) const { return 256; }

  void run(const Task& task) const {
    const int64_t dim = shape.dim, group = shape.group, keys = round_up(task.end, BLOCK);
    const auto [tile, unit, most] = tiles();
    Scratch s = scratch<0>((2 * keys * dim + BLOCK * dim + most * (dim + BLOCK)) * sizeof(C) +
                           most * (BLOCK + dim + 2) * sizeof(float) + SLACK);
    C *kt = s.take<C>(keys * dim), *vp = s.take<C>(keys * dim), *rows = s.take<C>(BLOCK * dim);
    C *qs = s.take<C>(most * dim), *p = s.take<C>(most * BLOCK);
    float *scores = s.take<float>(most * BLOCK), *acc = s.take<float>(most * dim);
    float *top = s.take<float>(most), *total = s.take<float>(most);

    for (int64_t b = 0; b < task.end; b += BLOCK) {
      int64_t end = std::min(b + BLOCK, task.end), n = round_up(end - b, KEYS);
      gather(k, task, b, end, 1, dim, n, rows);
      pack_columns(rows, n, dim, kt + b * dim, BLOCK);
      C* values = PAIR<C> == 2 ? rows : vp + b * dim;
      gather(v, task, b, end, 1, dim, n, values);
      pack_rows(values, n, dim, vp + b * dim);
    }
    for (int64_t begin = task.begin; begin < task.end; begin += tile) {
      int64_t end = std::min(begin + tile, task.end), used = (end - begin) * group;
      int64_t m = round_up(end - begin, unit) * group;
      gather(q, task, begin, end, group, dim, m, qs);
      std::fill_n(top, used, -std::numeric_limits<float>::infinity());
      std::fill_n(total, used, 0.0f);
      for (int64_t b = 0; b < end; b += BLOCK) {
        int64_t n = round_up(std::min(BLOCK, end - b), KEYS);
        product(m, n, dim, qs, dim, kt + b * dim, BLOCK, scores, BLOCK, false);
        for (int64_t t = begin, r = 0; t < end; t++)
          for (int64_t g = 0; g < group; g++, r++) {
            int64_t seen = std::min(n, t + 1 - b);
            float kept = softmax(scores + r * BLOCK, seen, n, scale * LOG2_E, top[r], total[r], p + r * BLOCK);
            float* a = acc + r * dim;
            for (int64_t d = 0; b > 0 && d < dim; d += W) store(a + d, load(a + d) * kept);
          }
        product(m, dim, n, p, BLOCK, vp + b * dim, dim, acc, dim, b > 0);
      }
      write(task, begin, end, acc, top, total);
    }
  }

  // One query's scores -> unnormalised probabilities, with zeros behind the `seen` keys. Updates its greatest score and
  // its sum relative to that, and returns the factor for what was summed relative to the old one.
  static float softmax(const float* s, int64_t seen, int64_t n, float factor, float& top, float& total, C* p) {
    const int64_t whole = seen / W * W;
    const I inside = lanes() < int32_t(seen - whole);
    const F none = splat(-std::numeric_limits<float>::infinity());
    F m0 = splat(top), m1 = none, m2 = none, m3 = none;
    int64_t j = 0;
    for (; j + 4 * W <= whole; j += 4 * W) {
      m0 = larger(load(s + j), m0);
      m1 = larger(load(s + j + W), m1);
      m2 = larger(load(s + j + 2 * W), m2);
      m3 = larger(load(s + j + 3 * W), m3);
    }
    for (; j < whole; j += W) m0 = larger(load(s + j), m0);
    if (whole < seen) m1 = larger(inside ? load(s + whole) : none, m1);
    float before = top;
    top = reduce(larger(larger(m0, m1), larger(m2, m3)), larger);

    const F shift = splat(top * factor);
    F added{};
    for (j = 0; j < whole; j += W) {
      F e = exp2(load(s + j) * factor - shift);
      added += e;
      store(p + j, e);
    }
    if (whole < seen) {
      F e = inside ? exp2(load(s + whole) * factor - shift) : F{};
      added += e;
      store(p + whole, e);
      j += W;
    }
    for (; j < n; j += W) store(p + j, F{});
    float kept = exp2(splat((before - top) * factor))[0];
    total = total * kept + reduce(added, sum);
    return kept;
  }

  void write(const Task& task, int64_t begin, int64_t end, const float* acc, const float* top,
             const float* total) const {
    float* l = lse + ((task.row * shape.heads + task.head) * shape.length + task.first + begin) * shape.group;
    int64_t r = 0;
    for (int64_t t = begin; t < end; t++)
      for (int64_t g = 0; g < shape.group; g++, r++) {
        T* o = task.at(out, t, g);
        F share = splat(1.0f / total[r]);
        for (int64_t d = 0; d < shape.dim; d += W) store(o + d, load(acc + r * shape.dim + d) * share);
        l[r] = top[r] * (scale * LOG2_E) + std::log2(total[r]);
      }
  }
};

// ----------------------------------------------------------------------------------------------------------- backward

template <typename T, typename C>
struct Backward {
  Shape shape;
  float scale;
  View<const T> q, k, v, out, grad;
  View<T> dq, dk, dv;
  const float* lse;

  static constexpr int64_t BLOCK = 128; // keys at a time

  Tiling tiles() const { return Tiling(shape.group, 192); }
  // At most 4 chunks a document: each has sums of its own for all keys that it sees.
  int64_t chunk(int64_t tokens) const { return std::max<int64_t>(256, round_up((tokens + 3) / 4, BLOCK)); }
  int64_t sums(int64_t end) const { return round_up(end, BLOCK) * shape.dim; }

  void run(Task task) const {
    const int64_t dim = shape.dim, keys = round_up(task.end, BLOCK);
    const auto [tile, unit, ld] = tiles();
    Scratch s = scratch<0>((3 * keys * dim + 6 * ld * dim + 3 * BLOCK * ld) * sizeof(C) +
                           (2 * keys * dim + 2 * BLOCK * ld + ld * (dim + 2)) * sizeof(float) +
                           ld * sizeof(T*) + SLACK);
    C *ks = s.take<C>(keys * dim), *vs = s.take<C>(keys * dim), *kt = s.take<C>(keys * dim);
    C *qs = s.take<C>(ld * dim), *gs = s.take<C>(ld * dim), *qt = s.take<C>(ld * dim), *gt = s.take<C>(ld * dim);
    C *q_pairs = s.take<C>(ld * dim), *g_pairs = s.take<C>(ld * dim);
    C *p = s.take<C>(BLOCK * ld), *ds = s.take<C>(BLOCK * ld), *ds_pairs = s.take<C>(BLOCK * ld);
    float *scores = s.take<float>(BLOCK * ld), *dp = s.take<float>(BLOCK * ld), *dqt = s.take<float>(ld * dim);
    float *lse2 = s.take<float>(ld), *delta = s.take<float>(ld);
    T** targets = s.take<T*>(ld);
    const bool alone = !task.sums;
    if (alone) task.sums = s.take<float>(2 * keys * dim);
    float *dks = task.sums, *dvs = dks + sums(task.end);

    std::memset(task.sums, 0, 2 * keys * dim * sizeof(float));
    gather(k, task, 0, task.end, 1, dim, keys, ks);
    gather(v, task, 0, task.end, 1, dim, keys, vs);
    for (int64_t b = 0; b < task.end; b += BLOCK) transpose(ks + b * dim, BLOCK, dim, kt + b * dim, BLOCK);

    for (int64_t begin = task.begin; begin < task.end; begin += tile) {
      int64_t end = std::min(begin + tile, task.end), n = round_up(end - begin, unit) * shape.group;
      gather(q, task, begin, end, shape.group, dim, n, qs);
      gather(grad, task, begin, end, shape.group, dim, n, gs);
      pack_columns(qs, n, dim, qt, ld);
      pack_columns(gs, n, dim, gt, ld);
      const C *qr = pack_rows(qs, n, dim, q_pairs), *gr = pack_rows(gs, n, dim, g_pairs);
      statistics(task, begin, end, n, lse2, delta);
      for (int64_t b = 0; b < end; b += BLOCK) {
        int64_t m = round_up(std::min(BLOCK, end - b), KEYS);
        transposed_scores(ks + b * dim, qt, b, m, begin, n, scores);
        transposed_scores(vs + b * dim, gt, b, m, begin, n, dp);
        for (int64_t i = 0; i < m; i += 2)
          softmax_gradient(scores + i * ld, dp + i * ld, ld, b + i - begin, n, lse2, delta, p + i * ld, ds + i * ld,
                           ds_pairs + i * ld);
        product(m, dim, n, p, ld, gr, dim, dvs + b * dim, dim, true);
        product(m, dim, n, ds, ld, qr, dim, dks + b * dim, dim, true);
        product(dim, n, m, kt + b * dim, BLOCK, PAIR<C> == 2 ? ds_pairs : ds, ld, dqt, ld, b > 0);
      }
      write_queries(dqt, ld, task, begin, end, n, targets);
    }
    if (alone) {
      task.begin = 0;
      write_keys(&task, &task + 1);
    }
  }

  // Keys from b on (left, m rows) times queries from `begin` on (right, n columns) -> c[m][n]; most of what lies in the
  // future is left out.
  void transposed_scores(const C* left, const C* right, int64_t b, int64_t m, int64_t begin, int64_t n,
                         float* c) const {
    const auto [_, unit, ld] = tiles();
    const int64_t past = std::clamp<int64_t>(begin - b, 0, m), dim = shape.dim;
    if (past) product(past, n, dim, left, dim, right, ld, c, ld, false);
    for (int64_t i = past; i < m; i += KEYS) {
      int64_t skip = (b + i - begin) / unit * unit * shape.group;
      if (skip >= n) break;
      product(KEYS, n - skip, dim, left + i * dim, dim, right + skip * PAIR<C>, ld, c + i * ld + skip, ld, false);
    }
  }

  // Of two keys, `ahead` and ahead + 1 tokens behind the tile's first query: scores s and dP -> P and dS.
  void softmax_gradient(const float* s, const float* dp, int64_t ld, int64_t ahead, int64_t n, const float* lse2,
                        const float* delta, C* p, C* ds, C* ds_pairs) const {
    const int64_t low0 = std::clamp<int64_t>(ahead * shape.group, 0, n); // the first column that sees the key
    const int64_t low1 = std::clamp<int64_t>((ahead + 1) * shape.group, 0, n);
    const float factor = scale * LOG2_E;
    auto cell = [&](int64_t c, auto is_edge) {
      F l = load(lse2 + c), e = load(delta + c);
      F p0 = exp2(load(s + c) * factor - l), p1 = exp2(load(s + ld + c) * factor - l);
      F d0 = p0 * (load(dp + c) - e), d1 = p1 * (load(dp + ld + c) - e);
      if constexpr (is_edge) {
        I in0 = lanes() >= int32_t(low0 - c), in1 = lanes() >= int32_t(low1 - c);
        p0 = in0 ? p0 : F{};
        d0 = in0 ? d0 : F{};
        p1 = in1 ? p1 : F{};
        d1 = in1 ? d1 : F{};
      }
      store(p + c, p0);
      store(p + ld + c, p1);
      store_pair(ds + c, ds + ld + c, ds_pairs + 2 * c, d0, d1);
    };
    int64_t c = 0;
    for (; c + W <= low0; c += W) {
      store(p + c, F{});
      store(p + ld + c, F{});
      store_pair(ds + c, ds + ld + c, ds_pairs + 2 * c, F{}, F{});
    }
    for (; c < low1; c += W) cell(c, std::true_type());
    for (; c < n; c += W) cell(c, std::false_type());
  }

  // Of each query: lse, and delta = sum(dO * O).
  void statistics(const Task& task, int64_t begin, int64_t end, int64_t n, float* lse2, float* delta) const {
    const float* l = lse + ((task.row * shape.heads + task.head) * shape.length + task.first + begin) * shape.group;
    int64_t r = 0;
    for (int64_t t = begin; t < end; t++)
      for (int64_t m = 0; m < shape.group; m++, r++) {
        const T *o = task.at(out, t, m), *g = task.at(grad, t, m);
        F dot{};
        for (int64_t d = 0; d < shape.dim; d += W) dot += load(o + d) * load(g + d);
        delta[r] = reduce(dot, sum);
        lse2[r] = l[r];
      }
    std::fill(lse2 + r, lse2 + n, 0.0f);
    std::fill(delta + r, delta + n, 0.0f);
  }

  void write_queries(const float* dqt, int64_t ld, const Task& task, int64_t begin, int64_t end, int64_t n,
                     T** targets) const {
    int64_t used = 0;
    for (int64_t t = begin; t < end; t++)
      for (int64_t g = 0; g < shape.group; g++) targets[used++] = task.at(dq, t, g);
    each_transposed(dqt, shape.dim, n, ld, [=, this](int64_t d, int64_t r, const U8* block) {
      for (int64_t i = 0; i < std::min<int64_t>(SIDE, used - r); i++) store8(targets[r + i] + d, (F8)block[i] * scale);
    });
  }

  // dK and dV of the tokens of the document's chunk `from`: chunks before it don't see them.
  void write_keys(const Task* from, const Task* to) const {
    for (int64_t t = from->begin; t < from->end; t++)
      for (int64_t d = 0; d < shape.dim; d += W) {
        F a{}, b{};
        for (const Task* c = from; c < to; c++) {
          a += load(c->sums + t * shape.dim + d);
          b += load(c->sums + sums(c->end) + t * shape.dim + d);
        }
        store(from->at(dk, t) + d, a * scale);
        store(from->at(dv, t) + d, b);
      }
  }
};

// ---------------------------------------------------------------------------------------------------------- schedule

template <typename Work>
std::vector<Task> cut(const Work& work, const int32_t* documents, int64_t n) {
  const auto& shape = work.shape;
  if (n < 1 || documents[0] != 0 || documents[n] != shape.rows * shape.length)
    throw std::invalid_argument("documents must go from 0 to rows * length");
  std::vector<Task> tasks;
  for (int64_t i = 0; i < n; i++) {
    const int64_t start = documents[i], tokens = documents[i + 1] - start;
    if (tokens < 0 || start % shape.length + tokens > shape.length)
      throw std::invalid_argument("documents must ascend and none may cross the end of a row: see the one from " +
                                  std::to_string(start) + " to " + std::to_string(start + tokens));
    const int64_t step = work.chunk(tokens);
    for (int64_t h = 0; h < shape.heads; h++)
      for (int64_t b = 0; b < tokens; b += step)
        tasks.push_back({start / shape.length, h, start % shape.length, b, std::min(b + step, tokens), nullptr});
  }
  return tasks;
}

// Calls use(i) for i < n on all threads, whoever is free taking the next.
template <typename Use>
void in_parallel(int64_t n, Use use) {
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    struct Release {
      ~Release() { at::native::cpublas::brgemm_release(); }
    } at_the_end;
    for (int64_t i; (i = next++) < n;) use(i);
  });
}

template <typename Work>
void run_all(const Work& work, const std::vector<Task>& tasks) {
  auto cost = [](const Task& t) { return (t.end - t.begin) * (t.begin + t.end); };
  std::vector<const Task*> order;
  for (auto& t : tasks) order.push_back(&t);
  std::stable_sort(order.begin(), order.end(), [&](auto* a, auto* b) { return cost(*a) > cost(*b); });
  in_parallel(order.size(), [&](int64_t i) { work.run(*order[i]); });
}

template <typename T, typename C>
void run_backward(const Backward<T, C>& work, std::vector<Task> tasks) {
  const int64_t n = tasks.size();
  auto is_first = [&](int64_t i) { return i == n || tasks[i].begin == 0; };
  auto in_chunks = [&](int64_t i) { return !is_first(i) || !is_first(i + 1); };
  int64_t floats = 0;
  for (int64_t i = 0; i < n; i++)
    if (in_chunks(i)) floats += 2 * work.sums(tasks[i].end);
  Scratch memory = scratch<1>(floats * sizeof(float));
  for (int64_t i = 0; i < n; i++)
    if (in_chunks(i)) tasks[i].sums = memory.take<float>(2 * work.sums(tasks[i].end));
  run_all(work, tasks);
  if (floats)
    in_parallel(n, [&](int64_t i) {
      if (!in_chunks(i)) return;
      int64_t end = i + 1;
      while (!is_first(end)) end++;
      work.write_keys(&tasks[i], &tasks[end]);
    });
}

struct Call {
  Shape shape;
  float scale;
  void* const* tensors;
  const int64_t* strides;
  float* lse;
  const int32_t* documents;
  int64_t count;

  template <typename T>
  View<T> view(int i) const {
    auto* s = strides + 4 * i;
    return {(T*)tensors[i], s[0], s[1], s[2], s[3]};
  }
};

template <typename T, typename C>
void run(const Call& c, bool backward) {
  auto in = [&](int i) { return c.view<const T>(i); };
  if (backward) {
    Backward<T, C> work{c.shape,      c.scale,      in(0), in(1), in(2), in(3), in(4), c.view<T>(5), c.view<T>(6),
                        c.view<T>(7), c.lse};
    run_backward(work, cut(work, c.documents, c.count));
  } else {
    Forward<T, C> work{c.shape, c.scale, in(0), in(1), in(2), c.view<T>(3), c.lse};
    run_all(work, cut(work, c.documents, c.count));
  }
}

} // namespace

// sizes: rows, heads of keys and values, length, group, head_dim. tensors: q, k, v, out of the forward; q, k, v, out,
// dOut, dq, dk, dv of the backward; each has 4 strides, see View. Returns null or what is wrong.
extern "C" const char* trainwright_attention(int backward, int is_bfloat16, const int64_t* sizes, float scale,
                                             void* const* tensors, const int64_t* strides, float* lse,
                                             const int32_t* documents, int64_t count) {
  static thread_local std::string error;
  Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  Call call{shape, scale, tensors, strides, lse, documents, count};
  try {
    // Without AMX the products of bfloat16 are slower than those of float.
    if (!is_bfloat16)
      run<float, float>(call, backward);
    else if (at::native::cpublas::could_pack(at::kBFloat16))
      run<BFloat16, BFloat16>(call, backward);
    else
      run<BFloat16, float>(call, backward);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
