//! How a collective on device memory is cut into collectives on pieces that fit a buffer of the host.
//!
//! Input and output are lists of shares, one for each rank or one in all. A piece has the same span of every share,
//! so that the collective on the pieces is the collective on the whole, element by element; shares that are shorter
//! than others run out first. All ranks must cut alike, so nothing here depends on what one rank alone knows.

use std::ops::Range;

use super::{CopySpan, DeviceBuffer};

/// The alignment of the output in a buffer; that of every dtype, and of a cache line.
const ALIGNMENT: usize = 64;

/// A collective in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pieces {
    /// The shares of this rank's input, in elements from its beginning; none where it has no input.
    pub(crate) inputs: Vec<Range<usize>>,
    /// Those of its output.
    pub(crate) outputs: Vec<Range<usize>>,
    /// Whether a piece's output takes the place of its input in the buffer.
    pub(crate) in_place: bool,
    /// The length of the longest share of any rank, in elements.
    pub(crate) longest: usize,
    /// The span of each share that a piece has, in elements.
    piece_len: usize,
    /// The number of pieces, at least one: an empty collective is one too.
    pub(crate) count: usize,
}

/// One piece: what is copied to the host before its collective, and to the device after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The number of elements of each share.
    pub(crate) inputs: Vec<usize>,
    pub(crate) outputs: Vec<usize>,
    /// Where the output begins in the buffer, in bytes.
    pub(crate) output_start: usize,
    pub(crate) down: Vec<CopySpan>,
    pub(crate) up: Vec<CopySpan>,
}

impl Pieces {
    /// Cuts shares, of which any rank has `shares_of_all` at most and the longest of any rank has `longest` elements,
    /// for buffers of `buffer_bytes`.
    pub(crate) fn new(
        (inputs, outputs): (Vec<Range<usize>>, Vec<Range<usize>>),
        in_place: bool,
        (shares_of_all, longest): (usize, usize),
        (buffer_bytes, size): (usize, usize),
    ) -> Self {
        let room = buffer_bytes.saturating_sub(ALIGNMENT) / size;
        let piece_len = (room / shares_of_all.max(1)).max(1);
        let count = longest.div_ceil(piece_len).max(1);
        Self { inputs, outputs, in_place, longest, piece_len, count }
    }

    /// The bytes of a buffer that has room for any piece of elements of `size` bytes.
    pub(crate) fn buffer_bytes(&self, size: usize) -> usize {
        let bytes =
            |shares: &[Range<usize>]| (shares.len() * self.piece_len * size).next_multiple_of(ALIGNMENT);
        let (input, output) = (bytes(&self.inputs), bytes(&self.outputs));
        if self.in_place { self.piece_len * size } else { input + output }
    }

    /// Piece number `index` of `input` and `output`, from 0.
    pub(crate) fn piece(&self, index: usize, input: DeviceBuffer, output: DeviceBuffer) -> Piece {
        let inputs = self.clip(&self.inputs, index);
        let outputs = self.clip(&self.outputs, index);
        let size = input.dtype().size();
        let down = spans(&inputs, input, 0);
        let input_bytes = down.iter().map(|span| span.bytes).sum::<usize>();
        let output_start = if self.in_place { 0 } else { input_bytes.next_multiple_of(ALIGNMENT) };
        let up = spans(&outputs, output, output_start);
        debug_assert!(input_bytes <= self.inputs.len() * self.piece_len * size);
        let lens = |spans: &[Range<usize>]| spans.iter().map(ExactSizeIterator::len).collect();
        Piece { inputs: lens(&inputs), outputs: lens(&outputs), output_start, down, up }
    }

    /// How much of a share of `len` elements is in piece number `index`.
    pub(crate) fn part(&self, index: usize, len: usize) -> usize {
        len.saturating_sub(index * self.piece_len).min(self.piece_len)
    }

    fn clip(&self, shares: &[Range<usize>], index: usize) -> Vec<Range<usize>> {
        let clip = |share: &Range<usize>| {
            let start = (share.start + index * self.piece_len).min(share.end);
            start..start + self.part(index, share.len())
        };
        shares.iter().map(clip).collect()
    }
}

/// The spans of a device buffer that follow each other in a host buffer from `offset` on.
fn spans(parts: &[Range<usize>], buffer: DeviceBuffer, mut offset: usize) -> Vec<CopySpan> {
    let size = buffer.dtype().size();
    let mut spans = Vec::with_capacity(parts.len());
    for part in parts.iter().filter(|part| !part.is_empty()) {
        assert!(part.end <= buffer.len(), "shares are checked against the buffer");
        let bytes = part.len() * size;
        spans.push(CopySpan { address: buffer.address() + (part.start * size) as u64, offset, bytes });
        offset += bytes;
    }
    spans
}

/// One share for each rank, each as long as its count, one after the other.
pub(crate) fn shares_of(counts: &[usize]) -> Vec<Range<usize>> {
    let mut shares = Vec::with_capacity(counts.len());
    let mut start = 0;
    for count in counts {
        shares.push(start..start + count);
        start += count;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn every_element_is_in_one_piece_whatever_the_lengths() {
        for counts in [vec![0], vec![1], vec![7, 0, 3], vec![10, 10], vec![64, 1, 65, 0]] {
            let total: usize = counts.iter().sum();
            let buffer = DeviceBuffer::checked(1 << 20, total, DType::F32);
            let shares = shares_of(&counts);
            let longest = counts.iter().copied().max().unwrap_or(0);
            for buffer_bytes in [64, 100, 128, 4096] {
                let cut = Pieces::new(
                    (shares.clone(), Vec::new()),
                    false,
                    (counts.len(), longest),
                    (buffer_bytes, 4),
                );
                let mut seen = vec![0; total * 4];
                for index in 0..cut.count {
                    let piece = cut.piece(index, buffer, DeviceBuffer::empty(DType::F32));
                    for span in piece.down {
                        let start = (span.address - buffer.address()) as usize;
                        seen[start..start + span.bytes].iter_mut().for_each(|count| *count += 1);
                        assert!(span.offset + span.bytes <= cut.buffer_bytes(4));
                    }
                }
                assert!(seen.iter().all(|&count| count == 1), "{counts:?} in {buffer_bytes} bytes: {cut:?}");
            }
        }
    }

    #[test]
    fn a_pieces_output_follows_its_input_at_a_cache_line() {
        let (input, output) =
            (DeviceBuffer::checked(0, 20, DType::I8), DeviceBuffer::checked(1000, 60, DType::I8));
        let cut = Pieces::new((shares_of(&[20]), shares_of(&[20; 3])), false, (4, 20), (64 + 40, 1));
        assert_eq!(cut.count, 2);
        let piece = cut.piece(1, input, output);
        assert_eq!((piece.inputs, piece.outputs, piece.output_start), (vec![10], vec![10; 3], 64));
        assert_eq!(piece.down, [CopySpan { address: 10, offset: 0, bytes: 10 }]);
        let up = [(1010, 64), (1030, 74), (1050, 84)];
        assert_eq!(piece.up, up.map(|(address, offset)| CopySpan { address, offset, bytes: 10 }));
    }
}
