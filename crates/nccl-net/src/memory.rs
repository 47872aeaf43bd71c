//! NCCL's buffers.
//!
//! NCCL leaves a buffer alone from `isend` or `irecv` until `test` has said that the request is done, or until the
//! communicator is closed. Both kinds of buffers are made from that promise, live in a request, and are dropped with it
//! before NCCL hears that it is done; only the thread that NCCL calls on looks into them.

use crate::failure::Failure;

/// Bytes to be sent.
#[derive(Debug)]
pub struct Source {
    start: *const u8,
    len: usize,
}

/// Room for bytes that are to come.
#[derive(Debug)]
pub struct Sink {
    start: *mut u8,
    len: usize,
}

// SAFETY: whoever made it promised that the bytes are nobody else's meanwhile, on whatever thread.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Send for Sink {}

impl Source {
    /// `len` bytes from `start` on, which may be null when there are none.
    ///
    /// # Errors
    /// That it is null, or longer than an object can be.
    ///
    /// # Safety
    /// The bytes can be read, and nobody writes them, for as long as the value lives.
    pub unsafe fn new(start: *const u8, len: usize) -> Result<Self, Failure> {
        check(start.is_null(), len)?;
        Ok(Self { start, len })
    }

    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not null and not too long, which `new` has checked; readable and unchanged while `self` lives, which
        // its caller has promised.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl Sink {
    /// Room for `len` bytes from `start` on, which may be null when there is none.
    ///
    /// # Errors
    /// That it is null, or longer than an object can be.
    ///
    /// # Safety
    /// The room can be written, holds bytes of whatever value, and is nobody else's, for as long as the value lives.
    pub unsafe fn new(start: *mut u8, len: usize) -> Result<Self, Failure> {
        check(start.is_null(), len)?;
        Ok(Self { start, len })
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// All of it.
    pub fn room(&mut self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: not null and not too long, which `new` has checked; valid bytes that are ours alone while `self`
        // lives, which its caller has promised.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

fn check(is_null: bool, len: usize) -> Result<(), Failure> {
    if is_null && len > 0 {
        return Err(Failure::argument(format!("a buffer of {len} bytes at no address")));
    }
    if isize::try_from(len).is_err() {
        return Err(Failure::argument(format!("a buffer of {len} bytes is longer than memory")));
    }
    Ok(())
}

#[cfg(test)]
impl Source {
    /// Bytes that live for ever.
    pub fn leaked(bytes: Vec<u8>) -> Self {
        let bytes: &'static [u8] = bytes.leak();
        Self { start: bytes.as_ptr(), len: bytes.len() }
    }
}

#[cfg(test)]
impl Sink {
    /// Room that lives for ever, and a look at it once nobody writes any more.
    pub fn leaked(len: usize) -> (Self, impl Fn() -> Vec<u8>) {
        let room: &'static mut [u8] = vec![0; len].leak();
        let start = room.as_mut_ptr();
        // SAFETY: tests look when the request is done, and then the sink is gone.
        let look = move || unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
        (Self { start, len }, look)
    }
}
