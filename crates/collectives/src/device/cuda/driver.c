/* A test double of CUDA's driver: device memory is the host's, and everything runs at once, in the call.
 *
 * What it is to do is compiled in:
 *   POLLS    how often an event that was recorded is not ready yet when it is asked
 *   FAIL     name of the function that returns CODE
 *   WITHOUT_EVENTS  leaves out cuEventQuery
 *   HELD     for how many nanoseconds streams are to be held
 * A call that needs a context and has none returns CUDA_ERROR_INVALID_CONTEXT, as the driver does.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef POLLS
#define POLLS 0
#endif
#ifndef FAIL
#define FAIL ""
#endif
#ifndef HELD
#define HELD 0
#endif
#ifndef CODE
#define CODE 0
#endif

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600 };

static int ready;
static _Thread_local int contexts;

static int answer(const char *name) {
    if (!ready) return NOT_INITIALIZED;
    return strcmp(name, FAIL) ? SUCCESS : CODE;
}

static int within(const char *name) {
    int code = answer(name);
    return code || contexts ? code : INVALID_CONTEXT;
}

int cuInit(unsigned flags) { ready = 1; return answer("cuInit"); }
int cuDriverGetVersion(int *version) { *version = 12080; return answer("cuDriverGetVersion"); }
int cuDeviceGetCount(int *count) { *count = 2; return answer("cuDeviceGetCount"); }
int cuDeviceGetName(char *name, int bytes, int device) {
    strncpy(name, "A double", bytes);
    return answer("cuDeviceGetName");
}
int cuDeviceGetUuid(char *uuid, int device) {
    memset(uuid, device + 1, 16);
    uuid[0] = 0;
    return answer("cuDeviceGetUuid");
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &ready;
    return answer("cuDevicePrimaryCtxRetain");
}
int cuDevicePrimaryCtxRelease_v2(int device) { return answer("cuDevicePrimaryCtxRelease_v2"); }
int cuCtxPushCurrent_v2(void *context) {
    int code = answer("cuCtxPushCurrent_v2");
    if (!code) contexts++;
    return code;
}
int cuCtxPopCurrent_v2(void **context) {
    int code = within("cuCtxPopCurrent_v2");
    if (!code) contexts--;
    *context = &ready;
    return code;
}
int double_contexts(void) { return contexts; }

int cuStreamCreate(void **stream, unsigned flags) {
    *stream = malloc(1);
    return within("cuStreamCreate");
}
int cuStreamSynchronize(void *stream) { return within("cuStreamSynchronize"); }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return within("cuStreamWaitEvent"); }

typedef struct { int polls; } event;
int cuEventCreate(event **made, unsigned flags) {
    *made = calloc(1, sizeof **made);
    return within("cuEventCreate");
}
int cuEventRecord(event *e, void *stream) {
    e->polls = POLLS;
    return within("cuEventRecord");
}
#ifndef WITHOUT_EVENTS
int cuEventQuery(event *e) {
    int code = within("cuEventQuery");
    return code ? code : e->polls-- > 0 ? NOT_READY : SUCCESS;
}
#endif
int cuEventSynchronize(event *e) { return within("cuEventSynchronize"); }

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(*memory, 0, bytes);
    return within("cuMemHostAlloc");
}
int cuMemFreeHost(void *memory) {
    int code = within("cuMemFreeHost");
    if (!code) free(memory);
    return code;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    int code = within("cuMemcpyDtoHAsync_v2");
    if (!code) memcpy(to, (void *)from, bytes);
    return code;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, void *from, size_t bytes, void *stream) {
    int code = within("cuMemcpyHtoDAsync_v2");
    if (!code) memcpy((void *)to, from, bytes);
    return code;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    *address = (uint64_t)malloc(bytes);
    return within("cuMemAlloc_v2");
}
int cuMemFree_v2(uint64_t address) {
    free((void *)address);
    return within("cuMemFree_v2");
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, NULL); }
int cuMemcpyHtoD_v2(uint64_t to, void *from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, NULL); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return cuMemcpyHtoDAsync_v2(to, (void *)from, bytes, stream);
}

/* A kernel is known by its name, which the text must have. The only one takes nanoseconds, and does nothing but that. */
int cuModuleLoadData(void **module, const char *text) {
    static int loaded;
    if (loaded++) return INVALID_VALUE;
    *module = (void *)text;
    return within("cuModuleLoadData");
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = strstr(module, name);
    return *function ? within("cuModuleGetFunction") : NOT_FOUND;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    if (gx * gy * gz * bx * by * bz != 1 || *(uint64_t *)parameters[0] != HELD) return INVALID_VALUE;
    return within("cuLaunchKernel");
}
int cuGetErrorName(int code, const char **name) {
    *name = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : NULL;
    return code == 719 ? SUCCESS : 1;
}
