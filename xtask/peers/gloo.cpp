// Gloo, as torch.distributed calls it but without Python around it: torch's own ProcessGroupGloo over 127.0.0.1, or
// between the network namespaces of PEER_HOSTS, which is FILE=ADDRESS for each rank with commas between them.
//
// `bench RANKS ROW...` starts the other ranks itself. Not through Python, because `import torch` needs 4 GB of CUDA
// libraries on a machine without a GPU, and because a call then costs Gloo what the interpreter takes.
#include "peer.h"

#include <ATen/Parallel.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/types.h>
#include <torch/version.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
std::vector<pid_t> others;
std::string store_file;
bool in_place;
at::Tensor from;
std::vector<at::Tensor> into;

// Goes to the rank's host, if there are hosts, and returns the address that the rank has. Before libtorch has started a
// thread: a thread that exists would stay behind.
std::string enter_host(int rank) {
  const char *hosts = std::getenv("PEER_HOSTS");
  if (hosts == nullptr) return "127.0.0.1";
  std::istringstream entries(hosts);
  std::string entry;
  for (int host = 0; host <= rank; host++) std::getline(entries, entry, ',');
  const size_t middle = entry.find('=');
  const int file = open(entry.substr(0, middle).c_str(), O_RDONLY | O_CLOEXEC);
  if (middle == std::string::npos || file < 0 || setns(file, CLONE_NEWNET) != 0) {
    std::fprintf(stderr, "rank %d: cannot enter the host %s\n", rank, entry.c_str());
    std::exit(2);
  }
  close(file);
  return entry.substr(middle + 1);
}

double reduce_one(double own, c10d::ReduceOp op) {
  std::vector<at::Tensor> tensors{torch::full({1}, own, torch::kFloat64)};
  c10d::AllreduceOptions options;
  options.reduceOp = op;
  group->allreduce(tensors, options)->wait();
  return tensors[0].item<double>();
}

} // namespace

// The first process becomes rank 0 and forks the others before libtorch has started a thread. They die with it.
void peer_start(int *argc, char ***argv, int *rank, int *ranks) {
  if (*argc < 2 || (*ranks = std::atoi((*argv)[1])) < 1) {
    std::fprintf(stderr, "the first argument is the number of ranks\n");
    std::exit(2);
  }
  (*argv)[1] = (*argv)[0];
  *argc -= 1;
  *argv += 1;
  const pid_t parent = getpid();
  store_file = "/tmp/paceline-peers-gloo-" + std::to_string(parent);
  std::remove(store_file.c_str());
  *rank = 0;
  for (int other = 1; other < *ranks; other++) {
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) std::_Exit(2);
      others.clear();
      *rank = other;
      break;
    }
    if (child < 0) {
      std::perror("fork");
      std::exit(2);
    }
    others.push_back(child);
  }
  const std::string address = enter_host(*rank);
  at::set_num_threads(1);
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(120));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
  auto store = c10::make_intrusive<c10d::FileStore>(store_file, *ranks);
  group = c10::make_intrusive<c10d::ProcessGroupGloo>(store, *rank, *ranks, options);
}

// Gloo reduces in place; out of place there is a copy before each call, as in a program that keeps its input.
void peer_use(float *input, float *output, size_t len) {
  const auto shape = {static_cast<int64_t>(len)};
  in_place = input == output;
  from = torch::from_blob(input, shape, torch::kFloat32);
  into = {torch::from_blob(output, shape, torch::kFloat32)};
}

void peer_all_reduce() {
  if (!in_place) into[0].copy_(from);
  group->allreduce(into)->wait();
}

void peer_barrier() { group->barrier()->wait(); }

double peer_sum(double own) { return reduce_one(own, c10d::ReduceOp::SUM); }

double peer_max(double own) { return reduce_one(own, c10d::ReduceOp::MAX); }

void peer_stop() {
  into.clear();
  group.reset();
  bool failed = false;
  for (pid_t other : others) {
    int status = 0;
    failed |= waitpid(other, &status, 0) != other || status != 0;
  }
  if (!others.empty()) std::remove(store_file.c_str());
  if (failed) std::exit(2);
}
