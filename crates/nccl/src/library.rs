//! The loaded library, and every call into it.
//!
//! Why this is sound. The table of [`Functions`] is filled only from a library that told a version of major 2 through
//! `ncclGetVersion`, and the library is never unloaded: NCCL has threads of its own. A [`Handle`] is made only by the
//! functions here that create communicators, is neither `Clone` nor `Copy`, and is consumed by what frees it, so it is
//! alive whenever it is passed. It is `Send` and not `Sync`: one thread at a time is inside NCCL with it. Pointers to
//! device memory come from [`Region`] and [`Stream`](crate::Stream), whose makers have promised what NCCL needs; the
//! lengths are checked in `operation.rs`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix;

use crate::error::{Attempt, Error};
use crate::ffi::{Config, Function, Functions, RawCommunicator};
use crate::operation::{Operation, Region, Stream};
use crate::result_code::ResultCode;
use crate::search::{SONAME, Search};
use crate::unique_id::UniqueId;
use crate::version::Version;

/// `RTLD_NOLOAD` of glibc and musl: only what is loaded already.
const NO_LOAD: c_int = 4;

/// `NCCL_SPLIT_NOCOLOR`: a rank that is in no part.
const NO_COLOR: c_int = -1;

/// From where the library came.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// It was in this process already, most likely torch's.
    Loaded,
    /// From a file.
    File(PathBuf),
    /// The dynamic linker found it by this name.
    System(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loaded => write!(f, "the {SONAME} that this process has already loaded"),
            Self::File(path) => path.display().fmt(f),
            Self::System(name) => write!(f, "{name} of the system"),
        }
    }
}

/// NCCL, loaded into this process. It stays there until the process ends.
pub struct Library {
    functions: Functions,
    version: Version,
    origin: Origin,
    /// Its functions are in use as long as the process lives.
    _library: ManuallyDrop<unix::Library>,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("version", &self.version).field("origin", &self.origin).finish()
    }
}

impl Library {
    /// Looks for NCCL and loads it; reads files, waits for nobody. Loading 200 MB takes some 100 ms when they are not in
    /// memory yet.
    ///
    /// # Errors
    /// [`Error::NotFound`] names every place; [`Error::Unusable`] if the copy that the process has, or the one that was
    /// asked for by path, is not an NCCL of major version 2 from [`Version::OLDEST`] on. Files and names of the search
    /// that cannot be used are passed over, and named if nothing else is found.
    pub fn open(search: &Search) -> Result<Arc<Self>, Error> {
        if search.loaded
            && let Ok(library) = load(Path::new(SONAME), NO_LOAD | unix::RTLD_NOW)
        {
            return Self::of(library, Origin::Loaded);
        }
        if let Some(path) = &search.path {
            let file = if path.is_dir() { path.join(SONAME) } else { path.clone() };
            // A name without a slash would be searched for elsewhere.
            let file = std::path::absolute(&file).unwrap_or(file);
            let library = load(&file, unix::RTLD_NOW | unix::RTLD_LOCAL)
                .map_err(|reason| Error::Unusable { origin: file.display().to_string(), reason })?;
            return Self::of(library, Origin::File(file));
        }
        let mut tried = Vec::new();
        let files = search.files.iter().map(|file| Origin::File(file.clone()));
        for origin in files.chain(search.names.iter().map(|name| Origin::System(name))) {
            let place = match &origin {
                Origin::File(file) => file.clone(),
                Origin::System(name) => PathBuf::from(name),
                Origin::Loaded => PathBuf::from(SONAME),
            };
            if place.is_absolute() && !place.exists() {
                tried.push(Attempt { place, reason: "no such file".to_owned() });
                continue;
            }
            let opened = load(&place, unix::RTLD_NOW | unix::RTLD_LOCAL)
                .and_then(|library| Self::of(library, origin).map_err(|error| error.to_string()));
            match opened {
                Ok(library) => return Ok(library),
                Err(reason) => tried.push(Attempt { place, reason }),
            }
        }
        Err(Error::NotFound { tried })
    }

