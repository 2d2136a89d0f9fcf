// wgmma.mma_async: D (64 x N) += A (64 x 16) B (16 x N), operands in shared memory by descriptor, A in registers too.
// Each warp of a warpgroup makes its own sixteen rows, at a moment between the issue and wgmma.wait_group; until then
// its registers are in flight. Layouts from the PTX ISA.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace software_gpu {

// An instruction: its registers, and what its last operands say.
struct Form {
  std::vector<int32_t> accumulators, fragment;  // fragment: of A, where it is in registers
  int columns;
  bool bfloat;
  float sign_a, sign_b;
  bool transposed_a, transposed_b;
};

struct Product {
  Inst* in = nullptr;
  const Form* form = nullptr;
  uint64_t a = 0, b = 0;
  bool keep = false, done = false;  // keep: D is added to
  Issued* issued = nullptr;
  Clock seen, seen_by_async;
  uint32_t clock = 0;
};

namespace {

struct Descriptor {
  uint32_t start, leading, stride, swizzle;
};
Descriptor read(uint64_t d) {
  const uint32_t mode = uint32_t(d >> 62);
  if (d >> 49 & 7) fault("bad descriptor", "a base offset of %u is not implemented", uint32_t(d >> 49 & 7));
  constexpr uint64_t reserved = 3ull << 14 | 3ull << 30 | 7ull << 46 | 0x3ffull << 52;
  if (d & reserved) fault("bad descriptor", "0x%llx: reserved bits are set", static_cast<unsigned long long>(d));
  const uint32_t bytes[] = {0, 128, 64, 32};
  return {uint32_t(d & 0x3fff) << 4, uint32_t(d >> 16 & 0x3fff) << 4, uint32_t(d >> 32 & 0x3fff) << 4, bytes[mode]};
}

float from_half(uint16_t h, bool bfloat) {
  uint32_t bits;
  if (bfloat) {
    bits = uint32_t(h) << 16;
  } else {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, f = h & 1023;
    if (e == 0) {
      const float r = float(f) * 0x1p-24f;
      return sign ? -r : r;
    }
    bits = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | f << 13;
  }
  float r;
  memcpy(&r, &bits, 4);
  return r;
}

// Rows row ... row + 7 of an operand whose columns run along the rows: eight elements of each k in a piece of 16 bytes,
// eight k in a core matrix.
void fetch_transposed(Warp& w, const Descriptor& d, int row, const Access& by, bool bfloat, float sign,
                      float (*to)[16]) {
  const uint32_t r = uint32_t(row), wide = d.swizzle / 2;  // elements of a row of the swizzle's pattern
  for (uint32_t k = 0; k < 16; ++k) {
    uint32_t address;
    if (wide)
      address =
          swizzled(d.start + r % wide * 2 + r / wide * d.leading + k % 8 * d.swizzle + k / 8 * d.stride, d.swizzle);
    else
      address = d.start + r / 8 * d.stride + k % 8 * 16 + k / 8 * d.leading;
    const SharedPlace at = shared_place(w, address, 16, 16, false);
    touch_shared(*w.cta, at.offset, 16, false, by);
    uint16_t halves[8];
    memcpy(halves, &w.cta->shared[at.offset], 16);
    for (int i = 0; i < 8; ++i) to[i][k] = sign * from_half(halves[i], bfloat);
  }
}

// Row `row` of an operand whose rows run along k: sixteen elements in two pieces of 16 bytes.
void fetch(Warp& w, const Descriptor& d, int row, const Access& by, bool bfloat, float sign, float* to) {
  Cta& cta = *w.cta;
  for (uint32_t piece = 0; piece < 2; ++piece) {
    uint32_t address;
    if (d.swizzle)
      address =
          swizzled(d.start + uint32_t(row / 8) * d.stride + uint32_t(row % 8) * d.swizzle + piece * 16, d.swizzle);
    else
      address = d.start + uint32_t(row / 8) * d.stride + piece * d.leading + uint32_t(row % 8) * 16;
    const SharedPlace at = shared_place(w, address, 16, 16, false);
    touch_shared(cta, at.offset, 16, false, by);
    uint16_t halves[8];
    memcpy(halves, &cta.shared[at.offset], 16);
    for (int i = 0; i < 8; ++i) to[piece * 8 + uint32_t(i)] = sign * from_half(halves[i], bfloat);
  }
}

// The sum of 16 products and what is added to, as tensor cores form it at worst (Fasi, Higham, Mikaitis and Pranesh
// 2021; Ootomo and Yokota 2022): every addend cut off 24 bits below the largest one's first. Exact for sums of numbers
// that are multiples of that.
double aligned_sum(const double (&products)[16], double added_to) {
  double most = std::abs(added_to);
  for (const double p : products) most = std::max(most, std::abs(p));
  if (most == 0 || !std::isfinite(most)) {
    for (const double p : products) added_to += p;
    return added_to;
  }
  const int first = std::ilogb(most);
  const double parts = std::ldexp(1.0, 24 - first);
  int32_t sum = int32_t(added_to * parts);
  for (const double p : products) sum += int32_t(p * parts);
  return double(sum) / parts;
}

void multiply(Warp& w, Product& p) {
  const Access by{&w, &p.seen, &p.seen_by_async, uint16_t(w.agent + kProducts), p.clock, 0, true, kProducts};
  const Form& f = *p.form;
  alignas(64) float a[16][16], b[256][16];
  const auto operand = [&](uint64_t bits, bool transposed, float sign, int first, int rows, float (*to)[16]) {
    const Descriptor d = read(bits);
    for (int r = 0; r < rows; r += transposed ? 8 : 1)
      if (transposed)
        fetch_transposed(w, d, first + r, by, f.bfloat, sign, to + r);
      else
        fetch(w, d, first + r, by, f.bfloat, sign, to[r]);
  };
  if (f.fragment.empty())
    operand(p.a, f.transposed_a, f.sign_a, w.index % 4 * 16, 16, a);
  else  // lane 4 (r mod 8) + (k mod 8) / 2 holds it, in register r / 8 + 2 (k / 8)
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k) {
        const uint32_t two = w.r<uint32_t>(f.fragment[size_t(r / 8 + k / 8 * 2)])[r % 8 * 4 + k % 8 / 2];
        a[r][k] = f.sign_a * from_half(uint16_t(two >> 16 * (k % 2)), f.bfloat);
      }
  operand(p.b, f.transposed_b, f.sign_b, 0, f.columns, b);
  alignas(64) double wide_a[16][16];
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) wide_a[r][k] = a[r][k];
  const std::vector<int32_t>& slots = f.accumulators;
  float* d[128];
  for (size_t i = 0; i < slots.size(); ++i) d[i] = w.r<float>(slots[i]);
  // By the seed: exact in double (16 products of 8 or 11 bits) and rounded to nearest once, or cut off, addends too.
  const bool to_zero = device.rounding_seed % 2 == 1;
  for (int c = 0; c < f.columns; ++c) {
    double wide_b[16];
    for (int k = 0; k < 16; ++k) wide_b[k] = b[c][k];
    for (int r = 0; r < 16; ++r) {
      double products[16], sum = 0;
      for (int k = 0; k < 16; ++k) products[k] = wide_a[r][k] * wide_b[k];
      // Lane 4 (r mod 8) + (c mod 8) / 2 holds it, in register 4 (c / 8) + 2 (r / 8) + c mod 2.
      float& out = d[c / 8 * 4 + r / 8 * 2 + c % 2][r % 8 * 4 + c % 8 / 2];
      const double added_to = p.keep ? double(out) : 0;
      for (int k = 0; k < 16; ++k) sum += products[k];
      const double whole = to_zero ? aligned_sum(products, added_to) : sum + added_to;
      float rounded = float(whole);
      if (to_zero && std::isfinite(rounded) && std::abs(double(rounded)) > std::abs(whole))
        rounded = std::nextafter(rounded, 0.f);
      out = rounded;
    }
  }
  for (int32_t slot : slots) w.defined[size_t(slot)] = kAll;
  p.done = true;
  p.issued->clocks[size_t(w.index % 4)] = p.clock;
  if (++p.issued->parts_done == 4) ++w.cluster->changes;
}

