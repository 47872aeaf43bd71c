//! Network devices whose other end is a file of ours. The one file of this crate with `unsafe`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::ioctl_fionbio;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `TUNSETIFF` of linux/if_tun.h, which declares an `int` where the kernel reads a `struct ifreq`.
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);

/// IP packets, and nothing before them.
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;

/// The kernel refuses the name of a device that exists, rather than attaching to it.
const IFF_TUN_EXCL: u16 = 0x8000;

/// `IFNAMSIZ` of linux/if.h, the final zero included.
const NAME_BYTES: usize = 16;

/// `struct ifreq` of linux/if.h as far as `TUNSETIFF` reads it: a name, flags, and the rest of a union.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

/// A device's other end: what it sends is read here, and what is written here it receives. Never blocks.
///
/// The device lasts as long as this value, in whatever namespace it was put.
#[derive(Debug)]
pub(crate) struct Tun {
    file: File,
}

impl Tun {
    /// Makes a device of this name in our own namespace.
    ///
    /// # Errors
    /// What the system said: there is no `/dev/net/tun`, we may not, the name is taken or longer than 15 bytes.
    pub(crate) fn create(name: &str) -> io::Result<Self> {
        let mut request = InterfaceRequest {
            name: [0; NAME_BYTES],
            flags: IFF_TUN | IFF_NO_PI | IFF_TUN_EXCL,
            rest: [0; 22],
        };
        if name.is_empty() || name.len() >= NAME_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} has not 1 to 15 bytes"),
            ));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: the file is the TUN driver's, for which this number is TUNSETIFF. The driver reads a `struct ifreq`
        // of 40 bytes at the address, writes it back with the device's name, and keeps no pointer to it. That is what
        // `InterfaceRequest` is in size and layout (its size is checked below), and it is ours alone during the call.
        unsafe { ioctl(&file, Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request))? };
        ioctl_fionbio(&file, true)?;
        Ok(Self { file })
    }

    /// The next packet that the device sends, or `WouldBlock`. One that does not fit is cut off.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Has the device receive a packet.
    pub(crate) fn write(&self, packet: &[u8]) -> io::Result<usize> {
        (&self.file).write(packet)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_does_not_fit_is_refused_before_the_kernel_sees_it() {
        for name in ["", "sixteen-bytes-xx"] {
            assert_eq!(Tun::create(name).expect_err("refused").kind(), io::ErrorKind::InvalidInput);
        }
    }
}
