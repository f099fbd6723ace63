// The CUDA driver under nullcudart.c: what Triton's launchers and torch's own calls of the driver need.
// Launches are checked against an H100's limits, tensor maps against TMA's rules.
#define _GNU_SOURCE
#include <cuda.h>
#undef cuDevicePrimaryCtxRelease
#undef cuModuleGetGlobal
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "counts.h"

#define OK(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define TRACE(...) \
  do { \
    if (getenv("NULLGPU_TRACE")) fprintf(stderr, "[nullcu] " __VA_ARGS__), fputc('\n', stderr); \
  } while (0)
typedef unsigned long long u64;
static const u64 MEMORY = 85017755648ull, PAGE = 2 << 20;
static const unsigned SHARED = 232448;

OK(cuInit, unsigned flags)
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return *table = 0, CUDA_ERROR_NOT_FOUND; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "nullgpu", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { return *text = "nullgpu", CUDA_SUCCESS; }

// ---- devices and contexts
CUresult cuDeviceGetCount(int *count) {
  char *wanted = getenv("NULLGPU_COUNT");
  return *count = wanted ? atoi(wanted) : 1, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  snprintf(name, size, NAME);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1755000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)(0x100l + device), CUDA_SUCCESS;
}
OK(cuDevicePrimaryCtxRelease, CUdevice device)
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)0x100, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
OK(cuCtxSetCurrent, CUcontext context)
OK(cuCtxPushCurrent, CUcontext context)
OK(cuCtxPopCurrent, CUcontext *context)
OK(cuCtxSetLimit, CUlimit limit, size_t value)
OK(cuCtxSynchronize, void)

// ---- modules: a kernel's real number of registers, from its cubin (ELF: section .text.<kernel>, sh_info >> 24)
typedef struct { int regs; } Function;

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  Function *function = malloc(sizeof *function);
  function->regs = 32;
  const char *bytes = image;
  const Elf64_Ehdr *header = image;
  if (!memcmp(bytes, ELFMAG, SELFMAG) && bytes[EI_CLASS] == ELFCLASS64) {
    const Elf64_Shdr *sections = (const void *)(bytes + header->e_shoff);
    const char *names = bytes + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++)
      if (!strncmp(names + sections[i].sh_name, ".text.", 6)) function->regs = sections[i].sh_info >> 24;
  }
  return *module = (CUmodule)function, CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *bytes = calloc(1, size + sizeof(Elf64_Ehdr));
  size_t got = fread(bytes, 1, size, file);
  fclose(file);
  CUresult result = got == (size_t)size ? cuModuleLoadData(module, bytes) : CUDA_ERROR_INVALID_IMAGE;
  free(bytes);
  return result;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}
OK(cuModuleUnload, CUmodule module)
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  TRACE("cuModuleGetFunction %s", name);
  return *f = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal(CUdeviceptr *p, size_t *size, CUmodule module, const char *name) {
  static char bytes[4096];
  return *p = (CUdeviceptr)bytes, *size = sizeof bytes, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? ((Function *)f)->regs
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  int too_much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > (int)SHARED;
  return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
OK(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache config)
CUresult cuLinkCreate_v2(unsigned n, CUjit_option *options, void **values, CUlinkState *state) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name, unsigned n,
                          CUjit_option *options, void **values) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLinkComplete(CUlinkState state, void **cubin, size_t *size) { return CUDA_ERROR_NOT_SUPPORTED; }

// ---- virtual memory (torch's expandable segments)
static u64 vmm_used;

CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
  return *size = PAGE, CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr wanted, u64 flags) {
  char *q = mmap(0, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  return *p = ((CUdeviceptr)q + PAGE - 1) & ~(PAGE - 1), CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *p, u64 flags) {
  if (vmm_used + size > MEMORY) return CUDA_ERROR_OUT_OF_MEMORY;
  return vmm_used += size, *handle = size, CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return vmm_used -= handle, CUDA_SUCCESS; }
CUresult cuMemUnmap(CUdeviceptr p, size_t size) { return madvise((void *)p, size, MADV_DONTNEED), CUDA_SUCCESS; }
OK(cuMemAddressFree, CUdeviceptr p, size_t size)
OK(cuMemMap, CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle handle, u64 flags)
OK(cuMemSetAccess, CUdeviceptr p, size_t size, const CUmemAccessDesc *access, size_t count)
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = p;
  else *(int *)value = attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
  return CUDA_SUCCESS;
}

// ---- launches
static CUresult launch(unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned shared, CUstream s) {
  TRACE("launch grid %u %u %u, %u threads, %u bytes shared", gx, gy, gz, threads, shared);
  if (nullgpu_count) nullgpu_count(KERNEL, s);
  int wrong = !gx || !gy || !gz || gy > 65535 || gz > 65535 || threads > 1024 || shared > SHARED;
  return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **args, void **extra) {
  return launch(gx, gy, gz, bx * by * bz, shared, s);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream s, void **args) {
  return launch(gx, gy, gz, bx * by * bz, shared, s);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **args, void **extra) {
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  return launch(c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes, c->hStream);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int threads, size_t shared) {
  return *blocks = 1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *config) {
  return *clusters = 132, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  int wrong = (size_t)address % 16 != 0;
  for (unsigned i = 0; i < rank; i++) wrong |= !sizes[i] || !box[i] || box[i] > 256 || (i + 1 < rank && strides[i] % 16);
  if (wrong) return CUDA_ERROR_INVALID_VALUE;
  return memset(map, 0, sizeof *map), CUDA_SUCCESS;
}

// ---- by name
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
  if (result) *result = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  TRACE("cuGetProcAddress %s: %s", name, *f ? "found" : "not found");
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
