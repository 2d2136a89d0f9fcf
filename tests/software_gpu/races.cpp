// Happens-before. Every warp has a clock and what it has seen of the others'; each of its asynchronous units is an
// agent of its own. `seen_by_async` is what a proxy fence has made visible to the asynchronous proxy.
#include <algorithm>

#include "machine.h"

namespace software_gpu {
namespace {

// Of cells that atomics write to: each agent's last.
std::unordered_map<const Cell*, std::vector<std::pair<uint16_t, uint32_t>>> atomics;

std::string agent_name(const Access& by, uint16_t agent) {
  const int units = by.warp->cluster->units;
  const int warp = agent / units, unit = agent % units;
  const char* what[] = {"", "'s wgmma", "'s bulk store (its reads)", "'s bulk store (its writes)"};
  const int per_cta = int(by.warp->cta->warps.size());
  return printed("warp %d of CTA %d%s", warp % per_cta, warp / per_cta, unit < kLoads ? what[unit] : "'s bulk load");
}

[[noreturn]] void race(const char* first, const char* second, const Access& by, uint16_t agent, uint8_t lane,
                       const Place& place) {
  const std::string other = agent_name(by, agent), self = agent_name(by, by.agent);
  fault("race", "%s of %s at 0x%llx by %s lane %d is not ordered after the %s by %s lane %d", second, place.space,
        static_cast<unsigned long long>(place.at), self.c_str(), by.lane, first, other.c_str(), lane);
}

[[noreturn]] void race_of_clusters(const char* first, const char* second, uint32_t one, uint32_t other,
                                   const Place& place) {
  fault("race", "%s of %s at 0x%llx in cluster %u and its %s in cluster %u have no order", second, place.space,
        static_cast<unsigned long long>(place.at), other, first, one);
}

// The write that the cell remembers comes before this access.
void after_write(const Cell& cell, const Access& by, uint32_t cluster, const Place& place, const char* what,
                 bool same) {
  if (!cell.writing_cluster) return;
  if (cell.flags & kByAtomic) {
    if (by.atomic) return;
    if (cell.flags & kAtomicClusters)
      fault("race", "%s of %s at 0x%llx in cluster %u and atomics of several clusters have no order", what, place.space,
            static_cast<unsigned long long>(place.at), cluster);
    for (const auto& [agent, clock] : atomics[&cell])
      if (agent != by.agent && cell.writing_cluster == cluster &&
          (agent >= by.seen->size() || (*by.seen)[agent] < clock))
        race("atomic", what, by, agent, 0, place);
  }
  if (cell.writing_cluster != cluster) race_of_clusters("write", what, cell.writing_cluster, cluster, place);
  if (cell.writer == by.agent && !by.async) {
    if (cell.written == by.clock && cell.write_lane != by.lane && !same)
      race("write", what, by, cell.writer, cell.write_lane, place);
    return;
  }
  if (cell.writer >= by.seen->size() || (*by.seen)[cell.writer] < cell.written)
    race("write", what, by, cell.writer, cell.write_lane, place);
  if (by.async && !(cell.flags & kByAsync) && (*by.seen_by_async)[cell.writer] < cell.written)
    fault("missing proxy fence",
          "%s of %s at 0x%llx by %s: the write by %s lane %d is in the generic proxy, and no fence.proxy.async lies "
          "between",
          what, place.space, static_cast<unsigned long long>(place.at), agent_name(by, by.agent).c_str(),
          agent_name(by, cell.writer).c_str(), cell.write_lane);
}

}  // namespace

void forget_atomics() { atomics.clear(); }

void check_read(Cell& cell, const Access& by, uint32_t cluster, const Place& place) {
  after_write(cell, by, cluster, place, "read", false);
  if (cell.reading_cluster == cluster && cell.reader == by.agent && cell.read == by.clock) {
    if (cell.read_lane != by.lane) cell.read_lane = 255;
    return;
  }
  if (cell.reading_cluster) {
    if (cell.reading_cluster != cluster)
      cell.flags |= kManyClusters;
    else if (cell.reader != by.agent)
      cell.flags |= kManyAgents;
  }
  cell.reading_cluster = cluster;
  cell.reader = by.agent;
  cell.read = by.clock;
  cell.read_lane = by.lane;
}

void check_write(Cell& cell, const Access& by, uint32_t cluster, const Place& place, bool same) {
  after_write(cell, by, cluster, place, "write", same);
  if (cell.reading_cluster) {
    if (cell.reading_cluster != cluster || (cell.flags & kManyClusters))
      race_of_clusters("read", "write", cell.reading_cluster, cluster, place);
    if (cell.reader == by.agent && !by.async) {
      if (cell.read == by.clock && cell.read_lane != by.lane)
        race("read", "write", by, cell.reader, cell.read_lane, place);
    } else if (cell.reader >= by.seen->size() || (*by.seen)[cell.reader] < cell.read) {
      race("read", "write", by, cell.reader, cell.read_lane, place);
    }
  }
  uint8_t kinds = by.async ? kByAsync : 0;
  if (by.atomic) {
    auto& those = atomics[&cell];
    kinds |= kByAtomic | (cell.flags & kByAtomic ? cell.flags & kAtomicClusters : 0);
    if (!(cell.flags & kByAtomic)) those.clear();
    if ((cell.flags & kByAtomic) && cell.writing_cluster != cluster) kinds |= kAtomicClusters;
    const auto mine = std::find_if(those.begin(), those.end(), [&](const auto& a) { return a.first == by.agent; });
    if (mine == those.end())
      those.emplace_back(by.agent, by.clock);
    else
      mine->second = by.clock;
  }
  cell.writing_cluster = cluster;
  cell.writer = by.agent;
  cell.written = by.clock;
  cell.write_lane = by.lane;
  cell.reading_cluster = 0;
  cell.flags = uint8_t((cell.flags & (kDefined | kBarrier)) | kinds);
}

// Shared memory remembers the last read of every warp (four bytes) and of its units (sixteen).
void check_readers(Cta& cta, uint32_t offset, const Access& by) {
  const size_t warps = cta.warps.size();
  const size_t units = size_t(cta.cluster->units), first = size_t(cta.warps[0]->agent);
  const uint32_t* clocks = &cta.readers[offset / 4 * warps];
  const Clock& seen = *by.seen;
  for (size_t i = 0; i < warps; ++i) {
    const size_t agent = first + i * units;
    if (clocks[i] > seen[agent] && (by.async || agent != by.agent))
      race("read", "write", by, uint16_t(agent), 0, {"shared memory", offset + kSharedBase});
  }
  if (units == 1) return;
  const uint32_t* of_units = &cta.async_readers[offset / 16 * warps * 2];
  for (size_t i = 0; i < warps * 2; ++i) {
    const size_t agent = first + i / 2 * units + (i % 2 ? kStoreReads : kProducts);
    if (of_units[i] > seen[agent])
      race("read", "write", by, uint16_t(agent), 0, {"shared memory", offset + kSharedBase});
  }
}

void note_reader(Cta& cta, uint32_t offset, uint32_t bytes, const Access& by) {
  const size_t warps = cta.warps.size();
  const size_t index = size_t(by.warp->index);
  if (by.unit == kSelf) {
    for (uint32_t at = offset / 4; at <= (offset + bytes - 1) / 4; ++at) cta.readers[at * warps + index] = by.clock;
  } else {
    const size_t unit = index * 2 + (by.unit == kStoreReads);
    for (uint32_t at = offset / 16; at <= (offset + bytes - 1) / 16; ++at)
      cta.async_readers[at * warps * 2 + unit] = by.clock;
  }
}

}  // namespace software_gpu
