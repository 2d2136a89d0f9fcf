// The CPU kernels of the contrastive losses: what each instruction set provides for a block of logits.
//
// Words: a *stripe* is a run of columns (texts), a *block* some rows against one stripe, a *panel* the rows or columns
// that the register tile covers at once. Operands are packed so that the inner loop reads them in order:
//   panels   [ceil(n / width)][depth][width]   D is the depth: both sides of the logits; width = mr or nr
//   slices   [ceil(D / nr)][depth][nr]         the rows are the depth: right-hand sides of the gradients
// T is the arithmetic type (float or double). With bfloat16 products a packed word is two bfloat16 neighbours along the
// depth, accumulated in float32. Every sum has a fixed order that does not depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/each_isa.h"

namespace gapkern::contrastive {

// The columns of a stripe at most: a multiple of every arithmetic's nr. Wide ones read and write dX less often; small
// problems take narrow ones, so that every thread has some.
constexpr int kStripe = 448, kNarrowStripe = 224;
constexpr int64_t kNarrowUpTo = 2048;  // columns
// Words between the rows of dS. Not a power of two, so that the rows the register tile reads at once do not fall on the
// same cache sets; a constant, so that multiples become address offsets.
constexpr int row_stride(int group) { return kStripe / group + 16; }

struct Shape {
  int mr;     // rows of the register tile
  int nr;     // columns of the register tile
  int group;  // depth elements per packed word: 1, or 2 with bfloat16 products
  int word;   // bytes of a packed word
};

// U, const where T is.
template <class T, class U>
using SameConst = std::conditional_t<std::is_const_v<T>, const U, U>;

// `rows` rows against one stripe of `cols` columns: t = <x, y> or, where `distances` is set, -||x - y||^2. Distances
// are sums of squared differences: norms and a product would cancel for near pairs, which count most, and save nothing
// where subtractions have ports of their own. Arrays over columns are read and written in whole vectors: their
// allocation extends one vector past the last element.
template <class T>
struct LogitBlock {
  const void* images;  // panels of the rows
  const void* texts;   // panels of the stripe
  int64_t rows, cols, depth;
  bool distances;  // never with bfloat16 products
  int64_t label;   // column within the stripe of row 0's label; row i's is i further
};

// A block's logits between the forward and the backward pass, which reads them (T const). Both null: not kept.
template <class T>
struct KeptBlock {
  T* t;                          // [rows, cols]
  SameConst<T, int16_t>* codes;  // [rows, cols] t / unit, rounded; bfloat16 products only
  std::remove_const_t<T> unit;
};

// Where dS, the gradient of the loss by the logit, goes.
struct GradientOutput {
  void* by_rows;      // left operand of dX, row-major, row_stride(group) words a row; null: no product wants dS
  void* by_columns;   // with bfloat16 products: left operand of dY, panels of mr columns, two rows a word
  int64_t panel;      // words between those panels
  double* scale_sum;  // sum of dS t over the block
};

// What keeps a block's exponentials within the range of T.
enum class Range {
  normal,   // 2^(k t): all normal numbers
  shifted,  // 2^(k t - shift): none too large; those below the normal range count as its lowest number
  tracked,  // relative to the largest logits of the row and of the column
};

// The softmax losses' logit of a pair is k t in units of log2. Rounded to T, k would cost a small loss as many digits
// as log2 of the loss has units.
template <class T>
struct Exponents {
  Range range;
  T k, k_low;  // k, and what is left of it
  T shift;     // an integer
};

// Labels are in none of the sums: a small loss is what the others amount to beside the label, and would drown in it.
// References are logits in units of t, times the sign of k: differences t - t' of near logits are exact, whatever k is.
template <class T>
struct ForwardBlock : LogitBlock<T> {
  Exponents<T> exponents;
  T* row_sum;         // out [rows]  sum over the stripe of the exponentials
  T* row_largest;     // out [rows]  tracked only: sign(k) times the row's reference; -inf: no logit but the label's
  T* column_sum;      // out [kStripe]
  T* column_largest;  // out [kStripe]
  T* label_t;         // out [rows]: t at the label, where the stripe holds it
  KeptBlock<T> kept;  // out
};

// The same block in the backward pass.
//   tracked:    dS = a_i 2^(k (t - row_reference_i) - row_log2_i) + b_j 2^(k (t - column_reference_j) - column_log2_j)
//   otherwise:  dS = 2^(k t - shift) (a_i + b_j)
// and label_gradient_i at the label of row i: there p - 1 of a rounded p would be all rounding for a small loss.
template <class T>
struct GradientBlock : LogitBlock<T> {
  Exponents<T> exponents;
  const T* row_weight;  // a [rows]
  const T* row_reference;
  const T* row_log2;       // log2 of the row's sum about its reference
  const T* column_weight;  // b [cols]
  const T* column_reference;
  const T* column_log2;
  const T* label_t;  // t at the label [rows]
  const T* label_gradient;
  KeptBlock<const T> kept;
  GradientOutput out;
  double* sum;    // out: the sum of dS over the block
  T* row_sum;     // out [rows]: sums of dS; null: not wanted
  T* column_sum;  // out [kStripe]
};

// What a pair is, the first that applies: the label; a *positive* or left out, by equal ids; left out, since t or the
// guide's t is above a limit; a *negative*. Ids and limits of T, whole vectors of the columns'. Without ids no two are
// equal; without limits they are infinite.
template <class T>
struct PairClasses {
  const T *row_ids, *column_ids;
  const T *row_limit, *column_limit;
  const void *guide_images, *guide_texts;  // panels of T; null: no guide
  int64_t guide_depth;
  const T *guide_row_limit, *guide_column_limit;
};

enum PairClass : int { kNegative, kPositive, kClasses };

// ForwardBlock with sums over each class. Where a side is compared with itself, only pairs above the diagonal count,
// which begins at column `label`: (i, j) goes into the sums of row i and of column j.
template <class T>
struct ClassesForwardBlock : LogitBlock<T> {
  Exponents<T> exponents;
  PairClasses<T> classes;
  T *row_sum[kClasses], *row_largest[kClasses];        // out [rows]
  T *column_sum[kClasses], *column_largest[kClasses];  // out [kStripe]
  T* label_t;                                          // out [rows]
  KeptBlock<T> kept;                                   // out
};

template <class T>
struct ClassWeights {
  const T *weight, *reference, *log2;  // as in GradientBlock
};

// GradientBlock whose pairs have the weights of their class.
template <class T>
struct ClassesGradientBlock : LogitBlock<T> {
  Exponents<T> exponents;
  PairClasses<T> classes;
  ClassWeights<T> rows_of[kClasses], columns_of[kClasses];
  const T *label_t, *label_gradient;
  KeptBlock<const T> kept;
  GradientOutput out;
  double* sum;
  T *row_sum, *column_sum;
};

// The sigmoid loss of a block and its gradient in one pass. With l = scale t + bias:
//   loss += softplus(l),  dS = sigmoid(l);  at the label softplus(-l) and -sigmoid(-l).
template <class T>
struct SigmoidBlock : LogitBlock<T> {
  T scale, bias;
  double* loss_sum;
  double* bias_sum;  // sum of dS
  GradientOutput out;
};

// Ids are compared exactly, in lanes as wide as T.
template <class T>
using Id = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The same with positives by ids: pairs of equal ids, with a = row_weight + column_weight,
//   loss += a softplus(-l),  dS = -a sigmoid(-l),
// or, where a is a soft target, (1 - a) softplus(l) and (1 - a) sigmoid(l) more. There is no label.
template <class T>
struct MaskedSigmoidBlock : SigmoidBlock<T> {
  const Id<T>*row_ids, *column_ids;
  const T *row_weight, *column_weight;
};

// C [rows, cols] (=, +=) A B: A is dS of one stripe, B packed slices of the other side that follow each other. Each
// panel of A's rows meets all the slices before the next: it stays in the first-level cache, and they come in order.
template <class T>
struct ProductBlock {
  const void* a;
  const void* slices;
  int64_t panel;  // words between A's panels of mr rows
  int64_t depth, rows, cols;
  T* c;
  int64_t c_stride;
  bool first;  // C is written, not added to
};

// kernels_products.cpp
template <class T>
struct ProductKernels {
  Shape shape;
  double (*squared_norm)(const T* x, const T* centre, int64_t depth);
  void (*pack_panel)(const T* x, int64_t rows, int width, int64_t depth, void* out);
  void (*pack_slice)(const T* x, int64_t rows, int64_t depth, int64_t slice, const T* centre, void* out);
  void (*product_rows)(const ProductBlock<T>&);     // A read along by_rows: dX
  void (*product_columns)(const ProductBlock<T>&);  // A read down by_rows or by_columns: dY
};

// kernels_softmax.cpp
template <class T>
struct SoftmaxKernels {
  void (*forward)(const ForwardBlock<T>&);
  void (*gradient)(const GradientBlock<T>&);
};

// kernels_classes.cpp: one kernel for each kind of classes.
struct ClassesKind {
  bool positive;  // equal ids are positives
  bool own;       // a side with itself; never guided
  bool guided;
  int index() const { return int(positive) + (own ? 2 : guided ? 4 : 0); }
};

template <class T>
struct ClassesKernels {
  void (*classes_forward[6])(const ClassesForwardBlock<T>&);
  void (*classes_gradient[6])(const ClassesGradientBlock<T>&);
};

// kernels_sigmoid.cpp
template <class T>
struct SigmoidKernels {
  void (*sigmoid)(const SigmoidBlock<T>&);
};

// kernels_masked_sigmoid.cpp
template <class T>
struct MaskedSigmoidKernels {
  void (*masked_sigmoid[2])(const MaskedSigmoidBlock<T>&);  // by weights, and by soft targets
};

// One file's kernels in each arithmetic.
template <template <class> class Kernels>
struct KernelSet {
  Kernels<float> f32;
  Kernels<double> f64;
  bool has_bf16;  // native bfloat16 products
  Kernels<float> bf16;
};

GAPKERN_DECLARE_FOR_EACH_ISA(const KernelSet<ProductKernels>& product_kernels();
                             const KernelSet<SoftmaxKernels>& softmax_kernels();
                             const KernelSet<ClassesKernels>& classes_kernels();
                             const KernelSet<SigmoidKernels>& sigmoid_kernels();
                             const KernelSet<MaskedSigmoidKernels>& masked_sigmoid_kernels())

// All kernels of one arithmetic.
template <class T>
struct Engine : ProductKernels<T>, SoftmaxKernels<T>, ClassesKernels<T>, SigmoidKernels<T>, MaskedSigmoidKernels<T> {};

}  // namespace gapkern::contrastive
