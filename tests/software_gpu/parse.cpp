// PTX text to kernels. Entries are found when a module is registered and decoded when they are first launched; what is
// not known is an error that names the statement.
#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "decode.h"

namespace software_gpu {

std::unordered_map<std::string, Maker>& instructions() {
  static std::unordered_map<std::string, Maker> table;
  return table;
}
std::vector<Patch> patches;

namespace {

bool of_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

std::string without_comments(std::string text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '/' && text[i + 1] == '/')
      while (i < text.size() && text[i] != '\n') text[i++] = ' ';
    else if (text[i] == '/' && text[i + 1] == '*') {
      const size_t end = text.find("*/", i + 2);
      for (const size_t stop = end == std::string::npos ? text.size() : end + 2; i < stop; ++i)
        if (text[i] != '\n') text[i] = ' ';
    }
  }
  return text;
}

uint32_t type_bytes(const std::string& type) {
  if (type == "pred") return 0;
  uint32_t bits = 0;
  for (char c : type)
    if (std::isdigit(static_cast<unsigned char>(c))) bits = bits * 10 + uint32_t(c - '0');
  if (type == "bf16") bits = 16;
  return bits / 8;
}

// Reads one piece after the other.
struct Reader {
  const std::string& text;
  size_t at, end;
  uint32_t line;

  void skip() {
    while (at < end && std::isspace(static_cast<unsigned char>(text[at]))) {
      if (text[at] == '\n') ++line;
      ++at;
    }
  }
  bool more() {
    skip();
    return at < end;
  }
  char peek() {
    skip();
    return at < end ? text[at] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at;
    return true;
  }
  void need(char c) {
    if (!take(c)) fault("parse", "line %u: expected '%c' at '%.40s'", line, c, text.c_str() + at);
  }
  std::string word() {
    skip();
    const size_t from = at;
    while (at < end && (of_name(text[at]) || text[at] == '.')) ++at;
    if (at == from) fault("parse", "line %u: expected a name at '%.40s'", line, text.c_str() + at);
    return text.substr(from, at - from);
  }
  // A statement's operation: with its colons, as in shared::cluster.
  std::string operation() {
    skip();
    const size_t from = at;
    while (at < end && (of_name(text[at]) || text[at] == '.' || text[at] == ':')) ++at;
    return text.substr(from, at - from);
  }
  int64_t integer() {
    skip();
    char* stop = nullptr;
    const bool negative = take('-');
    const uint64_t value = std::strtoull(text.c_str() + at, &stop, 0);
    if (stop == text.c_str() + at) fault("parse", "line %u: expected a number at '%.40s'", line, text.c_str() + at);
    at = size_t(stop - text.c_str());
    if (at < end && text[at] == 'U') ++at;
    return negative ? -int64_t(value) : int64_t(value);
  }

  Operand operand() {
    Operand o;
    const char c = peek();
    if (c == '[') {
      ++at;
      o.kind = Operand::address;
      Operand base = operand();
      o.offset = base.offset;
      base.offset = 0;
      o.parts.push_back(base);
      if (take(',')) o.parts.push_back(operand());
      need(']');
    } else if (c == '{') {
      ++at;
      o.kind = Operand::vector;
      do o.parts.push_back(operand());
      while (take(','));
      need('}');
    } else if (c == '!') {
      ++at;
      o = operand();
      o.negated = true;
    } else if (c == '0' && at + 1 < end && (text[at + 1] == 'f' || text[at + 1] == 'd')) {
      o.kind = Operand::number;
      o.width = text[at + 1] == 'f' ? 'w' : 'd';
      char* stop = nullptr;
      o.value = std::strtoull(text.substr(at + 2, o.width == 'w' ? 8 : 16).c_str(), &stop, 16);
      at += o.width == 'w' ? 10 : 18;
    } else if (std::isdigit(static_cast<unsigned char>(c)) || c == '-') {
      o.kind = Operand::number;
      o.value = uint64_t(integer());
    } else {
      o.text = word();
      if (o.text == "_") o.kind = Operand::discard;
      if (peek() == '+') {
        ++at;
        o.offset = integer();
      } else if (peek() == '|') {
        ++at;
        Operand both;
        both.kind = Operand::pair;
        both.parts = {o, operand()};
        return both;
      }
    }
    return o;
  }
};

uint32_t line_of(const std::string& text, size_t at) {
  return 1 + uint32_t(std::count(text.begin(), text.begin() + int64_t(at), '\n'));
}

