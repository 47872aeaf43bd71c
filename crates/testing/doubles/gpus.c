/* A test double of a machine with GPUs: CUDA's driver and NCCL in one library, for programs in several processes.
 *
 * Device memory is the host's. Each stream is a thread that runs what was enqueued, in order, later than is convenient:
 * before every step it may sleep. Nothing but streams and events orders anything. What is allocated or freed is filled with
 * poison. NCCL's operations move data between processes through files in a folder that the unique id names (below TMPDIR);
 * one whose peer does not come never ends, until it is aborted. It shows that our waits and calls are enough for the rules
 * as NVIDIA's documentation has them, and nothing about NVIDIA's libraries or any speed.
 *
 * Environment: DOUBLE_GPUS  how many GPUs there are, 2 unless it is set
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, NOT_READY = 600 };
enum { POISON = 0xA5 };

/* ---- the driver ------------------------------------------------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static int ready;
static _Thread_local int contexts;
static _Thread_local int current;

typedef struct step {
    struct step *next;
    void (*run)(void *);
    void *with;
} step;

typedef struct {
    step *first, **last;
    long given, run;
    unsigned chance;
} stream;

typedef struct { long recorded, run; } event;
typedef struct { event *event; long mark; } mark;
typedef struct { void *to; const void *from; size_t bytes; } copy;

static void *work(void *with) {
    stream *s = with;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!s->first) pthread_cond_wait(&news, &lock);
        step *now = s->first;
        if (!(s->first = now->next)) s->last = &s->first;
        pthread_mutex_unlock(&lock);
        if (rand_r(&s->chance) % 4 == 0) usleep(rand_r(&s->chance) % 500);
        now->run(now->with);
        free(now->with);
        free(now);
        pthread_mutex_lock(&lock);
        s->run++;
        pthread_cond_broadcast(&news);
    }
    return NULL;
}

static int enqueue(stream *s, void (*run)(void *), const void *with, size_t bytes) {
    step *given = calloc(1, sizeof *given);
    given->run = run;
    given->with = malloc(bytes);
    memcpy(given->with, with, bytes);
    pthread_mutex_lock(&lock);
    *s->last = given;
    s->last = &given->next;
    s->given++;
    pthread_cond_broadcast(&news);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static int within(void) { return !ready ? NOT_INITIALIZED : contexts ? SUCCESS : INVALID_CONTEXT; }

static int gpus(void) {
    const char *asked = getenv("DOUBLE_GPUS");
    return asked ? atoi(asked) : 2;
}

int cuInit(unsigned flags) { ready = 1; return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = gpus(); return SUCCESS; }
int cuDeviceGetName(char *name, int bytes, int device) { snprintf(name, bytes, "A double"); return SUCCESS; }
int cuDeviceGetUuid(unsigned char *uuid, int device) {
    memset(uuid, 0, 16);
    uuid[0] = device + 1;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(uintptr_t)(device + 1);
    return ready ? SUCCESS : NOT_INITIALIZED;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) {
    contexts++;
    current = (int)(uintptr_t)context - 1;
    return SUCCESS;
}
int cuCtxPopCurrent_v2(void **context) {
    if (!contexts) return INVALID_CONTEXT;
    contexts--;
    return SUCCESS;
}

int cuStreamCreate(stream **made, unsigned flags) {
    static atomic_uint number;
    stream *s = calloc(1, sizeof *s);
    s->last = &s->first;
    s->chance = getpid() * 31 + atomic_fetch_add(&number, 1);
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, s)) return INVALID_VALUE;
    pthread_detach(thread);
    *made = s;
    return within();
}
int cuStreamSynchronize(stream *s) {
    if (!s) return within();
    pthread_mutex_lock(&lock);
    long given = s->given;
    while (s->run < given) pthread_cond_wait(&news, &lock);
    pthread_mutex_unlock(&lock);
    return within();
}

static void wait_for(void *with) {
    mark *m = with;
    pthread_mutex_lock(&lock);
    while (m->event->run < m->mark) pthread_cond_wait(&news, &lock);
    pthread_mutex_unlock(&lock);
}
static void has_run(void *with) {
    mark *m = with;
    pthread_mutex_lock(&lock);
    m->event->run = m->mark;
    pthread_cond_broadcast(&news);
    pthread_mutex_unlock(&lock);
}
int cuStreamWaitEvent(stream *s, event *e, unsigned flags) {
    pthread_mutex_lock(&lock);
    mark m = {e, e->recorded};
    pthread_mutex_unlock(&lock);
    return enqueue(s, wait_for, &m, sizeof m), within();
}
int cuEventCreate(event **made, unsigned flags) { *made = calloc(1, sizeof **made); return within(); }
int cuEventRecord(event *e, stream *s) {
    pthread_mutex_lock(&lock);
    mark m = {e, ++e->recorded};
    pthread_mutex_unlock(&lock);
    return enqueue(s, has_run, &m, sizeof m), within();
}
int cuEventQuery(event *e) {
    pthread_mutex_lock(&lock);
    int done = e->run == e->recorded;
    pthread_mutex_unlock(&lock);
    int code = within();
    return code ? code : done ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(event *e) {
    pthread_mutex_lock(&lock);
    while (e->run < e->recorded) pthread_cond_wait(&news, &lock);
    pthread_mutex_unlock(&lock);
    return within();
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(*memory, POISON, bytes);
    return within();
}
int cuMemFreeHost(void *memory) { free(memory); return within(); }
/* Freed memory stays, full of poison, so that whoever still uses it is wrong and does not crash. */
typedef struct { size_t bytes; char pad[56]; } header;
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    header *made = aligned_alloc(64, sizeof *made + (bytes + 63) / 64 * 64);
    made->bytes = bytes;
    memset(made + 1, POISON, bytes);
    *address = (uint64_t)(uintptr_t)(made + 1);
    return within();
}
int cuMemFree_v2(uint64_t address) {
    header *made = (header *)(uintptr_t)address - 1;
    memset(made + 1, POISON, made->bytes);
    return within();
}

