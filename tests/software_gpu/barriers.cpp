// bar, barrier.cluster, mbarrier, fences and setmaxnreg: who waits for whom, and what they then have seen.
#include <algorithm>

#include "lanes.h"

namespace software_gpu {
namespace {

void release(Warp& w, Clock& into, Clock& into_async) {
  join(into, w.seen);
  join(into_async, w.seen_by_async);
}
void acquire(Warp& w, const Clock& from, const Clock& from_async) {
  join(w.seen, from);
  join(w.seen_by_async, from_async);
}
void finish(Barrier& b) {
  join(b.released, b.gathered);
  join(b.released_async, b.gathered_async);
  std::fill(b.gathered.begin(), b.gathered.end(), 0);
  std::fill(b.gathered_async.begin(), b.gathered_async.end(), 0);
  b.arrived = 0;
  ++b.generation;
}

uint32_t uniform(Warp& w, int slot, uint32_t m, const char* what) {
  const uint32_t* values = w.r<uint32_t>(slot);
  if (m & ~w.defined[slot]) fault("uninitialised", "%s was never defined", what);
  const uint32_t value = values[__builtin_ctz(m)];
  for (uint32_t left = m; left; left &= left - 1)
    if (values[__builtin_ctz(left)] != value)
      fault("divergent barrier", "%s differs between the lanes of a warp", what);
  return value;
}

Step bar_sync(Warp& w, Inst& in, uint32_t m) {
  const uint32_t id = uniform(w, in.a, m, "the barrier's number");
  const uint32_t all = uint32_t(w.cta->warps.size()) * kLanes;
  const uint32_t count = in.b < 0 ? all : uniform(w, in.b, m, "the barrier's count of threads");
  if (id > 15) fault("divergent barrier", "barrier %u of 16", id);
  if (count == 0 || count % kLanes || count > all)
    fault("divergent barrier", "a count of %u threads where the CTA has %u", count, all);
  if (m != w.live) fault("divergent barrier", "lanes 0x%08x of 0x%08x execute it", m, w.live);
  Barrier& b = w.cta->barriers[id];
  Group& g = w.group();
  if (!g.token) {
    if (b.arrived && b.expected != count)
      fault("divergent barrier", "barrier %u: %u threads are expected by those that wait, %u by warp %d", id,
            b.expected, count, w.index);
    b.expected = count;
    release(w, b.gathered, b.gathered_async);
    tick(w);
    b.arrived += kLanes;
    g.token = b.generation;
    if (b.arrived == b.expected) {
      finish(b);
      ++w.cluster->changes;
    }
  }
  if (b.generation == g.token)
    return w.wait(printed("barrier %u, %u of %u threads are there", id, b.arrived, b.expected));
  acquire(w, b.released, b.released_async);
  g.token = 0;
  return Step::done;
}

template <bool relaxed>
Step cluster_arrive(Warp& w, Inst&, uint32_t m) {
  if (m != w.live) fault("divergent barrier", "barrier.cluster: lanes 0x%08x of 0x%08x", m, w.live);
  if (w.cluster_token) fault("divergent barrier", "barrier.cluster: a second arrival without a wait");
  Barrier& b = w.cluster->barrier;
  if (relaxed) {
    join(b.gathered, w.fenced);
    b.gathered_async.resize(w.seen.size());
  } else {
    release(w, b.gathered, b.gathered_async);
  }
  tick(w);
  ++b.arrived;
  w.cluster_token = b.generation;
  advance_cluster_barrier(*w.cluster);
  return Step::done;
}
Step cluster_wait(Warp& w, Inst&, uint32_t m) {
  if (m != w.live) fault("divergent barrier", "barrier.cluster: lanes 0x%08x of 0x%08x", m, w.live);
  Barrier& b = w.cluster->barrier;
  if (!w.cluster_token) fault("divergent barrier", "barrier.cluster.wait without an arrival");
  if (b.generation == w.cluster_token)
    return w.wait(printed("the cluster's barrier, %u of %zu warps are there", b.arrived, w.cluster->warps.size()));
  acquire(w, b.released, b.released_async);
  w.cluster_token = 0;
  return Step::done;
}

Step fence_init(Warp& w, Inst&, uint32_t) {
  join(w.fenced, w.seen);
  tick(w);
  return Step::done;
}
Step fence_proxy(Warp& w, Inst&, uint32_t) {
  join(w.seen_by_async, w.seen);
  tick(w);
  return Step::done;
}

// --- mbarrier

void maybe_complete(Cluster& cluster, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  join(b.done, b.gathered);
  join(b.done_async, b.gathered_async);
  std::fill(b.gathered.begin(), b.gathered.end(), 0);
  std::fill(b.gathered_async.begin(), b.gathered_async.end(), 0);
  ++cluster.changes;
}

SharedPlace place_of(Warp& w, Inst& in, int lane, bool cluster) {
  if (!(w.defined[in.a] >> lane & 1)) fault("uninitialised", "the mbarrier's address was never defined");
  return shared_place(w, w.r<uint32_t>(in.a)[lane] + uint32_t(in.imm), 8, 8, cluster);
}

Step mbarrier_init(Warp& w, Inst& in, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const SharedPlace place = place_of(w, in, lane, false);
    const uint32_t count = w.r<uint32_t>(in.b)[lane];
    if (count == 0 || count >= 1u << 20) fault("mbarrier", "initialised with a count of %u", count);
    if (place.cta->mbarriers.count(place.offset))
      fault("mbarrier", "at %u is initialised again", place.offset + kSharedBase);
    touch_shared(*place.cta, place.offset, 8, true, by_lane(w, lane));
    for (uint32_t i = 0; i < 4; ++i) place.cta->cells[place.offset / 2 + i].flags |= kBarrier;
    Mbarrier& b = place.cta->mbarriers[place.offset];
    b.expected = b.pending = count;
    b.maker = uint16_t(w.agent);
    b.made = w.now();
  }
  ++w.cluster->changes;
  return Step::done;
}

template <bool cluster, bool bytes>
Step mbarrier_arrive(Warp& w, Inst& in, uint32_t m) {
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const SharedPlace place = place_of(w, in, lane, cluster);
    Mbarrier& b = mbarrier_at(*place.cta, place.offset, w.seen);
    if (bytes) {
      b.bytes += w.r<uint32_t>(in.b)[lane];
      if (b.bytes >= 1 << 20) fault("mbarrier", "more than 2^20 - 1 bytes are expected");
    }
    if (b.pending == 0)
      fault("mbarrier", "at %u: an arrival more than the %u it expects in a phase", place.offset + kSharedBase,
            b.expected);
    --b.pending;
    release(w, b.gathered, b.gathered_async);
    maybe_complete(*w.cluster, b);
  }
  tick(w);
  return Step::done;
}

