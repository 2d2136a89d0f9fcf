// Sums over pairs of equal ids on the CPU: rows ordered by id, classes shared among threads, registration.
#include "contrastive/class_sums.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "contrastive/arguments.h"
#include "contrastive/blocking.h"

namespace gapkern::contrastive {
namespace {

constexpr int64_t kTaskElements = int64_t(1) << 15;  // of both sides, in a task
constexpr int64_t kFewTasks = 32;                    // up to which columns are shared out too
constexpr int64_t kRun = 64;                         // columns of a task then

const ClassSumsKernels& table() { return GAPKERN_FOR_ACTIVE_ISA(class_sums_kernels); }

struct Given {
  Tensor x, y, row_ids, column_ids;  // contiguous
  bool distances;
  int64_t label_offset;
  bool labelled;

  int64_t n() const { return x.size(0); }
  int64_t m() const { return y.size(0); }
  int64_t d() const { return x.size(1); }
};

Given check(const Tensor& x, const Tensor& y, const Tensor& row_ids, const Tensor& column_ids,
            const std::string& similarity, int64_t label_offset, bool labelled) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x and y: expected shapes (N, D) and (M, D)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y: expected the dtype of x");
  STD_TORCH_CHECK(row_ids.numel() == x.size(0), "row_ids: expected ", x.size(0), " elements, got ", row_ids.numel());
  STD_TORCH_CHECK(column_ids.numel() == y.size(0), "col_ids: expected ", y.size(0), " elements, got ",
                  column_ids.numel());
  Similarity parsed;
  STD_TORCH_CHECK(parse_similarity(similarity, &parsed), "similarity: expected 'dot' or 'sqeuclidean', got '",
                  similarity, "'");
  return {torch::stable::contiguous(x),
          torch::stable::contiguous(y),
          as_type(row_ids, ScalarType::Long),
          as_type(column_ids, ScalarType::Long),
          parsed == Similarity::sqeuclidean,
          label_offset,
          labelled};
}

// Calls f with the kernels of a dtype.
template <class F>
void by_dtype(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(table().f32);
    case ScalarType::Double:
      return f(table().f64);
    case ScalarType::BFloat16:
      return f(table().bf16);
    case ScalarType::Half:
      return f(table().f16);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

// The rows of both sides by class, and the classes in groups of about a task's work.
class Partition {
 public:
  struct Class {
    int64_t row, rows, column, columns;  // first places in the orders, and how many
    bool pairs;                          // whether it has any beside a label
  };

  explicit Partition(const Given& g)
      : row_order_(in_order(g.row_ids)),
        column_order_(in_order(g.column_ids)),
        row_label_(g.n(), -1),
        column_label_(g.m(), -1) {
    const int64_t* const rows = g.row_ids.const_data_ptr<int64_t>();
    const int64_t* const columns = g.column_ids.const_data_ptr<int64_t>();
    for (int64_t i = std::max<int64_t>(0, -g.label_offset); g.labelled && i < g.n(); ++i) {
      const int64_t j = i + g.label_offset;
      if (j >= g.m()) break;
      if (rows[i] != columns[j]) continue;
      row_label_[i] = j;
      column_label_[j] = i;
    }
    int64_t size = 0;
    for (int64_t r = 0, c = 0; r < g.n() || c < g.m();) {
      const int64_t id = c == g.m() || (r < g.n() && rows[row_order_[r]] < columns[column_order_[c]])
                             ? rows[row_order_[r]]
                             : columns[column_order_[c]];
      Class found{.row = r, .rows = 0, .column = c, .columns = 0, .pairs = false};
      for (; r < g.n() && rows[row_order_[r]] == id; ++r) ++found.rows;
      for (; c < g.m() && columns[column_order_[c]] == id; ++c) ++found.columns;
      const bool label = found.rows == 1 && found.columns == 1 && row_label_[row_order_[found.row]] >= 0;
      found.pairs = found.rows > 0 && found.columns > 0 && !label;
      if (size == 0) groups_.push_back(int64_t(classes_.size()));
      classes_.push_back(found);
      size += (found.rows + found.columns) * g.d();
      if (size >= kTaskElements) size = 0;
    }
    groups_.push_back(int64_t(classes_.size()));
    run_ = int64_t(groups_.size()) > kFewTasks ? g.d() : std::min(g.d(), kRun);
    runs_ = divide_up(g.d(), run_);
  }

  int64_t runs() const { return runs_; }  // of columns

  // Calls f(class, run, its first column, how many) in parallel.
  template <class F>
  void for_each(const Given& g, const F& f) const {
    parallel(int64_t(groups_.size() - 1) * runs_, [&](int64_t item) {
      const int64_t group = item / runs_, run = item % runs_, first = run * run_;
      for (int64_t k = groups_[group]; k < groups_[group + 1]; ++k)
        f(classes_[k], run, first, std::min(run_, g.d() - first));
    });
  }

  template <class T>
  ClassBlock<T> block(const Given& g, const Class& of, int64_t first, int64_t depth) const {
    const T* const x = static_cast<const T*>(g.x.data_ptr()) + first;
    const T* const y = static_cast<const T*>(g.y.data_ptr()) + first;
    return {.own = {x, row_order_.data() + of.row, of.rows},
            .other = {y, column_order_.data() + of.column, of.columns},
            .label = row_label_.data(),
            .depth = depth,
            .stride = g.d(),
            .distances = g.distances};
  }
  // The same as the columns see it.
  template <class T>
  ClassBlock<T> turned(ClassBlock<T> block) const {
    std::swap(block.own, block.other);
    block.label = column_label_.data();
    return block;
  }

 private:
  static std::vector<int64_t> in_order(const Tensor& ids) {
    const int64_t* const id = ids.const_data_ptr<int64_t>();
    std::vector<int64_t> order(ids.numel());
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
    return order;
  }

  std::vector<int64_t> row_order_, column_order_, row_label_, column_label_;
  std::vector<Class> classes_;
  std::vector<int64_t> groups_;  // first classes, and their number
  int64_t run_, runs_;
};

std::tuple<Tensor, Tensor> class_sums(const Tensor& x, const Tensor& y, const Tensor& row_ids, const Tensor& column_ids,
                                      std::string similarity, int64_t label_offset, bool labelled) {
  const Given g = check(x, y, row_ids, column_ids, similarity, label_offset, labelled);
  const Partition partition(g);
  std::vector<double> rows(partition.runs() * g.n(), 0.), columns(partition.runs() * g.m(), 0.);
  by_dtype(x.scalar_type(), [&]<class T>(const ClassSums<T>& kernels) {
    partition.for_each(g, [&](const Partition::Class& of, int64_t run, int64_t first, int64_t depth) {
      if (!of.pairs) return;
      std::vector<double> scratch(depth);
      const ClassBlock<T> block = partition.block<T>(g, of, first, depth);
      kernels.sums(block, scratch.data(), rows.data() + run * g.n());
      kernels.sums(partition.turned(block), scratch.data(), columns.data() + run * g.m());
    });
  });
  const auto total = [&](const std::vector<double>& of_runs, int64_t count) {
    Tensor out = empty(x, {count}, ScalarType::Double);
    double* const to = out.mutable_data_ptr<double>();
    for (int64_t i = 0; i < count; ++i) {
      to[i] = 0;
      for (int64_t run = 0; run < partition.runs(); ++run) to[i] += of_runs[run * count + i];
    }
    return out;
  };
  return {total(rows, g.n()), total(columns, g.m())};
}

// The gradient of block.own's rows.
template <class T>
void form(const ClassSums<T>& kernels, const ClassBlock<T>& block, bool pairs, const double* by_own,
          const double* by_other, double* scratch, T* out) {
  if (pairs) return kernels.gradient(block, by_own, by_other, scratch, out);
  for (int64_t k = 0; k < block.own.count; ++k) {
    T* const row = out + block.own.members[k] * block.stride;
    std::fill(row, row + block.depth, T{});
  }
}

std::tuple<Tensor, Tensor> class_sums_backward(const Tensor& grad_row, const Tensor& grad_col, const Tensor& x,
                                               const Tensor& y, const Tensor& row_ids, const Tensor& column_ids,
                                               std::string similarity, int64_t label_offset, bool labelled,
                                               std::vector<bool> needs) {
  const Given g = check(x, y, row_ids, column_ids, similarity, label_offset, labelled);
  STD_TORCH_CHECK(needs.size() == 2, "needs: expected two flags");
  STD_TORCH_CHECK(grad_row.numel() == g.n() && grad_col.numel() == g.m(),
                  "contrastive_class_sums_backward: gradients do not match x and y");
  const Tensor of_rows = as_type(grad_row, ScalarType::Double), of_columns = as_type(grad_col, ScalarType::Double);
  const double* const by_rows = of_rows.const_data_ptr<double>();
  const double* const by_columns = of_columns.const_data_ptr<double>();
  const Partition partition(g);
  const Tensor none = empty(x, {0}, x.scalar_type());
  // Not from the caching allocator, which would hold them beside the gradients that they are added to.
  const Tensor grad_x = needs[0] ? fresh_like(g.x) : none, grad_y = needs[1] ? fresh_like(g.y) : none;
  by_dtype(x.scalar_type(), [&]<class T>(const ClassSums<T>& kernels) {
    T* const to_x = static_cast<T*>(grad_x.data_ptr());
    T* const to_y = static_cast<T*>(grad_y.data_ptr());
    partition.for_each(g, [&](const Partition::Class& of, int64_t, int64_t first, int64_t depth) {
      std::vector<double> scratch(2 * depth);
      const ClassBlock<T> block = partition.block<T>(g, of, first, depth);
      if (needs[0]) form(kernels, block, of.pairs, by_rows, by_columns, scratch.data(), to_x + first);
      if (needs[1]) form(kernels, partition.turned(block), of.pairs, by_columns, by_rows, scratch.data(), to_y + first);
    });
  });
  return {grad_x, grad_y};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_class_sums", TORCH_BOX(&gapkern::contrastive::class_sums));
  m.impl("contrastive_class_sums_backward", TORCH_BOX(&gapkern::contrastive::class_sums_backward));
}
