// Exact causal attention inside packed documents, forward and backward (Dao et al. 2022, 2023), for the CPU.
//
// A task is a chunk of queries of one document and one key/value head; it packs the keys and values that it sees once and
// goes through them by tiles. The query heads of a group are folded into the rows of one product. The cut into tasks never
// depends on the number of threads and nothing is summed across tasks in an order that does, so the bits don't either.
//
// Products are ATen's brgemm, C[M][N] (+)= A[M][K] B[K][N] into float: it picks AMX, AVX-512 or AVX2. For bfloat16 it wants
// B's rows interleaved in pairs, [K/2][N][2]. Each shape and stride is compiled once per thread, so all strides are constants
// of the head dimension and group, and sizes are multiples of a few dozen.
//
// The forward keeps scores as [queries][keys]. The backward keeps them transposed, [keys][queries]: then the probabilities and
// their gradients are already what dV = P^T dO and dK = dS^T Q need on the left, and writing dS^T with interleaved rows as well
// makes it the right side of dQ^T = K^T dS^T. Only operands of length x head_dim are ever transposed.

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
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;

// ---------------------------------------------------------------------------------------------------------------- vectors

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int B = 8; // side of the blocks that are transposed in registers

template <typename T, int N>
using vector_of __attribute__((vector_size(sizeof(T) * N))) = T;
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));

template <typename V>
inline V raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void put(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline F splat(float x) { return F{} + x; }
inline F load(const float* p) { return raw<F>(p); }
// What the compiler would spell badly.
#if defined(__AVX512F__)
inline U widen(H v) { return (U)_mm512_cvtepu16_epi32((__m256i)v); }
inline F larger(F a, F b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline U widen(H v) { return (U)_mm256_cvtepu16_epi32((__m128i)v); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); }
#else
inline U widen(H v) { return __builtin_convertvector(v, U); }
inline F larger(F a, F b) { return a > b ? a : b; } // b where one is NaN
#endif
inline F load(const BFloat16* p) { return (F)(widen(raw<H>(p)) << 16); }
inline void store(float* p, F v) { put(p, v); }
inline void store(BFloat16* p, F v) {
#ifdef __AVX512BF16__
  put(p, _mm512_cvtneps_pbh((__m512)v));
#else
  // to nearest even; a NaN that arithmetic on bfloat16 can make stays one
  U bits = (U)v;
  put(p, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, H));
#endif
}
// Two rows, and the same once more interleaved; for float just the rows.
inline void store_pair(float* a, float* b, float*, F x, F y) {
  put(a, x);
  put(b, y);
}
inline void store_pair(BFloat16* a, BFloat16* b, BFloat16* both, F x, F y) {
#ifdef __AVX512BF16__
  typedef int16_t S32 __attribute__((vector_size(64)));
  constexpr S32 order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  auto words = (__m512i)_mm512_cvtne2ps_pbh(y, x);
  put(a, _mm512_castsi512_si256(words));
  put(b, _mm512_extracti64x4_epi64(words, 1));
  put(both, _mm512_permutexvar_epi16((__m512i)order, words));
#else
  store(a, x);
  store(b, y);
  put(both, widen(raw<H>(a)) | widen(raw<H>(b)) << 16);
#endif
}
inline I lanes() {
  I v{};
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

template <int STEP, typename V, std::size_t... L>
inline V swapped(V v, std::index_sequence<L...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (int(L) ^ STEP)...);
#else
  return __builtin_shuffle(v, I{(int(L) ^ STEP)...});
#endif
}
template <typename Op>
inline float reduce(F v, Op op) {
  auto order = std::make_index_sequence<W>();
  if (W == 16) v = op(v, swapped<8 % W>(v, order));
  v = op(v, swapped<4>(v, order));
  v = op(v, swapped<2>(v, order));
  v = op(v, swapped<1>(v, order));
  return v[0];
}
inline F sum(F a, F b) { return a + b; }

// 2^x to 2e-7 for x <= 127; 0 below -127. NaN stays NaN. The magic number leaves round(x) + 127 in the low bits.
inline F exp2(F x) {
  x = larger(splat(-127.0f), x);
  constexpr float magic = 12582912.0f + 127.0f;
  F t = x + magic;
  F f = x - (t - magic);
#ifdef DEG4
  F p = splat(9.6183904e-3f);
#else
  F p = f * 1.3390666e-3f + 9.6183904e-3f;
#endif
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * (F)((U)t << 23);
}

