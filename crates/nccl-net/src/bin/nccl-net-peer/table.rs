//! The plugin's function tables as NCCL sees them.

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::path::Path;
use std::ptr;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use nccl_net_paceline::abi::{HANDLE_BYTES, Logger, NetV8, NetV11, PTR_CUDA, PTR_HOST, ResultCode, SUCCESS};
use nccl_net_paceline::{v8, v11};

use crate::Failed;
use crate::options::Through;

/// The name by which NCCL finds a plugin in the program itself.
const STATIC_PLUGIN: &str = "STATIC_PLUGIN";

/// Keeps the tables in the program, where nothing else refers to them.
#[used]
static LINKED: (&NetV8, &NetV11) = (&v8::ncclNetPlugin_v8, &v11::ncclNetPlugin_v11);

/// A plugin that has been opened.
pub struct Plugin {
    table: Table,
    context: *mut c_void,
    // Last: the table is its.
    _library: Library,
}

enum Table {
    V8(Symbol<*const NetV8>),
    V11(Symbol<*const NetV11>),
}

/// A connection's end, a listener or a request, whatever that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opaque(*mut c_void);

/// A handle's bytes.
pub type Handle = [u8; HANDLE_BYTES];

/// Calls a function of the table with arguments that both versions have in common.
macro_rules! common {
    ($plugin:expr, $function:ident ($($argument:expr),*)) => {
        match &$plugin.table {
            // SAFETY: the table lives as long as the library, which `$plugin` keeps; each caller below says why its
            // arguments are as NCCL's.
            Table::V8(table) => unsafe { ((***table).$function)($($argument),*) },
            // SAFETY: as above.
            Table::V11(table) => unsafe { ((***table).$function)($($argument),*) },
        }
    };
}

impl Plugin {
    /// Opens it as NCCL does, and calls `init`.
    pub fn open(path: &Path, through: Through) -> Result<Self, Failed> {
        let library = if path == Path::new(STATIC_PLUGIN) {
            Library::this()
        } else {
            // SAFETY: the library is Paceline's own plugin, whose constructors do nothing.
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
                .map_err(|error| format!("{}: {error}", path.display()))?
        };
        // SAFETY: the names are NCCL's for tables of these types.
        let table = unsafe {
            match through {
                Through::V8 => Table::V8(library.get(b"ncclNetPlugin_v8\0")?),
                _ => Table::V11(library.get(b"ncclNetPlugin_v11\0")?),
            }
        };
        let mut plugin = Self { table, context: ptr::null_mut(), _library: library };
        plugin.init()?;
        Ok(plugin)
    }

    fn init(&mut self) -> Result<(), Failed> {
        let logger = Some(logger());
        let context = &mut self.context;
        let code = match &self.table {
            // SAFETY: the table lives as long as the library; the logger is a function of this program.
            Table::V8(table) => unsafe { ((***table).init)(logger) },
            // SAFETY: as above; there is a place for the context, and the rest may be null, which the plugin ignores.
            Table::V11(table) => unsafe {
                ((***table).init)(context, 7, ptr::null_mut(), logger, ptr::null_mut())
            },
        };
        must("init", code)
    }

    /// How many devices there are.
    pub fn devices(&self) -> Result<i32, Failed> {
        let mut count: c_int = -1;
        // The place is a variable.
        must("devices", common!(self, devices(&mut count)))?;
        Ok(count)
    }

    /// Listens at device 0.
    pub fn listen(&self) -> Result<(Handle, Opaque), Failed> {
        let (mut handle, mut comm): (Handle, _) = ([0; HANDLE_BYTES], ptr::null_mut());
        let place = (&raw mut handle).cast();
        let code = match &self.table {
            // SAFETY: the table lives as long as the library; both places are variables.
            Table::V8(table) => unsafe { ((***table).listen)(0, place, &mut comm) },
            // SAFETY: as above.
            Table::V11(table) => unsafe { ((***table).listen)(self.context, 0, place, &mut comm) },
        };
        must("listen", code)?;
        Ok((handle, Opaque(comm)))
    }

