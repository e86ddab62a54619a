// A GPU for machines without one: CPU kernels behind the dispatch key of CUDA, in memory of their own.
//
// What only a real GPU shows (its speed, its rounding) it can't tell. It tells what most often breaks code that has only
// run on a CPU: an operation on tensors of two devices fails here as it does there, and memory has a limit that can be
// set. `simulated_gpu.py` loads it in front of torch, whose own registration of CUDA is empty in a build for CPUs.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

namespace {

const Device gpu(c10::kCUDA, 0);
size_t used = 0, most = 0, limit = SIZE_MAX;

struct Allocation {
  void* memory;
  size_t bytes;
};

void release(void* context) {
  auto* allocation = static_cast<Allocation*>(context);
  used -= allocation->bytes;
  std::free(allocation->memory);
  delete allocation;
}

struct Memory final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(OutOfMemoryError, used + bytes <= limit, "CUDA out of memory: no room for ", bytes, " bytes");
    used += bytes;
    most = std::max(most, used);
    auto* allocation = new Allocation{std::aligned_alloc(64, bytes / 64 * 64 + 64), bytes};
    return {allocation->memory, allocation, &release, gpu};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(c10::kCUDA, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

Tensor on_cpu(const Tensor& tensor) {  // the same memory
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  on_cpu(self).copy_(on_cpu(source.expand(self.sizes())));
  return self;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {  // the fallback's way back from the CPU
  if (self.sizes() != target.sizes()) target.resize_(self.sizes());
  on_cpu(target).copy_(on_cpu(self));
  return target;
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* storage = self.storage().unsafeGetStorageImpl();
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (bytes > storage->nbytes()) {
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}

Tensor& set_(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor depthwise(const Tensor& self, const Tensor& weight, c10::SymIntArrayRef, const std::optional<Tensor>& bias,
                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation) {
  auto own = bias && bias->defined() ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return at::conv2d(on_cpu(self), on_cpu(weight), own, C10_AS_INTARRAYREF_SLOW(stride),
                    C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), self.size(1))
      .to(gpu);
}

// Every other operation: as on a CPU, but not on tensors of two devices. As on a GPU, a number (no dimensions) may be on
// either, and so may the indices into a tensor on the GPU.
void on_one_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const bool indexes = schema.name().find("index") != std::string::npos;
  bool here = false, there = false;
  const auto see = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    there |= tensor.is_cuda();
    here |= tensor.is_cpu() && tensor.dim() > 0;
  };
  const auto arguments = torch::jit::last(stack, schema.arguments().size());
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      see(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& each : argument.toTensorList()) see(each);
    } else if (argument.isOptionalTensorList() && !(indexes && there)) {
      for (const std::optional<Tensor>& each : argument.toOptionalTensorList().vec()) see(each.value_or(Tensor()));
    }
  }
  TORCH_CHECK(!(here && there), "Expected all tensors to be on the same device: ", schema.name());
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("resize_", &resize_);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", &unfold);
  library.impl("set_.source_Storage_storage_offset", &set_);
  library.impl("_conv_depthwise2d", &depthwise);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_one_device>()); }

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // found by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return gpu; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

extern "C" {
size_t simulated_used() { return used; }
size_t simulated_most() { return most; }
void simulated_forget() { most = used; }
void simulated_limit(size_t bytes) { limit = bytes; }
}
