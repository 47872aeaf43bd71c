//! Short digests of parameters, to compare ranks and runs.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA256};
use paceline_collectives::Element;

/// The first 8 bytes of a SHA-256: enough to notice any difference, short enough to read out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 8]);

impl Digest {
    /// The digest of tensors in order; each one's length counts, so moving elements between them shows.
    pub fn of<'a, T: Element>(tensors: impl IntoIterator<Item = &'a [T]>) -> Self {
        let mut context = Context::new(&SHA256);
        for tensor in tensors {
            context.update(&(tensor.len() as u64).to_le_bytes());
            context.update(bytemuck::cast_slice(tensor));
        }
        let digest = context.finish();
        let mut first = [0; 8];
        first.copy_from_slice(&digest.as_ref()[..8]);
        Self(first)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_or_another_cut_changes_the_digest() {
        let base = Digest::of([&[1.0f32, 2.0][..], &[3.0]]);
        assert_eq!(base, Digest::of([&[1.0f32, 2.0][..], &[3.0]]));
        assert_ne!(base, Digest::of([&[1.0f32][..], &[2.0, 3.0]]));
        assert_ne!(base, Digest::of([&[-1.0f32, 2.0][..], &[3.0]]));
        assert_eq!(base.to_string().len(), 16);
    }
}
