// cuBLAS, cuBLASLt and NCCL that compute and send nothing; a rank believes that the others answer.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>
#include "counts.h"
#undef cublasCreate_v2

#define BLAS_OK(name, ...) \
  cublasStatus_t name(__VA_ARGS__) { return CUBLAS_STATUS_SUCCESS; }
#define BLAS_LAUNCH(name, ...) \
  cublasStatus_t name(__VA_ARGS__) { return nullgpu_count(BLAS, *(void **)handle), CUBLAS_STATUS_SUCCESS; }
#define NCCL_OK(name, ...) \
  ncclResult_t name(__VA_ARGS__) { return ncclSuccess; }
#define NCCL_LAUNCH(name, ...) \
  ncclResult_t name(__VA_ARGS__) { return nullgpu_count(NCCL, s), ncclSuccess; }
typedef long long i64;
static cublasMath_t math_mode;

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { // holds its stream
  return *handle = calloc(1, 64), CUBLAS_STATUS_SUCCESS;
}
BLAS_OK(cublasDestroy_v2, cublasHandle_t handle)
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t s) {
  return *(void **)handle = s, CUBLAS_STATUS_SUCCESS;
}
BLAS_OK(cublasSetWorkspace_v2, cublasHandle_t handle, void *workspace, size_t size)
BLAS_OK(cublasSetPointerMode_v2, cublasHandle_t handle, cublasPointerMode_t mode)
BLAS_OK(cublasSetSmCountTarget, cublasHandle_t handle, int count)
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  return math_mode = mode, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  return *mode = math_mode, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
BLAS_LAUNCH(cublasSgemm_v2, cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
            const float *alpha, const float *A, int lda, const float *B, int ldb, const float *beta, float *C, int ldc)
BLAS_LAUNCH(cublasSgemmStridedBatched, cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
            int k, const float *alpha, const float *A, int lda, i64 stride_a, const float *B, int ldb, i64 stride_b,
            const float *beta, float *C, int ldc, i64 stride_c, int batch)
BLAS_LAUNCH(cublasGemmEx, cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
            const void *alpha, const void *A, cudaDataType At, int lda, const void *B, cudaDataType Bt, int ldb,
            const void *beta, void *C, cudaDataType Ct, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algorithm)
BLAS_LAUNCH(cublasGemmStridedBatchedEx, cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
            int k, const void *alpha, const void *A, cudaDataType At, int lda, i64 stride_a, const void *B,
            cudaDataType Bt, int ldb, i64 stride_b, const void *beta, void *C, cudaDataType Ct, int ldc, i64 stride_c,
            int batch, cublasComputeType_t compute, cublasGemmAlgo_t algorithm)
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t Ad, const void *B, cublasLtMatrixLayout_t Bd, const void *beta,
                              const void *C, cublasLtMatrixLayout_t Cd, void *D, cublasLtMatrixLayout_t Dd,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t size, cudaStream_t s) {
  return nullgpu_count(BLAS, s), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t A,
                                              cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
  memset(results, 0, sizeof *results);
  return *found = 1, CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL
typedef struct { int rank, size; } Comm;

static ncclResult_t make(ncclComm_t *comm, int size, int rank) {
  Comm *made = malloc(sizeof *made);
  *made = (Comm){rank, size};
  return *comm = (ncclComm_t)made, ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return memset(id, 7, sizeof *id), ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) { return make(comm, size, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
  return make(comm, size, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int ids, ncclUniqueId *id,
                                      ncclConfig_t *config) {
  return make(comm, size, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
  return make(made, ((Comm *)comm)->size, key);
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int *size) { return *size = ((Comm *)comm)->size, ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { return *rank = ((Comm *)comm)->rank, ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { return *error = ncclSuccess, ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t comm, void *p, size_t size, void **handle) {
  return *handle = p, ncclSuccess;
}
NCCL_OK(ncclCommDeregister, const ncclComm_t comm, void *handle)
NCCL_OK(ncclCommDestroy, ncclComm_t comm)
NCCL_OK(ncclCommAbort, ncclComm_t comm)
NCCL_OK(ncclCommFinalize, ncclComm_t comm)
NCCL_OK(ncclGroupStart, void)
NCCL_OK(ncclGroupEnd, void)
NCCL_LAUNCH(ncclAllReduce, const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
            cudaStream_t s)
NCCL_LAUNCH(ncclReduceScatter, const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
            ncclComm_t comm, cudaStream_t s)
NCCL_LAUNCH(ncclAllGather, const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t s)
NCCL_LAUNCH(ncclAlltoAll, const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t s)
NCCL_LAUNCH(ncclBroadcast, const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
            cudaStream_t s)
NCCL_LAUNCH(ncclReduce, const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
            ncclComm_t comm, cudaStream_t s)
NCCL_LAUNCH(ncclSend, const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s)
NCCL_LAUNCH(ncclRecv, void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s)
