//! Calls that NCCL never makes, or makes with what it was not given: each is refused with a code, and nothing crashes.

use nccl_net_paceline::abi::{HANDLE_BYTES, INVALID_ARGUMENT, INVALID_USAGE};

use crate::Failed;
use crate::ends::print_line;
use crate::options::Options;
use crate::table::{Handle, Opaque, Plugin};

/// Makes them, and says so when all were refused.
pub fn run(options: &Options) -> Result<(), Failed> {
    let plugin = Plugin::open(&options.plugin, options.through)?;
    for address in [1, 2, 77, usize::MAX, 1 << 32, 7 << 32 | 3, 0xdead_beef] {
        let comm = Opaque::made_up(address);
        refused("isend", plugin.isend(comm, &mut [1], 0), INVALID_ARGUMENT)?;
        refused("irecv", plugin.irecv(comm, &mut [vec![1]], &[0]), INVALID_ARGUMENT)?;
        refused("test", plugin.test(comm, 1), INVALID_ARGUMENT)?;
        refused("accept", plugin.accept(comm), INVALID_ARGUMENT)?;
        refused("closeSend", plugin.close_send(comm), INVALID_ARGUMENT)?;
        refused("closeRecv", plugin.close_recv(comm), INVALID_ARGUMENT)?;
        refused("closeListen", plugin.close_listen(comm), INVALID_ARGUMENT)?;
    }
    handles(&plugin)?;
    let (_, listener) = plugin.listen()?;
    refused("isend", plugin.isend(listener, &mut [1], 0), INVALID_ARGUMENT)?;
    refused("closeRecv", plugin.close_recv(listener), INVALID_ARGUMENT)?;
    refused("regMr", plugin.register_on_device(listener), INVALID_USAGE)?;
    plugin.close_listen(listener)?;
    refused("closeListen", plugin.close_listen(listener), INVALID_ARGUMENT)?;
    print_line("refused")
}

/// Handles that are none, and one with each of its bytes changed.
fn handles(plugin: &Plugin) -> Result<(), Failed> {
    refused("connect", plugin.connect(&mut [0; HANDLE_BYTES]), INVALID_ARGUMENT)?;
    refused("connect", plugin.connect(&mut [0xff; HANDLE_BYTES]), INVALID_ARGUMENT)?;
    let (good, listener) = plugin.listen()?;
    for at in 0..HANDLE_BYTES {
        let mut bad: Handle = good;
        bad[at] ^= 0x41;
        // It is refused, or begins to dial somebody who is not there. It must not be a connection.
        if let Ok(Some(_)) = plugin.connect(&mut bad) {
            return Err(format!("a connection by a handle whose byte {at} is wrong").into());
        }
    }
    plugin.close_listen(listener)
}

fn refused<T>(call: &str, outcome: Result<T, Failed>, code: i32) -> Result<(), Failed> {
    match outcome {
        Err(Failed { code: Some(found), .. }) if found == code => Ok(()),
        Err(Failed { code: found, .. }) => Err(format!("{call} answered {found:?}, expected {code}").into()),
        Ok(_) => Err(format!("{call} was not refused").into()),
    }
}
