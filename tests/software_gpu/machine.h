// A CUDA device made of software: what its rooms share. PTX is decoded once into Inst; a warp is 32 lanes wide, its
// registers are vectors of 32, and every check of memory, order and definedness ends in a Fault.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace software_gpu {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAll = 0xffffffffu;
inline constexpr int kSlotBytes = 128;  // 32 lanes of 32 bits; 64-bit registers take two

struct Fault : std::runtime_error {
  Fault(std::string kind_, const std::string& what) : std::runtime_error(what), kind(std::move(kind_)) {}
  std::string kind, kernel, instruction;
  uint32_t line = 0;
};
[[noreturn]] void fault(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string printed(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A small counter-based generator: the same draws for the same seed on every machine.
struct Random {
  uint64_t state = 1;
  uint32_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return uint32_t((z ^ (z >> 31)) >> 16);
  }
  uint32_t below(uint32_t n) { return uint32_t((uint64_t(next()) * n) >> 32); }
};

struct Warp;
struct Inst;
struct Cluster;
enum class Step { done, wait, jumped };
using Handler = Step (*)(Warp&, Inst&, uint32_t);

// How many lanes an instruction must have together before it can run.
enum class Together : uint8_t { any, all, members };

struct Inst {
  Handler run = nullptr;
  int32_t d = -1, a = -1, b = -1, c = -1;  // slots of registers, or numbers of predicates
  int32_t guard = -1;
  bool unless = false, accumulators = false, is_product = false;
  Together together = Together::any;
  int32_t members = -1, target = -1;
  int32_t p = -1;                    // a second destination
  int64_t imm = 0;                   // offsets, counts, modes
  std::array<int32_t, 4> v{};        // elements of a vector
  uint32_t uses = 0, use_count = 0;  // of Kernel::uses: every slot read or written
  uint32_t line = 0, form = 0;
  uint64_t count = 0;
};

struct Special {
  int slot;
  std::string name;
};
struct Constant {
  int slot;
  uint64_t bits;
  int width;
};
struct Parameter {
  uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::vector<Inst> code;
  std::vector<int32_t> uses;
  std::vector<std::string> forms;  // by Inst::form
  std::vector<Special> specials;
  std::vector<Constant> constants;
  std::vector<Parameter> parameters;
  std::vector<int> accumulators;         // slots that a product accumulates in
  std::map<uint32_t, std::string> text;  // by line
  int slots = 0, predicates = 2;         // predicates 0 and 1 are false and true
  uint32_t shared_bytes = 0, parameter_bytes = 0, most_threads = 1024;
  bool asynchronous = false, dynamic_shared = false, decoded = false;
  uint64_t serial = 0;
};

using Clock = std::vector<uint32_t>;
inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i)
    if (into[i] < from[i]) into[i] = from[i];
}

// What is known of two bytes of memory. An agent is a warp, or one of its asynchronous units (races.h).
struct Cell {
  uint32_t written = 0, read = 0;                     // clocks
  uint32_t writing_cluster = 0, reading_cluster = 0;  // 0: never in this launch
  uint16_t writer = 0, reader = 0;
  uint8_t write_lane = 0, read_lane = 0, flags = 0, unused = 0;
};
enum : uint8_t {
  kDefined = 1,
  kByAsync = 2,
  kManyClusters = 4,
  kManyAgents = 8,
  kBarrier = 16,
  kByAtomic = 32,
  kAtomicClusters = 64
};

struct Cta;

struct Group {
  uint32_t mask, at;
  uint64_t token = 0;       // of the barrier it has arrived at
  uint64_t waiting_at = 0;  // Cluster::changes when it began to wait; 0: it runs
};

struct Product;  // wgmma.mma_async, products.cpp
struct Copy;     // cp.async.bulk, copies.cpp

