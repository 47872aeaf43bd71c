/* The benchmark of one library: `bench ROW...`, a row being barrier:ITERATIONS or BYTES:ITERATIONS.
 *
 * As nccl-tests and `paceline bench` do it: all rows are warmed up before the first is timed; calls are timed back to
 * back, with one reading of the clock at each end; then one more call is made on numbers that are different for every
 * rank and row, and each element of its result is compared with the sum. The numbers are small integers, whose sums are
 * exact in f32 whatever the order.
 *
 * Rank 0 prints one JSON object per row on a line of its own: the mean of one call in microseconds, averaged over the
 * ranks, and the wrong elements of all ranks. How often a row is called is for the caller to say. */
#include "peer.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum place { OUT_OF_PLACE, IN_PLACE };

/* Calls of each row before the first row is timed, as `paceline bench -w 3`. Libraries set up shared memory at the first
 * calls (MPICH after the fifth of a job). */
enum { WARM_UP = 3 };

/* How late the late rank comes to a barrier that is checked: far above what a busy machine hides. */
static const struct timespec LATE = {.tv_sec = 0, .tv_nsec = 3000000};

struct row {
  size_t bytes; /* 0: a barrier */
  long iterations;
};

static int rank, ranks;
static float *input, *output;

static double now_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static void fail(const char *what) {
  fprintf(stderr, "rank %d: %s\n", rank, what);
  exit(2);
}

static struct row parse(const char *text) {
  struct row row = {0, 0};
  const char *colon = strchr(text, ':');
  char *end = NULL;
  if (colon == NULL) fail("a row is barrier:ITERATIONS or BYTES:ITERATIONS");
  if (strncmp(text, "barrier:", 8) != 0) {
    row.bytes = strtoull(text, &end, 10);
    if (end != colon || row.bytes == 0 || row.bytes % sizeof(float) != 0) fail("a size is a multiple of 4 bytes");
  }
  row.iterations = strtol(colon + 1, &end, 10);
  if (*end != '\0' || row.iterations < 1) fail("iterations are a number from 1 on");
  return row;
}

static void fill(float *buffer, size_t len, float value) {
  for (size_t i = 0; i < len; i++) buffer[i] = value;
}

/* Points the calls of a row at its buffers. Sums in place grow with every call; of zeros they stay zeros, and no number
 * becomes infinite, which is slow on some processors. */
static void use(const struct row *row, enum place place) {
  size_t len = row->bytes / sizeof(float);
  if (len == 0) return;
  fill(output, len, 0);
  peer_use(place == IN_PLACE ? output : input, output, len);
}

static void repeat(const struct row *row, long times) {
  if (row->bytes == 0) {
    for (long i = 0; i < times; i++) peer_barrier();
  } else {
    for (long i = 0; i < times; i++) peer_all_reduce();
  }
}

/* What `of_rank` puts into an element. The seed differs from row to row: what an earlier one has left is wrong. */
static float contribution(int of_rank, size_t element, unsigned seed) {
  return (float)((element * 7 + (size_t)of_rank * 1009 + seed * 31) % 4093);
}

static double wrong_elements(const struct row *row, enum place place, unsigned seed) {
  size_t len = row->bytes / sizeof(float), wrong = 0;
  for (size_t i = 0; i < len; i++) {
    float own = contribution(rank, i, seed);
    input[i] = own;
    output[i] = place == IN_PLACE ? own : -3;
  }
  peer_use(place == IN_PLACE ? output : input, output, len);
  peer_all_reduce();
  for (size_t i = 0; i < len; i++) {
    float expected = 0;
    for (int r = 0; r < ranks; r++) expected += contribution(r, i, seed);
    wrong += output[i] != expected;
  }
  fill(input, len, 1);
  return (double)wrong;
}

/* One rank after the other comes late; leaving before it has entered is wrong. */
static double left_too_early(void) {
  double wrong = 0;
  for (int late = 0; late < ranks; late++) {
    if (rank == late) nanosleep(&LATE, NULL);
    double entered = now_us();
    peer_barrier();
    double left = now_us();
    wrong += left < peer_max(entered);
  }
  return wrong;
}

static void measure(const struct row *row, enum place place, unsigned seed) {
  use(row, place);
  peer_barrier();
  double start = now_us();
  repeat(row, row->iterations);
  double own_us = (now_us() - start) / row->iterations;
  double mean_us = peer_sum(own_us) / ranks;
  double wrong = peer_sum(row->bytes == 0 ? left_too_early() : wrong_elements(row, place, seed));
  if (rank != 0) return;
  printf("{\"bytes\":%zu,\"place\":\"%s\",\"iterations\":%ld,\"mean_us\":%.6f,\"wrong\":%.0f}\n", row->bytes,
         place == IN_PLACE ? "in_place" : "out_of_place", row->iterations, mean_us, wrong);
  fflush(stdout);
}

int main(int argc, char **argv) {
  peer_start(&argc, &argv, &rank, &ranks);
  int rows = argc - 1;
  struct row *row = calloc((size_t)rows + 1, sizeof *row);
  size_t largest = sizeof(float);
  for (int i = 0; i < rows; i++) {
    row[i] = parse(argv[i + 1]);
    if (row[i].bytes > largest) largest = row[i].bytes;
  }
  input = aligned_alloc(4096, (largest + 4095) / 4096 * 4096);
  output = aligned_alloc(4096, (largest + 4095) / 4096 * 4096);
  if (input == NULL || output == NULL) fail("out of memory");
  /* Touches all pages, so that none is handed out under the clock. */
  fill(input, largest / sizeof(float), 1);
  fill(output, largest / sizeof(float), 0);

  for (int i = 0; i < rows; i++) {
    for (enum place place = OUT_OF_PLACE; place <= IN_PLACE; place++) {
      if (place == IN_PLACE && row[i].bytes == 0) continue;
      use(&row[i], place);
      repeat(&row[i], row[i].iterations < WARM_UP ? row[i].iterations : WARM_UP);
    }
  }
  for (int i = 0; i < rows; i++) {
    for (enum place place = OUT_OF_PLACE; place <= IN_PLACE; place++) {
      if (place == IN_PLACE && row[i].bytes == 0) continue;
      measure(&row[i], place, (unsigned)(2 * i + place + 1));
    }
  }
  peer_stop();
  free(input);
  free(output);
  free(row);
  return 0;
}
