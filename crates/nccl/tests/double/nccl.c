/* A test double of libnccl: the C interface and nothing behind it. It moves no data and knows no other rank, unless the
 * test gives it something that does (double_run_with).
 *
 * What it is to do is compiled in:
 *   VERSION  the version code it tells, which also decides which functions it has
 *   LOG      file to which it adds one line per call
 *   FAIL     name of the function that returns CODE
 *   HANG     name of the function that does not return before the file RELEASE exists
 *   POLLS    how often ncclCommGetAsyncError says "in progress" after a call that begins something; -1: always
 *   OPERATION_POLLS  the same after an operation was enqueued; POLLS if it is not given
 *   ENDS     what it says after that
 *   HIDE_VERSION  leaves out ncclGetVersion
 * Misuse (a communicator used after its end, or by two threads at once) is written to the log as a line "MISUSE ...".
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 22809
#endif
#ifndef FAIL
#define FAIL ""
#endif
#ifndef CODE
#define CODE 0
#endif
#ifndef HANG
#define HANG ""
#endif
#ifndef RELEASE
#define RELEASE "/nonexistent/release"
#endif
#ifndef POLLS
#define POLLS 0
#endif
#ifndef OPERATION_POLLS
#define OPERATION_POLLS POLLS
#endif
#ifndef ENDS
#define ENDS 0
#endif

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { ALIVE = 0x600d, GONE = 0xdead };

typedef struct { char internal[128]; } unique_id;

typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
} config;

typedef struct comm {
    int mark, rank, size;
    int polls;              /* how often "in progress" is still said */
    struct comm **out;      /* written once more when the work is complete, as NCCL does */
    struct comm *made;
    atomic_int inside;
} comm;

static void say(const char *format, const void *one, long two, long three) {
    FILE *log = fopen(LOG, "a");
    if (!log) return; /* the test has ended, and its folder is gone */
    fprintf(log, format, (const char *)one, two, three);
    fputc('\n', log);
    fclose(log);
}

static int answer(const char *name) {
    if (!strcmp(name, HANG)) {
        say("%s hangs", name, 0, 0);
        while (access(RELEASE, F_OK)) usleep(1000);
    }
    return strcmp(name, FAIL) ? SUCCESS : CODE;
}

static void enter(comm *c, const char *name) {
    if (!c || c->mark != ALIVE) say("MISUSE %s of a communicator that has ended", name, 0, 0);
    else if (atomic_fetch_add(&c->inside, 1)) say("MISUSE %s while another thread is inside", name, 0, 0);
}

static int leave(comm *c, int code) {
    if (c) atomic_fetch_sub(&c->inside, 1);
    return code;
}

/* Begins something on c that is in progress for that many polls; `made` is written to `out` at the end. */
static int begin_for(int polls, comm *c, comm **out, comm *made) {
    if (!polls) {
        if (out) *out = made;
        return SUCCESS;
    }
    c->polls = polls;
    c->out = out;
    c->made = made;
    return IN_PROGRESS;
}

static int begin(comm *c, comm **out, comm *made) { return begin_for(POLLS, c, out, made); }

static comm *make(int rank, int size) {
    comm *c = calloc(1, sizeof *c);
    *c = (comm){.mark = ALIVE, .rank = rank, .size = size};
    return c;
}

#ifndef HIDE_VERSION
int ncclGetVersion(int *version) { *version = VERSION; return answer("ncclGetVersion"); }
#endif

int ncclGetUniqueId(unique_id *id) {
    memset(id, 0x5a, sizeof *id);
    return answer("ncclGetUniqueId");
}

const char *ncclGetErrorString(int code) { return code == 42 ? NULL : "words of the double"; }
const char *ncclGetLastError(comm *c) { return "the last error of the double"; }

static void say_config(const char *name, const config *c) {
    say("%s config size=%ld version=%ld", name, (long)c->size, c->version);
    say("%s config blocking=%ld maxCTAs=%ld", name, c->blocking, c->max_ctas);
    say("%s config netName set=%ld magic=%lx", c->net_name ? c->net_name : name, !!c->net_name, c->magic);
}

int ncclCommInitRankConfig(comm **out, int size, unique_id id, int rank, config *settings) {
    say("%s rank=%ld size=%ld", "ncclCommInitRankConfig", rank, size);
    say("%s id=%ld,%ld", "ncclCommInitRankConfig", id.internal[0], id.internal[127]);
    say_config("ncclCommInitRankConfig", settings);
    int code = answer("ncclCommInitRankConfig");
    if (code) return code;
    *out = make(rank, size);
    return begin(*out, out, *out);
}

int ncclCommGetAsyncError(comm *c, int *state) {
    enter(c, "ncclCommGetAsyncError");
    if (c->polls) {
        if (c->polls > 0) c->polls--;
        *state = IN_PROGRESS;
    } else {
        if (c->out) *c->out = c->made;
        c->out = NULL;
        *state = ENDS;
    }
    return leave(c, answer("ncclCommGetAsyncError"));
}

int ncclCommCount(comm *c, int *count) { *count = c->size; return answer("ncclCommCount"); }
int ncclCommUserRank(comm *c, int *rank) { *rank = c->rank; return answer("ncclCommUserRank"); }
int ncclCommCuDevice(comm *c, int *device) { *device = 3; return answer("ncclCommCuDevice"); }

