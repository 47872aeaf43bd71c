//! Tests over the environments of real pods: what the operators of Kubeflow 1.0 and 1.9, Slurm and Kubernetes set.

use super::place::{Given, Place};
use super::{Pod, Surroundings, as_json, as_text, read};

/// The pods of tf-operator 1.0 for four workers and two parameter servers.
const MNIST: &str = r#""cluster":{"ps":["dist-mnist-for-e2e-test-ps-0.g10.svc:2222","dist-mnist-for-e2e-test-ps-1.g10.svc:2222"],"worker":["dist-mnist-for-e2e-test-worker-0.g10.svc:2222","dist-mnist-for-e2e-test-worker-1.g10.svc:2222","dist-mnist-for-e2e-test-worker-2.g10.svc:2222","dist-mnist-for-e2e-test-worker-3.g10.svc:2222"]}"#;

/// A whole cluster of the 1.9 operator.
const WHOLE: &str = r#""cluster":{"chief":["j-chief-0.ns.svc:2222"],"evaluator":["j-evaluator-0.ns.svc:2222"],"ps":["j-ps-0.ns.svc:2222"],"worker":["j-worker-0.ns.svc:2222","j-worker-1.ns.svc:2222"]}"#;

/// The /etc/hosts of a pod with a subdomain.
const HOSTS: &str = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n10.244.1.7\tweb-2.trainers.ml.svc.cluster.local\tweb-2\n";

fn tf(cluster: &str, role: &str, index: u32) -> Surroundings {
    let task = format!(r#""task":{{"type":"{role}","index":{index}}},"environment":"cloud""#);
    Surroundings::of("somewhere", &format!("TF_CONFIG={{{cluster},{task}}}"))
}

fn pod(around: &Surroundings) -> Pod {
    read(around).expect("no contradiction").expect("a pod of a job")
}

/// Kind, role with its number, number of the pod and of pods, and where launchers meet.
fn in_short(around: &Surroundings) -> String {
    let Some(pod) = read(around).expect("no contradiction") else { return "nothing".to_owned() };
    let unknown = || "?".to_owned();
    format!(
        "{}: {} {}, {}/{} at {}",
        pod.kind.value,
        pod.role.value,
        pod.role_index.value,
        pod.index.as_ref().map_or_else(unknown, |index| index.value.to_string()),
        pod.pods.as_ref().map_or_else(unknown, |pods| pods.value.to_string()),
        pod.meeting.as_ref().map_or_else(unknown, |meeting| meeting.value.to_string()),
    )
}

fn hosts_of(pod: &Pod) -> Vec<&str> {
    pod.peers.iter().map(|peer| peer.host.as_deref().unwrap_or("-")).collect()
}

#[test]
fn a_tfjob_counts_its_chief_its_workers_and_then_its_servers() {
    for (role, index, expected) in [
        ("ps", 0, "TFJob: ps 0, 4/6 at dist-mnist-for-e2e-test-worker-0.g10.svc"),
        ("ps", 1, "TFJob: ps 1, 5/6 at dist-mnist-for-e2e-test-worker-0.g10.svc"),
        ("worker", 0, "TFJob: worker 0, 0/6 at dist-mnist-for-e2e-test-worker-0.g10.svc"),
        ("worker", 3, "TFJob: worker 3, 3/6 at dist-mnist-for-e2e-test-worker-0.g10.svc"),
        ("evaluator", 0, "TFJob: evaluator 0, ?/? at ?"),
    ] {
        assert_eq!(in_short(&tf(MNIST, role, index)), expected);
    }
    for (role, index, number) in
        [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2), ("ps", 0, 3), ("evaluator", 0, 4)]
    {
        let expected = format!("TFJob: {role} {index}, {number}/5 at j-chief-0.ns.svc");
        assert_eq!(in_short(&tf(WHOLE, role, index)), expected);
    }
    let master = WHOLE.replace("chief", "master");
    assert_eq!(in_short(&tf(&master, "master", 0)), "TFJob: chief 0, 0/5 at j-master-0.ns.svc");
}

#[test]
fn every_pod_of_a_tfjob_has_the_same_list_of_peers() {
    let of_chief = pod(&tf(WHOLE, "chief", 0));
    assert_eq!(of_chief.peers, pod(&tf(WHOLE, "ps", 0)).peers);
    assert_eq!(
        hosts_of(&of_chief),
        [
            "j-chief-0.ns.svc",
            "j-worker-0.ns.svc",
            "j-worker-1.ns.svc",
            "j-ps-0.ns.svc",
            "j-evaluator-0.ns.svc"
        ]
    );
    assert!(of_chief.peers.iter().all(|peer| peer.port == Some(2222)));
}

