// Memory. Tensors have addresses of their own, a terabyte apart, so that a pointer leads into its own tensor or
// nowhere. Every access is checked: bounds, alignment, whether the bytes were ever written, and order (races.cpp).
#include "lanes.h"

namespace software_gpu {

Device device;
Launch* active = nullptr;

namespace {

struct Window {
  uint8_t* host = nullptr;
  uint64_t bytes = 0;                                // of the storage
  std::vector<std::pair<uint64_t, uint64_t>> views;  // the tensors in it that were handed to the device
  std::vector<uint8_t> defined;                      // by byte; empty: all are
  std::vector<Cell> cells;                           // by two bytes, of this launch
  bool live = false;
};
std::vector<Window> windows;
constexpr uint64_t kMiddle = uint64_t(1) << 39;  // tensors begin in the middle of their terabyte

Window* find(uint64_t address) {
  const uint64_t index = (address - kGlobalBase) >> 40;
  return address >= kGlobalBase && index < windows.size() ? &windows[index] : nullptr;
}

Window& window_of(uint64_t address, uint64_t bytes, uint64_t& offset) {
  Window* w = find(address);
  if (!w) {
    const char* guess = address == 0                            ? "a null pointer"
                        : address >> 40 == kParameterBase >> 40 ? "a parameter's address"
                        : address < 0x1000000                   ? "an address near null"
                                                                : "a host pointer?";
    fault("no device memory", "global memory at 0x%llx: %s", static_cast<unsigned long long>(address), guess);
  }
  offset = (address & ((uint64_t(1) << 40) - 1)) - kMiddle;
  for (const auto& [from, to] : w->views)
    if (offset >= from && offset + bytes <= to && offset + bytes >= offset) return *w;
  std::string views;
  for (const auto& [from, to] : w->views)
    views += printed(" [%llu, %llu)", static_cast<unsigned long long>(from), static_cast<unsigned long long>(to));
  fault("out of bounds", "global memory: %llu bytes at byte %lld of a storage of %llu; its tensors have the bytes%s",
        static_cast<unsigned long long>(bytes), static_cast<long long>(offset),
        static_cast<unsigned long long>(w->bytes), views.c_str());
}

}  // namespace

uint64_t map_memory(void* host, uint64_t storage_bytes, uint64_t offset, uint64_t bytes, bool defined) {
  size_t index = 0;
  while (index < windows.size() && windows[index].host != host) ++index;
  if (index == windows.size()) windows.emplace_back();
  Window& w = windows[index];
  if (w.bytes != storage_bytes) {
    w = Window();
    w.host = static_cast<uint8_t*>(host);
    w.bytes = storage_bytes;
  }
  if (!defined) w.defined.assign(storage_bytes, 0);
  const std::pair<uint64_t, uint64_t> view{offset, offset + bytes};
  bool known = false;
  for (auto& v : w.views) known |= v.first <= view.first && v.second >= view.second;
  if (bytes && !known) w.views.push_back(view);
  return kGlobalBase + (uint64_t(index) << 40) + kMiddle + offset;
}

void define_memory(void* storage) {
  for (Window& w : windows)
    if (w.host == storage) w.defined.clear();
}
void forget_memory(void* storage) {
  for (Window& w : windows)
    if (w.host == storage) w.views.clear(), w.defined.clear();
}
void unmap_all() { windows.clear(); }

void begin_launch(Launch& launch) {
  active = &launch;
  for (Window& w : windows) w.cells.clear();
  forget_atomics();
}

uint8_t* global_bytes(uint64_t address, uint64_t bytes) {
  uint64_t offset;
  return window_of(address, bytes, offset).host + offset;
}
bool global_known(uint64_t address, uint64_t bytes) {
  try {
    global_bytes(address, bytes);
    return true;
  } catch (const Fault&) {
    return false;
  }
}

Access by_lane(Warp& w, int lane) {
  return {&w, &w.seen, &w.seen_by_async, uint16_t(w.agent), w.now(), uint8_t(lane), false, kSelf};
}

void touch_global(uint64_t address, uint32_t bytes, bool write, const Access& by, bool same, bool known) {
  uint64_t offset;
  Window& w = window_of(address, bytes, offset);
  if (write && !known)
    fault("uninitialised", "a value that was never defined is stored to global memory by lane %d", by.lane);
  if (!w.defined.empty()) {
    if (write && !by.atomic) {
      memset(&w.defined[offset], 1, bytes);
    } else {
      for (uint64_t i = offset; i < offset + bytes; ++i)
        if (!w.defined[i])
          fault("uninitialised", "read of global memory that was never written: byte %llu of a tensor, lane %d",
                static_cast<unsigned long long>(i), by.lane);
    }
  }
  if (!device.check_races) return;
  if (w.cells.empty()) w.cells.resize(w.bytes / 2 + 1);
  const uint32_t cluster = by.warp->cluster->number;
  for (uint64_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    if (write)
      check_write(w.cells[i], by, cluster, {"global memory", address}, same);
    else
      check_read(w.cells[i], by, cluster, {"global memory", address});
  }
}

SharedPlace shared_place(Warp& w, uint32_t address, uint32_t bytes, uint32_t align, bool cluster) {
  Cta* cta = w.cta;
  const uint32_t rank = address >> 24, offset = (address & 0xffffff) - kSharedBase;
  if (rank) {
    if (rank > w.cluster->ctas.size())
      fault("out of bounds", "shared memory of CTA %u in a cluster of %zu", rank - 1, w.cluster->ctas.size());
    cta = w.cluster->ctas[rank - 1].get();
    if (cta != w.cta && !cluster) fault("out of bounds", "shared::cta memory of CTA %u, another one", rank - 1);
  }
  if (offset >= cta->shared.size() || offset + bytes > cta->shared.size())
    fault("out of bounds", "shared memory: %u bytes at %d of %zu", bytes, int32_t(offset), cta->shared.size());
  if (offset % align)
    fault("misaligned", "shared memory: offset %u for an access of %u bytes", offset + kSharedBase, align);
  if (cta != w.cta && cta->finished()) fault("out of bounds", "shared memory of CTA %d, which has exited", cta->rank);
  return {cta, offset};
}

void touch_shared(Cta& cta, uint32_t offset, uint32_t bytes, bool write, const Access& by, bool same, bool known) {
  const uint32_t cluster = by.warp->cluster->number;
  for (uint32_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    Cell& cell = cta.cells[i];
    const Place place{"shared memory", i * 2 + kSharedBase};
    if (cell.flags & kBarrier) fault("mbarrier", "its bytes at %u are touched as memory", i * 2 + kSharedBase);
    if ((!write || by.atomic) && !(cell.flags & kDefined))
      fault("uninitialised", "read of shared memory that was never written: offset %u, lane %d", i * 2 + kSharedBase,
            by.lane);
    if (write) {
      if (device.check_races) {
        check_write(cell, by, cluster, place, same);
        if (!same && (i == offset / 2 || i % 2 == 0)) check_readers(cta, i * 2, by);
      }
      cell.flags = uint8_t(known ? cell.flags | kDefined : cell.flags & ~kDefined);
    } else if (device.check_races) {
      check_read(cell, by, cluster, place);
    }
  }
  if (!write && device.check_races) note_reader(cta, offset, bytes, by);
}

const uint8_t* any_bytes(Warp& w, uint64_t address, uint32_t bytes) {
  (void)w;
  if (address >> 40 != kParameterBase >> 40) return global_bytes(address, bytes);
  const uint64_t offset = address - kParameterBase;
  if (offset + bytes > active->parameters.size())
    fault("out of bounds", "parameters: %u bytes at %llu of %zu", bytes, static_cast<unsigned long long>(offset),
          active->parameters.size());
  return active->parameters.data() + offset;
}

namespace {

enum class Space { global, shared, parameter };

// Elements of M bytes in registers of type R, in.c of them.
template <class M, class R, Space space, bool write>
Step access(Warp& w, Inst& in, uint32_t m) {
  const uint32_t unknown = m & ~w.defined[in.a];
  if (unknown) fault("uninitialised", "the address in lane %d was never defined", __builtin_ctz(unknown));
  const uint32_t count = uint32_t(in.c), bytes = count * uint32_t(sizeof(M));
  const uint64_t* wide = w.r<uint64_t>(in.a);
  const uint32_t* narrow = w.r<uint32_t>(in.a);
  for (uint32_t left = m; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const uint64_t address = (in.b ? wide[lane] : narrow[lane]) + uint64_t(in.imm);
    uint8_t* place;
    SharedPlace shared{};
    if constexpr (space == Space::global) {
      if (address % bytes)
        fault("misaligned", "global memory: 0x%llx for an access of %u bytes, lane %d",
              static_cast<unsigned long long>(address), bytes, lane);
      place = global_bytes(address, bytes);
    } else if constexpr (space == Space::shared) {
      shared = shared_place(w, uint32_t(address), bytes, bytes, false);
      place = &shared.cta->shared[shared.offset];
    } else {
      if (address % bytes) fault("misaligned", "parameters: byte %llu", static_cast<unsigned long long>(address));
      place = const_cast<uint8_t*>(any_bytes(w, address, bytes));
    }
    M values[4];
    uint32_t known = 1;
    if constexpr (write) {
      for (uint32_t k = 0; k < count; ++k) {
        values[k] = M(w.r<R>(in.v[k])[lane]);
        known &= w.defined[in.v[k]] >> lane;
      }
    }
    const bool same = write && memcmp(place, values, bytes) == 0;
    if constexpr (space == Space::global) touch_global(address, bytes, write, by_lane(w, lane), same, known & 1);
    if constexpr (space == Space::shared)
      touch_shared(*shared.cta, shared.offset, bytes, write, by_lane(w, lane), same, known & 1);
    if constexpr (write) {
      memcpy(place, values, bytes);
    } else {
      memcpy(values, place, bytes);
      for (uint32_t k = 0; k < count; ++k) w.r<R>(in.v[k])[lane] = R(values[k]);
    }
  }
  if constexpr (!write)
    for (uint32_t k = 0; k < count; ++k) w.define(in.v[k], m, kAll);
  return Step::done;
}

template <class M, Space space, bool write>
Handler by_register(char width) {
  using S = std::conditional_t<std::is_signed_v<M>, int64_t, uint64_t>;
  (void)sizeof(S);
  if (width == 'h') return access<M, std::conditional_t<std::is_signed_v<M>, int16_t, uint16_t>, space, write>;
  if (width == 'w') return access<M, std::conditional_t<std::is_signed_v<M>, int32_t, uint32_t>, space, write>;
  if (width == 'd') return access<M, std::conditional_t<std::is_signed_v<M>, int64_t, uint64_t>, space, write>;
  return nullptr;
}

template <class M, Space space, bool write>
void with_type(const std::string& form, int count) {
  instructions()[form] = [count](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 2);
    const Operand &value = s.operands[write ? 1 : 0], &address = s.operands[write ? 0 : 1];
    if (address.kind != Operand::address || address.parts.size() != 1) d.refuse(s, "expected an address");
    Operand base = address.parts[0];
    in.imm = address.offset;
    const char wide = d.width_of(base) ? d.width_of(base) : space == Space::shared ? 'w' : 'd';
    if (wide == 'w' && space != Space::shared) d.refuse(s, "an address of 32 bits");
    in.a = d.source(base, wide);
    in.b = wide == 'd';
    in.c = count;
    std::vector<Operand> elements = value.kind == Operand::vector ? value.parts : std::vector<Operand>{value};
    if (int(elements.size()) != count) d.refuse(s, "a vector of the wrong length");
    char width = 0;
    for (const Operand& e : elements)
      if (d.width_of(e)) width = d.width_of(e);
    if (!width) width = sizeof(M) == 8 ? 'd' : sizeof(M) == 4 ? 'w' : 'h';
    if ((width == 'h' && sizeof(M) > 2) || (width == 'w' && sizeof(M) > 4)) d.refuse(s, "a register too narrow");
    for (int k = 0; k < count; ++k) {
      const Operand& e = elements[size_t(k)];
      in.v[size_t(k)] = write ? d.source(e, width) : d.target(e, width);
    }
    in.run = by_register<M, space, write>(width);
  };
}

template <Space space, bool write>
void types(const std::string& prefix) {
  for (int count : {1, 2, 4}) {
    const std::string p = prefix + (count == 1 ? "" : ".v" + std::to_string(count));
    for (const char* t : {".u8", ".b8"}) with_type<uint8_t, space, write>(p + t, count);
    with_type<int8_t, space, write>(p + ".s8", count);
    for (const char* t : {".u16", ".b16"}) with_type<uint16_t, space, write>(p + t, count);
    with_type<int16_t, space, write>(p + ".s16", count);
    for (const char* t : {".u32", ".b32", ".f32"}) with_type<uint32_t, space, write>(p + t, count);
    with_type<int32_t, space, write>(p + ".s32", count);
    if (count == 4) continue;
    for (const char* t : {".u64", ".b64", ".f64"}) with_type<uint64_t, space, write>(p + t, count);
    with_type<int64_t, space, write>(p + ".s64", count);
  }
}

}  // namespace

void memory_handlers() {
  for (const char* form : {"ld.global", "ld.global.nc"}) types<Space::global, false>(form);
  types<Space::global, true>("st.global");
  types<Space::shared, false>("ld.shared");
  types<Space::shared, true>("st.shared");
  types<Space::parameter, false>("ld.param");
}

}  // namespace software_gpu
