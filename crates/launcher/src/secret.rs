//! Opens files with secrets, and refuses those that others can read.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use paceline_transport::secret::{JobSecret, SECRET_MOST};
use zeroize::Zeroizing;

use crate::error::Error;

/// The mode bit that lets every user of the machine read a file.
const OTHERS_READ: u32 = 0o004;

/// The job secret in this file; without one, that of a job which has been told to do without.
///
/// # Errors
/// As [`read`].
pub fn of(path: Option<&Path>) -> Result<JobSecret, Error> {
    path.map_or_else(|| Ok(JobSecret::known_to_all()), read)
}

/// Reads the job secret.
///
/// # Errors
/// [`Error::Usage`] in one line that quotes nothing of the file.
pub fn read(path: &Path) -> Result<JobSecret, Error> {
    let wrong = |why: String| Error::Usage(format!("the job secret {}: {why}", path.display()));
    let file = open(path).map_err(wrong)?;
    let mut text = Zeroizing::new(Vec::with_capacity(SECRET_MOST + 1));
    // One byte more than is allowed: `new` says that it is too long.
    file.take(SECRET_MOST as u64 + 1).read_to_end(&mut text).map_err(|e| wrong(e.to_string()))?;
    JobSecret::new(&text).map_err(|e| match e {
        paceline_transport::Error::Identity { reason } => wrong(reason),
        e => wrong(e.to_string()),
    })
}

/// Opens a file with a secret.
///
/// A file that all users can read is refused, unless it is one of a volume that Kubernetes has mounted: there 0644 is
/// the default, and the pod is the only user. That is told by what the kubelet does to replace all files of a volume
/// at once: each is a link into `..data`.
///
/// # Errors
/// In words, without the path.
pub fn open(path: &Path) -> Result<File, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    // Of the open file, so that it cannot be another one than is read.
    let metadata = file.metadata().map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("not a file".to_owned());
    }
    if metadata.mode() & OTHERS_READ != 0 {
        if !is_mounted_by_kubernetes(path) {
            return Err(format!(
                "all users of this machine can read it; chmod 600 {}, or defaultMode: 0440 of the volume",
                path.display()
            ));
        }
        tracing::warn!(
            file = %path.display(),
            "all users in this pod can read a secret; defaultMode: 0440 and fsGroup of the volume change that"
        );
    }
    Ok(file)
}

fn is_mounted_by_kubernetes(path: &Path) -> bool {
    fs::read_link(path).is_ok_and(|target| target.starts_with("..data"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const TEXT: &str = "0123456789abcdef0123456789abcdef\n";

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
    }

    #[test]
    fn each_file_that_will_not_do_is_refused_in_one_line() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let refused = |text: &str, mode: u32| {
            let path = dir.path().join("secret");
            write(&path, text, mode);
            let error = read(&path).expect_err("refused").to_string();
            assert!(error.starts_with(&format!("the job secret {}: ", path.display())), "{error}");
            assert!(!error.contains('\n') && !error.contains("0123"), "{error}");
            error
        };
        assert!(refused(TEXT, 0o644).contains("all users of this machine can read it; chmod 600 "));
        assert!(refused("0123", 0o600).contains("has 4 bytes and needs 16"));
        assert!(refused("", 0o600).contains("is empty"));
        assert!(refused(&"0123".repeat(2000), 0o600).contains("some other file"));
        let missing = read(&dir.path().join("missing")).expect_err("refused").to_string();
        assert!(missing.contains("No such file"), "{missing}");
        assert!(read(dir.path()).expect_err("refused").to_string().contains("not a file"));
    }

    #[test]
    fn files_of_the_user_or_group_and_of_kubernetes_are_read() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        for mode in [0o400, 0o600, 0o440] {
            write(&at("secret"), TEXT, mode);
            assert!(read(&at("secret")).is_ok(), "{mode:o}");
            fs::remove_file(at("secret")).expect("removed");
        }
        fs::create_dir(at("..2026_01_01")).expect("made");
        write(&at("..2026_01_01/secret"), TEXT, 0o644);
        symlink("..2026_01_01", at("..data")).expect("linked");
        symlink("..data/secret", at("secret")).expect("linked");
        assert!(read(&at("secret")).is_ok());
        symlink("..2026_01_01/secret", at("link")).expect("linked");
        assert!(read(&at("link")).is_err(), "any other link is followed to the file's mode");
    }
}
