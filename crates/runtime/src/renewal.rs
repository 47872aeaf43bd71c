//! Reads a member's identity, notices when it has been renewed, and takes it over.
//!
//! An identity is one file, as the launcher writes it, or a folder with `tls.crt`, `tls.key` and `ca.crt`, as
//! cert-manager writes it. Both replace it in one step: the launcher by renaming the file, the kubelet by turning
//! the link through which all files of a volume are reached. Looking at it costs a system call twice a second on
//! the I/O thread, where a watch of the file system would cost a descriptor and would not see into network volumes.

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

/// The files of an identity that is a folder, in the order in which they make one text.
pub const FILES: [&str; 3] = ["tls.key", "tls.crt", "ca.crt"];

/// Reads an identity from its file or folder. Blocks for as long as the file system does.
///
/// # Errors
/// In words: that a file cannot be read, or what is wrong with it.
pub fn read(path: &Path) -> Result<Identity, String> {
    let read = |path: PathBuf| {
        fs::read_to_string(&path).map_err(|error| match path.file_name() {
            Some(name) => format!("{}: {error}", name.display()),
            None => error.to_string(),
        })
    };
    let bundle = if path.is_dir() {
        FILES.iter().map(|name| read(path.join(name))).collect::<Result<Vec<_>, _>>()?.join("\n")
    } else {
        read(path.to_owned())?
    };
    Identity::from_pem(&bundle).map_err(|error| error.to_string())
}

/// Renews `identity` from `path` whenever what is there changes, for as long as it is polled.
pub async fn follow(path: PathBuf, identity: Identity) {
    let mut watch = Watch { taken: version(&path), refused: None };
    loop {
        tokio::time::sleep(INTERVAL).await;
        watch.look(&path, &identity);
    }
}

/// Which versions have been looked at.
struct Watch {
    taken: Option<Version>,
    refused: Option<Version>,
}

impl Watch {
    /// Takes over what is new. What cannot be used is looked at again the next time: whoever copies three files one by one
    /// leaves a key and a certificate that do not fit for a moment.
    fn look(&mut self, path: &Path, identity: &Identity) {
        let Some(now) = version(path).filter(|now| Some(*now) != self.taken) else { return };
        let renewed = read(path).and_then(|fresh| identity.renew(&fresh).map_err(|error| error.to_string()));
        match renewed {
            Ok(()) => {
                self.taken = Some(now);
                tracing::debug!(member = identity.member(), "renewed");
            }
            // Said once for each version.
            Err(reason) if self.refused.replace(now) != Some(now) => {
                tracing::warn!(path = %path.display(), reason, "cannot use the renewed certificate");
            }
            Err(_) => {}
        }
    }
}

fn version(path: &Path) -> Option<Version> {
    // Of a folder the certificate: its key comes with it.
    let certificate = path.join("tls.crt");
    let path = if path.is_dir() { &certificate } else { path };
    let metadata = fs::metadata(path).ok()?;
    let modified_ns = (metadata.mtime(), metadata.mtime_nsec());
    Some(Version { device: metadata.dev(), inode: metadata.ino(), modified_ns })
}

#[cfg(test)]
mod tests {
    use paceline_transport::identity::JobAuthority;

    use super::*;

    /// Writes an identity as cert-manager does: the key, the leaf, the authority.
    fn write(folder: &Path, identity: &Identity) {
        let bundle = identity.to_pem();
        let parts: Vec<&str> = bundle.split_inclusive("-----\n").collect();
        // Each block is a line that begins it, and its body with the line that ends it.
        for (name, part) in FILES.iter().zip(parts.chunks(2)) {
            fs::write(folder.join(name), part.concat()).expect("written");
        }
    }

    #[test]
    fn a_folder_is_read_like_the_file_and_a_missing_part_is_named() {
        let authority = JobAuthority::new("job").expect("a name");
        let identity = authority.issue("worker-1", Duration::from_secs(60)).expect("a name");
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &identity);
        assert_eq!(read(folder.path()).expect("all three are there").to_pem(), identity.to_pem());
        let file = folder.path().join("bundle.pem");
        fs::write(&file, identity.to_pem()).expect("written");
        assert_eq!(read(&file).expect("one text").to_pem(), identity.to_pem());
        fs::remove_file(folder.path().join("ca.crt")).expect("removed");
        let reason = read(folder.path()).expect_err("no authority");
        assert!(reason.starts_with("ca.crt: No such file"), "{reason}");
    }

    #[test]
    fn files_that_are_replaced_one_by_one_are_taken_when_all_have_come() {
        let authority = JobAuthority::new("job").expect("a name");
        let issue = || authority.issue("worker-1", Duration::from_secs(60)).expect("a name");
        let (folder, aside) = [(); 2].map(|()| tempfile::tempdir().expect("a folder")).into();
        let (identity, fresh) = (issue(), issue());
        write(folder.path(), &identity);
        write(aside.path(), &fresh);
        let bring = |name: &str| {
            fs::rename(aside.path().join(name), folder.path().join(name)).expect("renamed");
        };
        let mut watch = Watch { taken: version(folder.path()), refused: None };
        let before = identity.to_pem();
        bring("tls.crt");
        watch.look(folder.path(), &identity);
        assert_eq!(identity.to_pem(), before, "the certificate does not fit the key");
        bring("tls.key");
        watch.look(folder.path(), &identity);
        assert_eq!(identity.to_pem(), fresh.to_pem());
    }

    #[test]
    fn a_new_version_of_either_kind_is_noticed() {
        let authority = JobAuthority::new("job").expect("a name");
        let issue = || authority.issue("worker-1", Duration::from_secs(60)).expect("a name");
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &issue());
        let before = version(folder.path());
        assert!(before == version(folder.path()) && before.is_some());
        fs::rename(folder.path().join("tls.crt"), folder.path().join("old")).expect("renamed");
        assert!(version(folder.path()).is_none(), "in the middle of a change nothing is read");
        write(folder.path(), &issue());
        assert!(version(folder.path()) != before);
    }
}
