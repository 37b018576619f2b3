// The part of DLPack's C exchange API, version 1, that reads a tensor of Python's: the structs are its
// binary interface, see dlpack.h of github.com/dmlc/dlpack. PyTorch has it from 2.10 on, as
// torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace tokenflex::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // owned by the tensor, as are its strides
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*view)(void* object, Tensor* out);  // 0, or -1 with a Python error
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

}  // namespace tokenflex::dlpack
