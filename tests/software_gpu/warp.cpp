// Warps: 32 lanes that part at branches and meet again, and what they tell each other.
#include <algorithm>

#include "lanes.h"

namespace software_gpu {
namespace {

Step branch(Warp& w, Inst& in, uint32_t m) {
  Group& g = w.group();
  if (m == g.mask) {
    g.at = uint32_t(in.target);
  } else {
    g.mask &= ~m;
    ++g.at;
    w.groups.push_back({m, uint32_t(in.target)});
  }
  return Step::jumped;
}

Step leave(Warp& w, Inst&, uint32_t m) {
  Group& g = w.group();
  w.live &= ~m;
  g.mask &= ~m;
  ++g.at;
  if (!g.mask) w.groups.erase(w.groups.begin() + int64_t(w.current));
  if (!w.live) {
    ++w.cluster->changes;
    if (w.flights) fault("asynchronous work at exit", "wgmma in flight");
    if (w.cta->finished()) at_exit(*w.cta);
    advance_cluster_barrier(*w.cluster);
  }
  return Step::jumped;
}

// The lanes that an instruction with a member mask runs for: all the live ones that it names.
uint32_t members(Warp& w, const Inst& in, uint32_t m) {
  const int lane = __builtin_ctz(m);
  if (!(w.defined[in.members] >> lane & 1)) fault("uninitialised", "a member mask that was never defined");
  const uint32_t mask = w.r<uint32_t>(in.members)[lane];
  for (uint32_t left = m; left; left &= left - 1)
    if (w.r<uint32_t>(in.members)[__builtin_ctz(left)] != mask) fault("divergent", "lanes name different member masks");
  if (m & ~mask) fault("divergent", "lane %d is not in its own member mask 0x%08x", __builtin_ctz(m & ~mask), mask);
  return mask;
}

enum class Shuffle { up, down, butterfly, index };
template <Shuffle mode>
Step shuffle(Warp& w, Inst& in, uint32_t m) {
  const uint32_t mask = members(w, in, m);
  uint32_t out[kLanes] = {}, inside = 0, known = 0;
  const uint32_t *a = w.r<uint32_t>(in.a), *b = w.r<uint32_t>(in.b), *c = w.r<uint32_t>(in.c);
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const int by = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
    const int lowest = lane & segment, most = lowest | (clamp & ~segment);
    int from = 0;
    bool in_range = false;
    if (mode == Shuffle::up) from = lane - by, in_range = from >= most;
    if (mode == Shuffle::down) from = lane + by, in_range = from <= most;
    if (mode == Shuffle::butterfly) from = lane ^ by, in_range = from <= most;
    if (mode == Shuffle::index) from = lowest | (by & ~segment), in_range = from <= most;
    if (!in_range) from = lane;
    if (!(mask >> from & 1) || !(m >> from & 1))
      fault("divergent", "lane %d reads the register of lane %d, which does not take part", lane, from);
    out[lane] = a[from];
    inside |= uint32_t(in_range) << lane;
    known |= (w.defined[in.a] >> from & 1) << lane;
  }
  put(w.r<uint32_t>(in.d), out, m);
  w.define(in.d, m, known & w.defined[in.b] & w.defined[in.c]);
  if (in.p >= 0) {
    w.pred[in.p] = (w.pred[in.p] & ~m) | inside;
    w.pred_defined[in.p] |= m;
  }
  return Step::done;
}

enum class Vote { ballot, any, all };
template <Vote mode>
Step vote(Warp& w, Inst& in, uint32_t m) {
  const uint32_t mask = members(w, in, m);
  if (m & ~w.pred_defined[in.a]) fault("uninitialised", "a predicate that was never defined is voted on");
  const uint32_t votes = w.pred[in.a] & m;
  if (mode == Vote::ballot) {
    uint32_t out[kLanes];
    std::fill(out, out + kLanes, votes);
    put(w.r<uint32_t>(in.d), out, m);
    w.define(in.d, m, kAll);
  } else {
    const bool result = mode == Vote::any ? votes != 0 : votes == (mask & m);
    w.pred[in.d] = (w.pred[in.d] & ~m) | (result ? m : 0);
    w.pred_defined[in.d] |= m;
  }
  return Step::done;
}

// One lane, always the same for a mask. Which one is not promised; devices choose the lowest, and CUTLASS relies on it:
// PipelineTmaAsync's leader is thread 0 of the producer's warps, whichever lane issues the copies.
Step elect(Warp& w, Inst& in, uint32_t m) {
  const int leader = __builtin_ctz(members(w, in, m) & w.live);
  uint32_t out[kLanes];
  std::fill(out, out + kLanes, uint32_t(leader));
  put(w.r<uint32_t>(in.d), out, m);
  w.define(in.d, m, kAll);
  w.pred[in.p] = (w.pred[in.p] & ~m) | ((1u << leader) & m);
  w.pred_defined[in.p] |= m;
  return Step::done;
}

Step warp_barrier(Warp& w, Inst& in, uint32_t m) {
  members(w, in, m);
  tick(w);
  return Step::done;
}

// Whether the group has the lanes that its instruction must have together.
bool together(Warp& w, const Group& g, const Inst& in) {
  if (in.together == Together::any) return true;
  if (in.together == Together::all) return g.mask == w.live;
  const uint32_t mask = w.r<uint32_t>(in.members)[__builtin_ctz(g.mask)];
  return (mask & w.live & ~g.mask) == 0;
}

// Merges the groups that stand at the same instruction and chooses one that can run.
bool pick(Warp& w) {
  const std::vector<Inst>& code = w.kernel->code;
  if (w.groups.size() > 1) {
    std::sort(w.groups.begin(), w.groups.end(), [](const Group& a, const Group& b) { return a.at < b.at; });
    for (size_t i = 0; i + 1 < w.groups.size();) {
      if (w.groups[i].at == w.groups[i + 1].at && !w.groups[i].token && !w.groups[i + 1].token) {
        w.groups[i].mask |= w.groups[i + 1].mask;
        w.groups[i].waiting_at = 0;
        w.groups.erase(w.groups.begin() + int64_t(i) + 1);
      } else {
        ++i;
      }
    }
  }
  bool waits = false;
  const size_t n = w.groups.size();
  for (size_t k = 0; k < n; ++k) {
    const size_t i = device.last_group_first ? n - 1 - k : k;
    const Group& g = w.groups[i];
    if (g.waiting_at) {
      waits = true;
      if (g.waiting_at == w.cluster->changes && !(w.timeout && w.polling)) continue;
    } else if (g.at < code.size() && !together(w, g, code[g.at])) {
      continue;
    }
    w.current = i;
    return true;
  }
  if (!waits && n) {
    const Inst& in = code[w.groups[0].at];
    Fault f("divergent", printed("the warp's lanes 0x%08x wait here for lanes that are elsewhere (0x%08x live)",
                                 w.groups[0].mask, w.live));
    f.line = in.line;
    throw f;
  }
  return false;
}

}  // namespace

