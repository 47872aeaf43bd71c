//! NCCL's functions and structs as C has them: the table of functions, filled when the library is loaded.
//!
//! The signatures are those of `nccl.h`, which has never changed one within major version 2. `tests/real.rs` compares
//! the structs and constants with the header of a wheel, by a C compiler.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr;

use crate::unique_id::UniqueId;
use crate::version::Version;

/// A pointer to NCCL's communicator. Null is none.
pub(crate) type RawCommunicator = *mut c_void;

/// A CUDA stream, opaque.
pub(crate) type RawStream = *mut c_void;

/// A function of NCCL that this library may or may not have.
pub(crate) struct Function<F> {
    pub name: &'static str,
    pub since: Version,
    /// `None`: this library does not export it.
    pub pointer: Option<F>,
}

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $name:literal since ($major:literal, $minor:literal, $patch:literal):
        fn($($argument:ty),*) -> $result:ty;)*) => {
        /// What the library exports of the functions that we call.
        pub(crate) struct Functions {
            $($(#[$doc])* pub $field: Function<unsafe extern "C" fn($($argument),*) -> $result>,)*
        }

        impl Functions {
            /// Looks up every function. One that is missing is noticed by whoever calls it.
            ///
            /// # Safety
            /// `library` is an NCCL of major version 2, so that the names have the signatures below, and stays loaded
            /// as long as the table is used.
            pub unsafe fn of(library: &libloading::os::unix::Library) -> Self {
                Self {
                    $($field: Function {
                        name: $name,
                        since: Version::new($major, $minor, $patch),
                        // SAFETY: the caller says that the name has this signature; the pointer is copied out of a
                        // library that, says the caller, is never unloaded before.
                        pointer: unsafe { library.get(concat!($name, "\0").as_bytes()) }
                            .ok()
                            .map(|symbol| *symbol),
                    },)*
                }
            }

            /// The names of those that are missing, with the version that brought them.
            pub fn missing(&self) -> Vec<(&'static str, Version)> {
                let mut missing = Vec::new();
                $(if self.$field.pointer.is_none() {
                    missing.push((self.$field.name, self.$field.since));
                })*
                missing
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion" since (2, 3, 0): fn(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId" since (2, 0, 0): fn(*mut UniqueId) -> c_int;
    get_error_string = "ncclGetErrorString" since (2, 0, 0): fn(c_int) -> *const c_char;
    get_last_error = "ncclGetLastError" since (2, 13, 0): fn(RawCommunicator) -> *const c_char;

    comm_init_rank_config = "ncclCommInitRankConfig" since (2, 14, 0):
        fn(*mut RawCommunicator, c_int, UniqueId, c_int, *mut Config) -> c_int;
    comm_init_rank_scalable = "ncclCommInitRankScalable" since (2, 23, 0):
        fn(*mut RawCommunicator, c_int, c_int, c_int, *mut UniqueId, *mut Config) -> c_int;
    comm_get_async_error = "ncclCommGetAsyncError" since (2, 4, 0): fn(RawCommunicator, *mut c_int) -> c_int;
    comm_finalize = "ncclCommFinalize" since (2, 14, 0): fn(RawCommunicator) -> c_int;
    comm_destroy = "ncclCommDestroy" since (2, 0, 0): fn(RawCommunicator) -> c_int;
    comm_abort = "ncclCommAbort" since (2, 4, 0): fn(RawCommunicator) -> c_int;
    comm_revoke = "ncclCommRevoke" since (2, 28, 7): fn(RawCommunicator, c_int) -> c_int;
    comm_split = "ncclCommSplit" since (2, 18, 0):
        fn(RawCommunicator, c_int, c_int, *mut RawCommunicator, *mut Config) -> c_int;
    comm_shrink = "ncclCommShrink" since (2, 27, 0):
        fn(RawCommunicator, *mut c_int, c_int, *mut RawCommunicator, *mut Config, c_int) -> c_int;
    comm_get_unique_id = "ncclCommGetUniqueId" since (2, 29, 2): fn(RawCommunicator, *mut UniqueId) -> c_int;
    comm_grow = "ncclCommGrow" since (2, 29, 2):
        fn(RawCommunicator, c_int, *const UniqueId, c_int, *mut RawCommunicator, *mut Config) -> c_int;
    comm_count = "ncclCommCount" since (2, 0, 0): fn(RawCommunicator, *mut c_int) -> c_int;
    comm_cu_device = "ncclCommCuDevice" since (2, 0, 0): fn(RawCommunicator, *mut c_int) -> c_int;
    comm_user_rank = "ncclCommUserRank" since (2, 0, 0): fn(RawCommunicator, *mut c_int) -> c_int;

    group_start = "ncclGroupStart" since (2, 0, 0): fn() -> c_int;
    group_end = "ncclGroupEnd" since (2, 0, 0): fn() -> c_int;
    all_reduce = "ncclAllReduce" since (2, 0, 0):
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, RawStream) -> c_int;
    broadcast = "ncclBroadcast" since (2, 2, 0):
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, RawStream) -> c_int;
    reduce = "ncclReduce" since (2, 0, 0):
        fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, RawCommunicator, RawStream) -> c_int;
    all_gather = "ncclAllGather" since (2, 0, 0):
        fn(*const c_void, *mut c_void, usize, c_int, RawCommunicator, RawStream) -> c_int;
    reduce_scatter = "ncclReduceScatter" since (2, 0, 0):
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, RawStream) -> c_int;
    send = "ncclSend" since (2, 7, 0):
        fn(*const c_void, usize, c_int, c_int, RawCommunicator, RawStream) -> c_int;
    recv = "ncclRecv" since (2, 7, 0):
        fn(*mut c_void, usize, c_int, c_int, RawCommunicator, RawStream) -> c_int;
}

