// As much of CUDA's header as nullcudart.c names, for test_null_device.py where CUDA is not installed. Only names and kinds
// are CUDA's: numbers and layouts are not, so what is compiled with this file is for that test alone.
#pragma once
#include <stddef.h>

typedef enum cudaError {
  cudaSuccess,
  cudaErrorInvalidDevice,
  cudaErrorMemoryAllocation,
  cudaErrorNotSupported,
  cudaErrorIllegalState,
  cudaErrorStreamCaptureUnsupported,
  cudaErrorStreamCaptureImplicit,
  cudaErrorStreamCaptureInvalidated,
} cudaError_t;
typedef struct stream *cudaStream_t;
typedef struct event *cudaEvent_t;
typedef struct graph *cudaGraph_t;
typedef struct node *cudaGraphNode_t;
typedef struct exec *cudaGraphExec_t;
typedef struct { int from_port; } cudaGraphEdgeData;
typedef struct { unsigned x, y, z; } dim3;
typedef struct { dim3 grid, block; size_t shared; cudaStream_t stream; } cudaLaunchConfig_t;
typedef void (*cudaStreamCallback_t)(cudaStream_t stream, cudaError_t status, void *data);
typedef void (*cudaHostFn_t)(void *data);

enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrWarpSize,
  cudaDevAttrClockRate,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth,
};
struct cudaPointerAttributes { enum cudaMemoryType type; int device; void *devicePointer; };
struct cudaFuncAttributes {
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
struct cudaDeviceProp {
  char name[256];
  struct { char bytes[16]; } uuid;
  size_t totalGlobalMem, totalConstMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  size_t reservedSharedMemPerBlock, textureAlignment;
  int l2CacheSize, memoryBusWidth, major, minor, multiProcessorCount, warpSize, regsPerBlock, regsPerMultiprocessor;
  int maxThreadsPerBlock, maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor, maxThreadsDim[3], maxGridSize[3];
  int concurrentKernels, asyncEngineCount, unifiedAddressing, managedMemory, cooperativeLaunch;
  int streamPrioritiesSupported, hostRegisterSupported, pciBusID;
};