// ---------------------------------------------------------------------------------------------------------------- packing

template <typename C>
constexpr int PAIR = 4 / sizeof(C); // rows that a right operand interleaves

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <std::size_t... L>
inline void transpose_block(U8* r, std::index_sequence<L...>) {
  for (int round = 0; round < 3; round++) {
    U8 next[B];
    for (int i = 0; i < B / 2; i++) {
      U8 a = r[i], b = r[i + B / 2];
#ifdef __clang__
      next[2 * i] = __builtin_shufflevector(a, b, (int(L) / 2 + int(L) % 2 * B)...);
      next[2 * i + 1] = __builtin_shufflevector(a, b, (int(L) / 2 + B / 2 + int(L) % 2 * B)...);
#else
      next[2 * i] = __builtin_shuffle(a, b, U8{(uint32_t(L) / 2 + uint32_t(L) % 2 * B)...});
      next[2 * i + 1] = __builtin_shuffle(a, b, U8{(uint32_t(L) / 2 + B / 2 + uint32_t(L) % 2 * B)...});
#endif
    }
    for (int i = 0; i < B; i++) r[i] = next[i];
  }
}
// r[i] = 8 words of row i at src, rows `stride` words apart; afterwards column i.
inline void load_transposed(U8* r, const uint32_t* src, int64_t stride) {
  for (int i = 0; i < B; i++) r[i] = raw<U8>(src + i * stride);
  transpose_block(r, std::make_index_sequence<B>());
}

// rows[n][dim] -> out[dim / PAIR][ld][PAIR]: the right operand whose columns are the rows.
template <typename C>
void pack_columns(const C* rows, int64_t n, int64_t dim, C* out, int64_t ld) {
  auto* src = (const uint32_t*)rows;
  auto* dst = (uint32_t*)out;
  int64_t words = dim / PAIR<C>;
  for (int64_t i = 0; i < n; i += B)
    for (int64_t j = 0; j < words; j += B) {
      U8 r[B];
      load_transposed(r, src + i * words + j, words);
      for (int c = 0; c < B; c++) put(dst + (j + c) * ld + i, r[c]);
    }
}

// rows[n][dim] -> out[dim][ld]: the left operand that is the transposed.
void transpose(const float* rows, int64_t n, int64_t dim, float* out, int64_t ld) { pack_columns(rows, n, dim, out, ld); }
void transpose(const BFloat16* rows, int64_t n, int64_t dim, BFloat16* out, int64_t ld) {
  auto* src = (const uint32_t*)rows;
  int64_t words = dim / 2;
  for (int64_t i = 0; i < n; i += B)
    for (int64_t j = 0; j < words; j += B) {
      U8 r[B];
      load_transposed(r, src + i * words + j, words);
      for (int c = 0; c < B; c++) {
        put(out + 2 * (j + c) * ld + i, __builtin_convertvector(r[c] & 0xffff, H8));
        put(out + (2 * (j + c) + 1) * ld + i, __builtin_convertvector(r[c] >> 16, H8));
      }
    }
}

// rows[n][dim] -> the right operand whose rows are the rows: [n / 2][dim][2], or for float the rows themselves.
const float* interleave(const float* rows, int64_t, int64_t, float*) { return rows; }
const BFloat16* interleave(const BFloat16* rows, int64_t n, int64_t dim, BFloat16* out) {
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t d = 0; d < dim; d += B) {
      auto a = __builtin_convertvector(raw<H8>(rows + i * dim + d), U8);
      auto b = __builtin_convertvector(raw<H8>(rows + (i + 1) * dim + d), U8);
      put(out + i * dim + 2 * d, a | b << 16);
    }
  return out;
}

// ---------------------------------------------------------------------------------------------------------------- problem

constexpr int64_t KEYS = 32;      // keys are padded to multiples of this many
#ifndef FKEYS
#define FKEYS 256
#endif
#ifndef BKEYS
#define BKEYS 128
#endif
#ifndef FCOLS
#define FCOLS 96
#endif
#ifndef BCOLS
#define BCOLS 192
#endif
#ifndef BCHUNK
#define BCHUNK 512
#endif
#ifndef FCHUNK
#define FCHUNK 256
#endif