void name_place(Fault& f, const Kernel& k, uint32_t line) {
  f.kernel = k.name;
  if (!f.line) f.line = line;
  const auto text = k.text.find(f.line);
  if (text != k.text.end()) f.instruction = text->second.substr(0, 160);
}

void advance(Warp& w, uint32_t budget) {
  Kernel& k = const_cast<Kernel&>(*w.kernel);
  uint64_t lanes = 0;
  while (budget--) {
    if (w.groups.size() > 1 || w.groups[0].waiting_at || k.code[w.groups[0].at].together != Together::any) {
      if (!pick(w)) break;
    } else {
      w.current = 0;
    }
    Group& g = w.groups[w.current];
    Inst& in = k.code[g.at];
    uint32_t m = g.mask;
    try {
      if (in.guard >= 0) {
        const uint32_t unknown = m & ~w.pred_defined[in.guard];
        if (unknown)
          fault("uninitialised", "the predicate in lane %d comes of a value that was never defined",
                __builtin_ctz(unknown));
        m &= in.unless ? ~w.pred[in.guard] : w.pred[in.guard];
        if (!m) {
          ++g.at;
          continue;
        }
      }
      ++in.count;
      lanes += uint64_t(__builtin_popcount(m));
      if (w.flights || in.accumulators) {
        for (uint32_t i = 0; i < in.use_count && !in.is_product; ++i) {
          const int slot = k.uses[in.uses + i];
          if (w.in_flight[size_t(slot)])
            fault("wgmma in flight", "a register of a product is touched before wgmma.wait_group");
          w.touched[size_t(slot)] = 1;
        }
      }
      g.waiting_at = 0;
      const Step step = in.run(w, in, m);
      if (step == Step::done) {
        ++w.groups[w.current].at;
      } else if (step == Step::wait) {
        w.groups[w.current].waiting_at = w.cluster->changes;
      } else if (!w.live) {
        break;
      }
    } catch (Fault& f) {
      name_place(f, k, in.line);
      throw;
    }
  }
  device.lane_instructions += lanes;
}

