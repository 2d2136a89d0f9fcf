// The sigmoid loss (SigLIP) on the CPU. Its gradient needs no statistics of rows or columns, so the loss and every
// gradient asked for come from one pass over the blocks: 2NMD for the loss, 6NMD with both gradients.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "contrastive/blocking.h"

namespace gapkern::contrastive {
namespace {

struct Sums {
  double loss = 0, scale = 0, bias = 0;
};

// images, texts: null where no gradient is wanted.
template <class T>
Sums run(const Problem<T>& p, double bias, T* images, T* texts) {
  const Shape& s = p.engine.shape;
  const Buffer packed_texts = p.pack_texts();
  const Buffer packed_images(round_up(p.chunk, s.mr) * p.panel_bytes());
  LogitGradients<T> gradients(p, images, texts);
  std::vector<Sums> blocks(p.stripes * divide_up(p.chunk, p.block));
  Sums total;
  for (int64_t row0 = 0; row0 < p.n; row0 += p.chunk) {
    const int64_t rows = std::min(p.chunk, p.n - row0), here = divide_up(rows, p.block);
    p.pack_images(row0, rows, packed_images);
    parallel(p.stripes * here, [&](int64_t item) {
      const auto [t, b] = p.place(item, here);
      SigmoidBlock<T> block{p.block_at(packed_images, packed_texts, row0, rows, t, b)};
      block.scale = T(p.scale);
      block.bias = T(bias);
      block.loss_sum = &blocks[item].loss;
      block.bias_sum = &blocks[item].bias;
      block.out = gradients.output(t, b * p.block, &blocks[item].scale);
      p.engine.sigmoid(block);
    });
    for (int64_t item = 0; item < p.stripes * here; ++item) {
      total.loss += blocks[item].loss;
      total.scale += blocks[item].scale;
      total.bias += blocks[item].bias;
    }
    gradients.multiply(row0, rows);
  }
  gradients.finish(1, {}, {});
  return total;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> call(const Arguments& a, const Tensor& images, const Tensor& texts,
                                                        double bias, int64_t label_offset,
                                                        const std::vector<bool>& needs) {
  const Tensor x = as_type(images, a.type), y = as_type(texts, a.type);
  const Problem<T> p = problem_of<T>(a, x, y, label_offset);
  if (p.wants_double()) {
    auto [loss, dx, dy, scale, of_bias] = call<double>(a.in_double(), images, texts, bias, label_offset, needs);
    return {loss, as_type(dx, a.type), as_type(dy, a.type), scale, of_bias};
  }
  Tensor dx = gradient_of(x, needs[0], a.type), dy = gradient_of(y, needs[1], a.type);
  const Sums sums = run<T>(p, bias, needs[0] ? dx.template mutable_data_ptr<T>() : nullptr,
                           needs[1] ? dy.template mutable_data_ptr<T>() : nullptr);
  const auto scalar = [&](double value) {
    Tensor t = empty(x, {}, ScalarType::Double);
    *t.mutable_data_ptr<double>() = value;
    return t;
  };
  return {scalar(sums.loss), dx, dy, scalar(sums.scale), scalar(sums.bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(const Tensor& images, const Tensor& texts,
                                                                const Tensor& logit_scale, const Tensor& logit_bias,
                                                                int64_t label_offset, std::string precision,
                                                                std::vector<bool> needs) {
  const Arguments a = check(images, texts, logit_scale, "dot", precision);
  STD_TORCH_CHECK(logit_bias.numel() == 1, "logit_bias: expected one element, got ", logit_bias.numel());
  STD_TORCH_CHECK(needs.size() == 2, "needs: expected two flags");
  const double bias = *as_type(logit_bias, ScalarType::Double).const_data_ptr<double>();
  if (a.type == ScalarType::Double) return call<double>(a, images, texts, bias, label_offset, needs);
  return call<float>(a, images, texts, bias, label_offset, needs);
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) { m.impl("sigmoid_loss", TORCH_BOX(&gapkern::contrastive::sigmoid_loss)); }
