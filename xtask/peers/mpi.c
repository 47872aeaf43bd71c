/* OpenMPI and MPICH. Errors end the job: that is MPI's default. */
#include "peer.h"

#include <mpi.h>

static const void *send_from;
static float *receive_into;
static int count;

void peer_start(int *argc, char ***argv, int *rank, int *ranks) {
  MPI_Init(argc, argv);
  MPI_Comm_rank(MPI_COMM_WORLD, rank);
  MPI_Comm_size(MPI_COMM_WORLD, ranks);
}

void peer_use(float *input, float *output, size_t len) {
  send_from = input == output ? MPI_IN_PLACE : input;
  receive_into = output;
  count = (int)len;
}

void peer_all_reduce(void) {
  MPI_Allreduce(send_from, receive_into, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

void peer_barrier(void) { MPI_Barrier(MPI_COMM_WORLD); }

double peer_sum(double own) {
  double all;
  MPI_Allreduce(&own, &all, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  return all;
}

double peer_max(double own) {
  double all;
  MPI_Allreduce(&own, &all, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return all;
}

void peer_stop(void) { MPI_Finalize(); }
