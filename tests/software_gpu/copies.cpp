// cp.async.bulk and cp.async.bulk.tensor with multicast, swizzles and fill beyond the edges; their reductions; mapa. A
// copy happens at a moment between its issue and the wait that promises it.
#include <algorithm>

#include "lanes.h"

namespace software_gpu {

struct Copy {
  TensorMap map;
  std::array<int32_t, 5> at{};
  Clock seen, seen_by_async;
  std::vector<std::pair<Cta*, uint32_t>> places;  // in shared memory
  uint32_t barrier = 0, reads = 0, writes = 0;    // clocks of a store's reads and writes
  bool read_done = false, done = false;
  std::vector<uint8_t> box;  // what a store has read
};

uint32_t checksum(const TensorMap& map) {
  uint32_t sum = 2166136261u;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&map);
  for (size_t i = 8; i < sizeof map; ++i) sum = (sum ^ bytes[i]) * 16777619u;
  return sum;
}

namespace {

TensorMap map_at(Warp& w, uint64_t address) {
  if (address % 64) fault("bad tensor map", "its address 0x%llx is no multiple of 64", (unsigned long long)address);
  TensorMap map;
  memcpy(&map, any_bytes(w, address, 128), sizeof map);
  if (map.magic != kMapMagic || map.check != checksum(map))
    fault("bad tensor map", "at 0x%llx is none that cuTensorMapEncodeTiled has made", (unsigned long long)address);
  return map;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t n = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) n *= map.box[i];
  return n;
}

// Calls f(offset within the box, address in global memory, bytes of the run that lie inside the tensor) for every 16
// bytes of the box.
template <class F>
void over_box(const Copy& c, const F& f) {
  const TensorMap& m = c.map;
  const uint32_t row = uint32_t(m.box[0]) * m.element_bytes, total = box_bytes(m);
  for (uint32_t linear = 0; linear < total; linear += 16) {
    uint32_t rest = linear / row;
    const int64_t first = int64_t(c.at[0]) * m.element_bytes + linear % row;
    const int64_t width = int64_t(m.dims[0]) * m.element_bytes;
    bool inside = true;
    int64_t offset = first;
    for (int i = 1; i < m.rank; ++i) {
      const int64_t index = c.at[size_t(i)] + int64_t(rest % m.box[i]);
      rest /= m.box[i];
      inside &= index >= 0 && index < int64_t(m.dims[i]);
      offset += index * int64_t(m.strides[i - 1]);
    }
    const int64_t skip = std::clamp<int64_t>(-first, 0, 16), stop = std::clamp<int64_t>(width - first, 0, 16);
    f(linear, m.address + uint64_t(offset), inside && stop > skip ? uint32_t(skip) : 0,
      inside && stop > skip ? uint32_t(stop) : 0);
  }
}

Access access_of(Warp& w, const Copy& c, int unit, uint32_t clock, int lane) {
  return {&w, &c.seen, &c.seen_by_async, uint16_t(w.agent + unit), clock, uint8_t(lane), true, unit};
}

std::shared_ptr<Copy> start(Warp& w, Inst& in, int lane) {
  if (!(w.defined[in.a] >> lane & 1)) fault("uninitialised", "the tensor map's address was never defined");
  auto c = std::make_shared<Copy>();
  c->map = map_at(w, w.r<uint64_t>(in.a)[lane]);
  const int rank = int(in.imm & 7);
  if (c->map.rank != rank) fault("bad tensor map", "of rank %d for coordinates of rank %d", c->map.rank, rank);
  const Kernel& k = *w.kernel;
  for (int i = 0; i < rank; ++i) {
    const int slot = k.uses[in.uses + uint32_t(i)];  // coordinates come first
    if (!(w.defined[size_t(slot)] >> lane & 1)) fault("uninitialised", "a coordinate was never defined");
    c->at[size_t(i)] = w.r<int32_t>(slot)[lane];
  }
  c->seen = w.seen;
  c->seen_by_async = w.seen_by_async;
  return c;
}

enum : int64_t { kMulticast = 8, kHint = 16, kAdd = 32, kType = 64 };