static void do_copy(void *with) {
    copy *c = with;
    memcpy(c->to, c->from, c->bytes);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, stream *s) {
    copy c = {to, (void *)(uintptr_t)from, bytes};
    return enqueue(s, do_copy, &c, sizeof c), within();
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, stream *s) {
    copy c = {(void *)(uintptr_t)to, from, bytes};
    return enqueue(s, do_copy, &c, sizeof c), within();
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, stream *s) {
    copy c = {(void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes};
    return enqueue(s, do_copy, &c, sizeof c), within();
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return within();
}
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    memcpy((void *)(uintptr_t)to, from, bytes);
    return within();
}
/* The only kernel there is: it holds its stream. */
int cuModuleLoadData(void **module, const char *text) {
    *module = strstr(text, ".entry paceline_hold(") ? (void *)text : NULL;
    return *module ? within() : INVALID_VALUE;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = strcmp(name, "paceline_hold") ? NULL : module;
    return *function ? within() : INVALID_VALUE;
}
static void sleep_for(void *with) {
    uint64_t nanoseconds = *(uint64_t *)with;
    struct timespec time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    nanosleep(&time, NULL);
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, stream *s, void **parameters, void **extra) {
    return enqueue(s, sleep_for, parameters[0], sizeof(uint64_t)), within();
}
int cuGetErrorName(int code, const char **name) {
    *name = code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : NULL;
    return *name ? SUCCESS : INVALID_VALUE;
}

/* ---- NCCL ------------------------------------------------------------------------------------------------------- */

enum { NCCL_SYSTEM_ERROR = 2, NCCL_INTERNAL_ERROR = 3, NCCL_INVALID_ARGUMENT = 4, NCCL_IN_PROGRESS = 7 };
enum { ALL_REDUCE, BROADCAST, REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND, RECEIVE };

typedef struct { char internal[128]; } unique_id;
typedef struct {
    int rank, size, device;
    char folder[128];
    long collectives;       /* enqueued */
    long *sent, *received;  /* enqueued, by peer */
    atomic_long given, run;
    atomic_int aborted, torn;
} comm;
typedef struct {
    comm *c;
    int what, type, op, other;
    const char *s;
    char *r;
    size_t count;
    long number;
} operation;

static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

static void name_of(char *name, comm *c, char kind, long number, int from, int to) {
    snprintf(name, 256, "%s/%c%ld.%d.%d", c->folder, kind, number, from, to);
}

static void give(comm *c, char kind, long number, int from, int to, const void *bytes, size_t len) {
    char name[256], begun[264];
    name_of(name, c, kind, number, from, to);
    snprintf(begun, sizeof begun, "%s.new", name);
    FILE *file = fopen(begun, "w");
    if (!file || fwrite(bytes, 1, len, file) != len || fclose(file) || rename(begun, name)) c->torn = 1;
}