// .shared or .global: alignment, type, name, count.
struct Variable {
  std::string name;
  uint32_t bytes = 0, align = 1;
  bool open = false;  // name[]
};
Variable variable(Reader& r) {
  Variable v;
  std::string type;
  while (r.peek() == '.') {
    const std::string w = r.word();
    if (w == ".align")
      v.align = uint32_t(r.integer());
    else if (w != ".ptr" && w != ".global" && w != ".shared")
      type = w.substr(1);
  }
  v.name = r.word();
  uint32_t count = 1;
  if (r.take('[')) {
    v.open = r.peek() == ']';
    count = v.open ? 0 : uint32_t(r.integer());
    r.need(']');
  }
  v.bytes = type_bytes(type) * count;
  v.align = std::max(v.align, type_bytes(type));
  return v;
}

struct Jump {
  size_t inst;
  std::vector<int> scopes;
  std::string label;
};

struct Body {
  Decoder& d;
  Reader r;
  std::vector<int> ids{0};
  int made = 0;
  std::map<std::pair<int, std::string>, int> labels;
  std::vector<Jump> jumps;
  std::map<std::string, uint32_t> forms;

  Body(Decoder& decoder, const Reader& reader) : d(decoder), r(reader) {}

  void registers(Reader& r) {
    const std::string type = r.word().substr(1);
    const uint32_t bytes = type_bytes(type);
    const char width = type == "pred" ? 'p' : bytes <= 2 ? 'h' : bytes == 4 ? 'w' : 'd';
    if (bytes > 8) fault("parse", "line %u: registers of type %s", r.line, type.c_str());
    do {
      const std::string name = r.word();
      const auto declare = [&](const std::string& n) {
        d.scopes.back()[n] = {width, width == 'p' ? d.kernel.predicates++ : d.new_slot(width)};
      };
      if (r.take('<')) {
        const int64_t count = r.integer();
        r.need('>');
        for (int64_t i = 0; i < count; ++i) declare(name + std::to_string(i));
      } else {
        declare(name);
      }
    } while (r.take(','));
  }

  void directive() {
    const std::string w = r.word();
    if (w == ".reg") {
      registers(r);
    } else if (w == ".shared") {
      const Variable v = variable(r);
      d.symbols[v.name] = d.place_shared(v.bytes, v.align);
    } else if (w == ".pragma" || w == ".loc") {
      while (r.peek() != ';' && r.more()) ++r.at;
    } else {
      fault("parse", "line %u: the directive %s is not known", r.line, w.c_str());
    }
    r.need(';');
  }

  void statement() {
    Statement s;
    s.line = r.line;
    const size_t from = r.at;
    if (r.take('@')) {
      s.unless = r.take('!');
      s.guard = r.word();
    }
    s.form = r.operation();
    while (r.peek() != ';') {
      s.operands.push_back(r.operand());
      if (!r.take(',')) break;
    }
    if (r.peek() != ';') fault("parse", "line %u: cannot read '%.60s'", s.line, r.text.substr(from, 60).c_str());
    d.kernel.text[s.line] += (d.kernel.text.count(s.line) ? " " : "") + r.text.substr(from, r.at - from);
    r.need(';');
    Inst in;
    in.line = s.line;
    d.used.clear();
    if (!s.guard.empty()) {
      const Register* g = d.find(s.guard);
      if (!g || g->width != 'p') fault("parse", "line %u: %s is no predicate", s.line, s.guard.c_str());
      in.guard = g->slot;
      in.unless = s.unless;
    }
    const auto found = forms.emplace(s.form, uint32_t(forms.size()));
    if (found.second) d.kernel.forms.push_back(s.form);
    in.form = found.first->second;
    const auto maker = instructions().find(s.form);
    if (maker == instructions().end())
      fault("unknown instruction", "line %u: %s", s.line, d.kernel.text[s.line].c_str());
    if (s.form == "bra" || s.form == "bra.uni") {
      std::vector<int> scopes(ids.begin(), ids.end());
      jumps.push_back({d.kernel.code.size(), scopes, s.operands.at(0).text});
    }
    maker->second(d, s, in);
    in.uses = uint32_t(d.kernel.uses.size());
    in.use_count = uint32_t(d.used.size());
    d.kernel.uses.insert(d.kernel.uses.end(), d.used.begin(), d.used.end());
    d.kernel.code.push_back(in);
  }

