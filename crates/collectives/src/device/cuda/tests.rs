//! The production code on a test double of CUDA's driver, in C. What this proves: which functions are called with what,
//! that a context is current in each call and not after it, that copies go where they should, and that what the driver
//! lacks or says ends in one line. What it does not: anything about a GPU, or about what is asynchronous.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use paceline_transport::mem;

use super::Cuda;
use crate::communicator::{Communicator, Config};
use crate::device::{Accelerator, Device, DeviceBuffer, Fallback, FallbackConfig, Pinned};
use crate::dtype::{DType, ReduceOp};

/// A compiled double, in a folder that goes when it is dropped.
struct Double {
    folder: PathBuf,
}

impl Double {
    fn new(settings: &[&str]) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("paceline-cuda-double-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the double");
        let double = Self { folder };
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-w", "-o"]).arg(double.library());
        compiler.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/device/cuda/driver.c")).args(settings);
        let output = compiler.output().expect("a C compiler named cc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        double
    }

    fn library(&self) -> PathBuf {
        self.folder.join("libcuda.so.1")
    }

    fn open(&self) -> Cuda {
        Cuda::with_driver(&self.library(), 0).expect("the double has everything")
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Elements of a vector as the double's device memory; they must not be looked at before the collective has returned.
fn on_device(elements: &mut [f32]) -> DeviceBuffer {
    DeviceBuffer::checked(elements.as_mut_ptr() as u64, elements.len(), DType::F32)
}

#[test]
fn collectives_go_through_the_drivers_copies() {
    let double = Double::new(&["-DPOLLS=2"]);
    let cuda = double.open();
    assert_eq!((cuda.name(), cuda.driver_version()), ("A double", Ok(12080)));
    thread::scope(|scope| {
        for transport in mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES) {
            let cuda = cuda.clone();
            scope.spawn(move || {
                let communicator =
                    Communicator::new(Box::new(transport), Config::default()).expect("it is right");
                let rank = communicator.rank() as f32;
                let stream = cuda.new_stream().expect("it has streams");
                let config = FallbackConfig { buffer_bytes: 256, buffers: 2 };
                let mut fallback = Fallback::new(communicator, Box::new(cuda), config).expect("it is right");
                let mut sum: Vec<f32> = (0..1000u16).map(|number| f32::from(number) + rank).collect();
                let buffer = on_device(&mut sum);
                fallback.all_reduce(buffer, buffer, ReduceOp::Sum, stream).expect("all call it");
                assert!(sum.iter().zip(0u16..).all(|(sum, number)| *sum == 2.0 * f32::from(number) + 1.0));
                let (mut own, mut all) = (vec![rank; 300], vec![9.0; 600]);
                fallback.all_gather(on_device(&mut own), on_device(&mut all), stream).expect("all call it");
                assert_eq!(all, [vec![0.0; 300], vec![1.0; 300]].concat());
                fallback.into_communicator().leave().expect("all do");
            });
        }
    });
}

#[test]
fn a_stream_is_held_by_the_kernel_which_is_loaded_once() {
    let double = Double::new(&["-DHELD=3000"]);
    let accelerator = Accelerator::Cuda(double.open());
    let stream = accelerator.new_stream().expect("it has streams");
    for _ in 0..2 {
        accelerator.hold(stream, Duration::from_micros(3)).expect("it has the kernel");
    }
    let failing = Double::new(&["-DFAIL=\"cuModuleLoadData\"", "-DCODE=719"]);
    let error = failing.open().hold(stream, Duration::ZERO).expect_err("it fails").to_string();
    assert_eq!(error, "cuModuleLoadData: CUDA_ERROR_LAUNCH_FAILED (719)");
}

#[test]
fn what_the_driver_lacks_or_says_is_one_line() {
    let double = Double::new(&["-DWITHOUT_EVENTS"]);
    let error = Cuda::with_driver(&double.library(), 0).expect_err("it lacks one").to_string();
    assert!(error.ends_with("is no driver of CUDA: it has no cuEventQuery"), "{error}");

    let double = Double::new(&["-DFAIL=\"cuInit\"", "-DCODE=719"]);
    let error = Cuda::with_driver(&double.library(), 0).expect_err("it fails").to_string();
    assert_eq!(error, "cuInit: CUDA_ERROR_LAUNCH_FAILED (719)");

    let double = Double::new(&["-DFAIL=\"cuMemHostAlloc\"", "-DCODE=987"]);
    let error = double.open().alloc_pinned(1).map(drop).expect_err("it fails").to_string();
    assert_eq!(error, "cuMemHostAlloc: an unknown code (987)");

    let double = Double::new(&[]);
    let error = Cuda::with_driver(&double.library(), 2).expect_err("it has two").to_string();
    assert_eq!(error, "choosing a GPU: there is no GPU 2; this process sees 2");
}

#[test]
fn without_a_driver_there_is_an_error_and_no_panic() {
    match Cuda::new(usize::MAX) {
        Err(error) => assert!(
            error.call == "loading CUDA's driver" || error.call == "choosing a GPU" || error.call == "cuInit",
            "{error}"
        ),
        Ok(cuda) => panic!("there are not so many GPUs: {cuda:?}"),
    }
    let error =
        Cuda::with_driver("/nonexistent/libcuda.so.1".as_ref(), 0).expect_err("there is no such file");
    assert!(error.to_string().contains("/nonexistent/libcuda.so.1"), "{error}");
}

/// Pinned memory that says when it is freed.
struct Noted {
    memory: Box<dyn Pinned>,
    freed: Arc<AtomicBool>,
}

impl Pinned for Noted {
    fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut()
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.freed.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_dropped_transfer_keeps_its_buffer_until_it_is_done_and_no_longer() {
    let double = Double::new(&["-DPOLLS=3"]);
    let cuda = double.open();
    let stream = cuda.new_stream().expect("it has streams");
    let (freed, memory) = (Arc::<AtomicBool>::default(), cuda.alloc_pinned(64).expect("it has memory"));
    let buffer = Noted { memory, freed: freed.clone() };
    let mut transfer = cuda.copy_to_host(Vec::new(), Box::new(buffer), stream).expect("it can");
    assert_eq!(transfer.is_done(), Ok(false), "the first time that it is asked");
    drop(transfer);
    let is_free = || freed.load(Ordering::Relaxed);
    assert!(!is_free(), "the second time");
    drop(cuda.alloc_pinned(64));
    assert!(!is_free(), "the third time");
    drop(cuda.alloc_pinned(64));
    assert!(is_free(), "it is done");
}

#[test]
fn memory_of_a_device_has_what_was_written_and_copied() {
    let double = Double::new(&[]);
    let (accelerator, why) = Accelerator::find(3, Some(&double.library()));
    assert_eq!((accelerator.name(), why), ("A double", None));
    let stream = accelerator.new_stream().expect("it has streams");
    let alloc = || accelerator.alloc(3, DType::I32).expect("it has memory");
    let (mut from, mut to) = (alloc(), alloc());
    from.write(bytemuck::cast_slice(&[1, 2, 3])).expect("it fits");
    to.copy_from(&from, stream).expect("it can");
    accelerator.synchronize(stream).expect("it can");
    let mut found = [0; 3];
    to.read(bytemuck::cast_slice_mut(&mut found)).expect("it can");
    assert_eq!(found, [1, 2, 3]);
}
