//! The caller's buffers during one operation, as bytes.
//!
//! Elements and bytes are converted by bytemuck, so nothing here is unsafe. Memory that comes as a raw
//! pointer (a tensor's, a shared segment's) becomes a slice in this file too, once a back end needs it.

use crate::dtype::Element;
use crate::plan::Span;

/// Input and output of one operation; the same memory when the call is in place.
#[derive(Debug)]
pub(crate) enum Buffers<'a> {
    /// Two buffers.
    Separate {
        /// Read only.
        input: &'a [u8],
        /// Written.
        output: &'a mut [u8],
    },
    /// One buffer, read and then written.
    InPlace {
        /// The memory.
        buffer: &'a mut [u8],
        /// Where input and output begin in it.
        starts: Starts,
    },
}

/// Where input and output begin in the buffer that has both, in elements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Starts {
    pub(crate) input: usize,
    pub(crate) output: usize,
}

impl<'a> Buffers<'a> {
    /// An operation that replaces its input by its result.
    pub(crate) fn in_place<T: Element>(buffer: &'a mut [T]) -> Self {
        Self::within(buffer, Starts::default())
    }

    /// An operation whose input is a part of its output, or the other way.
    pub(crate) fn within<T: Element>(buffer: &'a mut [T], starts: Starts) -> Self {
        Self::InPlace { buffer: bytemuck::cast_slice_mut(buffer), starts }
    }

    /// An operation that reads one buffer and writes another; either may be empty.
    pub(crate) fn separate<T: Element>(input: &'a [T], output: &'a mut [T]) -> Self {
        Self::Separate { input: bytemuck::cast_slice(input), output: bytemuck::cast_slice_mut(output) }
    }

    /// Elements of the input.
    pub(crate) fn input(&self, span: Span, size: usize) -> &[u8] {
        match self {
            Self::Separate { input, .. } => &input[bytes(span, size)],
            Self::InPlace { buffer, starts } => &buffer[bytes(after(starts.input, span), size)],
        }
    }

    /// Elements of the output.
    pub(crate) fn output(&self, span: Span, size: usize) -> &[u8] {
        match self {
            Self::Separate { output, .. } => &output[bytes(span, size)],
            Self::InPlace { buffer, starts } => &buffer[bytes(after(starts.output, span), size)],
        }
    }

    /// Elements of the output, to write.
    pub(crate) fn output_mut(&mut self, span: Span, size: usize) -> &mut [u8] {
        match self {
            Self::Separate { output, .. } => &mut output[bytes(span, size)],
            Self::InPlace { buffer, starts } => &mut buffer[bytes(after(starts.output, span), size)],
        }
    }

    /// Elements of the input (unless it is where they go) and the place in the output they belong to.
    pub(crate) fn input_and_output(
        &mut self,
        input_span: Span,
        output_start: usize,
        size: usize,
    ) -> (Option<&[u8]>, &mut [u8]) {
        let output_span = Span { start: output_start, len: input_span.len };
        match self {
            Self::Separate { input, output } => {
                (Some(&input[bytes(input_span, size)]), &mut output[bytes(output_span, size)])
            }
            Self::InPlace { buffer, starts } => {
                let output_span = after(starts.output, output_span);
                assert_eq!(
                    after(starts.input, input_span),
                    output_span,
                    "schedules of in-place operations keep elements in place"
                );
                (None, &mut buffer[bytes(output_span, size)])
            }
        }
    }
}

fn after(start: usize, span: Span) -> Span {
    Span { start: start + span.start, len: span.len }
}

fn bytes(span: Span, size: usize) -> std::ops::Range<usize> {
    span.start * size..(span.start + span.len) * size
}
