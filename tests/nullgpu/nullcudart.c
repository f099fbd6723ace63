// The CUDA runtime of an H100 that is not there (NULLGPU_COUNT of them), for LD_PRELOAD under a CUDA build of torch.
// Memory is host memory that costs nothing until it is touched, kernels do nothing, copies up to NULLGPU_COPY_MAX bytes
// are real. Allocation, streams, events and capture follow CUDA's rules. NULLGPU_TRACE=1 prints every call.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "counts.h"

#define OK(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define TRACE(...) \
  do { \
    if (getenv("NULLGPU_TRACE")) fprintf(stderr, "[nullgpu] " __VA_ARGS__), fputc('\n', stderr); \
  } while (0)
typedef unsigned long long u64;
static const size_t MEMORY = 85017755648ull;
static __thread int current_device;

static int devices(void) {
  char *count = getenv("NULLGPU_COUNT");
  return count ? atoi(count) : 1;
}

// ---- what is counted: launches by kind, at once or by replaying a graph; waits of the host; copies from pageable memory
typedef struct { u64 n[KINDS]; } Graph;
typedef struct { u64 capture; } Handle; // a stream, or an event: the capture that it takes part in
static u64 eager[KINDS], replayed[KINDS], captures, replays, waits, pageable;
static Graph *graph;                    // being captured
static u64 capture_id;                  // of the newest capture
static int invalid;                     // that capture: an illegal call was made during it, so that it ends with an error
static Handle defaults[3];              // the streams 0, 1 and 2 of CUDA
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Handle *handle(const void *h) { return (size_t)h < 3 ? &defaults[(size_t)h] : (Handle *)h; }
static int captured(const void *h) { return graph && handle(h)->capture == capture_id; }
void nullgpu_count(int kind, const void *stream) {
  TRACE("launch, kind %d%s", kind, captured(stream) ? ", captured" : "");
  __atomic_add_fetch(captured(stream) ? &graph->n[kind] : &eager[kind], 1, __ATOMIC_RELAXED);
}
void nullgpu_counts(u64 *out) { // eager by kind, replayed by kind, captures, replays, waits, pageable copies
  memcpy(out, eager, sizeof eager), memcpy(out + KINDS, replayed, sizeof replayed);
  out[2 * KINDS] = captures, out[2 * KINDS + 1] = replays, out[2 * KINDS + 2] = waits, out[2 * KINDS + 3] = pageable;
}
static cudaError_t host_waits(const char *call, int for_captured) {
  int illegal = for_captured || (graph && thread_mode != cudaStreamCaptureModeRelaxed);
  TRACE("%s: the host waits%s", call, illegal ? ", illegal during capture" : "");
  invalid |= illegal, waits++;
  return illegal ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// ---- devices
cudaError_t cudaGetDeviceCount(int *count) { return *count = devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  return current_device = device, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
OK(cudaGetLastError, void)
OK(cudaPeekAtLastError, void)
OK(cudaDeviceEnablePeerAccess, int peer, unsigned flags)
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  return thread_mode = *mode, *mode = before, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:%02X:00.0", 0x18 + device);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME); // a log of this device must never pass for an H100's
  p->totalGlobalMem = MEMORY, p->totalConstMem = 65536, p->l2CacheSize = 52428800, p->memoryBusWidth = 5120;
  p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->warpSize = 32;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->reservedSharedMemPerBlock = 1024, p->regsPerBlock = 65536, p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = 1024, p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = 65535, p->maxGridSize[2] = 65535;
  p->concurrentKernels = 1, p->asyncEngineCount = 3, p->unifiedAddressing = 1, p->managedMemory = 1;
  p->cooperativeLaunch = 1, p->streamPrioritiesSupported = 1, p->hostRegisterSupported = 1, p->textureAlignment = 512;
  p->pciBusID = 0x18 + device, p->uuid.bytes[0] = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
  case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
  case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  case cudaDevAttrMultiProcessorCount: *value = 132; break;
  case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
  case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
  case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
  case cudaDevAttrWarpSize: *value = 32; break;
  case cudaDevAttrClockRate: *value = 1755000; break;
  case cudaDevAttrMemoryClockRate: *value = 2619000; break;
  case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
  default: *value = 1;
  }
  return cudaSuccess;
}

// ---- memory: anonymous maps; pinned host memory is remembered, so that copies from other host memory can be counted
typedef struct { char *begin; size_t size; int device; } Range; // device -1: pinned
static Range ranges[65536];
static int known;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