Step mbarrier_try_wait(Warp& w, Inst& in, uint32_t m) {
  uint32_t done = 0;
  w.polled = nullptr;
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const SharedPlace place = place_of(w, in, lane, false);
    Mbarrier& b = mbarrier_at(*place.cta, place.offset, w.seen);
    const uint32_t parity = w.r<uint32_t>(in.b)[lane];
    if (parity > 1) fault("mbarrier", "a parity of %u", parity);
    if ((b.phase & 1) != parity) {
      done |= 1u << lane;
      acquire(w, b.done, b.done_async);
    } else if (!w.polled) {
      w.polled = &b;
      w.waits_for = printed("the mbarrier at %u of CTA %d: its phase %llu lacks %u of %u arrivals and %lld bytes",
                            place.offset + kSharedBase, place.cta->rank, static_cast<unsigned long long>(b.phase),
                            b.pending, b.expected, static_cast<long long>(b.bytes));
    }
  }
  w.polling = done != m;
  // It may give up at any time; it does where nothing else can go on, and now and then.
  if (done != m && !w.timeout && device.random.below(8)) return Step::wait;
  w.timeout = w.polling = false;
  w.pred[in.d] = (w.pred[in.d] & ~m) | done;
  w.pred_defined[in.d] |= m;
  return Step::done;
}

template <bool more>
Step set_registers(Warp& w, Inst& in, uint32_t) {
  const int want = int(in.imm);
  if (want < 24 || want > 256 || want % 8) fault("setmaxnreg", "%d registers", want);
  if (more ? want < w.registers : want > w.registers)
    fault("setmaxnreg", "%s to %d registers from %d", more ? ".inc" : ".dec", want, w.registers);
  const int need = (want - w.registers) * kLanes;
  if (need > w.cta->free_registers) return w.wait(printed("%d registers, %d are free", need, w.cta->free_registers));
  w.cta->free_registers -= need;
  w.registers = want;
  ++w.cluster->changes;
  return Step::done;
}

int shared_address(Decoder& d, const Statement& s, size_t i, Inst& in) {
  const Operand& o = s.operands.at(i);
  if (o.kind != Operand::address || o.parts.size() != 1) d.refuse(s, "expected an address");
  in.imm = o.offset;
  return d.source(o.parts[0], 'w');
}

}  // namespace

Mbarrier& mbarrier_at(Cta& cta, uint32_t offset, const Clock& seen) {
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end()) fault("mbarrier", "none was initialised at %u", offset + kSharedBase);
  Mbarrier& b = found->second;
  if (device.check_races && seen[b.maker] < b.made)
    fault("mbarrier", "at %u of CTA %d: its initialisation is not ordered before this use", offset + kSharedBase,
          cta.rank);
  return b;
}

void complete_bytes(Cta& cta, uint32_t offset, int64_t bytes, const Access& by) {
  Mbarrier& b = mbarrier_at(cta, offset, *by.seen);
  b.bytes -= bytes;
  if (b.bytes <= -(1 << 20)) fault("mbarrier", "2^20 bytes more than expected were completed");
  b.gathered.resize(by.seen->size());
  b.gathered[by.agent] = std::max(b.gathered[by.agent], by.clock);
  maybe_complete(*cta.cluster, b);
}

