// See attention.h. Compiled once for every instruction set, as `LATHE_KERNELS`.
//
// Matrices in the scratch memory are fp32, their rows a whole number of vectors long and zero behind the
// end. A document is read once; its queries then pass in blocks, each against the keys before its end.
// Softmax needs no running maximum, since a block's scores fit into the cache: QUERIES x length numbers. A single
// query, as in a step of decoding, reads keys and values where they lie.
// The backward pass computes them once more from the logarithms of their sums (Dao et al., arXiv 2205.14135).
#include "attention.h"

#define restrict __restrict__

namespace lathe {
namespace {

constexpr int64_t LANES = 16;
/// Queries of a block.
constexpr int64_t QUERIES = 24;
/// Rows of a product that are kept in registers.
#ifdef __AVX512F__
constexpr int ROWS = 12;
#else
constexpr int ROWS = 4;
#endif

typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));

int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

Vector& at(float* x) { return *reinterpret_cast<Vector*>(x); }
const Vector& at(const float* x) { return *reinterpret_cast<const Vector*>(x); }

float as_float(float x) { return x; }
float as_float(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

void store(float x, float& to) { to = x; }

/// To the nearest, ties to even.
void store(float x, BFloat16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = x == x ? rounded : 0x7fc0;
}

/// e^x to 2 units in the last place for x from -87 to 88; a smaller x counts as -87.
Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  x = x < lowest ? lowest : x;
  // Adding and taking away 1.5 * 2^23 rounds to a whole number.
  const Vector magic = Vector{} + 12582912.0f;
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector whole = shifted - magic;
  const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers exponent = ((Integers)shifted - (Integers)magic) << 23;
  return (Vector)((Integers)p + exponent);
}

/// Natural logarithm of a positive, normal number.
float logarithm(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  int32_t exponent = int32_t(bits >> 23) - 127;
  double m = __builtin_bit_cast(float, (bits & 0x7fffff) | 0x3f800000);
  if (m > 1.41421356) m *= 0.5, exponent++;
  // log m = 2 artanh((m - 1) / (m + 1)), of which |argument| < 0.172.
  const double s = (m - 1) / (m + 1), s2 = s * s;
  const double series = 1 + s2 * (1 / 3.0 + s2 * (1 / 5.0 + s2 * (1 / 7.0 + s2 * (1 / 9.0 + s2 / 11.0))));
  return float(exponent * 0.693147180559945309 + 2 * s * series);
}

Vector load(const float* x) { return at(x); }

Vector load(const BFloat16* x) {
  typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(64)));
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words) << 16);
}

/// The first `count` numbers of a vector, then zeros.
template <class T>
Vector load(const T* x, int64_t count) {
  Vector part{};
  for (int64_t i = 0; i < count; i++) part[i] = as_float(x[i]);
  return part;
}

