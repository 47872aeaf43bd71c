/* What bench.c needs from a library. One implementation per library is linked with it, so that the loop that is timed
 * is the same for all. Every rank calls the same functions in the same order. A failure ends the process. */
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Joins the job; takes its own words out of the command line. */
void peer_start(int *argc, char ***argv, int *rank, int *ranks);

/* Tells the library which buffers the calls that follow will be about; not timed. They stay valid until the next such
 * call. `input == output` is in place. */
void peer_use(float *input, float *output, size_t len);

/* The sum of all ranks' inputs into all ranks' outputs. */
void peer_all_reduce(void);

/* Nobody leaves before everybody has entered. */
void peer_barrier(void);

/* The sum and the maximum of one number per rank, for the report. */
double peer_sum(double own);
double peer_max(double own);

/* Leaves the job in order. */
void peer_stop(void);

#ifdef __cplusplus
}
#endif