std::deque<Form>& instances() {
  static std::deque<Form> all;
  return all;
}

uint64_t uniform_descriptor(Warp& w, int slot, const char* which) {
  const uint64_t* values = w.r<uint64_t>(slot);
  if (w.defined[size_t(slot)] != kAll) fault("uninitialised", "the descriptor of %s was never defined", which);
  for (int i = 1; i < kLanes; ++i)
    if (values[i] != values[0]) fault("divergent", "the descriptor of %s differs between lanes", which);
  return values[0];
}

Step issue(Warp& w, Inst& in, uint32_t m) {
  if (m != kAll) fault("divergent", "wgmma by the lanes 0x%08x", m);
  const Form& form = instances()[size_t(in.imm)];
  const uint64_t a = in.a < 0 ? 0 : uniform_descriptor(w, in.a, "A"), b = uniform_descriptor(w, in.b, "B");
  const uint32_t keep = w.pred[in.c];
  if (w.pred_defined[in.c] != kAll) fault("uninitialised", "scale-d was never defined");
  if (keep && keep != kAll) fault("divergent", "scale-d differs between lanes");
  for (int32_t slot : form.accumulators) {
    if (w.touched[size_t(slot)])
      fault("missing wgmma.fence", "an accumulator was touched since the last wgmma.fence, or there was none");
    if (keep && !w.in_flight[size_t(slot)] && w.defined[size_t(slot)] != kAll)
      fault("uninitialised", "an accumulator that is added to was never defined");
  }
  for (int32_t slot : form.fragment) {
    if (w.touched[size_t(slot)])
      fault("missing wgmma.fence", "a register of A was touched since the last wgmma.fence, or there was none");
    if (w.defined[size_t(slot)] != kAll) fault("uninitialised", "a register of A was never defined");
  }
  auto& log = w.cta->product_log[size_t(w.index / 4)];
  const std::array<uint64_t, 4> entry{in.line, a, b, keep};
  if (w.product_count == log.size())
    log.push_back({entry, 0, {}});
  else if (log[w.product_count].what != entry)
    fault("divergent", "the warps of a warpgroup issue different products (lines %llu and %u)",
          static_cast<unsigned long long>(log[w.product_count].what[0]), in.line);
  auto p = std::make_shared<Product>();
  p->issued = &log[w.product_count++];
  p->in = &in;
  p->form = &form;
  p->a = a;
  p->b = b;
  p->keep = keep != 0;
  p->seen = w.seen;
  p->seen_by_async = w.seen_by_async;
  p->clock = ++w.unit_clocks[kProducts];
  for (int32_t slot : form.accumulators) ++w.in_flight[size_t(slot)];
  for (int32_t slot : form.fragment) ++w.in_flight[size_t(slot)];
  ++w.flights;
  w.open_products.push_back(p);
  w.product_queue.push_back(p);
  w.cluster->later(in, [&w, p] {
    while (!p->done) {  // those before it first
      multiply(w, *w.product_queue.front());
      w.product_queue.pop_front();
    }
  });
  return Step::done;
}