// Bytes in a row, as a tensor map of one dimension: the address in in.a, their number in in.v[0].
std::shared_ptr<Copy> start_row(Warp& w, Inst& in, int lane) {
  if (!(w.defined[in.a] & w.defined[in.v[0]] & w.defined[in.b] & 1u << lane))
    fault("uninitialised", "an address or the number of bytes was never defined");
  auto c = std::make_shared<Copy>();
  const uint32_t bytes = w.r<uint32_t>(in.v[0])[lane];
  c->map.address = w.r<uint64_t>(in.a)[lane];
  if (c->map.address % 16 || bytes % 16 || !bytes)
    fault("misaligned", "a bulk copy of %u bytes at 0x%llx: expected multiples of 16", bytes,
          static_cast<unsigned long long>(c->map.address));
  c->map.rank = c->map.element_bytes = 1;
  c->map.dims[0] = c->map.box[0] = bytes;
  c->map.check = uint32_t(c->map.address);
  c->map.type = uint8_t(in.imm / kType);
  c->seen = w.seen;
  c->seen_by_async = w.seen_by_async;
  return c;
}
std::shared_ptr<Copy> begin(Warp& w, Inst& in, int lane) {
  return in.imm & 7 ? start(w, in, lane) : start_row(w, in, lane);
}
uint32_t alignment(const Inst& in) { return in.imm & 7 ? 128 : 16; }

Step load(Warp& w, Inst& in, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    auto c = begin(w, in, lane);
    const uint32_t bytes = box_bytes(c->map);
    const SharedPlace to = shared_place(w, w.r<uint32_t>(in.b)[lane], bytes, alignment(in), true);
    const SharedPlace barrier = shared_place(w, w.r<uint32_t>(in.c)[lane], 8, 8, true);
    c->barrier = barrier.offset;
    if (in.imm & kMulticast) {
      const uint32_t mask = w.r<uint16_t>(in.d)[lane];
      if (!mask || mask >> w.cluster->ctas.size())
        fault("out of bounds", "a multicast to the CTAs 0x%x of a cluster of %zu", mask, w.cluster->ctas.size());
      for (uint32_t rank = 0; rank < w.cluster->ctas.size(); ++rank)
        if (mask >> rank & 1) c->places.emplace_back(w.cluster->ctas[rank].get(), to.offset);
    } else {
      if (to.cta != barrier.cta) fault("mbarrier", "it lies in another CTA than the bytes it counts");
      c->places.emplace_back(to.cta, to.offset);
    }
    const int unit = kLoads + w.load_unit++ % (kUnits - kLoads);
    const uint32_t clock = ++w.unit_clocks[size_t(unit)];
    for (const auto& [cta, offset] : c->places) {
      Cta* into = cta;
      const uint32_t start_at = offset;
      ++into->incoming;
      if (into->finished()) fault("out of bounds", "a bulk load into CTA %d, which has exited", into->rank);
      w.cluster->later(in, [&w, c, into, start_at, unit, clock, lane, bytes] {
        const Access by = access_of(w, *c, unit, clock, lane);
        --into->incoming;
        if (into->finished()) fault("out of bounds", "a bulk load into CTA %d, which has exited", into->rank);
        over_box(*c, [&](uint32_t linear, uint64_t address, uint32_t from, uint32_t to) {
          const uint32_t at = swizzled(start_at + linear + kSharedBase, c->map.swizzle) - kSharedBase;
          touch_shared(*into, at, 16, true, by);
          uint8_t* place = &into->shared[at];
          memset(place, 0, 16);
          if (to > from) {
            touch_global(address + from, to - from, false, by);
            memcpy(place + from, global_bytes(address + from, to - from), to - from);
          }
        });
        complete_bytes(*into, c->barrier, bytes, by);
      });
    }
  }
  return Step::done;
}