struct Warp {
  Cta* cta = nullptr;
  Cluster* cluster = nullptr;
  const Kernel* kernel = nullptr;
  int index = 0, agent = 0;  // within the CTA; within the cluster's clocks
  std::vector<uint8_t> room;
  uint8_t* base = nullptr;
  std::vector<uint32_t> defined, pred, pred_defined;
  std::vector<uint16_t> in_flight;
  std::vector<uint8_t> touched;  // accumulators accessed since the last wgmma.fence
  int flights = 0;
  std::vector<Group> groups;
  size_t current = 0;
  uint32_t live = 0;
  bool timeout = false;  // the next mbarrier.try_wait gives up
  bool polling = false;  // it waits in one
  std::string waits_for;
  Clock seen, seen_by_async, fenced;
  std::array<uint32_t, 16> unit_clocks{};  // of the warp's asynchronous units
  uint64_t cluster_token = 0;              // of the cluster barrier it has arrived at and not yet waited for
  const struct Mbarrier* polled = nullptr;
  int registers = 0, load_unit = 0;
  // wgmma: committed groups, oldest first.
  std::deque<std::vector<std::shared_ptr<Product>>> product_groups;
  std::vector<std::shared_ptr<Product>> open_products;
  std::deque<std::shared_ptr<Product>> product_queue;  // issued, in their order
  size_t product_count = 0;
  // cp.async.bulk: per lane.
  std::array<std::deque<std::vector<std::shared_ptr<Copy>>>, kLanes> copy_groups;
  std::array<std::vector<std::shared_ptr<Copy>>, kLanes> open_copies;

  template <class T>
  T* r(int slot) {
    return reinterpret_cast<T*>(base + int64_t(slot) * kSlotBytes);
  }
  void define(int slot, uint32_t mask, uint32_t value) { defined[slot] = (defined[slot] & ~mask) | (value & mask); }
  Group& group() { return groups[current]; }
  Step wait(std::string why) {
    waits_for = std::move(why);
    return Step::wait;
  }
  uint32_t now() const { return seen[size_t(agent)]; }
};

struct Barrier {
  uint64_t generation = 1;
  uint32_t expected = 0, arrived = 0;
  Clock gathered, gathered_async, released, released_async;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  Clock gathered, gathered_async, done, done_async;
  uint16_t maker = 0;
  uint32_t made = 0;
};

// A product that the four warps of a warpgroup issue together, a quarter each; it is complete when all of them are.
struct Issued {
  std::array<uint64_t, 4> what{};  // line, descriptors, scale-d
  int parts_done = 0;
  std::array<uint32_t, 4> clocks{};
};

struct Cta {
  Cluster* cluster = nullptr;
  int rank = 0;
  std::array<uint32_t, 3> id{};
  std::vector<uint8_t> shared;
  std::vector<Cell> cells;              // of shared memory
  std::vector<uint32_t> readers;        // clocks [bytes / 4][warps]
  std::vector<uint32_t> async_readers;  // clocks [bytes / 16][2 warps]: products, copies
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<Barrier, 16> barriers;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::vector<std::deque<Issued>> product_log;  // by warpgroup
  int free_registers = 0, incoming = 0;         // incoming: bulk loads on their way
  bool finished() const {
    for (const auto& w : warps)
      if (w->live) return false;
    return true;
  }
};

struct Event {  // something asynchronous that will have happened by then
  uint64_t due;
  const Inst* of;
  std::function<void()> act;
};

struct Launch;
struct Cluster {
  Launch* launch = nullptr;
  uint32_t number = 1;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Warp*> warps;
  int units = 1, agents = 0;  // agents of a warp, and of all
  std::array<uint32_t, 3> id{}, shape{};
  Barrier barrier;
  std::vector<Event> events;
  uint64_t steps = 0, changes = 1;
  void later(const Inst& of, std::function<void()> act);
};

struct Launch {
  const Kernel* kernel = nullptr;
  std::array<uint32_t, 3> grid{}, block{}, cluster{1, 1, 1};
  uint32_t shared_bytes = 0;
  std::vector<uint8_t> parameters;
};

// The device's one state: seeds, counters, the last fault.
struct Device {
  uint64_t seed = 0, rounding_seed = 0;  // of orders and moments; of the last bits that are left open
  Random random;
  bool last_group_first = false, check_races = true;
  int multiprocessors = 4;
  uint64_t lane_instructions = 0, launches = 0;
  std::string last_fault;     // kind|kernel|line|instruction|what
  std::string pending_fault;  // of a call that the host may have ignored
};
extern Device device;

// Agents of one warp: itself, its products, its bulk stores' reads and writes, and its bulk loads.
enum : int { kSelf = 0, kProducts = 1, kStoreReads = 2, kStoreWrites = 3, kLoads = 4, kUnits = 12 };