/// What `join` makes of the two halves of a vector, of the halves of that, and so on.
template <class Join>
float fold(Vector x, Join join) {
  x = join(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  x = join(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  x = join(x, __builtin_shufflevector(x, x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return x[0];
}

float sum(Vector x) {
  return fold(x, [](Vector a, Vector b) { return a + b; });
}

float greatest(Vector x) {
  return fold(x, [](Vector a, Vector b) { return a > b ? a : b; });
}

/// A matrix whose element (i, k) is `first[i * row + k * column]`.
struct Left {
  const float* first;
  int64_t row, column;
};

/// `M` rows and `N` vectors of c = a b, or c += a b.
template <bool Add, int M, int N>
void tile(Left a, const float* restrict b, int64_t b_row, float* restrict c, int64_t c_row, int64_t depth) {
  Vector sums[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = Add ? at(c + m * c_row + n * LANES) : Vector{};
  for (int64_t k = 0; k < depth; k++)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++)
        sums[m][n] += a.first[m * a.row + k * a.column] * at(b + k * b_row + n * LANES);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) at(c + m * c_row + n * LANES) = sums[m][n];
}

template <bool Add, int M>
void strip(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns, int64_t depth) {
  int64_t n = 0;
  for (; n + 2 * LANES <= columns; n += 2 * LANES) tile<Add, M, 2>(a, b + n, b_row, c + n, c_row, depth);
  if (n < columns) tile<Add, M, 1>(a, b + n, b_row, c + n, c_row, depth);
}

template <bool Add, int M>
void last_strip(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns,
                int64_t depth) {
  if constexpr (M > 0) {
    if (rows == M) return strip<Add, M>(a, b, b_row, c, c_row, columns, depth);
    last_strip<Add, M - 1>(rows, a, b, b_row, c, c_row, columns, depth);
  }
}

/// c = a b, or c += a b. `columns` is a whole number of vectors.
template <bool Add>
void product(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
             int64_t depth) {
  for (; rows >= ROWS; rows -= ROWS, a.first += ROWS * a.row, c += ROWS * c_row)
    strip<Add, ROWS>(a, b, b_row, c, c_row, columns, depth);
  last_strip<Add, ROWS - 1>(rows, a, b, b_row, c, c_row, columns, depth);
}

/// Rows as fp32, times `scale`.
template <class T>
void read(const T* restrict from, int64_t step, int64_t rows, int64_t dim, float scale, float* restrict to) {
  const int64_t width = padded(dim);
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t c = 0; c < dim; c++) to[i * width + c] = as_float(from[i * step + c]) * scale;
    for (int64_t c = dim; c < width; c++) to[i * width + c] = 0;
  }
}

template <class T>
void write(const float* restrict from, int64_t rows, int64_t dim, T* restrict to, int64_t step) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < dim; c++) store(from[i * padded(dim) + c], to[i * step + c]);
}

/// The transpose of `read`'s matrix: `dim` rows of `padded(rows)`.
void transpose(const float* restrict from, int64_t rows, int64_t dim, float* restrict to) {
  const int64_t width = padded(dim), length = padded(rows);
  for (int64_t c = 0; c < dim; c++) {
    for (int64_t i = 0; i < rows; i++) to[c * length + i] = from[i * width + c];
    for (int64_t i = rows; i < length; i++) to[c * length + i] = 0;
  }
}

void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = 0;
}

/// Hands out parts of the scratch memory.
struct Scratch {
  float* next;

  float* take(int64_t count) {
    float* part = next;
    next += count;
    return part;
  }
};

int64_t forward_floats(int64_t past, int64_t length, int64_t dim) {
  const int64_t width = padded(dim), columns = padded(past + length);
  const int64_t copies = length == 1 ? 0 : (2 * width + dim) * columns;
  return copies + QUERIES * (2 * width + columns);
}

int64_t backward_floats(int64_t length, int64_t dim) {
  const int64_t width = padded(dim), columns = padded(length);
  return 4 * length * width + 2 * dim * columns + 4 * QUERIES * width + 2 * QUERIES * columns;
}

/// A row of scores becomes e^(score - offset) up to `count`, and zero behind. Returns the sum.
float exponentiate(float* scores, int64_t count, int64_t columns, float offset) {
  const Vector offsets = Vector{} + offset;
  Vector total{};
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) total += at(scores + j) = exponential(at(scores + j) - offsets);
  if (j < count) {
    Vector rest = exponential(at(scores + j) - offsets);
    for (int64_t i = count - j; i < LANES; i++) rest[i] = 0;
    total += at(scores + j) = rest;
    j += LANES;
  }
  for (; j < columns; j += LANES) at(scores + j) = Vector{};
  return sum(total);
}

float greatest_of(const float* scores, int64_t count) {
  float most = scores[0];
  int64_t j = 0;
  if (count >= LANES) {
    Vector lanes = at(scores);
    for (j = LANES; j + LANES <= count; j += LANES) lanes = at(scores + j) > lanes ? at(scores + j) : lanes;
    most = greatest(lanes);
  }
  for (; j < count; j++) most = scores[j] > most ? scores[j] : most;
  return most;
}

/// Scores become weights, which sum to one once divided by the result. Behind `count` they are zero.
float soften(float* scores, int64_t count, int64_t columns, float* log_sum) {
  const float most = greatest_of(scores, count), total = exponentiate(scores, count, columns, most);
  if (log_sum) *log_sum = most + logarithm(total);
  return total;
}

