//! This process as NCCL's network: its identity, its ports, and the thread that keeps their connections.
//!
//! Made at the first `init` and kept until the process ends, whatever NCCL finalizes: a communicator that is made later
//! finds it as it was.

use std::ffi::CString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use paceline_runtime::{env, interface, renewal};
use paceline_transport::pair::Port;
use paceline_transport::{Fabric, IoThread};

use crate::failure::Failure;
use crate::log;
use crate::settings::Settings;

static PLUGIN: Mutex<Option<Arc<Plugin>>> = Mutex::new(None);

/// The speed of interfaces that say none, in Mbit/s: NCCL's own guess.
const USUAL_SPEED: i32 = 10_000;

/// This process as a network.
#[derive(Debug)]
pub struct Plugin {
    /// What kind of links it makes.
    pub fabric: Fabric,
    /// NCCL's devices.
    pub devices: Vec<Device>,
    /// Who it is.
    pub member: String,
    // Last: it ends after what lives on it.
    _io: IoThread,
}

/// A network interface.
#[derive(Debug)]
pub struct Device {
    /// Where its listeners are dialled.
    pub port: Port,
    /// The interface's name.
    pub name: CString,
    /// Its device in `/sys`, by which NCCL finds which GPUs are near.
    pub pci_path: Option<CString>,
    /// In Mbit/s.
    pub speed: i32,
}

/// The plugin of this process, which is made now if there is none.
///
/// # Errors
/// What the environment lacks, or the operating system refuses.
pub fn start() -> Result<Arc<Plugin>, Failure> {
    let mut place = PLUGIN.lock().map_err(|_| Failure::internal("an earlier start has panicked"))?;
    if let Some(plugin) = &*place {
        return Ok(plugin.clone());
    }
    let settings = Settings::read(env::process).map_err(Failure::system)?;
    let plugin = Arc::new(Plugin::new(settings).map_err(|error| Failure::system(error.to_string()))?);
    log::info(&plugin.in_words());
    Ok(place.insert(plugin).clone())
}

/// The plugin of this process.
///
/// # Errors
/// That `init` has not been called.
pub fn get() -> Result<Arc<Plugin>, Failure> {
    let place = PLUGIN.lock().map_err(|_| Failure::internal("the start has panicked"))?;
    place.clone().ok_or_else(|| Failure::usage("called before init, or after an init that failed"))
}

impl Plugin {
    fn new(settings: Settings) -> Result<Self, paceline_transport::Error> {
        let Settings { identity, source, fabric, addresses } = settings;
        let io = IoThread::start()?;
        let interfaces = interface::of_this_host().unwrap_or_default();
        let open = |ip: &IpAddr| {
            let port = Port::open(&io.handle(), SocketAddr::new(*ip, 0), &identity, fabric)?;
            let of_ip = interfaces.iter().find(|address| address.ip == *ip);
            Ok(Device::new(port, of_ip.map_or("lo", |address| &address.interface)))
        };
        let devices = addresses.iter().map(open).collect::<Result<_, paceline_transport::Error>>()?;
        match source {
            Some(source) => drop(io.handle().spawn(renewal::follow(source, identity.clone()))),
            None => log::warn(
                "PACELINE_INSECURE=1 and no credentials: anybody who reaches these hosts can take part",
            ),
        }
        if fabric == Fabric::Tcp {
            log::warn(&format!("PACELINE_FABRIC=tcp: {}", env::PLAIN_TCP));
        }
        Ok(Self { fabric, devices, member: identity.member().to_owned(), _io: io })
    }

    /// A device of NCCL's.
    ///
    /// # Errors
    /// That there is none with this number.
    pub fn device(&self, number: i32) -> Result<&Device, Failure> {
        let device = usize::try_from(number).ok().and_then(|number| self.devices.get(number));
        device.ok_or_else(|| Failure::argument(format!("device {number}; there are {}", self.devices.len())))
    }

    fn in_words(&self) -> String {
        let devices: Vec<String> = self
            .devices
            .iter()
            .map(|device| format!("{} {}", device.name.to_string_lossy(), device.port.local_addr()))
            .collect();
        let version = env!("CARGO_PKG_VERSION");
        format!("release {version}, {} over {} at {}", self.member, self.fabric, devices.join(", "))
    }
}

impl Device {
    fn new(port: Port, interface: &str) -> Self {
        let folder = format!("/sys/class/net/{interface}");
        let speed = fs::read_to_string(format!("{folder}/speed")).ok();
        let speed = speed.and_then(|speed| speed.trim().parse().ok()).filter(|&speed: &i32| speed > 0);
        let path = fs::canonicalize(format!("{folder}/device")).ok();
        let pci_path = path.and_then(|path| CString::new(path.into_os_string().into_encoded_bytes()).ok());
        let name = CString::new(interface).unwrap_or_default();
        Self { port, name, pci_path, speed: speed.unwrap_or(USUAL_SPEED) }
    }
}