// --- memory.cpp
inline constexpr uint32_t kSharedBase = 1024;  // as on Hopper, where the first KiB is the system's
inline constexpr uint64_t kParameterBase = uint64_t(0x6000) << 40, kGlobalBase = uint64_t(0x2000) << 40;
uint64_t map_memory(void* host, uint64_t storage_bytes, uint64_t offset, uint64_t bytes, bool defined);
void define_memory(void* storage);
void forget_memory(void* storage);
void unmap_all();
void begin_launch(Launch& launch);
extern Launch* active;
void memory_handlers();
void atomic_handlers();
// The bytes' place in host memory; outside a tensor it is a fault.
uint8_t* global_bytes(uint64_t address, uint64_t bytes);
bool global_known(uint64_t address, uint64_t bytes);
struct SharedPlace {
  Cta* cta;
  uint32_t offset;
};
SharedPlace shared_place(Warp& w, uint32_t address, uint32_t bytes, uint32_t align, bool cluster);
const uint8_t* any_bytes(Warp& w, uint64_t address, uint32_t bytes);
// Who touches memory: a lane of a warp, or an asynchronous unit with what its issuer had seen.
struct Access {
  Warp* warp = nullptr;
  const Clock *seen = nullptr, *seen_by_async = nullptr;
  uint16_t agent = 0;
  uint32_t clock = 0;
  uint8_t lane = 0;
  bool async = false;
  int unit = kSelf;
  bool atomic = false;  // reads and writes; needs no order among its like
};
// Bounds, definedness and order of one access; `same` says that a write leaves the value as it is.
void touch_global(uint64_t address, uint32_t bytes, bool write, const Access& by, bool same = false, bool known = true);
void touch_shared(Cta& cta, uint32_t offset, uint32_t bytes, bool write, const Access& by, bool same = false,
                  bool known = true);
Access by_lane(Warp& w, int lane);

// --- races.cpp
struct Place {
  const char* space;
  uint64_t at;
};
void check_read(Cell& cell, const Access& by, uint32_t cluster, const Place& place);
void check_write(Cell& cell, const Access& by, uint32_t cluster, const Place& place, bool same);
void check_readers(Cta& cta, uint32_t offset, const Access& by);
void note_reader(Cta& cta, uint32_t offset, uint32_t bytes, const Access& by);
void forget_atomics();
inline void tick(Warp& w) { ++w.seen[size_t(w.agent)]; }

// --- copies.cpp
struct TensorMap {  // what the 128 bytes of a CUtensorMap hold here
  uint32_t magic, check;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 to 4
  uint32_t dims[5];
  uint32_t box[5];
  uint8_t rank, element_bytes, swizzle, type;  // swizzle: 0, 32, 64, 128 bytes; type: the driver's number
};
static_assert(sizeof(TensorMap) <= 128);
inline constexpr uint32_t kMapMagic = 0x7e4507a9;
uint32_t checksum(const TensorMap& map);
inline uint32_t swizzled(uint32_t address, uint32_t bytes) {
  return bytes == 0 ? address : address ^ ((address >> 7 & (bytes / 16 - 1)) << 4);
}

// --- atomics.cpp
void add_elements(uint8_t* to, const uint8_t* from, uint32_t bytes, int type);  // of a tensor map's type

// --- the rooms' instructions
struct Decoder;
struct Statement;
using Maker = std::function<void(Decoder&, const Statement&, Inst&)>;
std::unordered_map<std::string, Maker>& instructions();
void scalar_handlers();
void approximation_handlers();
void comparison_handlers();
void conversion_handlers();
void warp_handlers();
void barrier_handlers();
void copy_handlers();
void matrix_handlers();
void product_handlers();

// --- warp.cpp
void advance(Warp& w, uint32_t budget);  // for some instructions, or until it waits
bool runnable(Warp& w);
void name_place(Fault& f, const Kernel& k, uint32_t line);
// --- launch.cpp
void run(Launch& launch);
// --- barriers.cpp
void complete_bytes(Cta& cta, uint32_t offset, int64_t bytes, const Access& by);
void at_exit(Cta& cta);
void advance_cluster_barrier(Cluster& cluster);
Mbarrier& mbarrier_at(Cta& cta, uint32_t offset, const Clock& seen);
std::string state_of_barriers(const Cluster& cluster, const char** kind);

// --- parse.cpp
struct Module {
  std::string text;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<std::string, std::pair<size_t, size_t>> places;  // of entries in the text
  std::map<std::string, uint64_t> variables;
  std::map<std::string, std::pair<uint32_t, uint32_t>> shared;  // module-scope: bytes, alignment; 0 bytes: dynamic
};
std::unique_ptr<Module> index_module(std::string text);
Kernel& decoded(Module& module, const std::string& name);
struct Patch {
  std::string kernel, old, now;
  int which;
  bool used;
};
extern std::vector<Patch> patches;

}  // namespace software_gpu