Step fence(Warp& w, Inst&, uint32_t) {
  for (int slot : w.kernel->accumulators) w.touched[size_t(slot)] = 0;
  return Step::done;
}
Step commit(Warp& w, Inst&, uint32_t) {
  w.product_groups.push_back(std::move(w.open_products));
  w.open_products.clear();
  return Step::done;
}
Step wait(Warp& w, Inst& in, uint32_t) {
  for (size_t i = 0; i + size_t(in.imm) < w.product_groups.size(); ++i)
    for (const auto& p : w.product_groups[i])
      if (p->issued->parts_done < 4) return w.wait("wgmma.wait_group");
  while (w.product_groups.size() > size_t(in.imm)) {
    for (const auto& p : w.product_groups.front()) {
      for (int32_t slot : p->form->accumulators) --w.in_flight[size_t(slot)];
      for (int32_t slot : p->form->fragment) --w.in_flight[size_t(slot)];
      --w.flights;
      for (int i = 0; i < 4; ++i) {
        uint32_t& seen = w.seen[size_t(w.agent + (i - w.index % 4) * w.cluster->units + kProducts)];
        seen = std::max(seen, p->issued->clocks[size_t(i)]);
      }
    }
    w.product_groups.pop_front();
  }
  return Step::done;
}

}  // namespace

