// Between the parser and the rooms: one statement's text, and how its operands become slots.
#pragma once
#include "machine.h"

namespace software_gpu {

struct Operand {
  enum Kind { name, number, address, vector, pair, discard } kind = name;
  std::string text;            // a name
  uint64_t value = 0;          // a number's bits
  char width = 0;              // of a floating-point literal: w or d
  int64_t offset = 0;          // of an address
  bool negated = false;        // !p
  std::vector<Operand> parts;  // of a vector, a pair, or an address with coordinates
};

struct Statement {
  std::string form, guard;
  bool unless = false;
  std::vector<Operand> operands;
  uint32_t line = 0;
};

struct Register {
  char width;  // p, h (16 bits), w (32), d (64)
  int slot;
};

// Turns operands into slots. Widths: p predicate, h, w, d registers of 16, 32, 64 bits.
struct Decoder {
  Kernel& kernel;
  Module& module;
  std::vector<std::map<std::string, Register>> scopes;
  std::map<std::pair<uint64_t, char>, int> constants;
  std::map<std::string, int> special_slots;
  std::map<std::string, uint64_t> symbols;  // shared variables and parameters: their addresses
  std::vector<int32_t> used;                // by the statement at hand
  uint32_t dynamic_at = 0;

  int new_slot(char width) {
    const int slot = kernel.slots;
    kernel.slots += width == 'd' ? 2 : 1;
    return slot;
  }
  const Register* find(const std::string& name) const;
  uint32_t place_shared(uint32_t bytes, uint32_t align);
  int constant(uint64_t bits, char width);
  int special(const std::string& name, char width);
  int source(const Operand& o, char width);
  int target(const Operand& o, char width);
  int predicate(const Operand& o);  // negated ones are refused
  char width_of(const Operand& o) const;
  [[noreturn]] void refuse(const Statement& s, const std::string& why) const;
  void expect(const Statement& s, size_t count) const;
  // By a shape such as "wwp": the first is the destination.
  void simple(const Statement& s, Inst& in, const char* shape);
};

inline void on(const std::string& form, const char* shape, Handler handler) {
  instructions()[form] = [shape, handler](Decoder& d, const Statement& s, Inst& in) {
    d.simple(s, in, shape);
    in.run = handler;
  };
}

}  // namespace software_gpu