    fn of(library: unix::Library, origin: Origin) -> Result<Arc<Self>, Error> {
        // Whatever it is, it may have threads by now: it is not unloaded, not even when it is of no use.
        let library = ManuallyDrop::new(library);
        let unusable = |reason: String| Error::Unusable { origin: origin.to_string(), reason };
        // SAFETY: a library that exports this name is NCCL, whose ncclGetVersion has had this signature since 2.3. The
        // library is never unloaded.
        let get_version =
            unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion\0") };
        let get_version =
            get_version.map_err(|_| unusable("it has no ncclGetVersion: not NCCL".to_owned()))?;
        let mut code = 0;
        // SAFETY: the pointer is to an integer that lives through the call.
        let result = ResultCode(unsafe { get_version(&raw mut code) });
        let version = Version::from_code(code).filter(|_| result == ResultCode::SUCCESS);
        let version = version.ok_or_else(|| unusable(format!("ncclGetVersion told {code} with {result}")))?;
        let oldest = Version::OLDEST;
        if version.major != oldest.major || version < oldest {
            let reason =
                format!("it is NCCL {version}; Paceline needs {oldest} or later, of major version 2");
            return Err(unusable(reason));
        }
        // SAFETY: it is NCCL of major version 2, and never unloaded.
        let functions = unsafe { Functions::of(&library) };
        tracing::info!(%version, %origin, "loaded NCCL");
        Ok(Arc::new(Self { functions, version, origin, _library: library }))
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// From where it came.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The functions that this crate can call and this NCCL does not have, with the version that brought them.
    pub fn missing(&self) -> Vec<(&'static str, Version)> {
        self.functions.missing()
    }

    /// `ncclGetUniqueId`: an id for a new communicator. Opens a socket that listens for the other ranks; needs no GPU.
    /// Called by one rank, which brings it to the others.
    ///
    /// # Errors
    /// [`Error::Failed`] with NCCL's words: no network interface that NCCL can use, for one.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let function = &self.functions.get_unique_id;
        let get = self.require(function)?;
        let mut id = UniqueId::zeroed();
        // SAFETY: the pointer is to 128 bytes that live through the call.
        self.succeed(function.name, unsafe { get(&raw mut id) })?;
        Ok(id)
    }

    /// The pointer, or an error that says what this NCCL lacks.
    fn require<F: Copy>(&self, function: &Function<F>) -> Result<F, Error> {
        function.pointer.ok_or_else(|| Error::Missing {
            function: function.name,
            since: function.since,
            have: self.version,
            origin: self.origin.to_string(),
        })
    }

    fn succeed(&self, function: &'static str, code: c_int) -> Result<(), Error> {
        match ResultCode(code) {
            ResultCode::SUCCESS => Ok(()),
            code => Err(self.failure(function, code, None)),
        }
    }

    /// Like [`Self::succeed`], for functions of a communicator that may go on in the background.
    fn begin(&self, function: &'static str, code: c_int, handle: Option<&Handle>) -> Result<Progress, Error> {
        match ResultCode(code) {
            ResultCode::SUCCESS => Ok(Progress::Done),
            ResultCode::IN_PROGRESS => Ok(Progress::Pending),
            code => Err(self.failure(function, code, handle)),
        }
    }

    /// The error of a code, with NCCL's words.
    pub(crate) fn failure(&self, function: &'static str, code: ResultCode, handle: Option<&Handle>) -> Error {
        // SAFETY: any integer may be asked about; the answer is a constant of NCCL's or null.
        let words = self.functions.get_error_string.pointer.map(|get| unsafe { text_at(get(code.0)) });
        let handle = handle.map_or(ptr::null_mut(), Handle::raw);
        // SAFETY: the handle is alive or null, which means the process's last error. The answer points into a buffer of
        // NCCL's that another thread's error may overwrite, never free: at worst the words are mixed, and a terminating
        // zero stays at its end. They are copied at once.
        let last = self.functions.get_last_error.pointer.map(|get| unsafe { text_at(get(handle)) });
        Error::Failed { function, code, words: words.unwrap_or_default(), last: last.unwrap_or_default() }
    }

    /// `ncclCommInitRankConfig`, or `ncclCommInitRankScalable` where there are several ids.
    pub(crate) fn init(
        &self,
        rank: c_int,
        world_size: c_int,
        ids: &[UniqueId],
        settings: &Settings,
    ) -> Result<Created, Error> {
        let mut config = settings.config(self.version);
        let slot = Slot::new();
        let (name, code) = match ids {
            [] => {
                let reason = "no unique id was given".to_owned();
                return Err(Error::Usage { operation: "Communicator::new", reason });
            }
            [id] => {
                let function = &self.functions.comm_init_rank_config;
                let init = self.require(function)?;
                // SAFETY: all pointers are to values that live through the call; the configuration's name lives as long
                // as the settings, which the communicator's thread keeps.
                let code = unsafe { init(slot.out(), world_size, *id, rank, &raw mut config) };
                (function.name, code)
            }
            ids => {
                let function = &self.functions.comm_init_rank_scalable;
                let init = self.require(function)?;
                let mut ids = ids.to_vec();
                let count = c_int::try_from(ids.len()).unwrap_or(c_int::MAX);
                // SAFETY: as above; `ids` has at least `count` elements.
                let code =
                    unsafe { init(slot.out(), world_size, rank, count, ids.as_mut_ptr(), &raw mut config) };
                (function.name, code)
            }
        };
        self.created(name, code, slot, None)
    }

