/* A CUDA runtime that says it has one H100 and does nothing, for LD_PRELOAD: autograd's engine and torch's device guards
   then accept fake cuda tensors on a machine without a GPU. Every function returns 0, which is cudaSuccess. */

enum { WARP_SIZE = 10, MULTIPROCESSORS = 16, THREADS = 39, MAJOR = 75, MINOR = 76, SHARED_MEMORY = 97 };

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case WARP_SIZE: *value = 32; break;
    case MULTIPROCESSORS: *value = 132; break;
    case THREADS: *value = 2048; break;
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    case SHARED_MEMORY: *value = 232448; break;
    default: *value = 1;
  }
  return 0;
}

/* Of cudaDeviceProp, 1,032 bytes in CUDA 12 and 13, what torch asks when it chooses a kernel of attention. The offsets
   are those of CUDA's driver_types.h. */
enum { WARP_SIZE_AT = 308, MAJOR_AT = 360, MINOR_AT = 364, MULTIPROCESSORS_AT = 388 };

int cudaGetDeviceProperties(char *properties, int device) {
  *(int *)(properties + WARP_SIZE_AT) = 32;
  *(int *)(properties + MAJOR_AT) = 9;
  *(int *)(properties + MINOR_AT) = 0;
  *(int *)(properties + MULTIPROCESSORS_AT) = 132;
  return 0;
}

/* Handles only have to differ from NULL. */
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)1; return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }

/* Two functions of c10, libtorch's core library. They ask the driver whether the device has a context:
   c10::cuda::MaybeSetDevice(signed char) and c10::cuda::hasPrimaryContext(signed char). */
int _ZN3c104cuda14MaybeSetDeviceEa(signed char device) { return 0; }
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }
