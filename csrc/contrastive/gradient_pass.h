// The part that the softmax losses' backward passes share: dS chunk by chunk, what is summed of it, and its products.
#pragma once
#include <vector>

#include "contrastive/gradients.h"
#include "contrastive/side_weights.h"

namespace gapkern::contrastive {

template <class T>
class GradientPass {
 public:
  // images, texts: gradients, null where not wanted; of a side with itself, `own`, both are the same. `sums`: the
  // kernel writes sums over rows and over columns.
  GradientPass(const Problem<T>& problem, T* images, T* texts, bool sums, bool own = false)
      : p_(problem),
        cut_(problem.blocking),
        sums_wanted_(sums),
        own_(own),
        factor_(factor_in_gradients(problem)),
        label_t_(p_.n, T(0)),
        label_gradient_(p_.n, T(0)),
        operands_(problem, cut_.chunk),
        gradients_(problem, images, texts, own),
        scale_sums_(cut_.stripes * blocks()),
        sums_(cut_.stripes * blocks()),
        row_sum_(sums ? cut_.stripes * cut_.chunk : 0),
        column_sum_(sums ? blocks() * cut_.stripes * kStripe : 0),
        row_total_(sums ? p_.n : 0, 0.),
        column_total_(sums && !own ? p_.m : 0, 0.) {}

  double factor() const { return factor_; }  // that dS has been multiplied by

  // dS at the label of row i, without the factor.
  void set_label(int64_t i, double t, double gradient) {
    label_t_[i] = T(t);
    label_gradient_[i] = T(factor_ * gradient);
  }

  // Packs what the chunk's blocks need, but for those that are kept.
  template <class Kept>
  void pack(const Chunk& chunk, const Kept& kept) {
    if (chunk.row0 == 0 && !kept.reaches(p_.n)) operands_.pack_texts();
    if (!kept.reaches(chunk.row0 + chunk.rows)) operands_.pack_images(chunk);
  }

  // The chunk's blocks, of a side with itself those that reach above the diagonal.
  std::vector<BlockIndex> blocks_of(const Chunk& chunk) const {
    return own_ ? cut_.blocks_above(chunk) : cut_.blocks(chunk);
  }

  // A GradientBlock or ClassesGradientBlock with what does not depend on classes.
  template <class Block, class Kept>
  Block begin(const Chunk& chunk, const BlockIndex& at, int64_t item, const Kept& kept) {
    const int64_t i0 = at.block * cut_.block, row = chunk.row0 + i0;
    Block b{operands_.block(chunk, at)};
    b.exponents = p_.range.exponents();
    b.label_t = label_t_.data() + row;
    b.label_gradient = label_gradient_.data() + row;
    b.kept = kept.block(b, row, at.stripe * cut_.stripe);
    b.out = gradients_.output(at, &scale_sums_[item]);
    b.sum = &sums_[item];
    if (!sums_wanted_) return b;
    b.row_sum = row_sum_.data() + at.stripe * cut_.chunk + i0;
    b.column_sum = column_sum_.data() + (at.block * cut_.stripes + at.stripe) * kStripe;
    return b;
  }

  // Adds what the chunk's blocks have summed, and their products.
  void finish(const Chunk& chunk) {
    const std::vector<BlockIndex> found = blocks_of(chunk);
    for (int64_t item = 0; item < int64_t(found.size()); ++item) add(chunk, found[item], item);
    gradients_.multiply(chunk);
  }
  void end() { gradients_.finish(factor_, row_total_, column_total_); }

  // What the kernel summed, over all of the other side.
  const std::vector<double>& row_totals() const { return row_total_; }
  const std::vector<double>& column_totals() const { return column_total_; }

  double scale_gradient() const { return scale_total_ / factor_; }
  // Where the sum of dS is known to be `exact`, without the factor: what the computed one has too much of, as where
  // kept logits are coarse and the labels do not cancel it, is taken off at the labels' mean.
  double scale_gradient(double exact, double mean_t) const {
    return (scale_total_ - mean_t * (total_ - factor_ * exact)) / factor_;
  }

 private:
  int64_t blocks() const { return divide_up(cut_.chunk, cut_.block); }

  void add(const Chunk& chunk, const BlockIndex& at, int64_t item) {
    scale_total_ += scale_sums_[item];
    total_ += sums_[item];
    if (!sums_wanted_) return;
    std::vector<double>& columns = own_ ? row_total_ : column_total_;
    const int64_t i0 = at.block * cut_.block;
    for (int64_t i = i0; i < std::min(chunk.rows, i0 + cut_.block); ++i)
      row_total_[chunk.row0 + i] += row_sum_[at.stripe * cut_.chunk + i];
    for (int64_t j = 0; j < cut_.stripe_columns(at.stripe); ++j)
      columns[at.stripe * cut_.stripe + j] += column_sum_[(at.block * cut_.stripes + at.stripe) * kStripe + j];
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const bool sums_wanted_, own_;
  const double factor_;
  std::vector<T> label_t_, label_gradient_;
  LogitOperands<T> operands_;
  LogitGradients<T> gradients_;
  std::vector<double> scale_sums_, sums_;  // of the chunk's blocks
  std::vector<T> row_sum_, column_sum_;
  std::vector<double> row_total_, column_total_;
  double scale_total_ = 0, total_ = 0;
};

}  // namespace gapkern::contrastive