    /// `ncclCommSplit`. `None` as color: this rank is in no part, and nothing is created for it.
    pub(crate) fn split(&self, parent: &Handle, color: Option<c_int>, key: c_int) -> Result<Created, Error> {
        let function = &self.functions.comm_split;
        let split = self.require(function)?;
        let slot = Slot::new();
        // SAFETY: the parent is alive; without a configuration the child has the parent's.
        let code =
            unsafe { split(parent.raw(), color.unwrap_or(NO_COLOR), key, slot.out(), ptr::null_mut()) };
        self.created(function.name, code, slot, Some(parent))
    }

    /// `ncclCommShrink`; `flags` are NCCL's.
    pub(crate) fn shrink(&self, parent: &Handle, excluded: &[c_int], flags: c_int) -> Result<Created, Error> {
        let function = &self.functions.comm_shrink;
        let shrink = self.require(function)?;
        let mut excluded = excluded.to_vec();
        let count = c_int::try_from(excluded.len()).unwrap_or(c_int::MAX);
        let slot = Slot::new();
        // SAFETY: the parent is alive; `excluded` has at least `count` elements, and NCCL copies them.
        let code =
            unsafe { shrink(parent.raw(), excluded.as_mut_ptr(), count, slot.out(), ptr::null_mut(), flags) };
        self.created(function.name, code, slot, Some(parent))
    }

    /// `ncclCommGrow`: as a member (`parent`; with the id on the rank that made it), or as a newcomer (`rank`, no parent).
    pub(crate) fn grow(
        &self,
        parent: Option<&Handle>,
        world_size: c_int,
        id: Option<&UniqueId>,
        rank: Option<c_int>,
        settings: &Settings,
    ) -> Result<Created, Error> {
        let function = &self.functions.comm_grow;
        let grow = self.require(function)?;
        let mut config = settings.config(self.version);
        let old = parent.map_or(ptr::null_mut(), Handle::raw);
        let id = id.map_or(ptr::null(), ptr::from_ref);
        let slot = Slot::new();
        // SAFETY: the parent is alive or null; the other pointers are null or to values that live through the call.
        let code = unsafe { grow(old, world_size, id, rank.unwrap_or(-1), slot.out(), &raw mut config) };
        self.created(function.name, code, slot, parent)
    }

    /// `ncclCommGetUniqueId`: the id by which newcomers join this communicator.
    pub(crate) fn growth_id(&self, handle: &Handle) -> Result<UniqueId, Error> {
        let function = &self.functions.comm_get_unique_id;
        let get = self.require(function)?;
        let mut id = UniqueId::zeroed();
        // SAFETY: the handle is alive, the pointer is to 128 bytes that live through the call.
        self.succeed(function.name, unsafe { get(handle.raw(), &raw mut id) })?;
        Ok(id)
    }

    fn created(
        &self,
        function: &'static str,
        code: c_int,
        slot: Slot,
        parent: Option<&Handle>,
    ) -> Result<Created, Error> {
        let progress = self.begin(function, code, parent)?;
        Ok(Created { function, slot, progress })
    }

    /// `ncclCommGetAsyncError`: how the communicator is.
    pub(crate) fn state(&self, handle: &Handle) -> Result<ResultCode, Error> {
        let function = &self.functions.comm_get_async_error;
        let get = self.require(function)?;
        let mut state = ResultCode::INTERNAL_ERROR.0;
        // SAFETY: the handle is alive, the pointer is to an integer that lives through the call.
        self.succeed(function.name, unsafe { get(handle.raw(), &raw mut state) })?;
        Ok(ResultCode(state))
    }

    /// `ncclCommFinalize`.
    pub(crate) fn finalize(&self, handle: &Handle) -> Result<Progress, Error> {
        let function = &self.functions.comm_finalize;
        let finalize = self.require(function)?;
        // SAFETY: the handle is alive.
        self.begin(function.name, unsafe { finalize(handle.raw()) }, Some(handle))
    }