struct Shape {
  int64_t rows, heads, length, group, dim; // heads: key/value heads
};
// A tensor (rows, heads, length[, group], dim); strides in elements, the last dimension's is 1.
template <typename T>
struct View {
  T* data;
  int64_t row, head, token, member;
  T* at(int64_t r, int64_t h, int64_t t) const { return data + r * row + h * head + t * token; }
};
struct Task {
  int64_t row, head, first; // the document begins at token `first` of `row`
  int64_t begin, end;       // these queries of it, over its keys before `end`
  int64_t tokens;           // of the document
  int64_t partial;          // where its sums of dK and dV go, or -1: it is the only one of its document
};

// Rows from `first`, token by token and in it by group, converted; zeros up to `padded` rows.
template <typename T, typename C>
void gather(const View<T>& x, const Task& task, int64_t begin, int64_t end, int64_t group, int64_t dim, int64_t padded, C* out) {
  C* o = out;
  int64_t run = x.member == dim ? group * dim : dim, runs = group * dim / run;
  for (int64_t t = begin; t < end; t++) {
    auto* token = x.at(task.row, task.head, task.first + t);
    for (int64_t g = 0; g < runs; g++, o += run) {
      auto* in = token + g * x.member;
      if (sizeof(C) == sizeof(T))
        std::memcpy(o, in, run * sizeof(C));
      else
        for (int64_t d = 0; d < run; d += W) store(o + d, load(in + d));
    }
  }
  std::memset((void*)o, 0, (out + padded * dim - o) * sizeof(C));
}

