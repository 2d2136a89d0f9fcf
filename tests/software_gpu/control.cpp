// What Python asks of the device, by ctypes.
#include "decode.h"
#include "runtime.h"

using namespace software_gpu;

#define SOFTWARE_GPU_API extern "C" __attribute__((visibility("default")))

namespace {
int give(const std::string& text, char* out, uint64_t room) {
  if (room) {
    const size_t n = std::min<size_t>(text.size(), room - 1);
    memcpy(out, text.data(), n);
    out[n] = '\0';
  }
  return int(text.size());
}
std::vector<std::pair<Module*, std::unique_ptr<Module>>> replaced;
void forget_kernels(const std::string& part) {
  for (auto& m : modules())
    for (auto& [name, kernel] : m->kernels)
      if (kernel && name.find(part) != std::string::npos) kernel->decoded = false;
}
}  // namespace

SOFTWARE_GPU_API void software_gpu_seed(uint64_t order, uint64_t rounding) {
  device.seed = order;
  device.rounding_seed = rounding;
  device.launches = 0;
}
SOFTWARE_GPU_API void software_gpu_multiprocessors(int count) { device.multiprocessors = count; }
SOFTWARE_GPU_API void software_gpu_check_races(int check) { device.check_races = check != 0; }
SOFTWARE_GPU_API uint64_t software_gpu_lane_instructions() { return device.lane_instructions; }
SOFTWARE_GPU_API int software_gpu_fault(char* out, uint64_t room) { return give(device.last_fault, out, room); }
SOFTWARE_GPU_API void software_gpu_clear_fault() {
  device.last_fault.clear();
  device.pending_fault.clear();
}
SOFTWARE_GPU_API void software_gpu_patch(const char* kernel, const char* old, const char* now, int which) {
  patches.push_back({kernel, old, now, which, false});
  forget_kernels(kernel);
}
SOFTWARE_GPU_API void software_gpu_plant(const char* kernel, const char* what, int64_t value) {
  plants.push_back({kernel, what, value, false});
}
// The PTX of the first kernel whose name has `part`, from its parameters on.
SOFTWARE_GPU_API int software_gpu_ptx(const char* part, char* out, uint64_t room) {
  for (auto& m : modules())
    for (const auto& [name, place] : m->places)
      if (name.find(part) != std::string::npos)
        return give(m->text.substr(place.first, place.second - place.first), out, room);
  return -1;
}
// The kernels of this PTX take the place of those of the same names, until software_gpu_mend.
SOFTWARE_GPU_API int software_gpu_substitute(const char* ptx) {
  try {
    auto text = index_module(ptx);
    for (auto& m : modules()) {
      if (text->places.empty() || !m->places.count(text->places.begin()->first)) continue;
      auto before = std::make_unique<Module>(std::move(*m));
      *m = std::move(*text);
      replaced.emplace_back(m.get(), std::move(before));
      return 1;
    }
    return 0;
  } catch (Fault& f) {
    record(f);
    return 0;
  }
}
// How many patches and plants there were to be found; forgets them all, and substitutes.
SOFTWARE_GPU_API int software_gpu_mend() {
  int used = 0;
  for (const Patch& p : patches) {
    used += p.used;
    forget_kernels(p.kernel);
  }
  for (const Plant& p : plants) used += p.used;
  patches.clear();
  plants.clear();
  for (; !replaced.empty(); replaced.pop_back()) *replaced.back().first = std::move(*replaced.back().second);
  return used;
}
// Lines "LINE COUNT TEXT" of the statements of the first kernel whose name has `part`: how often warps executed them.
SOFTWARE_GPU_API int software_gpu_statements(const char* part, char* out, uint64_t room) {
  std::string text;
  for (auto& m : modules())
    for (const auto& [name, kernel] : m->kernels) {
      if (!text.empty() || !kernel || !kernel->decoded || name.find(part) == std::string::npos) continue;
      for (const Inst& in : kernel->code) {
        const auto words = kernel->text.find(in.line);
        text += std::to_string(in.line) + "\t" + std::to_string(in.count) + "\t" + words->second + "\n";
      }
    }
  return give(text, out, room);
}
// Lines "NAME LAUNCHES" of the kernels that were launched.
SOFTWARE_GPU_API int software_gpu_launches(char* out, uint64_t room) {
  std::map<std::string, uint64_t> launches;
  for (const auto& [host, f] : functions()) launches[f.name] += f.launches;
  std::string text;
  for (const auto& [name, count] : launches)
    if (count) text += name + "\t" + std::to_string(count) + "\n";
  return give(text, out, room);
}
// Lines "kernel NAME LAUNCHES" and "form KERNEL FORM STATEMENTS EXECUTED"; or "error WHAT".
SOFTWARE_GPU_API int software_gpu_report(char* out, uint64_t room) {
  static std::string text;
  if (out && room > text.size()) return give(text, out, room);
  text.clear();
  std::map<std::string, uint64_t> launches;
  for (const auto& [host, f] : functions()) launches[f.name] += f.launches;
  for (auto& m : modules())
    for (const auto& [name, place] : m->places) {
      try {
        Kernel& k = decoded(*m, name);
        text += "kernel\t" + name + "\t" + std::to_string(launches[name]) + "\n";
        std::map<std::string, std::pair<uint64_t, uint64_t>> forms;
        for (const Inst& in : k.code) {
          auto& [count, runs] = forms[k.forms[in.form]];
          ++count;
          runs += in.count;
        }
        for (const auto& [form, counts] : forms)
          text += "form\t" + name + "\t" + form + "\t" + std::to_string(counts.first) + "\t" +
                  std::to_string(counts.second) + "\n";
      } catch (const Fault& f) {
        text += "error\t" + name + "\t" + f.kind + ": " + f.what() + "\n";
      }
    }
  return int(text.size());
}
SOFTWARE_GPU_API int software_gpu_load(const char* ptx) {
  install();
  try {
    modules().push_back(index_module(ptx));
  } catch (const Fault& f) {
    record(f);
    return -1;
  }
  return int(modules().size()) - 1;
}
SOFTWARE_GPU_API void software_gpu_unload(int module) { modules()[size_t(module)] = index_module(""); }
SOFTWARE_GPU_API uint64_t software_gpu_map(void* host, uint64_t bytes, int defined) {
  return map_memory(host, bytes, 0, bytes, defined != 0);
}
SOFTWARE_GPU_API void software_gpu_unmap() { unmap_all(); }
SOFTWARE_GPU_API int software_gpu_encode(void* map, int type, uint32_t rank, uint64_t address, const uint64_t* dims,
                                         const uint64_t* strides, const uint32_t* box, int swizzle) {
  const uint32_t ones[] = {1, 1, 1, 1, 1};
  return encode_tiled(map, type, rank, reinterpret_cast<void*>(address), dims, strides, box, ones, 0, swizzle, 0, 0);
}
// shape: grid, block, cluster, three each; then the bytes of dynamic shared memory.
SOFTWARE_GPU_API int software_gpu_launch(int module, const char* name, const uint32_t* shape, const uint8_t* parameters,
                                         uint64_t bytes) {
  Function f;
  f.module = modules()[size_t(module)].get();
  f.name = name;
  f.most_dynamic_shared = 232448;
  Shape s{{shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, {shape[6], shape[7], shape[8]}, shape[9]};
  return launch(f, s, nullptr, parameters, bytes);
}
SOFTWARE_GPU_API int software_gpu_knows(const char* form) {
  install();
  return instructions().count(form) != 0;
}
