// What torch and NCCL ask NVML: NULLGPU_COUNT devices without NVLink.
#include <stdlib.h>
enum { SUCCESS, NOT_SUPPORTED = 3 };

int nvmlInit(void) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { return *device = (void *)1, SUCCESS; }
int nvmlDeviceGetHandleByUUID(const char *id, void **device) { return *device = (void *)1, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { return *device = (void *)(1l + i), SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  char *wanted = getenv("NULLGPU_COUNT");
  return *count = wanted ? atoi(wanted) : 1, SUCCESS;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return *type = 0, NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return NOT_SUPPORTED; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *infos) { return *count = 0, SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return NOT_SUPPORTED; }
const char *nvmlErrorString(int error) { return "nullgpu nvml"; }