u64 nullgpu_used(void) { return used; }
static void remember(void *begin, size_t size, int device) {
  pthread_mutex_lock(&lock);
  if (known < 65536) ranges[known++] = (Range){begin, size, device};
  pthread_mutex_unlock(&lock);
}
static Range find(const void *p, int forget) { // forget: the range that begins at p
  Range found = {0, 0, -2};
  pthread_mutex_lock(&lock);
  for (int i = 0; i < known && found.device == -2; i++)
    if (forget ? ranges[i].begin == p : (char *)p >= ranges[i].begin && (char *)p < ranges[i].begin + ranges[i].size) {
      found = ranges[i];
      if (forget) ranges[i] = ranges[--known];
    }
  pthread_mutex_unlock(&lock);
  return found;
}
cudaError_t cudaMalloc(void **p, size_t size) {
  size = size ? (size + 511) & ~511ull : 512;
  if (__atomic_add_fetch(&used, size, __ATOMIC_RELAXED) > MEMORY) {
    __atomic_sub_fetch(&used, size, __ATOMIC_RELAXED);
    return cudaErrorMemoryAllocation;
  }
  *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
  remember(*p, size, current_device);
  TRACE("cudaMalloc %zu, %.2f GiB in use", size, used / 1073741824.);
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  Range range = find(p, 1);
  if (range.device >= 0) munmap(p, range.size), __atomic_sub_fetch(&used, range.size, __ATOMIC_RELAXED);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return cudaMalloc(p, size); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  return *total = MEMORY, *available = MEMORY - used, cudaSuccess;
}
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { return remember(p, size, -1), cudaSuccess; }
cudaError_t cudaHostUnregister(void *p) { return find(p, 1), cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  if (posix_memalign(p, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
  return cudaHostRegister(*p, size, flags);
}
cudaError_t cudaFreeHost(void *p) { return find(p, 1), free(p), cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  Range range = find(p, 0);
  memset(a, 0, sizeof *a);
  a->type = range.device == -2 ? cudaMemoryTypeUnregistered : range.device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  if (range.device >= 0) a->device = range.device;
  if (range.device != -2) a->devicePointer = (void *)p;
  return cudaSuccess;
}
static void copy(void *to, const void *from, size_t size) {
  char *most = getenv("NULLGPU_COPY_MAX");
  if (size <= (most ? strtoull(most, 0, 0) : 1 << 20)) memmove(to, from, size);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  if (host_waits("cudaMemcpy", 0)) return cudaErrorStreamCaptureUnsupported;
  return nullgpu_count(COPY, 0), copy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
  TRACE("cudaMemcpyAsync kind %d, %zu bytes", kind, size);
  if ((kind == cudaMemcpyHostToDevice && find(from, 0).device == -2) ||
      (kind == cudaMemcpyDeviceToHost && find(to, 0).device == -2))
    pageable++;
  return nullgpu_count(COPY, s), copy(to, from, size), cudaSuccess;
}
OK(cudaMemcpyPeerAsync, void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t s)
OK(cudaMemcpyToSymbol, const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind)
OK(cudaMemset, void *p, int value, size_t size)
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) { return nullgpu_count(COPY, s), cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  static char dummy[1 << 16];
  return *p = dummy, cudaSuccess;
}

// ---- streams and events: everything is over at once
cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = calloc(1, sizeof(Handle)), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return cudaStreamCreate(s); }
OK(cudaStreamDestroy, cudaStream_t s) // never freed: who asks about it later gets an answer
OK(cudaStreamQuery, cudaStream_t s)
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *arg, unsigned flags) {
  return f(s, cudaSuccess, arg), cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *arg) { return f(arg), cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return host_waits("cudaDeviceSynchronize", graph != 0); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return host_waits("cudaStreamSynchronize", captured(s)); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return host_waits("cudaEventSynchronize", captured(e)); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = calloc(1, sizeof(Handle)), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return *handle(e) = *handle(s), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { // joins a capture, as in CUDA
  if (captured(e) && (size_t)s < 3) return invalid = 1, cudaErrorStreamCaptureImplicit; // those streams never do
  if (captured(e)) *handle(s) = *handle(e);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return captured(e) ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { return *ms = 1.0f, cudaSuccess; }

// ---- graphs: what is launched while one is captured is counted each time that it is replayed
static enum cudaStreamCaptureStatus status(cudaStream_t s) {
  return captured(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *is) { return *is = status(s), cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *is, u64 *id, cudaGraph_t *into,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  *is = status(s);
  if (id) *id = capture_id;
  if (into) *into = (cudaGraph_t)graph;
  if (nodes) *nodes = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  if (graph) return cudaErrorIllegalState; // one at a time here
  TRACE("cudaStreamBeginCapture");
  return graph = calloc(1, sizeof *graph), invalid = 0, handle(s)->capture = ++capture_id, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *made) {
  TRACE("cudaStreamEndCapture%s", invalid ? " of an invalid capture" : "");
  if (invalid) return free(graph), *made = 0, graph = 0, invalid = 0, cudaErrorStreamCaptureInvalidated;
  return *made = (cudaGraph_t)graph, graph = 0, captures++, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t made, u64 flags) {
  return *exec = (cudaGraphExec_t)made, cudaSuccess; // a few bytes, never freed
}
cudaError_t cudaGraphGetNodes(cudaGraph_t made, cudaGraphNode_t *nodes, size_t *count) {
  *count = 0;
  for (int kind = 0; kind < KINDS; kind++) *count += ((Graph *)made)->n[kind];
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  TRACE("cudaGraphLaunch");
  for (int kind = 0; kind < KINDS; kind++) replayed[kind] += ((Graph *)exec)->n[kind];
  return replays++, cudaSuccess;
}
OK(cudaGraphDestroy, cudaGraph_t made)
OK(cudaGraphExecDestroy, cudaGraphExec_t exec)

// ---- kernels
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return nullgpu_count(KERNEL, s), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return nullgpu_count(KERNEL, s), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
  return nullgpu_count(KERNEL, config->stream), cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *f) { return *kernel = (void *)f, cudaSuccess; }
OK(cudaFuncSetAttribute, const void *f, enum cudaFuncAttribute attribute, int value)
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = 90, a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int threads, size_t shared,
                                                                   unsigned flags) {
  return *blocks = 2, cudaSuccess;
}

// ---- the driver's functions by name, from the stub beside this one
static int unsupported(void) {
  fprintf(stderr, "[nullgpu] a driver function that nullgpu does not have was called\n");
  return cudaErrorNotSupported;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, u64 flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  *f = driver ? dlsym(driver, name) : 0;
  if (!*f) *f = (void *)unsupported;
  TRACE("cudaGetDriverEntryPoint %s", name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
