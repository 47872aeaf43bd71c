//! NCCL's logger, which it gives us at the start.

use std::ffi::CString;
use std::sync::RwLock;

use crate::abi::{LOG_INFO, LOG_WARN, Logger, SUBSYSTEMS};

static LOGGER: RwLock<Option<Logger>> = RwLock::new(None);

/// Logs there from now on.
pub fn set(logger: Option<Logger>) {
    if let (Some(logger), Ok(mut place)) = (logger, LOGGER.write()) {
        *place = Some(logger);
    }
}

/// A line that somebody should read; NCCL shows it from `NCCL_DEBUG=WARN` on.
pub fn warn(text: &str) {
    // NCCL shows warnings whatever subsystem they are of.
    line(LOG_WARN, text);
}

/// A line about what was chosen; NCCL shows it with `NCCL_DEBUG=INFO`.
pub fn info(text: &str) {
    line(LOG_INFO, text);
}

fn line(level: std::ffi::c_int, text: &str) {
    let Ok(Some(logger)) = LOGGER.read().map(|place| *place) else { return };
    let text = text.replace('\0', " ");
    let Ok(text) = CString::new(format!("NET/Paceline : {text}")) else { return };
    // SAFETY: NCCL's function, which lives as long as NCCL. The format takes one string, which is the one argument; all
    // three texts end with a zero and are not kept by it.
    unsafe { logger(level, SUBSYSTEMS, c"paceline".as_ptr(), 0, c"%s".as_ptr(), text.as_ptr()) }
}