struct Scratch {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    auto* p = (T*)next;
    next += round_up(count * sizeof(T), 64) + 64;
    return p;
  }
};
// Memory of the calling thread that is kept for the next call: fresh pages cost as much as the work on them.
template <int USE>
Scratch scratch(std::size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local std::size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = round_up(bytes, 1 << 16); 
    memory.reset((char*)std::aligned_alloc(64, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return {memory.get()};
}

// Queries come by tiles of about `columns` rows of the products; a ragged last one is padded to a multiple of `unit` tokens.
struct Tiling {
  int64_t unit, tile, rows;
  Tiling(int64_t group, int64_t columns) {
    unit = 16;
    while (unit < 64 && unit * group < 64) unit *= 2;
    tile = std::max<int64_t>(KEYS, columns / group / unit * unit);
    tile = round_up(tile, KEYS);
    rows = tile * group;
  }
};

// ---------------------------------------------------------------------------------------------------------------- forward

// One row of scores -> unnormalised probabilities; zeros behind `valid`. Returns the factor for what was summed before.
template <typename C>
inline float softmax_row(const float* s, int64_t valid, int64_t padded, float factor, float& top, float& total, C* p) {
  const float inf = std::numeric_limits<float>::infinity();
  int64_t full = valid / W * W, j = 0;
  F rest = splat(-inf), m0 = splat(top), m1 = rest, m2 = rest, m3 = rest;
  for (; j + 4 * W <= full; j += 4 * W) {
    m0 = larger(load(s + j), m0);
    m1 = larger(load(s + j + W), m1);
    m2 = larger(load(s + j + 2 * W), m2);
    m3 = larger(load(s + j + 3 * W), m3);
  }
  for (; j < full; j += W) m0 = larger(load(s + j), m0);
  I inside = lanes() < int32_t(valid - full);
  if (full < valid) m1 = larger(inside ? load(s + full) : rest, m1);
  float before = top;
  top = reduce(larger(larger(m0, m1), larger(m2, m3)), larger);
  F shift = splat(top * factor), added{};
  for (j = 0; j < full; j += W) {
    F e = exp2(load(s + j) * factor - shift);
    added += e;
    store(p + j, e);
  }
  if (full < valid) {
    F e = exp2(load(s + full) * factor - shift);
    e = inside ? e : F{};
    added += e;
    store(p + full, e);
    j += W;
  }
  for (; j < padded; j += W) store(p + j, F{});
  float kept = exp2(splat((before - top) * factor))[0];
  total = total * kept + reduce(added, sum);
  return kept;
}

template <typename T, typename C>
struct Forward {
  Shape shape;
  float scale;
  View<const T> q, k, v;
  View<T> out;
  float* lse; // (rows, heads, length, group)

  static constexpr int64_t BLOCK = FKEYS;
  static int64_t chunk(int64_t) { return FCHUNK; }
  Tiling tiling() const { return Tiling(shape.group, FCOLS); }

  std::size_t bytes(int64_t tokens) const {
    int64_t keys = round_up(tokens, BLOCK), rows = tiling().rows, dim = shape.dim;
    return (2 * keys * dim + BLOCK * dim + rows * (dim + BLOCK)) * sizeof(C) + rows * (BLOCK + dim + 2) * 4 + 16 * 128;
  }

  void run(const Task& task, float*) const {
    auto [rows_, heads, length, group, dim] = shape;
    Tiling tiles = tiling();
    Scratch s = scratch<0>(bytes(task.end));
    int64_t keys = round_up(task.end, BLOCK);
    C *kt = s.take<C>(keys * dim), *vp = s.take<C>(keys * dim), *line = s.take<C>(BLOCK * dim);
    C *qs = s.take<C>(tiles.rows * dim), *p = s.take<C>(tiles.rows * BLOCK);
    float *scores = s.take<float>(tiles.rows * BLOCK), *acc = s.take<float>(tiles.rows * dim);
    float *top = s.take<float>(tiles.rows), *total = s.take<float>(tiles.rows);

    for (int64_t b = 0; b < task.end; b += BLOCK) {
      int64_t e = std::min(b + BLOCK, task.end), n = round_up(e - b, KEYS);
      gather(k, task, b, e, 1, dim, n, line);
      pack_columns(line, n, dim, kt + b * dim, BLOCK);
      C* values = sizeof(C) == 4 ? vp + b * dim : line;
      gather(v, task, b, e, 1, dim, n, values);
      interleave(values, n, dim, vp + b * dim);
    }
    for (int64_t begin = task.begin; begin < task.end; begin += tiles.tile) {
      int64_t end = std::min(begin + tiles.tile, task.end), used = (end - begin) * group;
      int64_t rows = round_up(end - begin, tiles.unit) * group;
      gather(q, task, begin, end, group, dim, rows, qs);
      std::fill_n(top, used, -std::numeric_limits<float>::infinity());
      std::fill_n(total, used, 0.0f);
      for (int64_t b = 0; b < end; b += BLOCK) {
        int64_t n = round_up(std::min(b + BLOCK, end) - b, KEYS);
        brgemm(rows, n, dim, dim, BLOCK, BLOCK, false, qs, kt + b * dim, scores, PAIR<C> == 2);
        for (int64_t r = 0; r < used; r++) {
          int64_t valid = std::min(n, begin + r / group + 1 - b);
          float kept = softmax_row(scores + r * BLOCK, valid, n, scale * 1.44269504f, top[r], total[r], p + r * BLOCK);
          if (b)
            for (int64_t d = 0; d < dim; d += W) store(acc + r * dim + d, load(acc + r * dim + d) * kept);
        }
        brgemm(rows, dim, n, BLOCK, dim, dim, b > 0, p, vp + b * dim, acc, PAIR<C> == 2);
      }
      for (int64_t r = 0; r < used; r++) {
        int64_t t = begin + r / group, g = r % group;
        T* o = out.at(task.row, task.head, task.first + t) + g * out.member;
        F share = splat(1.0f / total[r]);
        for (int64_t d = 0; d < dim; d += W) store(o + d, load(acc + r * dim + d) * share);
        lse[((task.row * heads + task.head) * length + task.first + t) * group + g] = top[r] * scale + std::log(total[r]);
      }
    }
  }
};

// --------------------------------------------------------------------------------------------------------------- backward

template <typename T, typename C>
struct Backward {
  Shape shape;
  float scale;
  View<const T> q, k, v, out, grad;
  View<T> dq, dk, dv;
  const float* lse;

  static constexpr int64_t BLOCK = BKEYS;
  static int64_t chunk(int64_t tokens) { return std::max<int64_t>(BCHUNK, round_up((tokens + 3) / 4, 128)); }
  Tiling tiling() const { return Tiling(shape.group, BCOLS); }

  std::size_t bytes(int64_t tokens) const {
    int64_t keys = round_up(tokens, BLOCK), dim = shape.dim, rows = tiling().rows;
    return (3 * keys * dim + 6 * rows * dim + 3 * BLOCK * rows) * sizeof(C) +
        (2 * keys * dim + 2 * BLOCK * rows + rows * (dim + 2)) * 4 + 32 * 128;
  }

  // Rows s, d: scores and gradients of probabilities of keys `key` and `key + 1`. Columns before low0, low1 are the future's.
  template <bool MASK>
  static inline void cell(const float* s, const float* d, int64_t ld, int64_t c, F factor, const float* lse2, const float* delta,
                          int32_t low0, int32_t low1, C* p, C* ds, C* pairs) {
    F l = load(lse2 + c), de = load(delta + c);
    F p0 = exp2(load(s + c) * factor - l), p1 = exp2(load(s + ld + c) * factor - l);
    F d0 = p0 * (load(d + c) - de), d1 = p1 * (load(d + ld + c) - de);
    if constexpr (MASK) {
      I column = lanes() + int32_t(c);
      p0 = column >= low0 ? p0 : F{};
      d0 = column >= low0 ? d0 : F{};
      p1 = column >= low1 ? p1 : F{};
      d1 = column >= low1 ? d1 : F{};
    }
    store(p + c, p0);
    store(p + ld + c, p1);
    store_pair(ds + c, ds + ld + c, pairs + 2 * c, d0, d1);
  }

  std::pair<float*, float*> sums(const Task& task, Scratch& s, float* partials, int64_t keys) const {
    if (task.partial < 0) {
      auto* a = s.take<float>(keys * shape.dim);
      return {a, s.take<float>(keys * shape.dim)};
    }
    return {partials + task.partial, partials + task.partial + keys * shape.dim};
  }

  void run(const Task& task, float* partials) const {
    auto [rows_, heads, length, group, dim] = shape;
    Tiling tiles = tiling();
    Scratch s = scratch<0>(bytes(task.end));
    int64_t keys = round_up(task.end, BLOCK), ld = tiles.rows;
    C *ks = s.take<C>(keys * dim), *vs = s.take<C>(keys * dim), *kt = s.take<C>(keys * dim);
    C *qs = s.take<C>(ld * dim), *gs = s.take<C>(ld * dim), *qt = s.take<C>(ld * dim), *gt = s.take<C>(ld * dim);
    C *qi = s.take<C>(ld * dim), *gi = s.take<C>(ld * dim);
    float *scores = s.take<float>(BLOCK * ld), *dp = s.take<float>(BLOCK * ld), *dqt = s.take<float>(ld * dim);
    float *lse2 = s.take<float>(ld), *delta = s.take<float>(ld);
    C *p = s.take<C>(BLOCK * ld), *ds = s.take<C>(BLOCK * ld), *pairs = s.take<C>(BLOCK * ld);
    auto [dks, dvs] = sums(task, s, partials, keys);
    std::memset(dks, 0, keys * dim * 4);
    std::memset(dvs, 0, keys * dim * 4);
    gather(k, task, 0, task.end, 1, dim, keys, ks);
    gather(v, task, 0, task.end, 1, dim, keys, vs);
    for (int64_t b = 0; b < task.end; b += BLOCK) transpose(ks + b * dim, BLOCK, dim, kt + b * dim, BLOCK);
    constexpr bool vnni = PAIR<C> == 2;

    for (int64_t begin = task.begin; begin < task.end; begin += tiles.tile) {
      int64_t end = std::min(begin + tiles.tile, task.end), used = (end - begin) * group;
      int64_t rows = round_up(end - begin, tiles.unit) * group;
      gather(q, task, begin, end, group, dim, rows, qs);
      gather(grad, task, begin, end, group, dim, rows, gs);
      pack_columns(qs, rows, dim, qt, ld);
      pack_columns(gs, rows, dim, gt, ld);
      const C *qr = interleave(qs, rows, dim, qi), *gr = interleave(gs, rows, dim, gi);
      rowwise(task, begin, end, rows, lse2, delta);
      for (int64_t b = 0; b < end; b += BLOCK) {
        int64_t n = round_up(std::min(b + BLOCK, end) - b, KEYS);
        int64_t past = std::clamp<int64_t>(begin - b, 0, n); // keys that every query of the tile sees
        if (past) {
          brgemm(past, rows, dim, dim, ld, ld, false, ks + b * dim, qt, scores, vnni);
          brgemm(past, rows, dim, dim, ld, ld, false, vs + b * dim, gt, dp, vnni);
        }
        for (int64_t i = past; i < n; i += KEYS) {
          int64_t skip = (b + i - begin) / tiles.unit * tiles.unit * group;
          if (skip >= rows) continue;
          brgemm(KEYS, rows - skip, dim, dim, ld, ld, false, ks + (b + i) * dim, qt + skip * PAIR<C>, scores + i * ld + skip, vnni);
          brgemm(KEYS, rows - skip, dim, dim, ld, ld, false, vs + (b + i) * dim, gt + skip * PAIR<C>, dp + i * ld + skip, vnni);
        }
        F factor = splat(scale * 1.44269504f);
        for (int64_t i = 0; i < n; i += 2) {
          int64_t low0 = std::clamp<int64_t>((b + i - begin) * group, 0, rows), low1 = std::clamp<int64_t>((b + i + 1 - begin) * group, 0, rows);
          const float *si = scores + i * ld, *di = dp + i * ld;
          C *pi = p + i * ld, *dsi = ds + i * ld, *pairsi = pairs + i * ld;
          int64_t c = 0;
          for (; c + W <= low0; c += W) {
            store(pi + c, F{});
            store(pi + ld + c, F{});
            store(dsi + c, F{});
            store(dsi + ld + c, F{});
            if (vnni) put(pairsi + 2 * c, U{});
          }
          for (; c < low1; c += W) cell<true>(si, di, ld, c, factor, lse2, delta, low0, low1, pi, dsi, pairsi);
          for (; c < rows; c += W) cell<false>(si, di, ld, c, factor, lse2, delta, low0, low1, pi, dsi, pairsi);
        }
        brgemm(n, dim, rows, ld, dim, dim, true, p, gr, dvs + b * dim, vnni);
        brgemm(n, dim, rows, ld, dim, dim, true, ds, qr, dks + b * dim, vnni);
        brgemm(dim, rows, n, BLOCK, ld, ld, b > 0, kt + b * dim, vnni ? pairs : ds, dqt, vnni);
      }
      write_transposed(dqt, ld, task, begin, used);
    }
    if (task.partial < 0)
      for (int64_t t = 0; t < task.end; t++) {
        T *ok = dk.at(task.row, task.head, task.first + t), *ov = dv.at(task.row, task.head, task.first + t);
        for (int64_t d = 0; d < dim; d += W) {
          store(ok + d, load(dks + t * dim + d) * scale);
          store(ov + d, load(dvs + t * dim + d));
        }
      }
  }

  // Per query: the logarithm of its softmax sum, to base 2, and sum(dO * O).
  void rowwise(const Task& task, int64_t begin, int64_t end, int64_t rows, float* lse2, float* delta) const {
    auto [_, heads, length, group, dim] = shape;
    const float* l = lse + ((task.row * heads + task.head) * length + task.first + begin) * group;
    int64_t r = 0;
    for (int64_t t = begin; t < end; t++) {
      const T *o = out.at(task.row, task.head, task.first + t), *g = grad.at(task.row, task.head, task.first + t);
      for (int64_t m = 0; m < group; m++, r++) {
        F dot{};
        for (int64_t d = 0; d < dim; d += W) dot += load(o + m * out.member + d) * load(g + m * grad.member + d);
        delta[r] = reduce(dot, sum);
        lse2[r] = l[r] * 1.44269504f;
      }
    }
    std::fill(lse2 + r, lse2 + rows, 0.0f);
    std::fill(delta + r, delta + rows, 0.0f);
  }

  void write_transposed(const float* x, int64_t ld, const Task& task, int64_t begin, int64_t used) const {
    auto [_, heads, length, group, dim] = shape;
    for (int64_t r = 0; r < used; r += B)
      for (int64_t d = 0; d < dim; d += B) {
        U8 block[B];
        load_transposed(block, (const uint32_t*)x + d * ld + r, ld);
        for (int64_t i = 0; i < std::min<int64_t>(B, used - r); i++) {
          T* o = dq.at(task.row, task.head, task.first + begin + (r + i) / group) + (r + i) % group * dq.member + d;
          F8 y = (F8)block[i] * scale;
          if constexpr (sizeof(T) == 4)
            put(o, y);
          else {
            U8 bits = (U8)y;
            put(o, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, H8));
          }
        }
      }
  }
};

template <typename Work>
void run_tasks(const Work& work, std::vector<Task>& tasks, float* partials) {
  auto cost = [](const Task& t) { return (t.end - t.begin) * (t.begin + t.end); };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  std::atomic<std::size_t> next = 0;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    struct Release {
      ~Release() { at::native::cpublas::brgemm_release(); }
    } release;
    for (std::size_t i; (i = next++) < tasks.size();) work.run(tasks[i], partials);
  });
}

