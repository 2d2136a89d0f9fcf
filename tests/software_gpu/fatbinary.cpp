// The PTX in an object of nvcc: a fat binary's entries of kind 1, plain or as LZ4 (--compress-mode=speed).
#include "runtime.h"

namespace software_gpu {
namespace {

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, unknown;
  uint16_t minor, major;
  uint32_t architecture, name_offset, name_bytes;
  uint64_t flags, zero, whole_bytes;
};
enum : uint64_t { kLz4 = 0x2000, kZstandard = 0x8000 };

std::string from_lz4(const uint8_t* at, size_t bytes, size_t whole) {
  std::string out;
  out.reserve(whole);
  const uint8_t* end = at + bytes;
  const auto length = [&](size_t n) {
    if (n == 15)
      while (at < end) {
        n += *at;
        if (*at++ != 255) break;
      }
    return n;
  };
  while (at < end) {
    const uint8_t token = *at++;
    const size_t literals = length(token >> 4);
    if (literals > size_t(end - at)) fault("fat binary", "its LZ4 ends too early");
    out.append(reinterpret_cast<const char*>(at), literals);
    at += literals;
    if (at + 2 > end || out.size() >= whole) break;
    const size_t back = size_t(at[0]) | size_t(at[1]) << 8;
    at += 2;
    const size_t count = length(token & 15) + 4;
    if (back == 0 || back > out.size()) fault("fat binary", "its LZ4 refers to what is not there");
    for (size_t i = 0; i < count; ++i) out.push_back(out[out.size() - back]);
  }
  return out;
}

}  // namespace

std::string ptx_of(const void* fat_binary) {
  const auto* header = static_cast<const Header*>(fat_binary);
  if (header->magic != 0xba55ed50) fault("fat binary", "magic 0x%x", header->magic);
  const uint8_t* at = static_cast<const uint8_t*>(fat_binary) + header->header_bytes;
  const uint8_t* end = at + header->bytes;
  std::string newest;
  uint32_t architecture = 0;
  while (at < end) {
    const auto* e = reinterpret_cast<const Entry*>(at);
    if (e->kind == 1 && e->architecture >= architecture) {
      architecture = e->architecture;
      const uint8_t* body = at + e->header_bytes;
      if (e->flags & kLz4)
        newest = from_lz4(body, e->compressed_bytes, e->whole_bytes);
      else if (e->compressed_bytes == 0)
        newest.assign(reinterpret_cast<const char*>(body), e->bytes);
      else
        fault("fat binary", "PTX compressed otherwise than as LZ4 (flags 0x%llx); compile with --compress-mode=speed",
              static_cast<unsigned long long>(e->flags));
    }
    at += e->header_bytes + e->bytes;
  }
  if (newest.empty()) fault("fat binary", "no PTX is embedded");
  newest.resize(strlen(newest.c_str()));
  return newest;
}

}  // namespace software_gpu
