// The sigmoid loss (SigLIP) on the CPU. Its gradient needs no statistics of rows or columns, so the loss and every
// gradient asked for come from one pass over the blocks: 2NMD for the loss, 6NMD with both gradients.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "contrastive/gradients.h"

namespace gapkern::contrastive {
namespace {

struct Sums {
  double loss = 0, scale = 0, bias = 0;
};

// images, texts: null where no gradient is wanted.
template <class T>
Sums run(const Problem<T>& p, double bias, T* images, T* texts) {
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
      p.engine.sigmoid(b);
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
Outputs call(const Arguments& a, double bias, const std::vector<bool>& needs) {
  const Problem<T> p(a);
  if (p.range.wants_double()) {
    Outputs out = call<double>(a.in_double(), bias, needs);
    out.images = as_type(out.images, a.type);
    out.texts = as_type(out.texts, a.type);
    return out;
  }
  Tensor images = gradient_of(p.images, needs[0], a.type), texts = gradient_of(p.texts, needs[1], a.type);
  const Sums sums = run<T>(p, bias, needs[0] ? images.template mutable_data_ptr<T>() : nullptr,
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(const Tensor& images, const Tensor& texts,
                                                                const Tensor& logit_scale, const Tensor& logit_bias,
                                                                int64_t label_offset, std::string precision,
                                                                std::vector<bool> needs) {
  const Arguments a = check(images, texts, logit_scale, "dot", label_offset, precision);
  STD_TORCH_CHECK(logit_bias.numel() == 1, "logit_bias: expected one element, got ", logit_bias.numel());
  STD_TORCH_CHECK(needs.size() == 2, "needs: expected two flags");
  const double bias = *as_type(logit_bias, ScalarType::Double).const_data_ptr<double>();
  const Outputs out = a.type == ScalarType::Double ? call<double>(a, bias, needs) : call<float>(a, bias, needs);
  return {out.loss, out.images, out.texts, out.logit_scale, out.logit_bias};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) { m.impl("sigmoid_loss", TORCH_BOX(&gapkern::contrastive::sigmoid_loss)); }