template <typename Work>
std::vector<Task> cut(const Work& work, const int32_t* documents, int64_t n, int64_t* partial_floats) {
  std::vector<Task> tasks;
  int64_t floats = 0;
  for (int64_t d = 0; d < n; d++) {
    int64_t start = documents[d], tokens = documents[d + 1] - start, step = work.chunk(tokens);
    for (int64_t h = 0; h < work.shape.heads; h++)
      for (int64_t b = 0; b < tokens; b += step) {
        int64_t e = std::min(b + step, tokens);
        int64_t partial = -1;
        if (tokens > step) {
          partial = floats;
          floats += 2 * round_up(e, Work::BLOCK) * work.shape.dim;
        }
        tasks.push_back({start / work.shape.length, h, start % work.shape.length, b, e, tokens, partial});
      }
  }
  *partial_floats = floats;
  return tasks;
}

template <typename T, typename C>
void backward(Backward<T, C> work, const int32_t* documents, int64_t n) {
  int64_t floats;
  auto tasks = cut(work, documents, n, &floats);
  std::vector<Task> parts;
  for (auto& t : tasks)
    if (t.partial >= 0) parts.push_back(t);
  auto* partials = scratch<1>(floats * 4 + 64).template take<float>(floats);
  run_tasks(work, tasks, partials);
  // Sum the chunks of a document in their order.
  std::vector<std::pair<int64_t, int64_t>> docs;
  for (std::size_t i = 0; i < parts.size();) {
    std::size_t j = i + 1;
    while (j < parts.size() && parts[j].begin > 0) j++;
    docs.push_back({i, j});
    i = j;
  }
  int64_t dim = work.shape.dim;
  at::parallel_for(0, docs.size() * 64, 1, [&](int64_t from, int64_t to) {
    for (int64_t x = from; x < to; x++) {
      auto [i, j] = docs[x / 64];
      int64_t tokens = parts[i].tokens, share = (tokens + 63) / 64;
      for (int64_t t = x % 64 * share; t < std::min(tokens, (x % 64 + 1) * share); t++) {
        T *ok = work.dk.at(parts[i].row, parts[i].head, parts[i].first + t), *ov = work.dv.at(parts[i].row, parts[i].head, parts[i].first + t);
        for (int64_t d = 0; d < dim; d += W) {
          F a{}, b{};
          for (int64_t c = i; c < j; c++)
            if (parts[c].end > t) {
              float* base = partials + parts[c].partial;
              a += load(base + t * dim + d);
              b += load(base + (round_up(parts[c].end, (Backward<T, C>::BLOCK)) + t) * dim + d);
            }
          store(ok + d, a * work.scale);
          store(ov + d, b);
        }
      }
    }
  });
}


