// Warps: 32 lanes that part at branches and meet again, run in an order drawn from the seed. Then a launch: its clusters
// one after the other, a cluster's warps interleaved, what is asynchronous completed at random moments.
#include <algorithm>
#include <numeric>

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
    if (w.r<uint32_t>(in.members)[__builtin_ctz(left)] != mask)
      fault("divergent", "lanes name different member masks");
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

void name_place(Fault& f, const Kernel& k, uint32_t line) {
  f.kernel = k.name;
  if (!f.line) f.line = line;
  const auto text = k.text.find(f.line);
  if (text != k.text.end()) f.instruction = text->second.substr(0, 160);
}

// Runs a warp for some instructions, or until it waits.
void advance(Warp& w, uint32_t budget) {
  Kernel& k = const_cast<Kernel&>(*w.kernel);
  uint64_t lanes = 0;
  while (budget--) {
    if (w.groups.size() > 1 || w.groups[0].waiting_at ||
        k.code[w.groups[0].at].together != Together::any) {
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

uint32_t special_value(const Warp& w, int lane, const std::string& name) {
  const Cta& cta = *w.cta;
  const Cluster& cluster = *w.cluster;
  const Launch& launch = *cluster.launch;
  const uint32_t thread = uint32_t(w.index * kLanes + lane);
  const auto& b = launch.block;
  const std::array<uint32_t, 3> tid{thread % b[0], thread / b[0] % b[1], thread / (b[0] * b[1])};
  const size_t dot = name.find('.');
  const std::string base = name.substr(0, dot);
  const size_t axis = dot == std::string::npos ? 0 : size_t(name[dot + 1] - 'x');
  std::array<uint32_t, 3> in_cluster{}, count{};
  for (size_t i = 0; i < 3; ++i) {
    in_cluster[i] = cta.id[i] % cluster.shape[i];
    count[i] = launch.grid[i] / cluster.shape[i];
  }
  if (dot != std::string::npos && axis < 3) {
    if (base == "%tid") return tid[axis];
    if (base == "%ntid") return b[axis];
    if (base == "%ctaid") return cta.id[axis];
    if (base == "%nctaid") return launch.grid[axis];
    if (base == "%cluster_ctaid") return in_cluster[axis];
    if (base == "%cluster_nctaid") return cluster.shape[axis];
    if (base == "%clusterid") return cta.id[axis] / cluster.shape[axis];
    if (base == "%nclusterid") return count[axis];
  }
  if (name == "%laneid") return uint32_t(lane);
  if (name == "%warpid") return uint32_t(w.index);
  if (name == "%cluster_ctarank") return uint32_t(cta.rank);
  if (name == "%cluster_nctarank") return uint32_t(cluster.ctas.size());
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  fault("unknown instruction", "the special register %s", name.c_str());
}

// What ptxas gives a kernel of so many threads, one CTA on a multiprocessor.
int registers_at_launch(uint32_t threads) { return std::min(248, int(65536 / threads) / 8 * 8); }

// Warps keep their room from one cluster to the next: only what is undefined again is reset.
std::vector<std::unique_ptr<Warp>> pool;
uint64_t pool_of = 0;  // a kernel's serial number

std::unique_ptr<Warp> make_warp(Cluster& cluster, Cta& cta, int index, int agent) {
  const Kernel& k = *cluster.launch->kernel;
  std::unique_ptr<Warp> made;
  if (!pool.empty()) {
    made = std::move(pool.back());
    pool.pop_back();
  } else {
    made = std::make_unique<Warp>();
    made->room.resize(size_t(k.slots) * kSlotBytes + 128, 0xcd);
    const uintptr_t at = reinterpret_cast<uintptr_t>(made->room.data());
    made->base = made->room.data() + (128 - at % 128) % 128;
    for (const Constant& c : k.constants)
      for (int i = 0; i < kLanes; ++i) memcpy(made->r<uint8_t>(c.slot) + i * c.width, &c.bits, size_t(c.width));
  }
  Warp& w = *made;
  w.cta = &cta;
  w.cluster = &cluster;
  w.kernel = &k;
  w.index = index;
  w.agent = agent;
  w.defined.assign(size_t(k.slots), 0);
  for (const Constant& c : k.constants) w.defined[size_t(c.slot)] = kAll;
  w.pred.assign(size_t(k.predicates), 0);
  w.pred_defined.assign(size_t(k.predicates), 0);
  w.pred[1] = kAll;
  w.pred_defined[0] = w.pred_defined[1] = kAll;
  w.in_flight.assign(size_t(k.slots), 0);
  w.touched.assign(size_t(k.slots), 1);
  w.flights = 0;
  const Launch& l = *cluster.launch;
  const uint32_t threads = l.block[0] * l.block[1] * l.block[2], first = uint32_t(index) * kLanes;
  w.live = threads - first >= kLanes ? kAll : (1u << (threads - first)) - 1;
  w.groups.assign(1, Group{w.live, 0});
  w.current = 0;
  w.timeout = w.polling = false;
  w.product_groups.clear();
  w.open_products.clear();
  w.product_queue.clear();
  w.product_count = 0;
  w.unit_clocks.fill(0);
  w.cluster_token = 0;
  w.polled = nullptr;
  for (int i = 0; i < kLanes; ++i) w.copy_groups[size_t(i)].clear(), w.open_copies[size_t(i)].clear();
  w.seen.assign(size_t(cluster.agents), 0);
  w.seen_by_async.assign(size_t(cluster.agents), 0);
  w.fenced.assign(size_t(cluster.agents), 0);
  w.seen[size_t(agent)] = 1;
  w.load_unit = 0;
  w.registers = registers_at_launch(threads);
  for (const Special& s : k.specials) {
    for (int i = 0; i < kLanes; ++i) w.r<uint32_t>(s.slot)[i] = special_value(w, i, s.name);
    w.defined[size_t(s.slot)] = kAll;
  }
  return made;
}

void run_cluster(Launch& launch, uint32_t number, const std::array<uint32_t, 3>& id) {
  const Kernel& k = *launch.kernel;
  Cluster cluster;
  cluster.launch = &launch;
  cluster.number = number;
  cluster.id = id;
  cluster.shape = launch.cluster;
  const int ctas = int(launch.cluster[0] * launch.cluster[1] * launch.cluster[2]);
  const int warps = int((launch.block[0] * launch.block[1] * launch.block[2] + kLanes - 1) / kLanes);
  cluster.units = k.asynchronous ? kUnits : 1;
  cluster.agents = ctas * warps * cluster.units;
  for (int rank = 0; rank < ctas; ++rank) {
    cluster.ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *cluster.ctas.back();
    cta.cluster = &cluster;
    cta.rank = rank;
    const uint32_t r = uint32_t(rank), x = launch.cluster[0], y = launch.cluster[1];
    const std::array<uint32_t, 3> in_cluster{r % x, r / x % y, r / (x * y)};
    for (size_t i = 0; i < 3; ++i) cta.id[i] = id[i] * launch.cluster[i] + in_cluster[i];
    const uint32_t bytes = k.shared_bytes + launch.shared_bytes;
    cta.shared.resize(bytes);
    for (uint8_t& b : cta.shared) b = 0xa5;
    cta.cells.resize(bytes / 2 + 1);
    cta.readers.resize((bytes / 4 + 1) * size_t(warps));
    if (cluster.units > 1) cta.async_readers.resize((bytes / 16 + 1) * size_t(warps) * 2);
    cta.product_log.resize(size_t(warps + 3) / 4);
    const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
    cta.free_registers = 65536 - int(threads) * registers_at_launch(threads);
    for (int i = 0; i < warps; ++i) {
      cta.warps.push_back(make_warp(cluster, cta, i, (rank * warps + i) * cluster.units));
      cluster.warps.push_back(cta.warps.back().get());
    }
  }
  const auto fire = [&](size_t i) {
    Event e = std::move(cluster.events[i]);
    cluster.events.erase(cluster.events.begin() + int64_t(i));
    ++cluster.changes;
    try {
      e.act();
    } catch (Fault& f) {
      name_place(f, k, e.of->line);
      throw;
    }
  };
  std::vector<Warp*> ready;
  int rounds = 0;
  uint64_t changes = 0;
  while (true) {
    ++cluster.steps;
    for (size_t i = 0; i < cluster.events.size();)
      if (cluster.events[i].due <= cluster.steps)
        fire(i);
      else
        ++i;
    ready.clear();
    for (Warp* w : cluster.warps)
      if (runnable(*w)) ready.push_back(w);
    if (cluster.changes != changes) rounds = 0, changes = cluster.changes;
    if (ready.empty()) {
      if (!cluster.events.empty()) {
        fire(device.random.below(uint32_t(cluster.events.size())));
        continue;
      }
      bool live = false, polls = false;
      for (Warp* w : cluster.warps) {
        live |= w->live != 0;
        if (w->live && w->polling) polls = w->timeout = true;
      }
      if (!live) break;
      if (polls && ++rounds < 3) continue;
      const char* kind = "deadlock";
      std::string who = state_of_barriers(cluster, &kind);
      uint32_t line = 0;
      for (Warp* w : cluster.warps)
        if (w->live) {
          const Inst& in = k.code[w->groups[0].at];
          if (!line) line = in.line;
          who += printed(" CTA %d warp %d line %u: %s;", w->cta->rank, w->index, in.line, w->waits_for.c_str());
        }
      Fault f(kind, "nothing can go on:" + who);
      name_place(f, k, line);
      throw f;
    }
    Warp& w = *ready[device.random.below(uint32_t(ready.size()))];
    const uint32_t draw = device.random.next();
    advance(w, draw % 4 == 0 ? 1 + draw / 4 % 8 : draw % 4 == 1 ? 2000 : 1 + draw / 4 % 256);
    if (cluster.steps > 40000000) fault("deadlock", "no end after %llu steps", (unsigned long long)cluster.steps);
  }
  for (auto& cta : cluster.ctas)
    for (auto& w : cta->warps) pool.push_back(std::move(w));
}

}  // namespace

void Cluster::later(const Inst& of, std::function<void()> act) {
  const uint32_t draw = device.random.next();
  const uint64_t delay = draw % 3 == 0 ? 0 : draw % 3 == 1 ? draw / 4 % 16 : draw / 4 % 400;
  events.push_back({steps + delay, &of, std::move(act)});
}

void run(Launch& launch) {
  if (pool_of != launch.kernel->serial) pool.clear(), pool_of = launch.kernel->serial;
  begin_launch(launch);
  ++device.launches;
  device.random.state = device.seed * 0x9e3779b97f4a7c15ull + 77 + device.launches * (device.seed != 0);
  device.last_group_first = device.seed % 2 == 1;
  std::array<uint32_t, 3> clusters{};
  for (size_t i = 0; i < 3; ++i) clusters[i] = launch.grid[i] / launch.cluster[i];
  std::vector<uint32_t> order(size_t(clusters[0]) * clusters[1] * clusters[2]);
  std::iota(order.begin(), order.end(), 0u);
  if (device.seed)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[device.random.below(uint32_t(i))]);
  try {
    for (uint32_t n : order)
      run_cluster(launch, n + 1, {n % clusters[0], n / clusters[0] % clusters[1], n / (clusters[0] * clusters[1])});
  } catch (Fault& f) {
    if (f.kernel.empty()) f.kernel = launch.kernel->name;
    pool.clear();
    pool_of = 0;
    throw;
  }
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
