// ldmatrix and stmatrix: matrices of eight rows of 16 bytes between shared memory and a warp's registers.
#include "lanes.h"

namespace software_gpu {
namespace {

// Lane 8 i + r has the address of row r of matrix i. Lane l holds two elements of it: of row l / 4, those in the
// columns 2 (l mod 4) and one more; transposed, of column l / 4, those in these rows.
template <int matrices, bool transposed, bool write>
Step move(Warp& w, Inst& in, uint32_t m) {
  if (m != kAll) fault("divergent", "%s by the lanes 0x%08x", write ? "stmatrix" : "ldmatrix", m);
  for (int i = 0; i < matrices; ++i) {
    SharedPlace rows[8];
    for (int r = 0; r < 8; ++r) {
      if (!(w.defined[in.a] >> (8 * i + r) & 1)) fault("uninitialised", "a row's address was never defined");
      rows[r] = shared_place(w, w.r<uint32_t>(in.a)[8 * i + r] + uint32_t(in.imm), 16, 16, false);
    }
    const int slot = in.v[size_t(i)];
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t value = w.r<uint32_t>(slot)[lane];
      const bool known = w.defined[size_t(slot)] >> lane & 1;
      for (int e = 0; e < 2; ++e) {
        const int along = lane % 4 * 2 + e, other = lane / 4;
        const SharedPlace& row = rows[transposed ? along : other];
        const uint32_t at = row.offset + uint32_t(transposed ? other : along) * 2;
        uint8_t* place = &row.cta->shared[at];
        uint16_t half = uint16_t(value >> 16 * e);
        const bool same = write && memcmp(place, &half, 2) == 0;
        touch_shared(*row.cta, at, 2, write, by_lane(w, lane), same, known);
        if (write) {
          memcpy(place, &half, 2);
        } else {
          memcpy(&half, place, 2);
          value = (value & ~(0xffffu << 16 * e)) | uint32_t(half) << 16 * e;
        }
      }
      if (!write) w.r<uint32_t>(slot)[lane] = value;
    }
    if (!write) w.define(slot, kAll, kAll);
  }
  return Step::done;
}

template <int matrices, bool transposed, bool write>
void form() {
  for (const char* space : {".shared", ".shared::cta"})
    instructions()[std::string(write ? "stmatrix" : "ldmatrix") + ".sync.aligned.m8n8.x" + std::to_string(matrices) +
                   (transposed ? ".trans" : "") + space + ".b16"] =
        instructions()[std::string(write ? "stmatrix" : "ldmatrix") + ".sync.aligned.x" + std::to_string(matrices) +
                       (transposed ? ".trans" : "") + ".m8n8" + space + ".b16"] =
            [](Decoder& d, const Statement& s, Inst& in) {
              d.expect(s, 2);
              const Operand &place = s.operands[write ? 0 : 1], &registers = s.operands[write ? 1 : 0];
              if (place.kind != Operand::address || registers.kind != Operand::vector ||
                  registers.parts.size() != size_t(matrices))
                d.refuse(s, "expected an address and its registers");
              in.a = d.source(place.parts[0], 'w');
              in.imm = place.offset;
              for (size_t i = 0; i < size_t(matrices); ++i)
                in.v[i] = write ? d.source(registers.parts[i], 'w') : d.target(registers.parts[i], 'w');
              in.together = Together::all;
              in.run = move<matrices, transposed, write>;
            };
}

template <bool transposed, bool write>
void counts() {
  form<1, transposed, write>();
  form<2, transposed, write>();
  form<4, transposed, write>();
}

}  // namespace

void matrix_handlers() {
  counts<false, false>();
  counts<true, false>();
  counts<false, true>();
  counts<true, true>();
}

}  // namespace software_gpu