    /// One call of `connect`. `handle` must stay where it is between the calls.
    pub fn connect(&self, handle: &mut Handle) -> Result<Option<Opaque>, Failed> {
        let (mut comm, mut device) = (ptr::null_mut(), ptr::null_mut());
        let place = ptr::from_mut(handle).cast();
        let code = match &self.table {
            // SAFETY: the table lives as long as the library; all places are variables.
            Table::V8(table) => unsafe { ((***table).connect)(0, place, &mut comm, &mut device) },
            // SAFETY: as above.
            Table::V11(table) => unsafe {
                ((***table).connect)(self.context, 0, place, &mut comm, &mut device)
            },
        };
        must("connect", code)?;
        Ok(Opaque::of(comm))
    }

    /// One call of `accept`.
    pub fn accept(&self, listener: Opaque) -> Result<Option<Opaque>, Failed> {
        let (mut comm, mut device) = (ptr::null_mut(), ptr::null_mut());
        // The places are variables.
        must("accept", common!(self, accept(listener.0, &mut comm, &mut device)))?;
        Ok(Opaque::of(comm))
    }

    /// Registers a buffer.
    pub fn register(&self, comm: Opaque, buffer: &mut [u8]) -> Result<Opaque, Failed> {
        let mut handle = ptr::null_mut();
        let (start, len) = (buffer.as_mut_ptr().cast(), buffer.len());
        // A buffer and a variable.
        must("regMr", common!(self, reg_mr(comm.0, start, len, PTR_HOST, &mut handle)))?;
        Ok(Opaque(handle))
    }

    /// Asks to register memory of a device.
    pub fn register_on_device(&self, comm: Opaque) -> Result<(), Failed> {
        let mut handle = ptr::null_mut();
        // The address is not looked at.
        must("regMr", common!(self, reg_mr(comm.0, ptr::null_mut(), 8, PTR_CUDA, &mut handle)))
    }

    /// Takes a registration back.
    pub fn deregister(&self, comm: Opaque, registration: Opaque) -> Result<(), Failed> {
        // Nothing is passed but what it gave out.
        must("deregMr", common!(self, dereg_mr(comm.0, registration.0)))
    }

    /// Sends a buffer, which its owner leaves alone until the request is done.
    pub fn isend(&self, comm: Opaque, buffer: &mut [u8], tag: i32) -> Result<Option<Opaque>, Failed> {
        let mut request = ptr::null_mut();
        let (data, size) = (buffer.as_mut_ptr().cast(), buffer.len());
        let none = ptr::null_mut();
        let code = match &self.table {
            // SAFETY: the table lives as long as the library; the buffer outlives the request, of which `ends` takes
            // care; the place is a variable.
            Table::V8(table) => unsafe {
                ((***table).isend)(comm.0, data, size as c_int, tag, none, &mut request)
            },
            // SAFETY: as above.
            Table::V11(table) => unsafe {
                ((***table).isend)(comm.0, data, size, tag, none, none, &mut request)
            },
        };
        must("isend", code)?;
        Ok(Opaque::of(request))
    }

