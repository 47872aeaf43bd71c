//! The manifest: what makes shards one checkpoint. Read as what a stranger may have written.

use std::collections::BTreeMap;
use std::fmt;

use aws_lc_rs::digest::{self, Context, SHA256};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::layout::{Layout, TensorSpec};

/// The most bytes of a manifest: some 300,000 tensors. A longer one is not read.
pub const MAX_MANIFEST_BYTES: u64 = 32 * 1024 * 1024;

/// The most shards of a checkpoint, as many as a job can have ranks.
pub const MAX_SHARDS: usize = 65_536;

const FORMAT: &str = "paceline-checkpoint";
/// Raised whenever a reader of the version before would misread a checkpoint.
const VERSION: u32 = 1;

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_digest(&digest::digest(&SHA256, bytes))
    }

    /// Of what the context has been given.
    pub fn finish(context: Context) -> Self {
        Self::from_digest(&context.finish())
    }

    /// Its first 8 bytes, for names.
    pub fn short(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_be_bytes(first)
    }

    fn from_digest(digest: &digest::Digest) -> Self {
        Self(digest.as_ref().try_into().expect("a SHA-256 has 32 bytes"))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Sha256 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = || serde::de::Error::custom("a SHA-256 has 64 hexadecimal digits");
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// What one rank has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// The size of its file.
    pub bytes: u64,
    /// Of the whole file.
    pub sha256: Sha256,
}

/// The small part of a state: numbers and text under names, such as where the sampler is. Equal on all ranks.
///
/// Saved as JSON in the manifest, which rank 0 writes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Notes(BTreeMap<String, serde_json::Value>);

impl Notes {
    /// Adds something under a name, or replaces what is there.
    ///
    /// # Errors
    /// [`Error::Usage`] for what JSON cannot say, such as a map whose keys are not text.
    pub fn put(&mut self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        let value = serde_json::to_value(value).map_err(|error| Error::Usage {
            reason: format!("the note {name} cannot be written: {error}"),
        })?;
        self.0.insert(name.to_owned(), value);
        Ok(())
    }

    /// What is there under a name; `None` when nothing is.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is something else.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        T::deserialize(value)
            .map(Some)
            .map_err(|error| Error::Usage { reason: format!("the note {name} is something else: {error}") })
    }
}

/// All that is said about a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The step after which the state was.
    pub step: u64,
    /// Who wrote it: see [`Group::run`](super::Group::run).
    pub run: u64,
    /// The tensors.
    pub layout: Layout,
    /// One for each rank that wrote, by rank.
    pub shards: Vec<ShardRecord>,
    /// The program's notes.
    pub notes: Notes,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: String,
    version: u32,
    step: u64,
    run: String,
    shards: Vec<ShardRecord>,
    notes: Notes,
    tensors: Vec<TensorSpec>,
}

impl Manifest {
    /// The bytes of the file.
    ///
    /// # Errors
    /// The reason, when they are too many.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let written = Written {
            format: FORMAT.to_owned(),
            version: VERSION,
            step: self.step,
            run: format!("{:016x}", self.run),
            shards: self.shards.clone(),
            notes: self.notes.clone(),
            tensors: self.layout.tensors().to_vec(),
        };
        let mut bytes = serde_json::to_vec_pretty(&written).map_err(|error| error.to_string())?;
        bytes.push(b'\n');
        match bytes.len() as u64 > MAX_MANIFEST_BYTES {
            true => Err(format!(
                "its manifest would have {} bytes; at most {MAX_MANIFEST_BYTES} are read again",
                bytes.len()
            )),
            false => Ok(bytes),
        }
    }

    /// Reads the bytes of a file, of [`MAX_MANIFEST_BYTES`] at most.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let version = |text: &[u8]| {
            serde_json::from_slice::<serde_json::Value>(text).ok()?.get("version").and_then(|it| it.as_u64())
        };
        let written: Written = serde_json::from_slice(bytes).map_err(|error| match version(bytes) {
            Some(other) if other != u64::from(VERSION) => another_version(other),
            _ => error.to_string(),
        })?;
        if written.format != FORMAT {
            return Err("it is not a checkpoint of Paceline".to_owned());
        }
        if written.version != VERSION {
            return Err(another_version(written.version.into()));
        }
        if !(1..=MAX_SHARDS).contains(&written.shards.len()) {
            return Err(format!("{} shards; there are 1 to {MAX_SHARDS}", written.shards.len()));
        }
        let run = u64::from_str_radix(&written.run, 16).map_err(|error| format!("run: {error}"))?;
        let layout = Layout::new(written.tensors)?;
        Ok(Self { step: written.step, run, layout, shards: written.shards, notes: written.notes })
    }
}

fn another_version(version: u64) -> String {
    format!(
        "it is of version {version} of the format, and this is version {VERSION}; use the release that wrote it"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::layout::Tensor;
    use super::*;

    fn manifest() -> Manifest {
        let mut notes = Notes::default();
        notes.put("epoch", &3u64).expect("a number");
        Manifest {
            step: 12,
            run: 0xfeed,
            layout: Layout::of(&[Tensor::new("w", &[2, 1], &[0f32; 2])]).expect("two elements"),
            shards: vec![ShardRecord { bytes: 80, sha256: Sha256::of(b"a") }; 2],
            notes,
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let manifest = manifest();
        let read = Manifest::decode(&manifest.encode().expect("it is short")).expect("it is right");
        assert_eq!(read, manifest);
        assert_eq!(read.notes.get::<u64>("epoch"), Ok(Some(3)));
        assert_eq!(read.notes.get::<u64>("nothing"), Ok(None));
        assert!(read.notes.get::<String>("epoch").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_manifest_is_said() {
        let text = String::from_utf8(manifest().encode().expect("short")).expect("it is text");
        let refused = |from: &str, to: &str, expect: &str| {
            assert!(text.contains(from), "{text}");
            let error = Manifest::decode(text.replace(from, to).as_bytes()).expect_err(to);
            assert!(error.contains(expect), "{error}");
        };
        refused("paceline-checkpoint", "another", "not a checkpoint of Paceline");
        refused("\"version\": 1", "\"version\": 2", "version 2 of the format");
        refused("\"version\": 1", "\"version\": 2, \"more\": 1", "version 2 of the format");
        refused("\"f32\"", "\"f31\"", "no dtype f31");
        refused(&Sha256::of(b"a").to_string(), "abc", "64 hexadecimal digits");
        refused("\"w\"", "\"\"", "cannot have the name");
        refused("      2,", "      18446744073709551615, 9,", "more bytes than can be counted");
        refused("\"step\": 12", "\"step\": -1", "");
        let none = Manifest { shards: vec![], ..manifest() }.encode().expect("short");
        assert!(Manifest::decode(&none).expect_err("no shards").contains("0 shards"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn no_bytes_make_the_reader_panic(
            place in 0usize..400, bytes in prop::collection::vec(any::<u8>(), 0..20), cut in 0usize..400,
        ) {
            let mut text = manifest().encode().expect("short");
            let place = place.min(text.len());
            let end = (place + bytes.len()).min(text.len());
            text.splice(place..end, bytes);
            let _ = Manifest::decode(&text);
            text.truncate(cut);
            let _ = Manifest::decode(&text);
        }
    }
}
