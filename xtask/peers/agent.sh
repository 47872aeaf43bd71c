# How mpirun starts its daemon on another host: `sh agent.sh PREFIX ADDRESS COMMAND...`, where the host is the network
# namespace in the file PREFIX and the address's last number less one. The host gets a name of its own, because OpenMPI
# takes daemons of one name for one host, and its share of the processors, as one rank per core would have it.
prefix=$1
address=$2
shift 2
host=$((${address##*.} - 1))
processor=$((host % $(nproc)))
exec nsenter "--net=$prefix$host" -- unshare --uts -- taskset --cpu-list "$processor" \
    sh -c "hostname host$host; $*"