/// The products of a query with `Keys` neighbouring keys.
template <int Keys, class T>
void score(const float* query, const T* keys, int64_t step, int64_t dim, float* scores) {
  Vector sums[Keys]{};
  int64_t c = 0;
  for (; c + LANES <= dim; c += LANES)
    for (int j = 0; j < Keys; j++) sums[j] += at(query + c) * load(keys + j * step + c);
  for (int j = 0; j < Keys && c < dim; j++) sums[j] += at(query + c) * load(keys + j * step + c, dim - c);
  for (int j = 0; j < Keys; j++) scores[j] = sum(sums[j]);
}

/// `N` vectors of the sum of `count` rows, each times its weight.
template <int N, class T>
void weigh(const float* weights, int64_t count, const T* rows, int64_t step, float* restrict to) {
  Vector sums[N]{};
  for (int64_t j = 0; j < count; j++)
    for (int n = 0; n < N; n++) sums[n] += weights[j] * load(rows + j * step + n * LANES);
  for (int n = 0; n < N; n++) at(to + n * LANES) = sums[n];
}

/// One query of each head.
template <class T>
void forward_one(const Document<T>& document, const Attended<T>& attended, float* memory) {
  const auto [past, length, dim, heads, scale, queries, keys, values] = document;
  const int64_t width = padded(dim), count = past + 1, columns = padded(count);
  Scratch scratch{memory};
  float *q = scratch.take(width), *out = scratch.take(width), *scores = scratch.take(columns);
  for (int64_t head = 0; head < heads; head++) {
    read(queries.first + head * queries.head_step, 0, 1, dim, scale, q);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) score<4>(q, keys.first + j * keys.step, keys.step, dim, scores + j);
    for (; j < count; j++) score<1>(q, keys.first + j * keys.step, keys.step, dim, scores + j);
    const float total = soften(scores, count, columns, attended.log_sums ? attended.log_sums + head * attended.log_sum_step : nullptr);
    int64_t c = 0;
    for (; c + 4 * LANES <= dim; c += 4 * LANES) weigh<4>(scores, count, values.first + c, values.step, out + c);
    for (; c + LANES <= dim; c += LANES) weigh<1>(scores, count, values.first + c, values.step, out + c);
    if (c < dim) {
      Vector rest{};
      for (j = 0; j < count; j++) rest += scores[j] * load(values.first + j * values.step + c, dim - c);
      at(out + c) = rest;
    }
    for (c = 0; c < width; c += LANES) at(out + c) /= total;
    write(out, 1, dim, attended.outputs.first + head * attended.outputs.head_step, 0);
  }
}

template <class T>
void forward(const Document<T>& document, const Attended<T>& attended, float* memory) {
  if (document.length == 1) return forward_one(document, attended, memory);
  const auto [past, length, dim, heads, scale, queries, keys, values] = document;
  const int64_t width = padded(dim), all = past + length, columns = padded(all);
  Scratch scratch{memory};
  float *k_ld = scratch.take(all * width), *k_dl = scratch.take(dim * columns), *v_ld = scratch.take(all * width);
  float *q_md = scratch.take(QUERIES * width), *o_md = scratch.take(QUERIES * width);
  float* scores_ml = scratch.take(QUERIES * columns);
  read(keys.first, keys.step, all, dim, 1, k_ld);
  transpose(k_ld, all, dim, k_dl);
  read(values.first, values.step, all, dim, 1, v_ld);
  for (int64_t head = 0; head < heads; head++) {
    for (int64_t start = 0; start < length; start += QUERIES) {
      const int64_t rows = least(QUERIES, length - start), end = past + start + rows, seen = padded(end);
      read(queries.first + head * queries.head_step + start * queries.step, queries.step, rows, dim, scale, q_md);
      product<false>({q_md, width, 1}, k_dl, columns, scores_ml, columns, rows, seen, dim);
      float sums[QUERIES];
      for (int64_t i = 0; i < rows; i++) {
        float* log_sum = attended.log_sums ? attended.log_sums + head * attended.log_sum_step + start + i : nullptr;
        sums[i] = soften(scores_ml + i * columns, past + start + i + 1, seen, log_sum);
      }
      product<false>({scores_ml, columns, 1}, v_ld, width, o_md, width, rows, width, end);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c += LANES) at(o_md + i * width + c) /= sums[i];
      const auto& outputs = attended.outputs;
      write(o_md, rows, dim, outputs.first + head * outputs.head_step + start * outputs.step, outputs.step);
    }
  }
}

