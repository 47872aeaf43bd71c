//! How a process ended, in numbers and in words.

use std::fmt;

use rustix::process::WaitStatus;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Exited(u8),
    /// It was killed by the signal of this number.
    Killed(i32),
}

impl Ending {
    /// Reads what `wait` returned; `None` if the process has not ended (it was stopped or continued).
    pub fn from_wait(status: WaitStatus) -> Option<Self> {
        // The kernel keeps the low 8 bits of an exit code.
        let exited = status.exit_status().map(|code| Ending::Exited((code & 0xff) as u8));
        exited.or(status.terminating_signal().map(Ending::Killed))
    }

    /// The code by which a shell, and this launcher, pass the ending on: the exit code, or 128 + signal.
    pub fn exit_code(self) -> u8 {
        match self {
            Ending::Exited(code) => code,
            Ending::Killed(signal) => code_for_signal(signal),
        }
    }

    /// Whether the process exited with code 0.
    pub fn is_success(self) -> bool {
        self == Ending::Exited(0)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Ending::Exited(code) => write!(f, "exited with code {code}"),
            Ending::Killed(signal) => write!(f, "was killed by {}", signal_in_words(signal)),
        }
    }
}

/// 128 + signal. Signal numbers end at 64, so this stays below 256.
pub fn code_for_signal(signal: i32) -> u8 {
    128 | (signal & 0x7f) as u8
}

/// `signal 9 (SIGKILL)`, or `signal 35` where the number has no name.
pub fn signal_in_words(signal: i32) -> String {
    match signal_hook::low_level::signal_name(signal) {
        Some(name) => format!("signal {signal} ({name})"),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_shells() {
        for (ending, code) in [
            (Ending::Exited(0), 0),
            (Ending::Exited(3), 3),
            (Ending::Exited(255), 255),
            (Ending::Killed(9), 137),
            (Ending::Killed(15), 143),
            (Ending::Killed(64), 192),
        ] {
            assert_eq!(ending.exit_code(), code, "{ending}");
        }
    }

    #[test]
    fn an_ending_reads_as_the_end_of_a_sentence() {
        assert_eq!(Ending::Exited(3).to_string(), "exited with code 3");
        assert_eq!(Ending::Killed(9).to_string(), "was killed by signal 9 (SIGKILL)");
        assert_eq!(Ending::Killed(35).to_string(), "was killed by signal 35");
    }
}
