//! The caller's buffers during one operation, as bytes.
//!
//! Elements and bytes are converted by bytemuck, so nothing here is unsafe. Back ends that work with
//! addresses get them from [`RawBuffers`], which checks every range.

use std::marker::PhantomData;

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

    /// The input, and the output from element `start` on, which has `size` bytes.
    pub(crate) fn with_output_from(&mut self, start: usize, size: usize) -> Buffers<'_> {
        match self {
            Self::Separate { input, output } => {
                Buffers::Separate { input, output: &mut output[start * size..] }
            }
            Self::InPlace { buffer, starts } => {
                let starts = Starts { output: starts.output + start, ..*starts };
                Buffers::InPlace { buffer, starts }
            }
        }
    }

    /// The output alone, for a step that replaces or completes it; both begin at elements of it.
    pub(crate) fn within_output(&mut self, starts: Starts) -> Buffers<'_> {
        match self {
            Self::Separate { output, .. } => Buffers::InPlace { buffer: output, starts },
            Self::InPlace { buffer, starts: own } => {
                let of_output = |start| own.output + start;
                let starts = Starts { input: of_output(starts.input), output: of_output(starts.output) };
                Buffers::InPlace { buffer, starts }
            }
        }
    }

    /// The same memory as addresses, for elements of `size` bytes.
    pub(crate) fn raw(&mut self, size: usize) -> RawBuffers<'_> {
        let (input, output) = match self {
            Self::Separate { input, output } => {
                ((input.as_ptr(), input.len()), (output.as_mut_ptr(), output.len()))
            }
            // Both from one borrow, so that the one stays valid when the other is used.
            Self::InPlace { buffer, starts } => {
                let (start, len) = (buffer.as_mut_ptr(), buffer.len());
                let (input, output) = (starts.input * size, starts.output * size);
                check(input.max(output), 0, len);
                let input_start = start.wrapping_add(input).cast_const();
                ((input_start, len - input), (start.wrapping_add(output), len - output))
            }
        };
        RawBuffers { input, output, borrow: PhantomData }
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

/// The caller's buffers as addresses, while they are borrowed. In place, both are the same.
#[derive(Debug)]
pub(crate) struct RawBuffers<'a> {
    input: (*const u8, usize),
    output: (*mut u8, usize),
    borrow: PhantomData<&'a mut [u8]>,
}

impl RawBuffers<'_> {
    /// The address of `len` bytes of the input at `offset`.
    ///
    /// # Panics
    /// If they are not within it.
    #[inline]
    pub(crate) fn input(&self, offset: usize, len: usize) -> *const u8 {
        check(offset, len, self.input.1);
        self.input.0.wrapping_add(offset)
    }

    /// The address of `len` bytes of the output at `offset`.
    ///
    /// # Panics
    /// If they are not within it.
    #[inline]
    pub(crate) fn output(&self, offset: usize, len: usize) -> *mut u8 {
        check(offset, len, self.output.1);
        self.output.0.wrapping_add(offset)
    }

    /// Whether input and output begin at the same address.
    pub(crate) fn are_one(&self) -> bool {
        self.input.0 == self.output.0.cast_const()
    }

    /// Address and length in bytes of the input, and of the output.
    pub(crate) fn places(&self) -> ((usize, usize), (usize, usize)) {
        ((self.input.0.addr(), self.input.1), (self.output.0.addr(), self.output.1))
    }
}

#[inline]
fn check(offset: usize, len: usize, available: usize) {
    let end = offset.checked_add(len);
    assert!(end.is_some_and(|end| end <= available), "plans stay within the buffers they were made for");
}

fn bytes(span: Span, size: usize) -> std::ops::Range<usize> {
    span.start * size..(span.start + span.len) * size
}
