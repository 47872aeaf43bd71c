//! Which bytes of the state are in which shard: a pure function of the tensors and of the number of shards, so that
//! ranks agree without talking and any number of ranks can read what any other number has written.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use aws_lc_rs::digest::{self, SHA256};
use paceline_collectives::{DType, Element};
use serde::{Deserialize, Serialize};

use super::error::Error;

/// A tensor of the state, to be saved: borrowed, contiguous, in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    name: &'a str,
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a [u8],
}

/// A tensor of the state, to be loaded.
#[derive(Debug)]
pub struct TensorMut<'a> {
    name: &'a str,
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a mut [u8],
}

impl<'a> Tensor<'a> {
    /// The elements of a tensor under the name that it has in the model. The shape's product is the number of elements;
    /// [`Layout::of`] checks it.
    pub fn new<T: Element>(name: &'a str, shape: &'a [usize], elements: &'a [T]) -> Self {
        Self { name, dtype: T::DTYPE, shape, bytes: bytemuck::cast_slice(elements) }
    }

    /// The same from bytes of this machine, for tensors whose type is known at run time only.
    pub fn from_bytes(name: &'a str, dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> Self {
        Self { name, dtype, shape, bytes }
    }

    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a> TensorMut<'a> {
    /// Where the elements of a tensor go that has been saved under this name.
    pub fn new<T: Element>(name: &'a str, shape: &'a [usize], elements: &'a mut [T]) -> Self {
        Self { name, dtype: T::DTYPE, shape, bytes: bytemuck::cast_slice_mut(elements) }
    }

    /// The same for tensors whose type is known at run time only.
    pub fn from_bytes(name: &'a str, dtype: DType, shape: &'a [usize], bytes: &'a mut [u8]) -> Self {
        Self { name, dtype, shape, bytes }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }

    /// The same tensor, to be read only.
    pub fn view(&self) -> Tensor<'_> {
        Tensor { name: self.name, dtype: self.dtype, shape: self.shape, bytes: self.bytes }
    }
}

/// What a tensor is, without its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, unique in the state.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))
    }

    fn size(&self) -> Option<usize> {
        self.elements()?.checked_mul(self.dtype.size())
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {:?})", self.name, self.dtype, self.shape)
    }
}

/// Elements of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The tensor's place in the layout.
    pub tensor: usize,
    /// Which of its elements, in row-major order; never empty.
    pub elements: Range<usize>,
}

/// The tensors of a state, in order, without their elements. Equal on all ranks of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
    size: usize,
}

/// A name that somebody could mistake for a span of another tensor would make two entries of a shard one.
fn looks_like_a_span(name: &str) -> bool {
    let inner = name.strip_suffix(']').and_then(|name| name.rsplit_once('[')).map(|(_, inner)| inner);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    inner.and_then(|inner| inner.split_once("..")).is_some_and(|(a, b)| is_number(a) && is_number(b))
}