template <class T>
void backward(const Document<T>& document, const Gradients<T>& gradients, float* memory) {
  const auto [past, length, dim, heads, scale, queries, keys, values] = document;
  const int64_t width = padded(dim), columns = padded(length);
  Scratch scratch{memory};
  float *k_ld = scratch.take(length * width), *k_dl = scratch.take(dim * columns);
  float* v_dl = scratch.take(dim * columns);
  float *k_gradient_ld = scratch.take(length * width), *v_gradient_ld = scratch.take(length * width);
  float *q_md = scratch.take(QUERIES * width), *o_md = scratch.take(QUERIES * width);
  float *o_gradient_md = scratch.take(QUERIES * width), *q_gradient_md = scratch.take(QUERIES * width);
  float *p_ml = scratch.take(QUERIES * columns), *s_gradient_ml = scratch.take(QUERIES * columns);
  // The values are needed transposed alone; where they are read first, their gradient is summed later.
  read(values.first, values.step, length, dim, 1, v_gradient_ld);
  transpose(v_gradient_ld, length, dim, v_dl);
  read(keys.first, keys.step, length, dim, 1, k_ld);
  transpose(k_ld, length, dim, k_dl);
  clear(k_gradient_ld, length * width);
  clear(v_gradient_ld, length * width);
  for (int64_t head = 0; head < heads; head++) {
    for (int64_t start = 0; start < length; start += QUERIES) {
      const int64_t rows = least(QUERIES, length - start), end = start + rows, seen = padded(end);
      const auto block = [=](const Rows<const T>& x, float factor, float* to) {
        read(x.first + head * x.head_step + start * x.step, x.step, rows, dim, factor, to);
      };
      block(queries, scale, q_md);
      block(gradients.outputs, 1, o_md);
      block(gradients.output_gradients, 1, o_gradient_md);
      product<false>({q_md, width, 1}, k_dl, columns, p_ml, columns, rows, seen, dim);
      product<false>({o_gradient_md, width, 1}, v_dl, columns, s_gradient_ml, columns, rows, seen, dim);
      for (int64_t i = 0; i < rows; i++) {
        float *p = p_ml + i * columns, *s_gradient = s_gradient_ml + i * columns;
        exponentiate(p, start + i + 1, seen, gradients.log_sums[head * gradients.log_sum_step + start + i]);
        Vector dot{};
        for (int64_t c = 0; c < width; c += LANES) dot += at(o_md + i * width + c) * at(o_gradient_md + i * width + c);
        const Vector delta = Vector{} + sum(dot);
        for (int64_t j = 0; j < seen; j += LANES) at(s_gradient + j) = at(p + j) * (at(s_gradient + j) - delta);
      }
      product<false>({s_gradient_ml, columns, 1}, k_ld, width, q_gradient_md, width, rows, width, end);
      for (int64_t i = 0; i < rows * width; i += LANES) at(q_gradient_md + i) *= scale;
      const auto& to = gradients.queries;
      write(q_gradient_md, rows, dim, to.first + head * to.head_step + start * to.step, to.step);
      product<true>({s_gradient_ml, 1, columns}, q_md, width, k_gradient_ld, width, end, width, rows);
      product<true>({p_ml, 1, columns}, o_gradient_md, width, v_gradient_ld, width, end, width, rows);
    }
  }
  write(k_gradient_ld, length, dim, gradients.keys.first, gradients.keys.step);
  write(v_gradient_ld, length, dim, gradients.values.first, gradients.values.step);
}

}  // namespace

const Kernels LATHE_KERNELS = {forward_floats,    backward_floats, forward<float>,
                               forward<BFloat16>, backward<float>, backward<BFloat16>};

}  // namespace lathe
