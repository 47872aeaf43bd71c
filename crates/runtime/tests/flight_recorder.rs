//! Traces of real calls as files, in PyTorch's schema.

use std::fs;
use std::thread;
use std::time::Duration;

use paceline_collectives::{Communicator, Config, ReduceOp};
use paceline_runtime::flight_recorder::{file_name, write};
use paceline_transport::mem;
use serde_pickle::{DeOptions, HashableValue, Value};

/// Runs `part` on two ranks and returns their dumps.
fn dumps(part: fn(&mut Communicator)) -> Vec<Value> {
    let folder = tempfile::tempdir().expect("a folder");
    thread::scope(|scope| {
        for transport in mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES) {
            scope.spawn(|| {
                let config = Config::default();
                let mut communicator = Communicator::new(Box::new(transport), config).expect("it is right");
                part(&mut communicator);
                let trace = communicator.flight_recorder().trace();
                write(folder.path(), &trace, Duration::from_secs(600)).expect("it can be written");
                communicator.leave().expect("all do");
            });
        }
    });
    let read = |rank| fs::read(folder.path().join(file_name(rank))).expect("it was written");
    let dumps = [0, 1].map(|rank| serde_pickle::value_from_slice(&read(rank), DeOptions::new()));
    assert_eq!(fs::read_dir(folder.path()).expect("it is there").count(), 2, "nothing else is left");
    dumps.into_iter().map(|dump| dump.expect("a pickle")).collect()
}

fn get<'a>(value: &'a Value, key: &str) -> &'a Value {
    let Value::Dict(dict) = value else { panic!("no dict: {value:?}") };
    dict.get(&HashableValue::String(key.to_owned())).unwrap_or_else(|| panic!("no {key} in {dict:?}"))
}

fn list(value: &Value) -> &[Value] {
    let (Value::List(list) | Value::Tuple(list)) = value else { panic!("no list: {value:?}") };
    list
}

fn texts(entries: &[Value], key: &str) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    entries.iter().map(|entry| text(get(entry, key))).collect()
}

#[test]
fn a_trace_has_what_pytorchs_analyser_asks_for() {
    let dumps = dumps(|communicator| {
        communicator.all_reduce(&mut [1.0f32; 5], ReduceOp::Sum).expect("all call it");
        communicator.barrier().expect("all call it");
    });
    for (rank, dump) in dumps.iter().enumerate() {
        assert_eq!(get(dump, "version"), &Value::String("2.10".to_owned()));
        assert_eq!(get(dump, "rank"), &Value::I64(rank as i64));
        let group = get(get(dump, "pg_config"), "0");
        assert_eq!(get(group, "ranks"), &Value::String("[0, 1]".to_owned()));
        assert_eq!(get(get(get(dump, "pg_status"), "0"), "last_completed_collective"), &Value::I64(2));
        let entries = list(get(dump, "entries"));
        assert_eq!(texts(entries, "profiling_name"), ["nccl:all_reduce", "nccl:all_reduce_barrier"]);
        assert_eq!(texts(entries, "collective_seq_id"), ["1", "2"]);
        assert_eq!(texts(entries, "state"), ["completed", "completed"]);
        let first = &entries[0];
        assert_eq!(list(&list(get(first, "input_sizes"))[0]), [Value::I64(5)]);
        assert_eq!(list(get(first, "process_group")).len(), 2);
        let time = |key| match get(first, key) {
            Value::I64(time) => *time,
            other => panic!("no time: {other:?}"),
        };
        assert!(time("time_created_ns") <= time("time_discovered_completed_ns"));
        for key in ["p2p_seq_id", "record_id", "op_id", "output_sizes", "input_dtypes", "output_dtypes"] {
            get(first, key);
        }
        assert_eq!(get(first, "is_p2p"), &Value::Bool(false));
    }
}

#[test]
fn messages_are_in_a_group_of_their_two_ranks_and_counted_there() {
    let dumps = dumps(|communicator| {
        for _ in 0..2 {
            match communicator.rank() {
                0 => communicator.send(&[1u8; 3], 1).expect("it is received"),
                _ => communicator.recv(&mut [0u8; 3], 0).expect("it is sent"),
            }
        }
    });
    let names = dumps.iter().map(|dump| texts(list(get(dump, "entries")), "profiling_name"));
    assert_eq!(names.collect::<Vec<_>>(), [["nccl:send 0->1"; 2], ["nccl:recv 1<-0"; 2]]);
    for dump in &dumps {
        let pair = get(get(dump, "pg_config"), "0 0->1");
        assert_eq!(get(pair, "ranks"), &Value::String("[0, 1]".to_owned()));
        assert_eq!(texts(list(get(dump, "entries")), "p2p_seq_id"), ["1", "2"]);
    }
}

#[test]
fn every_call_has_a_name_and_lengths_that_the_analyser_accepts() {
    let dumps = dumps(|communicator| {
        let (mut two, mut four) = ([0.0f32; 2], [0.0f32; 4]);
        communicator.reduce(&mut two, ReduceOp::Sum, 0).expect("all call it");
        communicator.reduce_scatter(&four, &mut two, ReduceOp::Sum).expect("all call it");
        communicator.all_gather(&two, &mut four).expect("all call it");
        communicator.broadcast(&mut two, 1).expect("all call it");
        communicator.gather(&two, &mut four, 0).expect("all call it");
        communicator.scatter(&four, &mut two, 0).expect("all call it");
        communicator.all_to_all(&two, &mut [0.0; 2]).expect("all call it");
        let group = communicator.split(Some(7), 0).expect("all call it").expect("a member");
        group.leave().expect("all do");
    });
    let names = texts(list(get(&dumps[0], "entries")), "profiling_name").join(" ");
    let expected = "nccl:reduce nccl:_reduce_scatter_base nccl:_all_gather_base nccl:broadcast nccl:gather \
                    nccl:scatter nccl:all_to_all nccl:_all_gather_base";
    assert_eq!(names, expected);
    let inputs = list(get(&dumps[0], "entries")).iter().map(|entry| get(entry, "input_sizes"));
    let lens: Vec<&Value> = inputs.map(|sizes| &list(&list(sizes)[0])[0]).collect();
    assert_eq!(lens, [2, 4, 2, 2, 2, 4, 2, 2].map(Value::I64).iter().collect::<Vec<_>>());
}