bool runnable(Warp& w) {
  if (!w.live) return false;
  bool waits = false;
  for (const Group& g : w.groups) {
    waits |= g.waiting_at != 0;
    if (g.waiting_at ? g.waiting_at != w.cluster->changes || (w.timeout && w.polling)
                     : together(w, g, w.kernel->code[g.at]))
      return true;
  }
  return !waits;  // all stand apart: pick() says so
}

void warp_handlers() {
  for (const char* form : {"bra", "bra.uni"})
    instructions()[form] = [](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 1);
      in.run = branch;
    };
  for (const char* form : {"ret", "exit"})
    instructions()[form] = [](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 0);
      in.run = leave;
    };
  const auto shuffles = [](const char* form, Handler handler) {
    instructions()[form] = [handler](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 5);
      const Operand& to = s.operands[0];
      in.a = d.source(s.operands[1], 'w');
      in.b = d.source(s.operands[2], 'w');
      in.c = d.source(s.operands[3], 'w');
      in.members = d.source(s.operands[4], 'w');
      in.together = Together::members;
      in.d = d.target(to.kind == Operand::pair ? to.parts[0] : to, 'w');
      if (to.kind == Operand::pair) in.p = d.target(to.parts[1], 'p');
      in.run = handler;
    };
  };
  shuffles("shfl.sync.up.b32", shuffle<Shuffle::up>);
  shuffles("shfl.sync.down.b32", shuffle<Shuffle::down>);
  shuffles("shfl.sync.bfly.b32", shuffle<Shuffle::butterfly>);
  shuffles("shfl.sync.idx.b32", shuffle<Shuffle::index>);
  const auto votes = [](const char* form, char width, Handler handler) {
    instructions()[form] = [width, handler](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 3);
      in.a = d.predicate(s.operands[1]);
      in.members = d.source(s.operands[2], 'w');
      in.together = Together::members;
      in.d = d.target(s.operands[0], width);
      in.run = handler;
    };
  };
  votes("vote.sync.ballot.b32", 'w', vote<Vote::ballot>);
  votes("vote.sync.any.pred", 'p', vote<Vote::any>);
  votes("vote.sync.all.pred", 'p', vote<Vote::all>);
  instructions()["elect.sync"] = [](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 2);
    if (s.operands[0].kind != Operand::pair) d.refuse(s, "expected a register and a predicate");
    in.members = d.source(s.operands[1], 'w');
    in.together = Together::members;
    in.d = d.target(s.operands[0].parts[0], 'w');
    in.p = d.target(s.operands[0].parts[1], 'p');
    in.run = elect;
  };
  instructions()["bar.warp.sync"] = [](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 1);
    in.members = d.source(s.operands[0], 'w');
    in.together = Together::members;
    in.run = warp_barrier;
  };
}

}  // namespace software_gpu
