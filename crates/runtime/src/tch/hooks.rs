//! Hears when a gradient is complete in a backward pass, while the pass goes on: `hooks.cpp` puts a hook on the node that
//! accumulates it.

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::marker::{PhantomData, PhantomPinned};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::Tensor;
use torch_sys::C_tensor;

use super::usage;
use crate::Error;

/// Bytes for the reason why there is no hook.
const REASON_BYTES: usize = 512;

/// Hooks on parameters, numbered from 0.
pub(super) struct GradientHooks {
    shared: Arc<Shared>,
    nodes: Vec<Node>,
}

#[derive(Default)]
struct Shared {
    /// Who is told, during a pass.
    listener: Mutex<Option<&'static mut Listener<'static>>>,
}

type Listener<'a> = dyn FnMut(usize) + Send + 'a;

/// A node of the autograd graph, which has the hook.
struct Node(*mut RawNode);

#[repr(C)]
struct RawNode {
    _opaque: [u8; 0],
    _neither_send_nor_unpin: PhantomData<(*mut u8, PhantomPinned)>,
}

// SAFETY: it is a `std::shared_ptr` that only its drop uses; its count is atomic.
unsafe impl Send for Node {}

unsafe extern "C" {
    fn paceline_hook_add(
        tensor: *const C_tensor,
        context: *const c_void,
        ready: unsafe extern "C" fn(*const c_void, usize),
        forget: unsafe extern "C" fn(*const c_void),
        parameter: usize,
        reason: *mut c_char,
        room: usize,
    ) -> *mut RawNode;
    fn paceline_hook_free(node: *mut RawNode);
}

impl GradientHooks {
    /// For those of the parameters that require a gradient; all are leaves. No backward pass may run through them meanwhile.
    ///
    /// # Errors
    /// [`Error::Usage`] with libtorch's reason.
    pub(super) fn new(parameters: &[Tensor]) -> Result<Self, Error> {
        let shared = Arc::<Shared>::default();
        let mut nodes = Vec::new();
        for (number, parameter) in parameters.iter().enumerate().filter(|(_, tensor)| tensor.requires_grad())
        {
            match Node::new(parameter, number, shared.clone()) {
                Ok(node) => nodes.push(node),
                Err(reason) => {
                    return usage(format!("no hook for the gradient of parameter {number}: {reason}"));
                }
            }
        }
        Ok(Self { shared, nodes })
    }

    /// Runs a backward pass, and calls `ready` with the number of a parameter whose gradient it has completed, which may be
    /// none, on whichever thread it runs. Some may not be told: while a call runs no other one is made, also from within it.
    ///
    /// If `ready` panics the process ends, since a panic cannot go through libtorch. After a pass that has failed on this
    /// thread a last call of it is waited for.
    pub(super) fn during<R>(&mut self, ready: &mut Listener<'_>, pass: impl FnOnce() -> R) -> R {
        // SAFETY: the guard takes the reference back before this function returns or unwinds, and whoever uses it holds the
        // lock meanwhile, so it is not used after that.
        let ready: &'static mut Listener<'static> =
            unsafe { std::mem::transmute::<&mut Listener<'_>, _>(ready) };
        *lock(&self.shared.listener) = Some(ready);
        let _guard = Guard(&self.shared);
        pass()
    }
}

impl Node {
    fn new(parameter: &Tensor, number: usize, shared: Arc<Shared>) -> Result<Self, String> {
        let context = Arc::into_raw(shared).cast::<c_void>();
        let mut reason = [0 as c_char; REASON_BYTES];
        // SAFETY: the tensor is there; the context is one reference of what both functions take it for, which `forget` is
        // called for once; as many bytes may be written as there are.
        let node = unsafe {
            paceline_hook_add(
                parameter.as_ptr(),
                context,
                ready,
                forget,
                number,
                reason.as_mut_ptr(),
                REASON_BYTES,
            )
        };
        match node.is_null() {
            false => Ok(Self(node)),
            // SAFETY: the text has an end, or is as empty as it was.
            true => Err(unsafe { CStr::from_ptr(reason.as_ptr()) }.to_string_lossy().into_owned()),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: `paceline_hook_add` has made it, and nobody has it any more.
        unsafe { paceline_hook_free(self.0) };
    }
}

/// Takes the listener back at the end of a pass, however that ends.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        *lock(&self.0.listener) = None;
    }
}