void advance_cluster_barrier(Cluster& cluster) {
  Barrier& b = cluster.barrier;
  uint32_t gone = 0;
  for (const Warp* w : cluster.warps) gone += w->live == 0 && w->cluster_token != b.generation;
  if (b.arrived && b.arrived + gone >= cluster.warps.size()) {
    finish(b);
    ++cluster.changes;
  }
}

void at_exit(Cta& cta) {
  if (cta.incoming)
    fault("asynchronous work at exit", "%d bulk copies from or to shared memory are in flight", cta.incoming);
  for (const auto& [offset, b] : cta.mbarriers)
    if (b.bytes)
      fault("mbarrier bytes", "at %u: %lld bytes are expected still, and the CTA exits", offset + kSharedBase,
            static_cast<long long>(b.bytes));
}

std::string state_of_barriers(const Cluster& cluster, const char** kind) {
  for (const auto& cta : cluster.ctas) {
    bool gone = false;
    for (const auto& w : cta->warps) {
      gone |= w->live == 0;
      if (w->live && w->polled && w->polled->pending == 0 && w->polled->bytes) *kind = "mbarrier bytes";
    }
    for (const Barrier& b : cta->barriers)
      if (b.arrived && gone) *kind = "divergent barrier";
  }
  return "";
}

void barrier_handlers() {
  for (const char* form : {"bar.sync", "barrier.sync.aligned", "barrier.sync"})
    instructions()[form] = [](Decoder& d, const Statement& s, Inst& in) {
      if (s.operands.empty() || s.operands.size() > 2) d.refuse(s, "expected one or two operands");
      in.a = d.source(s.operands[0], 'w');
      if (s.operands.size() > 1) in.b = d.source(s.operands[1], 'w');
      in.together = Together::all;
      in.run = bar_sync;
    };
  const auto plain = [](const char* form, Handler handler, bool all) {
    instructions()[form] = [handler, all](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 0);
      if (all) in.together = Together::all;
      in.run = handler;
    };
  };
  plain("barrier.cluster.arrive.relaxed.aligned", cluster_arrive<true>, true);
  plain("barrier.cluster.arrive.aligned", cluster_arrive<false>, true);
  plain("barrier.cluster.arrive.release.aligned", cluster_arrive<false>, true);
  plain("barrier.cluster.wait.aligned", cluster_wait, true);
  plain("barrier.cluster.wait.acquire.aligned", cluster_wait, true);
  plain("fence.mbarrier_init.release.cluster", fence_init, false);
  plain("fence.proxy.async.shared::cta", fence_proxy, false);
  plain("fence.proxy.async", fence_proxy, false);
  plain("fence.proxy.async.global", fence_proxy, false);

  const auto addressed = [](const char* form, size_t address, size_t value, Handler handler, bool discards) {
    instructions()[form] = [=](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, std::max(address, value) + 1);
      if (discards && s.operands[0].kind != Operand::discard) d.refuse(s, "a state as result");
      in.a = shared_address(d, s, address, in);
      if (value) in.b = d.source(s.operands[value], 'w');
      in.run = handler;
      d.kernel.asynchronous = true;
    };
  };
  addressed("mbarrier.init.shared::cta.b64", 0, 1, mbarrier_init, false);
  addressed("mbarrier.arrive.shared::cta.b64", 1, 0, mbarrier_arrive<false, false>, true);
  addressed("mbarrier.arrive.shared::cluster.b64", 1, 0, mbarrier_arrive<true, false>, true);
  addressed("mbarrier.arrive.expect_tx.shared::cta.b64", 1, 2, mbarrier_arrive<false, true>, true);
  addressed("mbarrier.arrive.expect_tx.shared::cluster.b64", 1, 2, mbarrier_arrive<true, true>, true);
  instructions()["mbarrier.try_wait.parity.shared::cta.b64"] = [](Decoder& d, const Statement& s, Inst& in) {
    if (s.operands.size() < 3 || s.operands.size() > 4) d.refuse(s, "expected three or four operands");
    in.a = shared_address(d, s, 1, in);
    in.b = d.source(s.operands[2], 'w');
    if (s.operands.size() > 3) in.c = d.source(s.operands[3], 'w');
    in.d = d.target(s.operands[0], 'p');
    in.run = mbarrier_try_wait;
    d.kernel.asynchronous = true;
  };
  for (const bool more : {false, true})
    instructions()[more ? "setmaxnreg.inc.sync.aligned.u32" : "setmaxnreg.dec.sync.aligned.u32"] =
        [more](Decoder& d, const Statement& s, Inst& in) {
          d.expect(s, 1);
          if (s.operands[0].kind != Operand::number) d.refuse(s, "expected a number");
          in.imm = int64_t(s.operands[0].value);
          in.together = Together::all;
          in.run = more ? set_registers<true> : set_registers<false>;
        };
}

}  // namespace software_gpu