template <typename T>
View<T> view(int i, void* const* tensors, const int64_t* strides) {
  auto* s = strides + 4 * i;
  return {(T*)tensors[i], s[0], s[1], s[2], s[3]};
}

template <typename T, typename C>
void dispatch(bool back, Shape shape, float scale, void* const* t, const int64_t* s, float* lse, const int32_t* documents, int64_t n) {
  if (back) {
    backward(Backward<T, C>{shape, scale, view<const T>(0, t, s), view<const T>(1, t, s), view<const T>(2, t, s), view<const T>(3, t, s),
                   view<const T>(4, t, s), view<T>(5, t, s), view<T>(6, t, s), view<T>(7, t, s), lse}, documents, n);
  } else {
    Forward<T, C> work{shape, scale, view<const T>(0, t, s), view<const T>(1, t, s), view<const T>(2, t, s), view<T>(3, t, s), lse};
    int64_t floats;
    auto tasks = cut(work, documents, n, &floats);
    run_tasks(work, tasks, nullptr);
  }
}
} // namespace

extern "C" const char* trainwright_attention(int back, int type, const int64_t* sizes, float scale, void* const* tensors, const int64_t* strides, float* lse, const int32_t* documents, int64_t n) {
  static thread_local std::string error;
  try {
    Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    if (type == 0)
      dispatch<float, float>(back, shape, scale, tensors, strides, lse, documents, n);
    else if (type == 1)
      dispatch<BFloat16, BFloat16>(back, shape, scale, tensors, strides, lse, documents, n);
    else
      dispatch<BFloat16, float>(back, shape, scale, tensors, strides, lse, documents, n);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
