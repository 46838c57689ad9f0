// Errors of the CUDA runtime as C++ exceptions, and the device guard of every launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" +
                                 cudaGetErrorName(error) + ")");
}

// Makes `device` current for the scope: torch's runtime and this statically linked one share the driver's
// context.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};
