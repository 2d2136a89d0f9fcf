// The driver's encoder of tensor maps, with every rule that the hardware or the driver has.
#include "runtime.h"

namespace software_gpu {

int encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                 const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int, int fill) {
  memset(map, 0, 128);
  const auto value = [](const char* what, uint64_t v) { return uint64_t(planted("", what, int64_t(v))); };
  try {
    const auto bad = [](const char* format, auto... values) { fault("bad tensor map", format, values...); };
    const uint8_t element[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    rank = uint32_t(value("map.rank", rank));
    if (type < 0 || type > 12) bad("the type %d", type);
    if (rank < 1 || rank > 5) bad("of rank %u", rank);
    TensorMap m{};
    m.magic = kMapMagic;
    m.rank = uint8_t(rank);
    m.element_bytes = element[type];
    m.type = uint8_t(type);
    m.address = value("map.address", reinterpret_cast<uint64_t>(address));
    m.address += value("map.shift", 0);
    if (m.address % 16) bad("the address 0x%llx is no multiple of 16", (unsigned long long)m.address);
    interleave = int(value("map.interleave", uint64_t(interleave)));
    if (interleave) bad("interleave %d", interleave);
    swizzle = int(value("map.swizzle", uint64_t(swizzle)));
    if (swizzle < 0 || swizzle > 3) bad("swizzle %d", swizzle);
    m.swizzle = uint8_t(swizzle ? 16 << swizzle : 0);
    if (fill != 0) bad("fill %d beyond the edges", fill);
    uint64_t extent = m.element_bytes;
    for (uint32_t i = 0; i < rank; ++i) {
      const uint64_t n = i == 1 ? value("map.dims.1", dims[i]) : i == 0 ? value("map.dims.0", dims[i]) : dims[i];
      if (n < 1 || n > uint64_t(1) << 32) bad("dimension %u is %llu", i, (unsigned long long)n);
      m.dims[i] = uint32_t(n);
      const uint64_t b = i == 0 ? value("map.box.0", box[i]) : i == 1 ? value("map.box.1", box[i]) : box[i];
      if (b < 1 || b > 256) bad("the box's dimension %u is %llu", i, (unsigned long long)b);
      m.box[i] = uint32_t(b);
      const uint64_t step = value("map.element_stride", element_strides[i]);
      if (step != 1) bad("an element stride of %llu", (unsigned long long)step);
      uint64_t stride = m.element_bytes;
      if (i) {
        stride = i == 1 ? value("map.stride", strides[0]) : strides[i - 1];
        if (stride % 16 || stride >= uint64_t(1) << 40)
          bad("the stride of dimension %u is %llu bytes", i, (unsigned long long)stride);
        m.strides[i - 1] = stride;
      }
      extent += (n - 1) * stride;
    }
    const uint32_t inner = uint32_t(m.box[0]) * m.element_bytes;
    if (inner % 16) bad("a row of the box has %u bytes, no multiple of 16", inner);
    if (m.swizzle && inner > m.swizzle) bad("a row of the box has %u bytes, its swizzle %u", inner, m.swizzle);
    if (!global_known(m.address, extent))
      bad("0x%llx and the %llu bytes from there are no device memory", (unsigned long long)m.address,
          (unsigned long long)extent);
    m.check = checksum(m);
    memcpy(map, &m, sizeof m);
    return kSuccess;
  } catch (Fault& f) {
    record(f);
    device.pending_fault = f.kind + "|" + f.what();
    return kInvalidValue;
  }
}

}  // namespace software_gpu