/* Waits for what a rank has given; 0 if the communicator was aborted before that. */
static int take(comm *c, char kind, long number, int from, int to, void *bytes, size_t len) {
    char name[256];
    name_of(name, c, kind, number, from, to);
    FILE *file;
    while (!(file = fopen(name, "r"))) {
        if (c->aborted) return 0;
        usleep(200);
    }
    if (fread(bytes, 1, len, file) != len) c->torn = 1;
    fclose(file);
    return 1;
}

static void forget(comm *c, char kind, long number, int from, int to) {
    char name[256];
    name_of(name, c, kind, number, from, to);
    unlink(name);
}

static double wide(int type, const char *at) {
    uint16_t half;
    uint32_t bits;
    float single;
    double number;
    switch (type) {
    case 6: { _Float16 f; memcpy(&f, at, 2); return f; }
    case 7: memcpy(&single, at, 4); return single;
    case 8: memcpy(&number, at, 8); return number;
    default: memcpy(&half, at, 2); bits = (uint32_t)half << 16; memcpy(&single, &bits, 4); return single;
    }
}
static void narrow(int type, char *at, double number) {
    float single = number;
    uint32_t bits;
    switch (type) {
    case 6: { _Float16 f = number; memcpy(at, &f, 2); break; }
    case 7: memcpy(at, &single, 4); break;
    case 8: memcpy(at, &number, 8); break;
    default:
        memcpy(&bits, &single, 4);
        bits += 0x7fff + (bits >> 16 & 1); /* to the nearest, ties to even; no NaN comes here */
        bits >>= 16;
        memcpy(at, &bits, 2);
    }
}
static int64_t integer(int type, const char *at) {
    int64_t number = 0;
    switch (type) {
    case 0: return *(const int8_t *)at;
    case 1: return *(const uint8_t *)at;
    case 2: { int32_t i; memcpy(&i, at, 4); return i; }
    case 3: { uint32_t i; memcpy(&i, at, 4); return i; }
    default: memcpy(&number, at, 8); return number;
    }
}

#define BY(op, zero, T)                                   \
    for (int r = 0; r < n; r++) {                          \
        T x = VALUE(type, all + r * stride + i * size);     \
        total = r == 0 ? x : op == 0 || op == 4 ? total + x : op == 1 ? total * x \
              : op == 2 ? (LESS(total, x) ? x : total) : (LESS(x, total) ? x : total); \
    }
/* One element of every rank's input, each `stride` bytes after the one before, put together in the order of ranks. */
static void reduce(int type, int op, int n, char *to, const char *all, size_t stride, size_t count) {
    int size = sizes[type], is_float = type >= 6, is_unsigned = type == 5;
    for (size_t i = 0; i < count; i++) {
        if (is_float) {
            double total = 0;
#define VALUE wide
#define LESS(a, b) ((a) < (b))
            BY(op, 0, double)
#undef VALUE
#undef LESS
            narrow(type, to + i * size, op == 4 ? total / n : total);
        } else {
            int64_t total = 0;
#define VALUE integer
#define LESS(a, b) (is_unsigned ? (uint64_t)(a) < (uint64_t)(b) : (a) < (b))
            BY(op, 0, int64_t)
#undef VALUE
#undef LESS
            if (op == 4) {
                char wrapped[8] = {0};
                memcpy(wrapped, &total, size);
                total = integer(type, wrapped);
                total = is_unsigned ? (int64_t)((uint64_t)total / n) : total / n;
            }
            memcpy(to + i * size, &total, size);
        }
    }
}

static void run_message(operation *o) {
    comm *c = o->c;
    size_t bytes = o->count * sizes[o->type];
    if (o->what == SEND) give(c, 'm', o->number, c->rank, o->other, o->s, bytes);
    else if (take(c, 'm', o->number, o->other, c->rank, o->r, bytes)) forget(c, 'm', o->number, o->other, c->rank);
}

static void run_collective(operation *o) {
    comm *c = o->c;
    size_t part = o->count * sizes[o->type];
    size_t bytes = o->what == REDUCE_SCATTER ? part * c->size : part;
    int reads = o->what != BROADCAST || c->rank == o->other;
    give(c, 'c', o->number, c->rank, 0, o->s, reads ? bytes : 0);
    char *all = malloc(bytes * c->size + 1);
    for (int r = 0; r < c->size; r++) {
        size_t len = o->what == BROADCAST && r != o->other ? 0 : bytes;
        if (!take(c, 'c', o->number, r, 0, all + r * bytes, len)) return free(all);
    }
    /* All have begun this one, so none still reads the one before. */
    forget(c, 'c', o->number - 1, c->rank, 0);
    switch (o->what) {
    case ALL_REDUCE: reduce(o->type, o->op, c->size, o->r, all, bytes, o->count); break;
    case REDUCE: if (c->rank == o->other) reduce(o->type, o->op, c->size, o->r, all, bytes, o->count); break;
    case REDUCE_SCATTER: reduce(o->type, o->op, c->size, o->r, all + c->rank * part, bytes, o->count); break;
    case BROADCAST: memcpy(o->r, all + o->other * bytes, bytes); break;
    case ALL_GATHER: memcpy(o->r, all, bytes * c->size); break;
    }
    free(all);
}