    /// Receives into buffers, which their owner leaves alone until the request is done.
    pub fn irecv(
        &self,
        comm: Opaque,
        buffers: &mut [Vec<u8>],
        tags: &[i32],
    ) -> Result<Option<Opaque>, Failed> {
        let count = buffers.len() as c_int;
        let mut data: Vec<*mut c_void> =
            buffers.iter_mut().map(|buffer| buffer.as_mut_ptr().cast()).collect();
        let mut tags = tags.to_vec();
        let mut none = vec![ptr::null_mut(); buffers.len()];
        let (data, tags, none) = (data.as_mut_ptr(), tags.as_mut_ptr(), none.as_mut_ptr());
        // As NCCL 2.28 passes it for receives whose completion it does not need to know.
        let mut request = ptr::without_provenance_mut(1);
        let code = match &self.table {
            Table::V8(table) => {
                let mut sizes: Vec<c_int> = buffers.iter().map(|buffer| buffer.len() as c_int).collect();
                // SAFETY: the table lives as long as the library; the arrays have `count` elements; the buffers outlive
                // the request, of which `ends` takes care; the place is a variable.
                unsafe {
                    ((***table).irecv)(comm.0, count, data, sizes.as_mut_ptr(), tags, none, &mut request)
                }
            }
            Table::V11(table) => {
                let mut sizes: Vec<usize> = buffers.iter().map(Vec::len).collect();
                // SAFETY: as above.
                unsafe {
                    ((***table).irecv)(
                        comm.0,
                        count,
                        data,
                        sizes.as_mut_ptr(),
                        tags,
                        none,
                        none,
                        &mut request,
                    )
                }
            }
        };
        must("irecv", code)?;
        Ok(Opaque::of(request))
    }

    /// Whether a request is done, and then the sizes of its `count` messages.
    pub fn test(&self, request: Opaque, count: usize) -> Result<Option<Vec<i32>>, Failed> {
        let mut done: c_int = -1;
        let mut sizes: Vec<c_int> = vec![-1; count];
        // The places are variables, the array has an element for each buffer.
        must("test", common!(self, test(request.0, &mut done, sizes.as_mut_ptr())))?;
        Ok((done == 1).then_some(sizes))
    }

    /// Closes one.
    pub fn close_send(&self, comm: Opaque) -> Result<(), Failed> {
        // Nothing is passed but what it gave out.
        must("closeSend", common!(self, close_send(comm.0)))
    }

    /// Closes one.
    pub fn close_recv(&self, comm: Opaque) -> Result<(), Failed> {
        // As above.
        must("closeRecv", common!(self, close_recv(comm.0)))
    }

    /// Closes one.
    pub fn close_listen(&self, comm: Opaque) -> Result<(), Failed> {
        // As above.
        must("closeListen", common!(self, close_listen(comm.0)))
    }

    /// Ends the communicator, where the version has that.
    pub fn finalize(&self) -> Result<(), Failed> {
        match &self.table {
            Table::V8(_) => Ok(()),
            // SAFETY: the table lives as long as the library; the context is its own.
            Table::V11(table) => must("finalize", unsafe { ((***table).finalize)(self.context) }),
        }
    }
}

impl Opaque {
    fn of(pointer: *mut c_void) -> Option<Self> {
        (!pointer.is_null()).then_some(Self(pointer))
    }

    /// Anything at all.
    pub fn made_up(address: usize) -> Self {
        Self(ptr::without_provenance_mut(address))
    }
}

fn must(call: &str, code: ResultCode) -> Result<(), Failed> {
    if code == SUCCESS {
        return Ok(());
    }
    Err(Failed { reason: call.to_owned(), code: Some(code) })
}

/// Shows the plugin's lines.
extern "C" fn show(
    level: c_int,
    _subsystems: c_ulong,
    _file: *const c_char,
    _line: c_int,
    _format: *const c_char,
    text: *const c_char,
) {
    // SAFETY: the plugin's format has one string, the text, which ends with a zero.
    let text = unsafe { CStr::from_ptr(text) };
    eprintln!("{} {}", if level == 2 { "WARN" } else { "INFO" }, text.to_string_lossy());
}

fn logger() -> Logger {
    type Shown = extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, *const c_char);
    // SAFETY: a call with one argument in place of `...` passes it as it would pass a sixth one, in the calling
    // conventions of Linux on x86-64 and ARM64. Rust cannot define a function with `...` itself.
    unsafe { std::mem::transmute::<Shown, Logger>(show) }
}
