/* NCCL's view of the plugin, by a C compiler: its interface written down again from NCCL's headers, layouts printed, and
 * the first calls made with a logger that takes any arguments, as NCCL's does. */
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef int result;
typedef void (*logger)(int level, unsigned long flags, const char *file, int line, const char *format, ...);
typedef struct { int ndevs, devs[4]; } vdevice;

typedef struct {
    char *name, *pciPath;
    uint64_t guid;
    int ptrSupport, regIsGlobal, speed, port;
    float latency;
    int maxComms, maxRecvs, netDeviceType, netDeviceVersion;
} properties8;

typedef struct {
    char *name, *pciPath;
    uint64_t guid;
    int ptrSupport, regIsGlobal, forceFlush, speed, port;
    float latency;
    int maxComms, maxRecvs, netDeviceType, netDeviceVersion;
    vdevice vProps;
    size_t maxP2pBytes, maxCollBytes;
    int maxMultiRequestSize;
} properties11;

typedef struct {
    const char *name;
    result (*init)(logger);
    result (*devices)(int *);
    result (*getProperties)(int, properties8 *);
    result (*listen)(int, void *, void **);
    result (*connect)(int, void *, void **, void **);
    result (*accept)(void *, void **, void **);
    result (*regMr)(void *, void *, size_t, int, void **);
    result (*regMrDmaBuf)(void *, void *, size_t, int, uint64_t, int, void **);
    result (*deregMr)(void *, void *);
    result (*isend)(void *, void *, int, int, void *, void **);
    result (*irecv)(void *, int, void **, int *, int *, void **, void **);
    result (*iflush)(void *, int, void **, int *, void **, void **);
    result (*test)(void *, int *, int *);
    result (*closeSend)(void *), (*closeRecv)(void *), (*closeListen)(void *);
    result (*getDeviceMr)(void *, void *, void **);
    result (*irecvConsumed)(void *, int, void *);
} net8;

typedef struct {
    const char *name;
    result (*init)(void **, uint64_t, void *, logger, void *);
    result (*devices)(int *);
    result (*getProperties)(int, properties11 *);
    result (*listen)(void *, int, void *, void **);
    result (*connect)(void *, int, void *, void **, void **);
    result (*accept)(void *, void **, void **);
    result (*regMr)(void *, void *, size_t, int, void **);
    result (*regMrDmaBuf)(void *, void *, size_t, int, uint64_t, int, void **);
    result (*deregMr)(void *, void *);
    result (*isend)(void *, void *, size_t, int, void *, void *, void **);
    result (*irecv)(void *, int, void **, size_t *, int *, void **, void **, void **);
    result (*iflush)(void *, int, void **, int *, void **, void **);
    result (*test)(void *, int *, int *);
    result (*closeSend)(void *), (*closeRecv)(void *), (*closeListen)(void *);
    result (*getDeviceMr)(void *, void *, void **);
    result (*irecvConsumed)(void *, int, void *);
    result (*makeVDevice)(int *, vdevice *);
    result (*finalize)(void *);
    result (*setNetAttr)(void *, void *);
} net11;

static void show(int level, unsigned long flags, const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("log %d %lu %s:%d ", level, flags, file, line);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

int main(int count, char **words) {
    void *library = count > 1 ? dlopen(words[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!library) return printf("%s\n", count > 1 ? dlerror() : "usage: probe LIBRARY"), 1;
    net8 *eight = dlsym(library, "ncclNetPlugin_v8");
    net11 *eleven = dlsym(library, "ncclNetPlugin_v11");
    if (!eight || !eleven) return printf("a table is missing\n"), 1;
    int devices = -1, done = -1;
    void *context = NULL, *handle = NULL, *request = &done;
    properties8 p8 = {0};
    properties11 p11 = {0};
    printf("init8 %d\n", eight->init(show));
    printf("init11 %d\n", eleven->init(&context, 1, NULL, show, NULL));
    printf("devices %d", eleven->devices(&devices));
    printf(" %d\n", devices);
    printf("properties8 %d", eight->getProperties(0, &p8));
    printf(" %s %d %d %d %d\n", p8.name, p8.ptrSupport, p8.speed > 0, p8.maxRecvs, p8.netDeviceType);
    printf("properties11 %d", eleven->getProperties(0, &p11));
    printf(" %s %d %d %d %d", p11.name, p11.ptrSupport, p11.speed > 0, p11.maxRecvs, p11.netDeviceType);
    printf(" %d %d %zu %zu %d\n", p11.vProps.ndevs, p11.vProps.devs[0], p11.maxP2pBytes, p11.maxCollBytes,
           p11.maxMultiRequestSize);
    printf("iflush %d", eight->iflush(NULL, 0, NULL, NULL, NULL, &request));
    printf(" %d\n", request == NULL);
    printf("regMr %d\n", eleven->regMr(NULL, NULL, 8, 1, &handle));
    printf("regMrDmaBuf %d\n", eleven->regMrDmaBuf(NULL, NULL, 8, 4, 0, 0, &handle));
    printf("none %d %d\n", eleven->makeVDevice == NULL, eleven->getDeviceMr == NULL && !eleven->irecvConsumed);
    printf("finalize %d %d\n", eleven->setNetAttr(context, NULL), eleven->finalize(context));
    int nulls[] = {eleven->listen(context, 0, NULL, NULL), eleven->devices(NULL), eleven->test(NULL, NULL, NULL)};
    printf("nulls %d %d %d\n", nulls[0], nulls[1], nulls[2]);
    printf("closed %d\n", dlclose(library));
    return 0;
}