#[test]
fn the_sparse_form_of_dynamic_workers_is_no_whole_job() {
    let servers = r#""ps":["j-ps-0.ns.svc:2222","j-ps-1.ns.svc:2222"]"#;
    for (cluster, role, index) in [
        (format!(r#""cluster":{{"worker":{{"1":"j-worker-1.ns.svc:2222"}},{servers}}}"#), "worker", 1),
        (r#""cluster":{"worker":{},"ps":["j-ps-1.ns.svc:2222"]}"#.to_owned(), "ps", 1),
        (r#""cluster":{"ps":["j-ps-1.ns.svc:2222"]}"#.to_owned(), "ps", 1),
        (r#""cluster":{"worker":{},"ps":[]}"#.to_owned(), "chief", 0),
        (r#""cluster":{}"#.to_owned(), "chief", 0),
    ] {
        let around = tf(&cluster, role, index);
        assert_eq!(in_short(&around), format!("TFJob: {role} {index}, ?/? at ?"), "{cluster}");
        let place = Place::of(&around, &Given::default()).expect("no contradiction");
        assert!(place.flags.is_empty() && place.remark.expect("it says so").contains("enableDynamicWorker"));
    }
}

/// The variables of pytorch-operator 1.0: the master is told localhost.
const V1_MASTER: &str = "MASTER_PORT=23456\nMASTER_ADDR=localhost\nWORLD_SIZE=4\nRANK=0\nPYTHONUNBUFFERED=0";
const V1_WORKER: &str = "MASTER_PORT=23456\nMASTER_ADDR=pytorch-dist-basic-sendrecv-master-0\nWORLD_SIZE=4\nRANK=2\nPYTHONUNBUFFERED=0";

/// Of training-operator 1.9: a master and two workers of two processes each.
const V19_WORKER: &str = "PYTHONUNBUFFERED=1\nMASTER_PORT=23456\nPET_MASTER_PORT=23456\nMASTER_ADDR=j-master-0\n\
    PET_MASTER_ADDR=j-master-0\nWORLD_SIZE=6\nRANK=2\nPET_NODE_RANK=2\nPET_NPROC_PER_NODE=2\nPET_NNODES=3";

const ELASTIC: &str = "PYTHONUNBUFFERED=1\nPET_RDZV_ENDPOINT=e-worker-0:23456\nPET_RDZV_BACKEND=c10d\nPET_NNODES=1:3\n\
    PET_MAX_RESTARTS=100\nPET_NPROC_PER_NODE=auto";

const TRAIN_JOB: &str = "PET_NNODES=4\nPET_NPROC_PER_NODE=auto\nPET_NODE_RANK=3\nPET_MASTER_ADDR=t-node-0-0.t\n\
    PET_MASTER_PORT=29500\nJOB_COMPLETION_INDEX=3";

#[test]
fn a_pytorchjob_counts_pods_and_finds_its_master() {
    for (hostname, variables, expected) in [
        (
            "pytorch-dist-basic-sendrecv-master-0",
            V1_MASTER,
            "PyTorchJob: master 0, 0/4 at pytorch-dist-basic-sendrecv-master-0",
        ),
        (
            "pytorch-dist-basic-sendrecv-worker-1",
            V1_WORKER,
            "PyTorchJob: worker 1, 2/4 at pytorch-dist-basic-sendrecv-master-0",
        ),
        ("j-worker-1", V19_WORKER, "PyTorchJob: worker 1, 2/3 at j-master-0"),
        ("e-worker-2", ELASTIC, "PyTorchJob: worker 2, 2/1:3 at e-worker-0:23456"),
        ("w-worker-1", "PET_NNODES=2\nPET_NPROC_PER_NODE=auto", "PyTorchJob: worker 1, 1/2 at w-worker-0"),
        ("t-node-0-3", TRAIN_JOB, "TrainJob: node 3, 3/4 at t-node-0-0.t"),
        (
            "h",
            "MASTER_ADDR=10.0.0.1\nMASTER_PORT=1\nRANK=1\nWORLD_SIZE=2",
            "PyTorchJob: worker 0, 1/2 at 10.0.0.1",
        ),
        ("h", "MASTER_ADDR=m\nRANK=1\nWORLD_SIZE=8\nPET_NPROC_PER_NODE=4", "PyTorchJob: worker 0, 1/2 at m"),
        // The processes of a job have these variables too.
        ("h", "MASTER_ADDR=m\nRANK=1\nWORLD_SIZE=8\nLOCAL_RANK=1", "nothing"),
        ("h", "MASTER_ADDR=m", "nothing"),
        ("laptop", "", "nothing"),
        ("laptop-3", "PET_NNODES=2", "nothing"),
    ] {
        assert_eq!(in_short(&Surroundings::of(hostname, variables)), expected, "{variables}");
    }
}

#[test]
fn the_names_of_other_pods_follow_from_the_masters() {
    let hosts =
        |hostname: &str, variables: &str| hosts_of(&pod(&Surroundings::of(hostname, variables))).join(" ");
    assert_eq!(hosts("j-worker-1", V19_WORKER), "j-master-0 j-worker-0 j-worker-1");
    assert_eq!(hosts("e-worker-2", ELASTIC), "e-worker-0 e-worker-1 e-worker-2");
    assert_eq!(hosts("t-node-0-3", TRAIN_JOB), "t-node-0-0.t t-node-0-1.t t-node-0-2.t t-node-0-3.t");
    assert_eq!(
        hosts("p-master-0", V1_MASTER),
        "- - - -",
        "the 1.0 operator makes a service for the master alone"
    );
}

#[test]
fn pods_that_no_operator_has_made_are_told_by_index_name_and_service() {
    let hosts = "10.0.0.4 train-1.trainers.ml.svc.cluster.local train-1";
    let job = |variables: &str| Surroundings::of("train-1", variables).with_hosts(hosts);
    assert_eq!(
        in_short(&job("JOB_COMPLETION_INDEX=1\nPET_NNODES=3")),
        "indexed Job: node 1, 1/3 at train-0.trainers.ml.svc.cluster.local"
    );
    let web = Surroundings::of("web-2", "").with_hosts(HOSTS);
    assert_eq!(in_short(&web), "StatefulSet: node 2, 2/? at web-0.trainers.ml.svc.cluster.local");
    let of_three = web.clone().with_nnodes(Some(3));
    assert_eq!(in_short(&of_three), "StatefulSet: node 2, 2/3 at web-0.trainers.ml.svc.cluster.local");
    assert_eq!(hosts_of(&pod(&of_three)).last(), Some(&"web-2.trainers.ml.svc.cluster.local"));
    let place = Place::of(&web, &Given::default()).expect("no contradiction");
    assert!(place.flags.is_empty() && place.remark.expect("it says so").contains("--nnodes N"));
    let unserved = Surroundings::of("train-1", "JOB_COMPLETION_INDEX=1\nPET_NNODES=3");
    let error = Place::of(&unserved, &Given::default()).expect_err("nobody finds pod 0");
    assert!(error.contains("headless service") && error.contains("--rdzv-endpoint"), "{error}");
}

/// What srun sets on the second of three nodes.
const SLURM: &str = "SLURM_JOB_ID=77\nSLURM_STEP_ID=0\nSLURM_STEP_NUM_NODES=3\nSLURM_NNODES=3\nSLURM_STEP_NUM_TASKS=3\n\
    SLURM_NODEID=1\nSLURM_PROCID=1\nSLURM_STEP_NODELIST=gpu[07-08],big1\nSLURMD_NODENAME=gpu08";

#[test]
fn a_step_of_slurm_on_several_nodes_is_a_job_of_them() {
    assert_eq!(in_short(&Surroundings::of("gpu08", SLURM)), "Slurm step: node 1, 1/3 at gpu07");
    assert_eq!(hosts_of(&pod(&Surroundings::of("gpu08", SLURM))), ["gpu07", "gpu08", "big1"]);
    let batch = SLURM.replace("SLURM_STEP_ID=0\n", "");
    assert_eq!(in_short(&Surroundings::of("gpu07", &batch)), "nothing", "a batch script runs on one node");
    let single = SLURM.replace("NODES=3", "NODES=1").replace("NNODES=3", "NNODES=1");
    assert_eq!(in_short(&Surroundings::of("gpu07", &single)), "nothing");
}

#[test]
fn each_contradiction_is_one_line_that_names_both_sides() {
    let whole = |task: &str| format!("TF_CONFIG={{{WHOLE},{task}}}");
    let cluster =
        |cluster: &str| format!(r#"TF_CONFIG={{"cluster":{cluster},"task":{{"type":"worker","index":0}}}}"#);
    for (hostname, variables, expected) in [
        ("h", "TF_CONFIG={".to_owned(), "TF_CONFIG cannot be read"),
        ("h", format!("TF_CONFIG={{{WHOLE}}}"), "has no `task`"),
        (
            "h",
            whole(r#""task":{"type":"worker","index":2}"#),
            "this pod is worker 2, but its cluster has worker 0 to 1",
        ),
        ("h", whole(r#""task":{"type":"worker","index":-1}"#), "task index -1, which is no number"),
        ("h", whole(r#""task":{"type":"boss","index":0}"#), "the role `boss`"),
        ("h", cluster(r#"{"ps":["a:1","b:1"]}"#), "this pod is worker 0, but its cluster has no worker"),
        ("h", cluster(r#"{"worker":["a:1","a:1"]}"#), "one address, a, for worker 0 and for worker 1"),
        ("h", cluster(r#"{"worker":["a"]}"#), "`a` for worker 0; give host:port"),
        ("h", cluster(r#"{"worker":["a:1",7]}"#), "has 7 as an address of worker"),
        ("h", cluster(r#"{"worker":"a:1"}"#), "no list of addresses for worker"),
        ("h", cluster(r#"{"worker":{"3":"a:1"}}"#), "this pod is worker 0, but its cluster has worker 3"),
        ("h", cluster(r#"{"chief":["a:1"],"master":["b:1"],"worker":["c:1"]}"#), "a chief and a master"),
        ("h", cluster(r#"{"chief":["a:1","b:1"],"worker":["c:1"]}"#), "2 chiefs"),
        (
            "h",
            "MASTER_ADDR=m\nRANK=4\nWORLD_SIZE=4".to_owned(),
            "RANK is 4, but there are 4 pods by WORLD_SIZE",
        ),
        ("h", "MASTER_ADDR=m\nRANK=x\nWORLD_SIZE=4".to_owned(), "RANK is `x`"),
        ("h", "MASTER_ADDR=m\nRANK=1".to_owned(), "nothing says how many pods"),
        ("h", "MASTER_ADDR=m\nRANK=1\nWORLD_SIZE=7\nPET_NPROC_PER_NODE=2".to_owned(), "no multiple of the 2"),
        (
            "h",
            V19_WORKER.replace("WORLD_SIZE=6", "WORLD_SIZE=5"),
            "neither the 3 pods of PET_NNODES nor 2 processes",
        ),
        ("h", V19_WORKER.replace("PET_NODE_RANK=2", "PET_NODE_RANK=1"), "PET_NODE_RANK is 1, but RANK is 2"),
        (
            "h",
            V19_WORKER.replace("PET_MASTER_ADDR=j", "PET_MASTER_ADDR=k"),
            "is k-master-0, but MASTER_ADDR is j-master-0",
        ),
        ("e-worker-3", ELASTIC.to_owned(), "called e-worker-3, but there are 3 by PET_NNODES"),
        ("e-worker-0", ELASTIC.replace("1:3", "3:1"), "PET_NNODES is `3:1`"),
        ("t", TRAIN_JOB.replace("INDEX=3", "INDEX=2"), "PET_NODE_RANK is 3, but JOB_COMPLETION_INDEX is 2"),
        (
            "j-5",
            "JOB_COMPLETION_INDEX=5\nPET_NNODES=5".to_owned(),
            "pod 5 by JOB_COMPLETION_INDEX, but there are 5",
        ),
        ("h", SLURM.replace("TASKS=3", "TASKS=6"), "6 launchers (SLURM_STEP_NUM_TASKS) on 3 nodes"),
        (
            "h",
            SLURM.replace("NODEID=1", "NODEID=2"),
            "which is big1 in SLURM_STEP_NODELIST, but SLURMD_NODENAME is gpu08",
        ),
        ("h", SLURM.replace("[07-08]", "[07-09]"), "has 4 nodes, but SLURM_STEP_NUM_NODES is 3"),
    ] {
        let error = read(&Surroundings::of(hostname, &variables)).expect_err(&variables);
        assert!(error.contains(expected) && !error.contains('\n'), "{variables}: {error}");
    }
    let local = Surroundings::of("h", "MASTER_ADDR=localhost\nRANK=1\nWORLD_SIZE=2");
    assert!(pod(&local).remarks[0].contains("both are on one machine"), "it may be meant");
    let renamed = Surroundings::of("web-2", "JOB_COMPLETION_INDEX=1").with_hosts(HOSTS);
    assert!(read(&renamed).expect_err("two numbers").contains("INDEX is 1, but this pod is called web-2"));
}

#[test]
fn run_gets_the_flags_that_a_person_would_have_given() {
    let flags = |around: &Surroundings, given: &Given| {
        Place::of(around, given).expect("no contradiction").flags.join(" ")
    };
    let worker = Surroundings::of("j-worker-1", V19_WORKER);
    let all = "--nproc-per-node=2 --nnodes=3 --node-rank=2 --rdzv-endpoint=j-master-0 --master-port=23456";
    assert_eq!(flags(&worker, &Given::default()), all);
    let some = Given { node_rank: Some(()), nproc_per_node: Some(()), ..Given::default() };
    assert_eq!(flags(&worker, &some), "--nnodes=3 --rdzv-endpoint=j-master-0 --master-port=23456");
    for alone in [
        Given { nnodes: Some("1".to_owned()), ..Given::default() },
        Given { standalone: Some(()), ..Given::default() },
    ] {
        assert_eq!(flags(&worker, &alone), "");
    }
    assert_eq!(flags(&Surroundings::of("laptop", ""), &Given::default()), "");
    let port = "MASTER_ADDR=m\nMASTER_PORT=23456\nRANK=1\nWORLD_SIZE=2";
    let port = flags(&Surroundings::of("h", port), &Given::default());
    assert_eq!(port, "--nnodes=2 --node-rank=1 --rdzv-endpoint=m --master-port=23456");
    let single = Surroundings::of("h", "MASTER_ADDR=localhost\nRANK=0\nWORLD_SIZE=1");
    assert_eq!(flags(&single, &Given::default()), "", "a job of one pod meets nobody");
}

#[test]
fn variables_of_torchrun_count_above_a_pod_that_is_known_by_others() {
    let place = |variables: &str| {
        let config = format!(r#"{{{WHOLE},"task":{{"type":"worker","index":0}}}}"#);
        let around = Surroundings::of("h", &format!("TF_CONFIG={config}\n{variables}"));
        let place = Place::of(&around, &Given::default()).expect("no contradiction");
        let remark = super::overruling(&pod(&around), &around).unwrap_or_default();
        (place.flags.join(" "), place.wanted.len(), remark)
    };
    let (flags, wanted, remark) = place("PET_LOG_DIR=logs");
    assert_eq!(flags, "--nnodes=5 --node-rank=1 --rdzv-endpoint=j-chief-0.ns.svc");
    assert_eq!((wanted, remark.as_str()), (5, ""));
    let (flags, wanted, remark) = place("PET_NODE_RANK=0\nPET_MASTER_ADDR=m");
    assert_eq!((flags.as_str(), wanted), ("--nnodes=5", 0), "they are other machines");
    let expected =
        "PET_NODE_RANK, PET_MASTER_ADDR are also set, and paceline run takes what they say before TF_CONFIG";
    assert_eq!(remark, expected);
    let (flags, _, remark) = place("PET_STANDALONE=1");
    assert!(flags.is_empty() && remark.contains("PET_STANDALONE is set"), "{flags} {remark}");
    assert_eq!(place("PET_NNODES=1").0, "");
    assert_eq!(place("PET_STANDALONE=0").1, 5);
}

#[test]
fn programs_are_told_their_role_and_how_many_have_which() {
    let place = Place::of(&tf(WHOLE, "ps", 0), &Given::default()).expect("no contradiction");
    let told = place.variables.iter().map(|(name, value)| format!("{name}={value}"));
    assert_eq!(
        told.collect::<Vec<_>>(),
        ["PACELINE_ROLE=ps", "PACELINE_ROLE_INDEX=0", "PACELINE_ROLES=chief:1,worker:2,ps:1,evaluator:1"]
    );
}

#[test]
fn what_was_understood_is_shown_with_its_source() {
    let pod = pod(&Surroundings::of("j-worker-1", V19_WORKER));
    let expected = "\
kind        PyTorchJob                          from PET_MASTER_ADDR
role        worker                              from PET_NODE_RANK
role index  1                                   from PET_NODE_RANK
pod         2                                   from PET_NODE_RANK
pods        3                                   from PET_NNODES
meet at     j-master-0                          from PET_MASTER_ADDR
ranks each  2                                   from PET_NPROC_PER_NODE
  0   master 0      j-master-0
  1   worker 0      j-worker-0
  2   worker 1      j-worker-1 (this pod)
";
    assert_eq!(as_text(Some(&pod)), expected);
    let document = as_json(Some(&pod));
    assert_eq!(document["pods"], serde_json::json!({ "value": "3", "from": "PET_NNODES" }));
    assert_eq!(document["peers"][2]["host"], "j-worker-1");
    assert!(as_text(None).starts_with("no job: "));
}