    /// `ncclCommRevoke`.
    pub(crate) fn revoke(&self, handle: &Handle) -> Result<Progress, Error> {
        let function = &self.functions.comm_revoke;
        let revoke = self.require(function)?;
        // SAFETY: the handle is alive; 0 is the only flag there is.
        self.begin(function.name, unsafe { revoke(handle.raw(), 0) }, Some(handle))
    }

    /// `ncclCommDestroy`, after a finalize that is complete. The handle is gone whatever it answers.
    pub(crate) fn destroy(&self, handle: Handle) -> Result<(), Error> {
        let function = &self.functions.comm_destroy;
        let destroy = self.require(function)?;
        // SAFETY: the handle is alive, and consumed.
        let code = unsafe { destroy(handle.raw()) };
        // Of a communicator that is gone nothing can be asked any more: what is in progress is as good as done.
        self.begin(function.name, code, None).map(drop)
    }

    /// `ncclCommAbort`. The handle is gone whatever it answers. It may never return.
    pub(crate) fn abort(&self, handle: Handle) -> Result<(), Error> {
        let function = &self.functions.comm_abort;
        let abort = self.require(function)?;
        // SAFETY: the handle is alive, and consumed; no other thread is inside NCCL with it, since it is not Sync.
        let code = unsafe { abort(handle.raw()) };
        self.begin(function.name, code, None).map(drop)
    }

    /// `ncclCommUserRank`, `ncclCommCount` and `ncclCommCuDevice`.
    pub(crate) fn place(&self, handle: &Handle) -> Result<Place, Error> {
        let functions = &self.functions;
        let mut answers = [0; 3];
        let asked = [&functions.comm_user_rank, &functions.comm_count, &functions.comm_cu_device];
        for (function, answer) in asked.into_iter().zip(&mut answers) {
            let ask = self.require(function)?;
            // SAFETY: the handle is alive, the pointer is to an integer that lives through the call.
            self.succeed(function.name, unsafe { ask(handle.raw(), &raw mut *answer) })?;
        }
        let number = |answer: c_int| usize::try_from(answer).ok();
        let place = number(answers[0]).zip(number(answers[1])).filter(|(rank, size)| rank < size);
        let Some((rank, world_size)) = place else {
            return Err(self.failure("ncclCommUserRank", ResultCode::INTERNAL_ERROR, None));
        };
        Ok(Place { rank, world_size, device: answers[2] })
    }

    /// Enqueues operations whose lengths have been checked, as a group if there are several: then they progress
    /// together, as an exchange of sends and receives must.
    pub(crate) fn enqueue(
        &self,
        handle: &Handle,
        operations: &[Operation],
        stream: Stream,
    ) -> Result<(&'static str, Progress), Error> {
        if let [operation] = operations {
            let code = self.call(handle, operation, stream)?;
            let function = operation.function();
            return Ok((function, self.begin(function, code, Some(handle))?));
        }
        let (start, end) = (&self.functions.group_start, &self.functions.group_end);
        let (start_group, end_group) = (self.require(start)?, self.require(end)?);
        // SAFETY: takes nothing; it opens a group of this thread, which is closed below in every case.
        self.succeed(start.name, unsafe { start_group() })?;
        let mut first_error = None;
        for operation in operations {
            let called = self
                .call(handle, operation, stream)
                .and_then(|code| self.begin(operation.function(), code, Some(handle)));
            if let Err(error) = called {
                first_error = Some(error);
                break;
            }
        }
        // SAFETY: closes the group of this thread.
        let code = unsafe { end_group() };
        match first_error {
            Some(error) => Err(error),
            None => Ok((end.name, self.begin(end.name, code, Some(handle))?)),
        }
    }