/// `ncclConfig_t` as 2.28 has it. Older libraries ignore what is behind their own end, newer ones set what is behind
/// ours to its default, by `version` and `size`.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    n_channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

/// NCCL's mark of a configuration that has been initialised.
const MAGIC: c_uint = 0xcafe_beef;

/// "Not set": NCCL takes its default or what the environment says.
const UNSET: c_int = c_int::MIN;

/// The version whose shape [`Config`] has.
const SHAPE: Version = Version::new(2, 28, 0);

impl Config {
    /// Non-blocking, everything else NCCL's default. The version is the older one of ours and the library's: a library
    /// must not look for fields that this struct lacks.
    pub fn non_blocking(library: Version, net_name: *const c_char, max_ctas: Option<u32>) -> Self {
        let version = library.min(SHAPE).code();
        let max_ctas = max_ctas.and_then(|count| c_int::try_from(count).ok()).unwrap_or(UNSET);
        Self {
            size: size_of::<Self>(),
            magic: MAGIC,
            version,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas,
            net_name,
            split_share: UNSET,
            traffic_class: UNSET,
            comm_name: ptr::null(),
            collnet_enable: UNSET,
            cta_policy: UNSET,
            shrink_share: UNSET,
            nvls_ctas: UNSET,
            n_channels_per_net_peer: UNSET,
            nvlink_centric_sched: UNSET,
        }
    }
}

/// What `tests/real.rs` compares with the header.
pub mod layout {
    use super::{Config, MAGIC, UNSET, UniqueId};
    use crate::operation::{DataType, ReduceOp};
    use crate::result_code::ResultCode;
    use std::mem::offset_of;

    /// C expressions and what they must evaluate to. `initial` is a value that the header's own initialiser made.
    pub fn expectations() -> Vec<(String, i64)> {
        let mut all = vec![
            ("sizeof(ncclUniqueId)".to_owned(), size_of::<UniqueId>() as i64),
            ("NCCL_CONFIG_UNDEF_INT".to_owned(), i64::from(UNSET)),
            ("initial.magic".to_owned(), i64::from(MAGIC)),
            ("sizeof(((ncclConfig_t*)0)->size)".to_owned(), size_of::<usize>() as i64),
            ("offsetof(ncclConfig_t, size)".to_owned(), 0),
        ];
        macro_rules! offsets {
            ($($field:ident = $name:literal,)*) => {
                $(all.push((format!("offsetof(ncclConfig_t, {})", $name), offset_of!(Config, $field) as i64));)*
            };
        }
        offsets! {
            magic = "magic", version = "version", blocking = "blocking", cga_cluster_size = "cgaClusterSize",
            min_ctas = "minCTAs", max_ctas = "maxCTAs", net_name = "netName", split_share = "splitShare",
            traffic_class = "trafficClass", comm_name = "commName", collnet_enable = "collnetEnable",
            cta_policy = "CTAPolicy", shrink_share = "shrinkShare", nvls_ctas = "nvlsCTAs",
            n_channels_per_net_peer = "nChannelsPerNetPeer", nvlink_centric_sched = "nvlinkCentricSched",
        }
        let codes = (0..=7).map(ResultCode);
        all.extend(codes.filter_map(|code| Some((code.name()?.to_owned(), i64::from(code.0)))));
        all.extend(DataType::ALL.map(|dtype| (dtype.name().to_owned(), i64::from(dtype.code()))));
        all.extend(ReduceOp::ALL.map(|op| (op.name().to_owned(), i64::from(op.code()))));
        all
    }

    /// The size of our configuration: that of 2.28's header, and at most that of a newer one.
    pub const CONFIG_SIZE: usize = size_of::<Config>();
}