impl Layout {
    /// The layout of a state with these tensors.
    ///
    /// # Errors
    /// [`Error::Usage`] when a shape does not fit its elements, and for names that are empty, longer than 1024 bytes,
    /// twice there, or end in something like `[0..8]`, by which parts of a tensor are named.
    pub fn of(tensors: &[Tensor<'_>]) -> Result<Self, Error> {
        for tensor in tensors {
            let spec = spec(tensor);
            if spec.size() != Some(tensor.bytes.len()) {
                let elements = tensor.bytes.len() / tensor.dtype.size();
                return Err(Error::Usage { reason: format!("the tensor {spec} has {elements} elements") });
            }
        }
        Self::new(tensors.iter().map(spec).collect()).map_err(|reason| Error::Usage { reason })
    }

    /// From what a manifest says.
    pub(super) fn new(tensors: Vec<TensorSpec>) -> Result<Self, String> {
        let (mut names, mut size) = (BTreeSet::new(), 0usize);
        for tensor in &tensors {
            let name = tensor.name.as_str();
            let in_order = (1..=MAX_NAME_BYTES).contains(&name.len()) && name != "__metadata__";
            if !in_order || looks_like_a_span(name) {
                return Err(format!("a tensor cannot have the name {:?}", clipped(name)));
            }
            if !names.insert(name) {
                return Err(format!("there are two tensors named {name}"));
            }
            let sum = tensor.size().and_then(|bytes| size.checked_add(bytes));
            size = sum.ok_or_else(|| format!("the tensor {name} has more bytes than can be counted"))?;
        }
        Ok(Self { tensors, size })
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The size of all tensors together, in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What tells two layouts apart: the first 8 bytes of a digest of all names, types and shapes.
    pub fn digest(&self) -> u64 {
        let text: String = self.tensors.iter().map(|tensor| format!("{tensor}\n")).collect();
        let mut first = [0; 8];
        first.copy_from_slice(&digest::digest(&SHA256, text.as_bytes()).as_ref()[..8]);
        u64::from_le_bytes(first)
    }

    /// The spans of one of `shards` shards, in the order in which they are in its file: larger elements first, so that
    /// all are aligned.
    ///
    /// The tensors are laid end to end and cut into equal parts, each cut moved down to the start of an element.
    ///
    /// # Panics
    /// When `shards` is 0.
    pub fn share(&self, shard: usize, shards: usize) -> Vec<Span> {
        let cut = |part: usize| (self.size as u128 * part as u128 / shards as u128) as usize;
        let (start, end) = (cut(shard), cut(shard + 1));
        let mut spans = Vec::new();
        let mut offset = 0;
        for (tensor, spec) in self.tensors.iter().enumerate() {
            let size = spec.size().expect("the layout was made with sizes that can be counted");
            let within = |at: usize| at.clamp(offset, offset + size) - offset;
            let elements = within(start) / spec.dtype.size()..within(end) / spec.dtype.size();
            if !elements.is_empty() {
                spans.push(Span { tensor, elements });
            }
            offset += size;
        }
        spans.sort_by_key(|span| std::cmp::Reverse(self.tensors[span.tensor].dtype.size()));
        spans
    }

    /// Where a span's bytes are in its tensor.
    pub(super) fn byte_range(&self, span: &Span) -> Range<usize> {
        let element = self.tensors[span.tensor].dtype.size();
        span.elements.start * element..span.elements.end * element
    }

    /// The size of spans together, in bytes.
    pub(super) fn size_of(&self, spans: &[Span]) -> usize {
        spans.iter().map(|span| self.byte_range(span).len()).sum()
    }

    /// The name of a span in its shard: the tensor's, if it is there as a whole.
    pub(super) fn span_name(&self, span: &Span) -> String {
        let spec = &self.tensors[span.tensor];
        match self.is_whole(span) {
            true => spec.name.clone(),
            false => format!("{}[{}..{}]", spec.name, span.elements.start, span.elements.end),
        }
    }

    /// The shape of a span in its shard: the tensor's, if it is there as a whole.
    pub(super) fn span_shape(&self, span: &Span) -> Vec<usize> {
        match self.is_whole(span) {
            true => self.tensors[span.tensor].shape.clone(),
            false => vec![span.elements.len()],
        }
    }

    fn is_whole(&self, span: &Span) -> bool {
        Some(span.elements.len()) == self.tensors[span.tensor].elements()
    }

    /// The first difference from another layout, in words.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        if self.tensors.len() != other.tensors.len() {
            return Some(format!("{} tensors instead of {}", other.tensors.len(), self.tensors.len()));
        }
        let mut pairs = self.tensors.iter().zip(&other.tensors);
        pairs
            .find(|(mine, theirs)| mine != theirs)
            .map(|(mine, theirs)| format!("{theirs} instead of {mine}"))
    }
}

/// Keeps the headers of shards short, and is more than any model uses.
const MAX_NAME_BYTES: usize = 1024;