// Stores, and additions where in.imm has kAdd. CUTLASS's epilogue lets all lanes of a warp issue one store; the device
// carries it out once.
Step store(Warp& w, Inst& in, uint32_t m) {
  std::shared_ptr<Copy> before;
  uint32_t address_before = 0;
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    auto c = begin(w, in, lane);
    const uint32_t bytes = box_bytes(c->map), address = w.r<uint32_t>(in.b)[lane];
    const bool adds = (in.imm & kAdd) != 0;
    if (before && !adds && address == address_before && c->at == before->at && c->map.check == before->map.check) {
      w.open_copies[size_t(lane)].push_back(before);
      continue;
    }
    before = c;
    address_before = address;
    const SharedPlace from = shared_place(w, address, bytes, alignment(in), false);
    Cta* cta = from.cta;
    const uint32_t start_at = from.offset;
    c->reads = ++w.unit_clocks[kStoreReads];
    c->writes = ++w.unit_clocks[kStoreWrites];
    ++cta->incoming;
    w.open_copies[size_t(lane)].push_back(c);
    Inst* of = &in;
    w.cluster->later(in, [&w, c, cta, start_at, lane, bytes, of, adds] {
      c->box.resize(bytes);
      const Access reads = access_of(w, *c, kStoreReads, c->reads, lane);
      over_box(*c, [&](uint32_t linear, uint64_t, uint32_t from_byte, uint32_t to_byte) {
        if (to_byte <= from_byte) return;
        const uint32_t at = swizzled(start_at + linear + kSharedBase, c->map.swizzle) - kSharedBase;
        touch_shared(*cta, at + from_byte, to_byte - from_byte, false, reads);
        memcpy(&c->box[linear], &cta->shared[at], 16);
      });
      c->read_done = true;
      --cta->incoming;
      w.cluster->later(*of, [&w, c, lane, adds] {
        Access writes = access_of(w, *c, kStoreWrites, c->writes, lane);
        writes.atomic = adds;
        over_box(*c, [&](uint32_t linear, uint64_t address, uint32_t from_byte, uint32_t to_byte) {
          if (to_byte <= from_byte) return;
          touch_global(address + from_byte, to_byte - from_byte, true, writes);
          uint8_t* to = global_bytes(address + from_byte, to_byte - from_byte);
          if (adds)
            add_elements(to, &c->box[linear + from_byte], to_byte - from_byte, c->map.type);
          else
            memcpy(to, &c->box[linear + from_byte], to_byte - from_byte);
        });
        c->done = true;
      });
    });
  }
  return Step::done;
}

Step commit(Warp& w, Inst&, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) {
    const size_t lane = size_t(__builtin_ctz(left));
    w.copy_groups[lane].push_back(std::move(w.open_copies[lane]));
    w.open_copies[lane].clear();
  }
  return Step::done;
}

// All but the latest in.imm groups of each lane.
template <bool read>
Step wait_group(Warp& w, Inst& in, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) {
    const auto& groups = w.copy_groups[size_t(__builtin_ctz(left))];
    for (size_t i = 0; i + size_t(in.imm) < groups.size(); ++i)
      for (const auto& c : groups[i])
        if (!(read ? c->read_done : c->done)) return w.wait("bulk stores");
  }
  for (uint32_t left = m; left; left &= left - 1) {
    auto& groups = w.copy_groups[size_t(__builtin_ctz(left))];
    for (size_t i = 0; i + size_t(in.imm) < groups.size(); ++i)
      for (const auto& c : groups[i]) {
        uint32_t& reads = w.seen[size_t(w.agent + kStoreReads)];
        uint32_t& writes = w.seen[size_t(w.agent + kStoreWrites)];
        reads = std::max(reads, c->reads);
        if (!read) writes = std::max(writes, c->writes);
      }
    while (!read && groups.size() > size_t(in.imm)) groups.pop_front();
  }
  return Step::done;
}

Step prefetch_map(Warp& w, Inst& in, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) map_at(w, w.r<uint64_t>(in.a)[__builtin_ctz(left)]);
  return Step::done;
}

Step map_address(Warp& w, Inst& in, uint32_t m) {
  uint32_t out[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    out[i] = 0;
    if (!(m >> i & 1)) continue;
    const uint32_t rank = w.r<uint32_t>(in.b)[i];
    if (rank >= w.cluster->ctas.size())
      fault("out of bounds", "mapa to CTA %u of a cluster of %zu", rank, w.cluster->ctas.size());
    out[i] = (rank + 1) << 24 | (w.r<uint32_t>(in.a)[i] & 0xffffff);
  }
  put(w.r<uint32_t>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b]);
  return Step::done;
}

// Coordinates first, then the others, so that `uses` starts with the coordinates.
void tensor(Decoder& d, const Statement& s, Inst& in, const Operand& map, int rank) {
  if (map.kind != Operand::address || map.parts.size() != 2 || int(map.parts[1].parts.size()) != rank)
    d.refuse(s, "expected a tensor map and its coordinates");
  for (const Operand& o : map.parts[1].parts) {
    const size_t before = d.used.size();
    const int slot = d.source(o, 'w');
    if (d.used.size() == before) d.used.push_back(slot);
  }
  in.imm = rank;
  in.a = d.source(map.parts[0], 'd');
  d.kernel.asynchronous = true;
}
int plain_address(Decoder& d, const Statement& s, const Operand& o) {
  if (o.kind != Operand::address || o.parts.size() != 1 || o.offset) d.refuse(s, "expected an address in a register");
  return d.source(o.parts[0], 'w');
}