/// # Safety
/// `context` is what `Node::new` has given, and its reference is not forgotten yet.
unsafe extern "C" fn ready(context: *const c_void, parameter: usize) {
    // SAFETY: as promised.
    let shared = unsafe { &*context.cast::<Shared>() };
    // Who does not get it misses nothing: a listener cannot rely on being told.
    let Ok(mut listener) = shared.listener.try_lock() else { return };
    if let Some(listener) = listener.as_mut() {
        listener(parameter);
    }
}

/// # Safety
/// `context` is what `Node::new` has given, once.
unsafe extern "C" fn forget(context: *const c_void) {
    // SAFETY: as promised.
    drop(unsafe { Arc::from_raw(context.cast::<Shared>()) });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A listener that panics ends the process, so nobody has left it half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for GradientHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GradientHooks").field("parameters", &self.nodes.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Layers of which each takes what the one before gives.
    fn chain(layers: usize) -> Vec<Tensor> {
        let weight = |_| Tensor::full([4, 4], 0.5, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        (0..layers).map(weight).collect()
    }

    fn loss(parameters: &[Tensor]) -> Tensor {
        let input = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
        parameters.iter().fold(input, |hidden, weight| hidden.matmul(weight)).sum(Kind::Float)
    }

    /// The gradients that are there when the hook of each is called.
    fn seen(hooks: &mut GradientHooks, parameters: &[Tensor]) -> Vec<(usize, Vec<bool>)> {
        let shared: Vec<Mutex<Tensor>> =
            parameters.iter().map(|tensor| Mutex::new(tensor.shallow_clone())).collect();
        let mut seen = Vec::new();
        let mut ready = |number: usize| {
            seen.push((number, shared.iter().map(|tensor| lock(tensor).grad().defined()).collect()));
        };
        hooks.during(&mut ready, || loss(parameters).backward());
        seen
    }

    #[test]
    fn each_gradient_is_told_when_it_is_complete_and_before_those_of_earlier_layers() {
        let parameters = chain(3);
        let mut hooks = GradientHooks::new(&parameters).expect("leaves");
        let expected = [(2, vec![false, false, true]), (1, vec![false, true, true]), (0, vec![true; 3])];
        assert_eq!(seen(&mut hooks, &parameters), expected);
    }

    #[test]
    fn a_pass_that_nobody_listens_to_and_hooks_that_are_gone_change_nothing() {
        let parameters = chain(2);
        let mut hooks = GradientHooks::new(&parameters).expect("leaves");
        loss(&parameters).backward();
        assert_eq!(seen(&mut hooks, &parameters).len(), 2);
        // The graph outlives them.
        let kept = loss(&parameters);
        drop(hooks);
        kept.backward();
        let mut others = GradientHooks::new(&parameters).expect("leaves");
        assert_eq!(seen(&mut others, &parameters).len(), 2);
    }

    #[test]
    fn what_requires_no_gradient_has_no_hook_and_what_is_no_leaf_is_refused() {
        let mut parameters = chain(2);
        parameters.push(Tensor::ones([1], (Kind::Float, Device::Cpu)));
        let hooks = GradientHooks::new(&parameters).expect("leaves, or without a gradient");
        assert_eq!(hooks.nodes.len(), 2);
        let made = &parameters[0] * 2.0;
        let error = GradientHooks::new(&[made]).expect_err("it is made from another one");
        assert!(error.to_string().starts_with("no hook for the gradient of parameter 0: "), "{error}");
    }

    #[test]
    fn a_listener_is_told_nothing_after_its_pass_even_if_that_panics() {
        let parameters = chain(1);
        let mut hooks = GradientHooks::new(&parameters).expect("leaves");
        let mut count = 0;
        let mut ready = |_| count += 1;
        let during = std::panic::AssertUnwindSafe(|| hooks.during(&mut ready, || panic!("on purpose")));
        assert!(std::panic::catch_unwind(during).is_err());
        loss(&parameters).backward();
        assert_eq!(count, 0);
    }
}
