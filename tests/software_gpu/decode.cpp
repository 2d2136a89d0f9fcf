// How operands become slots; and how a fault is raised.
#include "decode.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace software_gpu {

std::string printed(const char* format, ...) {
  char room[2048];
  va_list list;
  va_start(list, format);
  vsnprintf(room, sizeof room, format, list);
  va_end(list);
  return room;
}

void fault(const char* kind, const char* format, ...) {
  char room[2048];
  va_list list;
  va_start(list, format);
  vsnprintf(room, sizeof room, format, list);
  va_end(list);
  throw Fault(kind, room);
}

const Register* Decoder::find(const std::string& name) const {
  for (auto s = scopes.rbegin(); s != scopes.rend(); ++s) {
    const auto found = s->find(name);
    if (found != s->end()) return &found->second;
  }
  return nullptr;
}

int Decoder::constant(uint64_t bits, char width) {
  if (width == 'p') return bits ? 1 : 0;
  if (width == 'w') bits &= 0xffffffffu;
  if (width == 'h') bits &= 0xffffu;
  const auto found = constants.emplace(std::make_pair(bits, width), -1);
  if (found.second) {
    found.first->second = new_slot(width);
    kernel.constants.push_back({found.first->second, bits, width == 'd' ? 8 : width == 'w' ? 4 : 2});
  }
  return found.first->second;
}

int Decoder::special(const std::string& name, char width) {
  const auto found = special_slots.emplace(name + width, -1);
  if (found.second) {
    found.first->second = new_slot(width);
    kernel.specials.push_back({found.first->second, name});
  }
  return found.first->second;
}

char Decoder::width_of(const Operand& o) const {
  const Register* r = o.kind == Operand::name ? find(o.text) : nullptr;
  return r ? r->width : '\0';
}

int Decoder::source(const Operand& o, char width) {
  if (o.kind == Operand::number) {
    if (o.width && o.width != width) fault("parse", "a literal of the wrong width");
    return constant(o.value, width);
  }
  if (o.kind != Operand::name) fault("parse", "expected a register or a number");
  if (const Register* r = find(o.text)) {
    if (r->width != width) fault("parse", "%s: expected a register of width %c", o.text.c_str(), width);
    if (width != 'p') used.push_back(r->slot);
    return r->slot;
  }
  const auto symbol = symbols.find(o.text);
  if (symbol != symbols.end()) return constant(symbol->second + uint64_t(o.offset), width);
  const auto variable = module.variables.find(o.text);
  if (variable != module.variables.end()) return constant(variable->second + uint64_t(o.offset), width);
  const auto room = module.shared.find(o.text);
  if (room != module.shared.end()) {
    if (room->second.first) {
      symbols[o.text] = place_shared(room->second.first, room->second.second);
      return source(o, width);
    }
    const uint32_t align = std::max(room->second.second, 16u);
    dynamic_at = (kSharedBase + kernel.shared_bytes + align - 1) / align * align;
    kernel.dynamic_shared = true;
    return constant(dynamic_at + uint64_t(o.offset), width);
  }
  if (o.text[0] == '%' && width == 'w') return special(o.text, width);
  fault("parse", "%s is not known", o.text.c_str());
}

uint32_t Decoder::place_shared(uint32_t bytes, uint32_t align) {
  if (dynamic_at) fault("parse", "static shared memory after the dynamic was used");
  uint32_t& size = kernel.shared_bytes;
  size = (size + align - 1) / align * align;
  size += bytes;
  return kSharedBase + size - bytes;
}

int Decoder::target(const Operand& o, char width) {
  if (o.kind == Operand::discard) return width == 'p' ? kernel.predicates++ : new_slot(width);
  const Register* r = o.kind == Operand::name ? find(o.text) : nullptr;
  if (!r || r->width != width) fault("parse", "%s: expected a register of width %c", o.text.c_str(), width);
  if (width != 'p') used.push_back(r->slot);
  return r->slot;
}

int Decoder::predicate(const Operand& o) {
  if (o.negated) fault("parse", "!%s: a negated predicate as operand", o.text.c_str());
  return source(o, 'p');
}

void Decoder::refuse(const Statement& s, const std::string& why) const {
  fault("unknown form", "line %u: %s: %s", s.line, s.form.c_str(), why.c_str());
}

void Decoder::expect(const Statement& s, size_t count) const {
  if (s.operands.size() != count) refuse(s, printed("expected %zu operands, got %zu", count, s.operands.size()));
}

void Decoder::simple(const Statement& s, Inst& in, const char* shape) {
  const size_t count = strlen(shape);
  expect(s, count);
  int32_t* places[] = {&in.d, &in.a, &in.b, &in.c};
  try {
    for (size_t i = 1; i < count; ++i)
      *places[i] = shape[i] == 'p' ? predicate(s.operands[i]) : source(s.operands[i], shape[i]);
    in.d = target(s.operands[0], shape[0]);
  } catch (const Fault& f) {
    refuse(s, f.what());
  }
}

}  // namespace software_gpu
