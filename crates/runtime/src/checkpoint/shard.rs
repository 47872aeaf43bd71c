//! The header of a shard, which is a safetensors file: 8 bytes of length, JSON, and the elements one after the other.
//!
//! The crate of that name knows the header; the file we write and read in pieces, so that neither needs a second copy
//! of the shard in memory.

use std::collections::HashMap;

use paceline_collectives::DType;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::layout::{Layout, Span};

/// Before the header: its length, little-endian.
pub const LENGTH_BYTES: usize = 8;

/// Beyond twice what we would write: room for another writer's spaces and metadata.
const HEADER_SLACK: usize = 4096;

/// The start of a shard's file: the length and the header, after which the spans' bytes follow.
pub fn start(layout: &Layout, spans: &[Span], step: u64) -> Vec<u8> {
    let about =
        HashMap::from([("format".to_owned(), "pt".to_owned()), ("step".to_owned(), step.to_string())]);
    let metadata =
        Metadata::new(Some(about), entries(layout, spans)).expect("offsets follow from the shapes");
    let mut json = serde_json::to_vec(&metadata).expect("names and numbers");
    // The elements begin at a multiple of 8.
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut start = (json.len() as u64).to_le_bytes().to_vec();
    start.extend(json);
    start
}

/// The longest header that is read for these spans, in bytes.
pub fn longest_header(layout: &Layout, spans: &[Span], step: u64) -> usize {
    2 * start(layout, spans, step).len() + HEADER_SLACK
}

/// Checks that a header describes these spans, in this order and without gaps.
///
/// # Errors
/// What is wrong with it.
pub fn check(header: &[u8], layout: &Layout, spans: &[Span]) -> Result<(), String> {
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|error| format!("its header: {error}"))?;
    let expected = entries(layout, spans);
    if metadata.offset_keys().len() != expected.len() {
        return Err(format!("it has {} tensors instead of {}", metadata.offset_keys().len(), expected.len()));
    }
    let wrong =
        expected.into_iter().find(|(name, info)| !metadata.info(name).is_some_and(|it| same(it, info)));
    wrong.map_or(Ok(()), |(name, _)| Err(format!("{name} is missing, or has another type, shape or place")))
}

fn same(a: &TensorInfo, b: &TensorInfo) -> bool {
    (a.dtype, &a.shape, a.data_offsets) == (b.dtype, &b.shape, b.data_offsets)
}

fn entries(layout: &Layout, spans: &[Span]) -> Vec<(String, TensorInfo)> {
    let mut offset = 0;
    let entry = |span: &Span| {
        let start = offset;
        offset += layout.byte_range(span).len();
        let dtype = dtype(layout.tensors()[span.tensor].dtype);
        let info = TensorInfo { dtype, shape: layout.span_shape(span), data_offsets: (start, offset) };
        (layout.span_name(span), info)
    };
    spans.iter().map(entry).collect()
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::U64 => Dtype::U64,
        other => unreachable!("{other} is not written yet"),
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::super::layout::Tensor;
    use super::*;

    fn layout() -> Layout {
        let tensors = [Tensor::new("a", &[3], &[0f32; 3]), Tensor::new("b", &[2, 2], &[0f64; 4])];
        Layout::of(&tensors).expect("the shapes fit")
    }

    #[test]
    fn a_shard_is_a_safetensors_file_with_whole_tensors_under_their_names_and_parts_with_their_range() {
        let layout = layout();
        let spans = layout.share(0, 2);
        let mut file = start(&layout, &spans, 9);
        assert!(file.len().is_multiple_of(8), "the elements are aligned");
        let size = layout.size_of(&spans);
        file.extend((0..size).map(|byte| byte as u8));
        let (_, metadata) = SafeTensors::read_metadata(&file).expect("the crate reads it");
        assert_eq!(metadata.metadata().as_ref().and_then(|about| about.get("step")), Some(&"9".to_owned()));
        let read = SafeTensors::deserialize(&file).expect("the crate reads it");
        assert_eq!(read.tensor("b[0..1]").expect("its first element").shape(), [1]);
        assert_eq!(read.tensor("a").expect("all of it").data(), (8..20).collect::<Vec<u8>>());
        check(&file[LENGTH_BYTES..file.len() - size], &layout, &spans).expect("it is ours");
    }

    #[test]
    fn a_header_of_other_spans_is_refused() {
        let layout = layout();
        let header = |spans: &[Span]| start(&layout, spans, 9)[LENGTH_BYTES..].to_vec();
        let (first, second) = (layout.share(0, 2), layout.share(1, 2));
        assert!(check(&header(&first), &layout, &second).is_err());
        assert!(
            check(&header(&first[..1]), &layout, &first).expect_err("one is missing").contains("1 tensors")
        );
        assert!(check(b"{}", &layout, &first).is_err());
        assert!(check(b"\xff", &layout, &first).is_err());
    }
}
