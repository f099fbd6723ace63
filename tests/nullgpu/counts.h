// What the three libraries count together; nullcudart.c keeps the figures.
enum { KERNEL, BLAS, NCCL, COPY, KINDS };
#define NAME "NULLGPU posing as H100 80GB HBM3"
extern void nullgpu_count(int kind, const void *stream) __attribute__((weak));
