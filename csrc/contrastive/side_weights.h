// One side's weights in dS, for the gradient kernels.
#pragma once
#include <vector>

#include "contrastive/softmax.h"

namespace gapkern::contrastive {

// An ordinary logit_scale goes into dS, whose products are then the gradients.
template <class T>
double factor_in_gradients(const Problem<T>& p) {
  const bool ordinary = std::abs(p.scale) >= 1e-4 && std::abs(p.scale) <= 1e4;
  return !p.distances && ordinary ? p.scale : 1;
}

// One side's part of dS: its weights and references for GradientBlock.
template <class T>
class SideWeights {
 public:
  SideWeights(const ExponentRange<T>& range, const Statistics<const double>& stats, const double* gradient,
              double factor)
      : k_(range.k()),
        stats_(stats),
        gradient_(gradient),
        weight_(stats.count + kPadding, T(0)),
        reference_(range.tracked() ? stats.count + kPadding : 0, T(0)),
        log2_(reference_) {
    for (int64_t i = 0; i < stats.count; ++i) {
      if (stats.log2[i] == -INFINITY) continue;  // a sum of no terms: nothing has its weight
      const double down = range.tracked() ? 0 : range.shift() - k_ * stats.reference[i] - stats.log2[i];
      weight_[i] = T(factor * gradient[i] * std::exp2(down));
      if (!range.tracked()) continue;
      reference_[i] = T(stats.reference[i]);
      log2_[i] = T(stats.log2[i]);
    }
  }

  const T* weight(int64_t i) const { return weight_.data() + i; }
  // Null unless exponents are tracked.
  const T* reference(int64_t i) const { return reference_.empty() ? nullptr : reference_.data() + i; }
  const T* log2(int64_t i) const { return log2_.empty() ? nullptr : log2_.data() + i; }
  // This side's part of dS at a label.
  double at_label(int64_t i, double label_t) const {
    return gradient_[i] * std::exp2(k_ * (label_t - stats_.reference[i]) - stats_.log2[i]);
  }

 private:
  static constexpr int64_t kPadding = 64;  // whole vectors are read

  const double k_;
  const Statistics<const double> stats_;
  const double* const gradient_;
  std::vector<T> weight_, reference_, log2_;
};

}  // namespace gapkern::contrastive
