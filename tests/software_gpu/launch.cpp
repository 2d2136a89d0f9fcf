// A launch: its clusters one after the other, a cluster's warps interleaved in an order drawn from the seed, and what
// is asynchronous completed at random moments.
#include <algorithm>
#include <numeric>

#include "machine.h"

namespace software_gpu {
namespace {

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

}  // namespace software_gpu