    fn call(&self, handle: &Handle, operation: &Operation, stream: Stream) -> Result<c_int, Error> {
        let (functions, communicator) = (&self.functions, handle.raw());
        let stream = stream.handle() as *mut c_void;
        let source = |region: Region| region.address() as *const c_void;
        let target = |region: Region| region.address() as *mut c_void;
        let dtype = |region: Region| region.dtype().code();
        let number = |rank: usize| c_int::try_from(rank).unwrap_or(c_int::MAX);
        // SAFETY, for each call below: the handle is alive; regions and stream are what their makers have promised, and
        // the lengths of the two regions fit, which `Operation::complaint` has checked; the numbers of types and
        // operators are those of the header. NCCL enqueues the work and keeps no pointer to this thread's memory.
        Ok(match *operation {
            Operation::AllReduce { send, receive, op } => {
                let call = self.require(&functions.all_reduce)?;
                let (from, to) = (source(send), target(receive));
                // SAFETY: see above.
                unsafe { call(from, to, send.len(), dtype(send), op.code(), communicator, stream) }
            }
            Operation::Broadcast { send, receive, root } => {
                let call = self.require(&functions.broadcast)?;
                let (from, to) = (source(send), target(receive));
                // SAFETY: see above.
                unsafe { call(from, to, send.len(), dtype(send), number(root), communicator, stream) }
            }
            Operation::Reduce { send, receive, op, root } => {
                let call = self.require(&functions.reduce)?;
                let (from, to, root) = (source(send), target(receive), number(root));
                // SAFETY: see above.
                unsafe { call(from, to, send.len(), dtype(send), op.code(), root, communicator, stream) }
            }
            Operation::AllGather { send, receive } => {
                let call = self.require(&functions.all_gather)?;
                // SAFETY: see above.
                unsafe { call(source(send), target(receive), send.len(), dtype(send), communicator, stream) }
            }
            Operation::ReduceScatter { send, receive, op } => {
                let call = self.require(&functions.reduce_scatter)?;
                let (from, to) = (source(send), target(receive));
                // SAFETY: see above.
                unsafe { call(from, to, receive.len(), dtype(send), op.code(), communicator, stream) }
            }
            Operation::Send { send, peer } => {
                let call = self.require(&functions.send)?;
                // SAFETY: see above.
                unsafe { call(source(send), send.len(), dtype(send), number(peer), communicator, stream) }
            }
            Operation::Receive { receive, peer } => {
                let call = self.require(&functions.recv)?;
                let to = target(receive);
                // SAFETY: see above.
                unsafe { call(to, receive.len(), dtype(receive), number(peer), communicator, stream) }
            }
        })
    }
}

/// A communicator of NCCL that is alive. See the module's description.
pub(crate) struct Handle(NonNull<c_void>);

// SAFETY: NCCL's communicators belong to no thread; they must only not be used by two at once, and this is not Sync.
unsafe impl Send for Handle {}

impl Handle {
    fn raw(&self) -> RawCommunicator {
        self.0.as_ptr()
    }
}

/// What a function that makes communicators has answered.
pub(crate) struct Created {
    pub function: &'static str,
    pub slot: Slot,
    pub progress: Progress,
}

/// Where NCCL writes the communicator that it makes, once more when its work in the background is complete, and for a
/// split only then. Nobody can say when it has given up writing after an error or an abort, so the place is never freed:
/// it costs 8 bytes for each communicator that was ever made.
pub(crate) struct Slot {
    place: &'static AtomicPtr<c_void>,
    taken: bool,
}

impl Slot {
    fn new() -> Self {
        Self { place: Box::leak(Box::new(AtomicPtr::new(ptr::null_mut()))), taken: false }
    }

    fn out(&self) -> *mut RawCommunicator {
        self.place.as_ptr()
    }

    /// The communicator, if NCCL has written it by now and it has not been taken before: a handle is the only one.
    pub fn take(&mut self) -> Option<Handle> {
        let handle = NonNull::new(self.place.load(Ordering::Acquire)).map(Handle);
        let first = handle.is_some() && !std::mem::replace(&mut self.taken, handle.is_some());
        handle.filter(|_| first)
    }
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It is complete.
    Done,
    /// It goes on in the background; [`Library::state`] tells.
    Pending,
}

/// Where a communicator says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub rank: usize,
    pub world_size: usize,
    pub device: i32,
}

/// What a configuration is made from; keeps what it points to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub net_name: Option<CString>,
    pub max_ctas: Option<u32>,
}

impl Settings {
    fn config(&self, version: Version) -> Config {
        let net_name = self.net_name.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        Config::non_blocking(version, net_name, self.max_ctas)
    }
}

fn load(name: &Path, flags: c_int) -> Result<unix::Library, String> {
    // SAFETY: loading runs the library's initialisers. What is loaded is the NCCL that the user or the machine provides,
    // whose initialisers need nothing of us; a path comes from the user or is absolute, never from a peer.
    unsafe { unix::Library::open(Some(name), flags) }.map_err(|error| {
        let mut reason = error.to_string();
        // libloading puts the dynamic linker's own words below its own.
        if let Some(source) = std::error::Error::source(&error) {
            reason = source.to_string();
        }
        reason
    })
}

/// # Safety
/// Null, or a pointer to bytes that end with a zero.
unsafe fn text_at(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller says so.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}