void product_handlers() {
  for (int n = 8; n <= 256; n += 8)
    for (const char* type : {"bf16", "f16"}) {
      const bool bfloat = type[0] == 'b';
      instructions()["wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32." + type + "." + type] =
          [n, bfloat](Decoder& d, const Statement& s, Inst& in) {
            const bool registers = s.operands.size() == 7;  // A in them, which is not transposed
            if (!registers) d.expect(s, 8);
            if (s.operands[0].kind != Operand::vector || int(s.operands[0].parts.size()) != n / 2)
              d.refuse(s, "the wrong number of accumulators");
            Form form{{}, {}, n, bfloat, 1, 1, false, false};
            for (const Operand& o : s.operands[0].parts) form.accumulators.push_back(d.target(o, 'w'));
            if (registers) {
              if (s.operands[1].kind != Operand::vector || s.operands[1].parts.size() != 4)
                d.refuse(s, "expected four registers of A");
              for (const Operand& o : s.operands[1].parts) form.fragment.push_back(d.source(o, 'w'));
            } else {
              in.a = d.source(s.operands[1], 'd');
            }
            in.b = d.source(s.operands[2], 'd');
            in.c = d.predicate(s.operands[3]);
            for (size_t i = 4; i < s.operands.size(); ++i)
              if (s.operands[i].kind != Operand::number) d.refuse(s, "expected numbers at its end");
            form.sign_a = float(int64_t(s.operands[4].value));
            form.sign_b = float(int64_t(s.operands[5].value));
            if (std::abs(form.sign_a) != 1 || std::abs(form.sign_b) != 1) d.refuse(s, "a scale other than 1 and -1");
            for (size_t i = 6; i < s.operands.size(); ++i)
              if (s.operands[i].value > 1) d.refuse(s, "expected 0 or 1 for a transpose");
            form.transposed_a = !registers && s.operands[6].value;
            form.transposed_b = s.operands.back().value;
            in.imm = int64_t(instances().size());
            for (const auto& slots : {form.accumulators, form.fragment})
              d.kernel.accumulators.insert(d.kernel.accumulators.end(), slots.begin(), slots.end());
            instances().push_back(std::move(form));
            in.is_product = true;
            in.together = Together::all;
            in.run = issue;
            d.kernel.asynchronous = true;
          };
    }
  const auto plain = [](const char* form, Handler handler, size_t operands) {
    instructions()[form] = [=](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, operands);
      if (operands) {
        if (s.operands[0].kind != Operand::number) d.refuse(s, "expected a number");
        in.imm = int64_t(s.operands[0].value);
      }
      in.together = Together::all;
      in.run = handler;
    };
  };
  plain("wgmma.fence.sync.aligned", fence, 0);
  plain("wgmma.commit_group.sync.aligned", commit, 0);
  plain("wgmma.wait_group.sync.aligned", wait, 1);
}

}  // namespace software_gpu
