//! A progress bar that also works below `paceline run`, where standard error is a pipe to the launcher.
//!
//! The launcher says in PACELINE_CONSOLE whether it shows our lines on a terminal, and redraws a line that begins with a
//! carriage return in place. Without a terminal there is no bar; the lines that the program prints tell how far it is.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use std::env;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

/// A bar for `steps` steps, on the terminal if there is one.
pub fn bar(steps: u64, what: String) -> ProgressBar {
    let is_launchers_terminal = env::var_os("PACELINE_CONSOLE").is_some_and(|value| value == "terminal");
    let target = match is_launchers_terminal {
        true => ProgressDrawTarget::term_like(Box::<LauncherTerminal>::default()),
        // Draws nothing if standard error is no terminal.
        false => ProgressDrawTarget::stderr(),
    };
    let style =
        ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} steps").expect("the template is right");
    ProgressBar::with_draw_target(Some(steps), target).with_style(style).with_message(what)
}

/// One line at the other end of the pipe.
#[derive(Debug, Default)]
struct LauncherTerminal {
    /// What was drawn since the last flush: a line reaches the pipe whole.
    drawn: Mutex<String>,
}

impl LauncherTerminal {
    fn draw(&self, text: &str) -> io::Result<()> {
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }
}

impl TermLike for LauncherTerminal {
    /// Narrower than any terminal less the launcher's prefix; the bar needs 64 columns.
    fn width(&self) -> u16 {
        70
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(text)?;
        self.draw("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        // indicatif fills the line with spaces to wipe out what was there; the launcher replaces lines as a whole.
        self.draw(if text.trim_matches(' ').is_empty() { "" } else { text })
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r")
    }

    fn flush(&self) -> io::Result<()> {
        let text = std::mem::take(&mut *self.drawn.lock().unwrap_or_else(PoisonError::into_inner));
        let mut stderr = io::stderr().lock();
        stderr.write_all(text.as_bytes())?;
        stderr.flush()
    }

    // A single line has nowhere to move to.
    fn move_cursor_up(&self, _lines: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _lines: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _columns: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _columns: usize) -> io::Result<()> {
        Ok(())
    }
}