static void run(void *with) {
    operation *o = with;
    if (!o->c->aborted) o->what == SEND || o->what == RECEIVE ? run_message(o) : run_collective(o);
    o->c->run++;
}

static int ask(stream *s, operation o) {
    if (!s || o.type < 0 || o.type > 9) return NCCL_INVALID_ARGUMENT;
    comm *c = o.c;
    o.number = o.what == SEND ? ++c->sent[o.other] : o.what == RECEIVE ? ++c->received[o.other] : ++c->collectives;
    c->given++;
    return enqueue(s, run, &o, sizeof o);
}

int ncclGetVersion(int *version) { *version = 22809; return 0; }
int ncclGetUniqueId(unique_id *id) {
    const char *folder = getenv("TMPDIR");
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%s/nccl-double-XXXXXX", folder ? folder : "/tmp");
    return mkdtemp(id->internal) ? 0 : NCCL_SYSTEM_ERROR;
}
const char *ncclGetErrorString(int code) { return "words of the double"; }
const char *ncclGetLastError(comm *c) { return "the last error of the double"; }

int ncclCommInitRankConfig(comm **out, int size, unique_id id, int rank, void *settings) {
    if (!contexts) return NCCL_INVALID_ARGUMENT;
    comm *c = calloc(1, sizeof *c);
    c->rank = rank, c->size = size, c->device = current;
    c->sent = calloc(size, sizeof(long)), c->received = calloc(size, sizeof(long));
    snprintf(c->folder, sizeof c->folder, "%.127s", id.internal);
    give(c, 'i', 0, rank, 0, "", 0);
    *out = c;
    return NCCL_IN_PROGRESS;
}
int ncclCommGetAsyncError(comm *c, int *state) {
    char name[256];
    *state = c->torn ? NCCL_INTERNAL_ERROR : 0;
    for (int r = 0; r < c->size && !*state; r++) {
        name_of(name, c, 'i', 0, r, 0);
        if (access(name, F_OK)) *state = NCCL_IN_PROGRESS;
    }
    return 0;
}
int ncclCommCount(comm *c, int *count) { *count = c->size; return 0; }
int ncclCommUserRank(comm *c, int *rank) { *rank = c->rank; return 0; }
int ncclCommCuDevice(comm *c, int *device) { *device = c->device; return 0; }
int ncclCommFinalize(comm *c) {
    while (c->run < c->given && !c->aborted) usleep(200);
    return 0;
}
int ncclCommDestroy(comm *c) { return 0; }
int ncclCommAbort(comm *c) { c->aborted = 1; return ncclCommFinalize(c); }
int ncclGroupStart(void) { return 0; }
int ncclGroupEnd(void) { return 0; }

int ncclAllReduce(const void *s, void *r, size_t n, int type, int op, comm *c, stream *stream) {
    return ask(stream, (operation){c, ALL_REDUCE, type, op, 0, s, r, n});
}
int ncclBroadcast(const void *s, void *r, size_t n, int type, int root, comm *c, stream *stream) {
    return ask(stream, (operation){c, BROADCAST, type, 0, root, s, r, n});
}
int ncclReduce(const void *s, void *r, size_t n, int type, int op, int root, comm *c, stream *stream) {
    return ask(stream, (operation){c, REDUCE, type, op, root, s, r, n});
}
int ncclAllGather(const void *s, void *r, size_t n, int type, comm *c, stream *stream) {
    return ask(stream, (operation){c, ALL_GATHER, type, 0, 0, s, r, n});
}
int ncclReduceScatter(const void *s, void *r, size_t n, int type, int op, comm *c, stream *stream) {
    return ask(stream, (operation){c, REDUCE_SCATTER, type, op, 0, s, r, n});
}
int ncclSend(const void *s, size_t n, int type, int peer, comm *c, stream *stream) {
    return ask(stream, (operation){c, SEND, type, 0, peer, s, NULL, n});
}
int ncclRecv(void *r, size_t n, int type, int peer, comm *c, stream *stream) {
    return ask(stream, (operation){c, RECEIVE, type, 0, peer, NULL, r, n});
}
