//! Notices when the launcher has renewed this process's certificate, and takes it over.
//!
//! The launcher replaces the file in one step. Looking at it costs a system call twice a second on the I/O
//! thread, where a watch of the file system would cost a descriptor and would not see into network volumes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use paceline_transport::identity::Identity;

/// How often the file is looked at. Certificates are renewed when a third of their life is left.
const INTERVAL: Duration = Duration::from_millis(500);

/// What tells one version of a file from another: which file it is, and when it was written.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    modified_ns: (i64, i64),
}

/// Reads an identity from its file.
///
/// # Errors
/// In words: that the file cannot be read, or what is wrong with it.
pub(crate) fn read(path: &Path) -> Result<Identity, String> {
    let bundle = fs::read_to_string(path).map_err(|error| error.to_string())?;
    Identity::from_pem(&bundle).map_err(|error| error.to_string())
}

/// Renews `identity` from the file at `path` whenever that changes, for as long as it is polled.
pub(crate) async fn follow(path: PathBuf, identity: Identity) {
    let mut seen = version(&path);
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = version(&path);
        if now == seen || now.is_none() {
            continue;
        }
        seen = now;
        let renewed = read(&path).and_then(|fresh| identity.renew(&fresh).map_err(|error| error.to_string()));
        match renewed {
            Ok(()) => tracing::debug!(member = identity.member(), "renewed"),
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "cannot use the renewed certificate")
            }
        }
    }
}

fn version(path: &Path) -> Option<Version> {
    let metadata = fs::metadata(path).ok()?;
    let modified_ns = (metadata.mtime(), metadata.mtime_nsec());
    Some(Version { device: metadata.dev(), inode: metadata.ino(), modified_ns })
}