fn clipped(name: &str) -> String {
    name.chars().take(60).collect()
}

fn spec(tensor: &Tensor<'_>) -> TensorSpec {
    TensorSpec { name: tensor.name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.to_vec() }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSpec {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

impl Serialize for TensorSpec {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (name, dtype) = (self.name.clone(), self.dtype.name().to_owned());
        WrittenSpec { name, dtype, shape: self.shape.clone() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for TensorSpec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let WrittenSpec { name, dtype, shape } = WrittenSpec::deserialize(deserializer)?;
        let known = DType::ALL.into_iter().find(|known| known.name() == dtype);
        let dtype = known.ok_or_else(|| serde::de::Error::custom(format!("no dtype {}", clipped(&dtype))))?;
        Ok(Self { name, dtype, shape })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(tensors: &[(DType, Vec<usize>)]) -> Layout {
        let specs = tensors.iter().enumerate().map(|(number, (dtype, shape))| TensorSpec {
            name: format!("tensor {number}"),
            dtype: *dtype,
            shape: shape.clone(),
        });
        Layout::new(specs.collect()).expect("the names differ")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn each_element_is_in_one_shard_and_shards_are_equal_to_an_element(
            tensors in prop::collection::vec(
                (prop::sample::select(DType::ALL.to_vec()), prop::collection::vec(0usize..6, 0..3)), 0..8),
            shards in 1usize..9,
        ) {
            let layout = layout(&tensors);
            let mut seen: Vec<Vec<u8>> =
                layout.tensors().iter().map(|spec| vec![0; spec.elements().expect("small")]).collect();
            for shard in 0..shards {
                let spans = layout.share(shard, shards);
                let size = layout.size_of(&spans);
                prop_assert!(size.abs_diff(layout.size() / shards) <= 8, "{size} of {}", layout.size());
                let sizes: Vec<usize> =
                    spans.iter().map(|span| layout.tensors()[span.tensor].dtype.size()).collect();
                prop_assert!(sizes.is_sorted_by(|a, b| a >= b), "aligned");
                for span in spans {
                    seen[span.tensor][span.elements].iter_mut().for_each(|count| *count += 1);
                }
            }
            prop_assert!(seen.iter().flatten().all(|&count| count == 1), "{seen:?}");
        }
    }

    #[test]
    fn names_and_shapes_that_cannot_be_are_refused() {
        let refused = |name: &str, shape: &[usize], expect: &str| {
            let error = Layout::of(&[Tensor::new(name, shape, &[0f32; 4])]).expect_err(name).to_string();
            assert!(error.contains(expect), "{error}");
        };
        refused("w", &[5], "has 4 elements");
        refused("w", &[usize::MAX, 4], "has 4 elements");
        let half = [Tensor::from_bytes("w", DType::F32, &[1], &[0; 6])];
        assert!(Layout::of(&half).is_err(), "one and a half elements");
        for name in ["", "__metadata__", "w[0..2]", &"x".repeat(1025)] {
            refused(name, &[2, 2], "cannot have the name");
        }
        let twice = [Tensor::new("w", &[1], &[0f32]), Tensor::new("w", &[1], &[0f64])];
        assert!(Layout::of(&twice).expect_err("two").to_string().contains("two tensors named w"));
        Layout::of(&[Tensor::new("params['dense'][0]", &[], &[0u8])]).expect("this is no span");
    }

    #[test]
    fn layouts_that_differ_in_a_name_a_type_or_a_shape_have_other_digests() {
        let base = layout(&[(DType::F32, vec![2, 3])]);
        assert_eq!(base.digest(), layout(&[(DType::F32, vec![2, 3])]).digest());
        for other in [(DType::I32, vec![2, 3]), (DType::F32, vec![3, 2]), (DType::F32, vec![6])] {
            let other = layout(&[other]);
            assert_ne!(base.digest(), other.digest());
            assert!(base.difference(&other).is_some());
        }
        assert_eq!(base.difference(&base), None);
    }
}
