// The sigmoid loss (SigLIP) on the CPU, with labels or with positives by ids. Its gradient needs no statistics of rows
// or columns, so the loss and every gradient asked for come from one pass over the blocks: 2NMD for the loss, 6NMD with
// both gradients.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "contrastive/gradients.h"
#include "contrastive/pair_weights.h"

namespace gapkern::contrastive {
namespace {

struct Sums {
  double loss = 0, scale = 0, bias = 0;
};

// images, texts: null where no gradient is wanted. weights: of pairs of equal ids; null: labels are the positives.
template <class T>
Sums run(const Problem<T>& p, double bias, const PairWeights<T>* weights, T* images, T* texts) {
  const Blocking& cut = p.blocking;
  LogitOperands<T> operands(p, cut.chunk);
  operands.pack_texts();
  const LogitGradients<T> gradients(p, images, texts);
  std::vector<Sums> sums(cut.stripes * divide_up(cut.chunk, cut.block));
  Sums total;
  cut.for_each_chunk(cut.chunk, [&](const Chunk& chunk) {
    operands.pack_images(chunk);
    cut.for_each_block(chunk, [&](const BlockIndex& at, int64_t item) {
      SigmoidBlock<T> b{operands.block(chunk, at)};
      b.scale = T(p.scale);
      b.bias = T(bias);
      b.loss_sum = &sums[item].loss;
      b.bias_sum = &sums[item].bias;
      b.out = gradients.output(at, &sums[item].scale);
      if (weights == nullptr)
        p.engine.sigmoid(b);
      else
        p.engine.masked_sigmoid[weights->soft()](
            weights->block(b, chunk.row0 + at.block * cut.block, at.stripe * cut.stripe));
    });
    for (int64_t item = 0; item < cut.items(chunk); ++item) {
      total.loss += sums[item].loss;
      total.scale += sums[item].scale;
      total.bias += sums[item].bias;
    }
    gradients.multiply(chunk);
  });
  gradients.finish(1, {}, {});
  return total;
}

struct Outputs {
  Tensor loss, images, texts, logit_scale, logit_bias;  // the loss and its gradients
};

template <class T>
Outputs call(const Arguments& a, double bias, const SigmoidClasses* classes, const std::vector<bool>& needs) {
  const Problem<T> p(a);
  if (p.range.wants_double()) {
    Outputs out = call<double>(a.in_double(), bias, classes, needs);
    out.images = as_type(out.images, a.type);
    out.texts = as_type(out.texts, a.type);
    return out;
  }
  std::optional<PairWeights<T>> weights;
  if (classes != nullptr) weights.emplace(*classes);
  Tensor images = gradient_of(p.images, needs[0], a.type), texts = gradient_of(p.texts, needs[1], a.type);
  const Sums sums =
      run<T>(p, bias, weights ? &*weights : nullptr, needs[0] ? images.template mutable_data_ptr<T>() : nullptr,
             needs[1] ? texts.template mutable_data_ptr<T>() : nullptr);
  const auto scalar = [&](double value) {
    Tensor t = empty(p.images, {}, ScalarType::Double);
    *t.mutable_data_ptr<double>() = value;
    return t;
  };
  return {.loss = scalar(sums.loss),
          .images = images,
          .texts = texts,
          .logit_scale = scalar(sums.scale),
          .logit_bias = scalar(sums.bias)};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results results(const Arguments& a, const Tensor& logit_bias, const SigmoidClasses* classes,
                const std::vector<bool>& needs) {
  STD_TORCH_CHECK(logit_bias.numel() == 1, "logit_bias: expected one element, got ", logit_bias.numel());
  STD_TORCH_CHECK(needs.size() == 2, "needs: expected two flags");
  const double bias = *as_type(logit_bias, ScalarType::Double).const_data_ptr<double>();
  const Outputs out =
      a.type == ScalarType::Double ? call<double>(a, bias, classes, needs) : call<float>(a, bias, classes, needs);
  return {out.loss, out.images, out.texts, out.logit_scale, out.logit_bias};
}

Results sigmoid_loss(const Tensor& images, const Tensor& texts, const Tensor& logit_scale, const Tensor& logit_bias,
                     int64_t label_offset, std::string precision, std::vector<bool> needs) {
  return results(check(images, texts, logit_scale, "dot", label_offset, precision), logit_bias, nullptr, needs);
}

Results contrastive_masked_sigmoid(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                                   const Tensor& logit_bias, const Tensor& row_ids, const Tensor& col_ids,
                                   const Tensor& row_weights, const Tensor& col_weights, bool soft_targets,
                                   std::string precision, std::vector<bool> needs) {
  const Arguments a = check(x, y, logit_scale, "dot", 0, precision);
  const SigmoidClasses classes = check_classes(a, {row_ids, col_ids, row_weights, col_weights, soft_targets});
  return results(a, logit_bias, &classes, needs);
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("sigmoid_loss", TORCH_BOX(&gapkern::contrastive::sigmoid_loss));
  m.impl("contrastive_masked_sigmoid", TORCH_BOX(&gapkern::contrastive::contrastive_masked_sigmoid));
}
