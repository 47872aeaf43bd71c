//! The command line.

use std::path::PathBuf;

use crate::Failed;

/// What to say about a wrong one.
pub const USAGE: &str = "usage: nccl-net-peer receive|send|abuse|measure [--plugin FILE] [--through v8|v11|bare] [--bytes N] \
     [--message N] [--in-flight N] [--connections N] [--group N] [--stall-after N] [--rounds N]";

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// The plugin's table of version 8.
    V8,
    /// That of version 11.
    V11,
    /// No plugin: the links below it.
    Bare,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The library.
    pub plugin: PathBuf,
    /// What is called.
    pub through: Through,
    /// Bytes in all.
    pub bytes: usize,
    /// Bytes of a message.
    pub message: usize,
    /// Messages of a connection that are accepted and not done.
    pub in_flight: usize,
    /// Connections side by side.
    pub connections: usize,
    /// Buffers of each receive.
    pub group: usize,
    /// Stop for ever after so many messages of each connection.
    pub stall_after: Option<usize>,
    /// How often to measure.
    pub rounds: usize,
}

impl Options {
    /// Reads the words after the first.
    pub fn parse(words: &[String]) -> Result<Self, Failed> {
        let mut options = Self {
            plugin: beside_this_program()?,
            through: Through::V11,
            bytes: 1 << 30,
            message: 512 << 10,
            in_flight: 8,
            connections: 2,
            group: 1,
            stall_after: None,
            rounds: 7,
        };
        for pair in words.chunks(2) {
            let [name, value] = pair else { return Err(USAGE.into()) };
            options.set(name, value)?;
        }
        options.check()
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), Failed> {
        let number =
            || value.parse::<usize>().map_err(|error| Failed::from(format!("{name} {value}: {error}")));
        match name {
            "--plugin" => self.plugin = value.into(),
            "--through" => self.through = Through::parse(value)?,
            "--bytes" => self.bytes = number()?,
            "--message" => self.message = number()?,
            "--in-flight" => self.in_flight = number()?,
            "--connections" => self.connections = number()?,
            "--group" => self.group = number()?,
            "--stall-after" => self.stall_after = Some(number()?),
            "--rounds" => self.rounds = number()?,
            _ => return Err(USAGE.into()),
        }
        Ok(())
    }

    fn check(self) -> Result<Self, Failed> {
        let positive = [self.bytes, self.message, self.in_flight, self.connections, self.group, self.rounds];
        if positive.contains(&0) || self.message < 8 {
            return Err("all numbers must be positive, and a message has 8 bytes at least".into());
        }
        Ok(self)
    }

    /// Messages of each connection: full groups that have all the bytes together.
    pub fn messages(&self) -> usize {
        self.bytes.div_ceil(self.message * self.connections).next_multiple_of(self.group)
    }

    /// The words for one end.
    pub fn to_words(&self) -> Vec<String> {
        let words = [
            ("--plugin", self.plugin.display().to_string()),
            ("--through", self.through.name().to_owned()),
            ("--bytes", self.bytes.to_string()),
            ("--message", self.message.to_string()),
            ("--in-flight", self.in_flight.to_string()),
            ("--connections", self.connections.to_string()),
            ("--group", self.group.to_string()),
        ];
        words.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }
}

impl Through {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bare, Self::V8, Self::V11];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V8 => "v8",
            Self::V11 => "v11",
            Self::Bare => "bare",
        }
    }

    fn parse(name: &str) -> Result<Self, Failed> {
        let found = Self::ALL.into_iter().find(|through| through.name() == name);
        found.ok_or_else(|| format!("--through {name}: v8, v11 or bare").into())
    }
}

/// Where cargo puts the library, seen from where it puts this program.
fn beside_this_program() -> Result<PathBuf, Failed> {
    let program = std::env::current_exe()?;
    Ok(program.with_file_name("libnccl_net_paceline.so"))
}