int ncclCommFinalize(comm *c) {
    enter(c, "ncclCommFinalize");
    say("%s", "ncclCommFinalize", 0, 0);
    int code = answer("ncclCommFinalize");
    return leave(c, code ? code : begin(c, NULL, NULL));
}

static int end(comm *c, const char *name) {
    enter(c, name);
    say("%s", name, 0, 0);
    int code = answer(name);
    c->mark = GONE; /* leaked, so that a later use is seen */
    return leave(c, code);
}

int ncclCommDestroy(comm *c) { return end(c, "ncclCommDestroy"); }
int ncclCommAbort(comm *c) { return end(c, "ncclCommAbort"); }

/* What is to run the operations, if the test has given something: called for each when it is enqueued, with the
 * bytes of `s`, or of `r` where there is more in `s`. */
enum { ALL_REDUCE, BROADCAST, REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND, RECEIVE };
typedef void runner(void *stream, int what, const void *s, void *r, size_t bytes, int other);
static runner *run_with;
void double_run_with(runner *given) { run_with = given; }

typedef struct { void *stream; int what; const void *s; void *r; size_t count; int type, other; } asked;

static int enqueue(comm *c, const char *name, long argument, asked it) {
    static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    enter(c, name);
    say("%s count=%ld argument=%ld", name, it.count, argument);
    int code = answer(name);
    if (!code && run_with) run_with(it.stream, it.what, it.s, it.r, it.count * sizes[it.type], it.other);
    return leave(c, code ? code : begin_for(OPERATION_POLLS, c, NULL, NULL));
}

int ncclAllReduce(const void *s, void *r, size_t n, int type, int op, comm *c, void *stream) {
    return enqueue(c, "ncclAllReduce", type * 100 + op, (asked){stream, ALL_REDUCE, s, r, n, type, op});
}
int ncclBroadcast(const void *s, void *r, size_t n, int type, int root, comm *c, void *stream) {
    return enqueue(c, "ncclBroadcast", root, (asked){stream, BROADCAST, s, r, n, type, root});
}
int ncclReduce(const void *s, void *r, size_t n, int type, int op, int root, comm *c, void *stream) {
    return enqueue(c, "ncclReduce", type * 100 + op * 10 + root, (asked){stream, REDUCE, s, r, n, type, root});
}
int ncclAllGather(const void *s, void *r, size_t n, int type, comm *c, void *stream) {
    return enqueue(c, "ncclAllGather", type, (asked){stream, ALL_GATHER, s, r, n, type, 0});
}
int ncclReduceScatter(const void *s, void *r, size_t n, int type, int op, comm *c, void *stream) {
    return enqueue(c, "ncclReduceScatter", type * 100 + op, (asked){stream, REDUCE_SCATTER, s, r, n, type, op});
}
int ncclSend(const void *s, size_t n, int type, int peer, comm *c, void *stream) {
    return enqueue(c, "ncclSend", peer, (asked){stream, SEND, s, NULL, n, type, peer});
}
int ncclRecv(void *r, size_t n, int type, int peer, comm *c, void *stream) {
    return enqueue(c, "ncclRecv", peer, (asked){stream, RECEIVE, NULL, r, n, type, peer});
}
int ncclGroupStart(void) { say("%s", "ncclGroupStart", 0, 0); return answer("ncclGroupStart"); }
int ncclGroupEnd(void) { say("%s", "ncclGroupEnd", 0, 0); return answer("ncclGroupEnd"); }

#if VERSION >= 21800
int ncclCommSplit(comm *c, int color, int key, comm **out, config *settings) {
    enter(c, "ncclCommSplit");
    say("%s color=%ld key=%ld", "ncclCommSplit", color, key);
    int code = answer("ncclCommSplit");
    return leave(c, code ? code : begin(c, out, color < 0 ? NULL : make(key, c->size)));
}
#endif

#if VERSION >= 22300
int ncclCommInitRankScalable(comm **out, int size, int rank, int ids, unique_id *id, config *settings) {
    say("%s ids=%ld last=%ld", "ncclCommInitRankScalable", ids, id[ids - 1].internal[0]);
    *out = make(rank, size);
    return begin(*out, out, *out);
}
#endif

#if VERSION >= 22700
int ncclCommShrink(comm *c, int *without, int count, comm **out, config *settings, int flags) {
    enter(c, "ncclCommShrink");
    say("%s without=%ld flags=%ld", "ncclCommShrink", without[0], flags);
    c->polls = 0;
    int code = answer("ncclCommShrink");
    return leave(c, code ? code : begin(c, out, make(0, c->size - count)));
}
#endif

#if VERSION >= 22807
int ncclCommRevoke(comm *c, int flags) {
    enter(c, "ncclCommRevoke");
    say("%s flags=%ld", "ncclCommRevoke", flags, 0);
    return leave(c, begin(c, NULL, NULL));
}
#endif

#if VERSION >= 22902
int ncclCommGetUniqueId(comm *c, unique_id *id) {
    memset(id, 0x11, sizeof *id);
    return answer("ncclCommGetUniqueId");
}
int ncclCommGrow(comm *c, int size, const unique_id *id, int rank, comm **out, config *settings) {
    say("%s size=%ld rank=%ld", "ncclCommGrow", size, rank);
    if (!c) {
        if (!id) return INVALID_ARGUMENT;
        *out = make(rank, size);
        return begin(*out, out, *out);
    }
    enter(c, "ncclCommGrow");
    return leave(c, begin(c, out, make(c->rank, size)));
}
#endif