  void run() {
    while (r.more()) {
      const char c = r.peek();
      if (c == '{') {
        ++r.at;
        d.scopes.emplace_back();
        ids.push_back(++made);
      } else if (c == '}') {
        ++r.at;
        d.scopes.pop_back();
        ids.pop_back();
      } else if (c == ';') {
        ++r.at;
      } else if (c == '.') {
        directive();
      } else {
        const size_t from = r.at;
        if (of_name(c)) {
          const std::string name = r.operation();
          if (name.back() == ':') {
            labels[{ids.back(), name.substr(0, name.size() - 1)}] = int(d.kernel.code.size());
            continue;
          }
          r.at = from;
        }
        statement();
      }
    }
    for (const Jump& j : jumps) {
      for (auto id = j.scopes.rbegin(); id != j.scopes.rend() && d.kernel.code[j.inst].target < 0; ++id) {
        const auto found = labels.find({*id, j.label});
        if (found != labels.end()) d.kernel.code[j.inst].target = found->second;
      }
      if (d.kernel.code[j.inst].target < 0)
        fault("parse", "line %u: no label %s", d.kernel.code[j.inst].line, j.label.c_str());
    }
  }
};

}  // namespace

std::unique_ptr<Module> index_module(std::string text) {
  auto module = std::make_unique<Module>();
  module->text = without_comments(std::move(text));
  const std::string& t = module->text;
  int depth = 0;
  for (size_t i = 0; i < t.size(); ++i) {
    if (t[i] == '{') ++depth;
    if (t[i] == '}') --depth;
    if (t[i] != '.' || depth || (i && (of_name(t[i - 1]) || t[i - 1] == '.'))) continue;
    Reader r{t, i, t.size(), 0};
    const std::string w = r.word();
    if (w == ".entry") {
      const std::string name = r.word();
      size_t open = t.find('{', r.at), close = open;
      for (int level = 0; close < t.size(); ++close) {
        if (t[close] == '{') ++level;
        if (t[close] == '}' && --level == 0) break;
      }
      module->places[name] = {r.at, close};
      module->kernels[name] = nullptr;
      i = close;
    } else if (w == ".shared") {
      const Variable v = variable(r);
      module->shared[v.name] = {v.bytes, v.align};
      i = r.at - 1;
    } else if (w == ".global" || w == ".const") {
      const Variable v = variable(r);
      if (r.peek() == '=') fault("parse", "%s: a variable with a value", v.name.c_str());
      module->variables[v.name] = 0;  // no kernel has named one so far; the address 0 is never valid
      i = r.at - 1;
    }
  }
  return module;
}

Kernel& decoded(Module& module, const std::string& name) {
  const auto place = module.places.find(name);
  if (place == module.places.end()) fault("launch", "no kernel %s in the module's PTX", name.c_str());
  std::unique_ptr<Kernel>& slot = module.kernels[name];
  if (slot && slot->decoded) return *slot;
  slot = std::make_unique<Kernel>();
  Kernel& k = *slot;
  k.name = name;
  static uint64_t serial = 0;
  k.serial = ++serial;
  Decoder d{k, module, {{}}, {}, {}, {}, {}, 0};
  std::string text = module.text.substr(0, place->second.second);
  for (Patch& p : patches) {
    if (name.find(p.kernel) == std::string::npos) continue;
    size_t at = place->second.first;
    for (int i = 0; (at = text.find(p.old, at)) != std::string::npos; ++i, at += p.old.size())
      if (i == p.which) {
        text.replace(at, p.old.size(), p.now);
        p.used = true;
        break;
      }
  }
  Reader r{text, place->second.first, text.size(), line_of(text, place->second.first)};
  r.need('(');
  uint32_t bytes = 0;
  while (r.peek() == '.') {
    r.word();
    const Variable v = variable(r);
    bytes = (bytes + v.align - 1) / v.align * v.align;
    d.symbols[v.name] = kParameterBase + bytes;
    k.parameters.push_back({bytes, v.bytes});
    bytes += v.bytes;
    if (!r.take(',')) break;
  }
  k.parameter_bytes = bytes;
  r.need(')');
  while (r.peek() == '.') {
    const std::string w = r.word();
    int64_t product = 1;
    do product *= r.integer();
    while (r.take(','));
    if (w == ".maxntid" || w == ".reqntid")
      k.most_threads = uint32_t(product);
    else if (w != ".minnctapersm")
      fault("parse", "%s: the directive %s is not known", name.c_str(), w.c_str());
  }
  r.need('{');
  Body body(d, r);
  try {
    body.run();
  } catch (Fault& f) {
    f.kernel = name;
    throw;
  }
  k.decoded = true;
  if (d.dynamic_at) k.shared_bytes = d.dynamic_at - kSharedBase;
  std::vector<uint8_t> accumulates(size_t(k.slots), 0);
  for (int s : k.accumulators) accumulates[size_t(s)] = 1;
  for (Inst& in : k.code)
    for (uint32_t i = 0; i < in.use_count; ++i) in.accumulators |= accumulates[size_t(k.uses[in.uses + i])] != 0;
  return k;
}

}  // namespace software_gpu