// Operands of a copy of bytes in a row.
void row(Decoder& d, const Statement& s, Inst& in, const Operand& global, const Operand& shared, const Operand& bytes) {
  if (global.kind != Operand::address || global.parts.size() != 1 || global.offset)
    d.refuse(s, "expected an address in a register");
  in.a = d.source(global.parts[0], 'd');
  in.b = plain_address(d, s, shared);
  in.v[0] = d.source(bytes, 'w');
  in.imm = 0;
  d.kernel.asynchronous = true;
}

}  // namespace

void copy_handlers() {
  for (int rank = 1; rank <= 5; ++rank) {
    const std::string base = "cp.async.bulk.tensor." + std::to_string(rank) + "d.";
    for (const bool multicast : {false, true})
      for (const bool hint : {false, true})
        instructions()[base + "shared::cluster.global.mbarrier::complete_tx::bytes" +
                       (multicast ? ".multicast::cluster" : "") + (hint ? ".L2::cache_hint" : "")] =
            [=](Decoder& d, const Statement& s, Inst& in) {
              d.expect(s, size_t(3 + multicast + hint));
              tensor(d, s, in, s.operands[1], rank);
              in.b = plain_address(d, s, s.operands[0]);
              in.c = plain_address(d, s, s.operands[2]);
              if (multicast) in.d = d.source(s.operands[3], 'h'), in.imm |= kMulticast;
              if (hint) d.source(s.operands.back(), 'd'), in.imm |= kHint;
              in.run = load;
            };
    for (const char* action : {"", ".add", ".add.tile"})
      instructions()[(*action ? "cp.reduce.async.bulk.tensor." : "cp.async.bulk.tensor.") + std::to_string(rank) +
                     "d.global.shared::cta" + action + ".bulk_group"] = [=](Decoder& d, const Statement& s, Inst& in) {
        d.expect(s, 2);
        tensor(d, s, in, s.operands[0], rank);
        in.b = plain_address(d, s, s.operands[1]);
        if (*action) in.imm |= kAdd;
        in.run = store;
      };
  }
  for (const bool hint : {false, true})
    for (const bool multicast : {false, true})
      instructions()[std::string("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes") +
                     (multicast ? ".multicast::cluster" : "") + (hint ? ".L2::cache_hint" : "")] =
          [=](Decoder& d, const Statement& s, Inst& in) {
            d.expect(s, size_t(4 + multicast + hint));
            row(d, s, in, s.operands[1], s.operands[0], s.operands[2]);
            in.c = plain_address(d, s, s.operands[3]);
            if (multicast) in.d = d.source(s.operands[4], 'h'), in.imm |= kMulticast;
            if (hint) d.source(s.operands.back(), 'd');
            in.run = load;
          };
  const std::pair<const char*, int> sums[] = {{"add.u32", 2},        {"add.s32", 3}, {"add.u64", 4},
                                              {"add.noftz.f16", 6},  {"add.f32", 7}, {"add.f64", 8},
                                              {"add.noftz.bf16", 9}, {"", 0}};
  for (const auto& [sum, type] : sums)
    instructions()[*sum ? std::string("cp.reduce.async.bulk.global.shared::cta.bulk_group.") + sum
                        : "cp.async.bulk.global.shared::cta.bulk_group"] = [type](Decoder& d, const Statement& s,
                                                                                  Inst& in) {
      d.expect(s, 3);
      row(d, s, in, s.operands[0], s.operands[1], s.operands[2]);
      if (type) in.imm = kAdd | type * kType;
      in.run = store;
    };
  instructions()["cp.async.bulk.commit_group"] = [](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 0);
    in.run = commit;
  };
  for (const bool read : {false, true})
    instructions()[read ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group"] =
        [read](Decoder& d, const Statement& s, Inst& in) {
          d.expect(s, 1);
          if (s.operands[0].kind != Operand::number) d.refuse(s, "expected a number");
          in.imm = int64_t(s.operands[0].value);
          in.run = read ? wait_group<true> : wait_group<false>;
        };
  instructions()["prefetch.tensormap"] = [](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 1);
    if (s.operands[0].kind != Operand::address) d.refuse(s, "expected an address");
    in.a = d.source(s.operands[0].parts[0], 'd');
    in.run = prefetch_map;
  };
  on("mapa.shared::cluster.u32", "www", map_address);
}

}  // namespace software_gpu
