// The state of the softmax losses between the passes, and the sums it is made from.
#pragma once
#include <cmath>

#include "contrastive/kept.h"

namespace gapkern::contrastive {

// sum * 2^(k reference): a sum of exponentials about the largest logit seen so far.
struct Exponentials {
  double sum = 0;
  double reference = 0;
  bool empty = true;

  void add(double other_sum, double other_reference, double k) {
    if (other_sum == 0) return;
    if (empty || other_reference == reference) {
      sum += other_sum;
      reference = other_reference;
      empty = false;
      return;
    }
    const double above = k * (other_reference - reference);
    if (above > 0) {
      sum = sum * std::exp2(-above) + other_sum;
      reference = other_reference;
    } else {
      sum += other_sum * std::exp2(above);
    }
  }
};

// The log-sum-exps of one side in two parts, lse = scale reference + ln(2) log2: together they would round where |k t|
// is large.
template <class Real>  // double, const in the backward pass
struct Statistics {
  Real *reference, *log2;  // [count]
  int64_t count;

  void set(int64_t i, const Exponentials& e) const {
    reference[i] = e.reference;
    log2[i] = std::log2(e.sum);
  }
  // With the label's exponential, which no sum has yet. Relative to it, where it is the larger, log2 is the loss.
  void set(int64_t i, const Exponentials& e, double scale, double label_t) const {
    const double above = scale * kLog2e * (e.reference - label_t), others = std::log2(e.sum) + above;
    if (e.empty || others <= 0) {
      reference[i] = label_t;
      log2[i] = e.empty ? 0 : std::log1p(std::exp2(others)) * kLog2e;
    } else {
      reference[i] = e.reference;
      log2[i] = std::log2(e.sum + std::exp2(-above));
    }
  }
  double lse(int64_t i, double scale) const { return scale * reference[i] + log2[i] / kLog2e; }

  // Sums of no terms, whose log2 is -inf, are.
  template <class T>
  bool within(const ExponentRange<T>& range) const {
    for (int64_t i = 0; i < count; ++i)
      if (log2[i] > -INFINITY && !range.holds(reference[i], log2[i])) return false;
    return true;
  }
};

// What the forward pass leaves to the backward pass, in which T is const.
template <class T>
struct Softmax {
  using Real = SameConst<T, double>;
  Statistics<Real> rows, columns;
  Real* label_t;  // [n] t at the labels
  KeptLogits<T> kept;

  // Whether no sum fell below the range: shifted exponents may do that.
  bool within(const ExponentRange<std::remove_const_t<T>>& range) const {
    return !range.shifted() || (rows.within(range) && columns.within(range));
  }
};

// Statistics from [2 or more, count].
template <class Real>
Statistics<Real> statistics(Real* values, int64_t count) {
  return {.reference = values, .log2 = values + count, .count = count};
}

// The state in row_stats [3, n], column_stats [2, m] and kept [rows, m]. Logits of another type stay unused, as where
// float64 solves a problem of float32.
template <class T>
Softmax<T> softmax(const Problem<std::remove_const_t<T>>& p, typename Softmax<T>::Real* row_stats,
                   typename Softmax<T>::Real* column_stats, T* kept, int64_t kept_rows) {
  return {.rows = statistics(row_stats, p.n),
          .columns = statistics(column_stats, p.m),
          .label_t = row_stats + 2 * p.n,
          .kept = {p, kept, kept_rows}};
}

inline int64_t kept_rows_in(const Arguments& a, const Tensor& kept) {
  return kept.scalar_type() == a.type ? kept.size(0) : 0;
}

}  // namespace gapkern::contrastive
