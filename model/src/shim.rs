//! What libtorch can do and tch does not offer: autocast with a dtype, fused AdamW, deterministic
//! algorithms, counter-based dropout, packed weights, the allocator's settings, collectives. The only module with
//! `unsafe` code that calls C++.
//!
//! Functions return a [`TensorError`] whose message carries no C++ backtrace.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    ptr,
};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

pub mod c10d;

/// A failure inside libtorch: its first sentence, without the backtrace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TensorError(pub String);

impl From<tch::TchError> for TensorError {
    fn from(error: tch::TchError) -> TensorError {
        TensorError(trim_backtrace(&error.to_string()))
    }
}

/// Cuts what libtorch appends to a message: the C++ frames and the advice to set variables.
pub fn trim_backtrace(message: &str) -> String {
    let message = message.strip_prefix("Internal torch error: ").unwrap_or(message);
    let ends = ["\nException raised from", "\\nException raised from", "\nCUDA kernel errors", "\nframe #0", "\\nframe #0"];
    let end = ends.iter().filter_map(|mark| message.find(mark)).min().unwrap_or(message.len());
    message[..end].trim().to_owned()
}

type Tensors = *const *const C_tensor;

#[repr(C)]
struct AdamwOptions {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    eps: f64,
}

#[repr(C)]
struct DropoutOptions {
    seed: u64,
    step: u64,
    layer: u32,
    site: u32,
    probability: f64,
}

unsafe extern "C" {
    fn lathe_last_error() -> *const c_char;
    fn lathe_tune_malloc();
    fn lathe_deterministic() -> c_int;
    fn lathe_instruction_set() -> *const c_char;
    fn lathe_libtorch_version() -> *const c_char;
    fn lathe_dlopen(path: *const c_char) -> c_int;
    fn lathe_autocast(cuda: c_int, on: c_int) -> c_int;
    fn lathe_move_rows(
        input: *const C_tensor,
        from: *const C_tensor,
        back: *const C_tensor,
        unused: *const C_tensor,
    ) -> *mut C_tensor;
    fn lathe_attend_documents(
        queries: *const C_tensor,
        keys: *const C_tensor,
        values: *const C_tensor,
        documents: *const C_tensor,
    ) -> *mut C_tensor;
    fn lathe_attend_cached(
        queries: *const C_tensor,
        keys: *const C_tensor,
        values: *const C_tensor,
        cached_keys: *const C_tensor,
        cached_values: *const C_tensor,
        spans: *const CachedSpan,
        count: i64,
    ) -> *mut C_tensor;
    fn lathe_pack_weight(weight: *const C_tensor) -> *mut C_tensor;
    fn lathe_packed_linear(x: *const C_tensor, packed: *const C_tensor, bias: *const C_tensor, gelu: c_int) -> *mut C_tensor;
    fn lathe_is_for_rows(weight: *const C_tensor, packed: *const C_tensor) -> c_int;
    fn lathe_row_product(x: *const C_tensor, packed: *const C_tensor, bias: *const C_tensor, outputs: i64) -> *mut C_tensor;
    fn lathe_gradient_norm(parameters: Tensors, count: i64) -> *mut C_tensor;
    fn lathe_zero_gradients(parameters: Tensors, count: i64) -> c_int;
    fn lathe_set_gradient(parameter: *const C_tensor, gradient: *const C_tensor) -> c_int;
    fn lathe_resize_storage(tensor: *const C_tensor, bytes: i64) -> c_int;
    fn lathe_on_gradient(
        parameter: *const C_tensor,
        body: extern "C" fn(*mut c_void, *const C_tensor) -> c_int,
        free: extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> c_int;
    fn lathe_with_backward(
        input: *const C_tensor,
        output: *const C_tensor,
        body: extern "C" fn(*mut c_void, *const C_tensor) -> *mut C_tensor,
        free: extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> *mut C_tensor;
    fn lathe_adamw(
        parameters: Tensors,
        averages: Tensors,
        squares: Tensors,
        steps: Tensors,
        count: i64,
        options: *const AdamwOptions,
        grad_scale: *const C_tensor,
        found_inf: *const C_tensor,
    ) -> c_int;
    fn lathe_sgd(
        parameters: Tensors,
        momenta: Tensors,
        count: i64,
        options: *const SgdStep,
        grad_scale: *const C_tensor,
        found_inf: *const C_tensor,
    ) -> c_int;
    fn lathe_dropout_mask(
        sequences: *const u64,
        rows: i64,
        first: i64,
        positions: i64,
        width: i64,
        options: *const DropoutOptions,
    ) -> *mut C_tensor;
}

fn last_error() -> TensorError {
    // SAFETY: the shim returns a NUL-terminated string of this thread, valid until its next call.
    let message = unsafe { CStr::from_ptr(lathe_last_error()) };
    TensorError(trim_backtrace(&message.to_string_lossy()))
}

fn check(status: c_int) -> Result<(), TensorError> {
    if status == 0 { Err(last_error()) } else { Ok(()) }
}

fn owned(tensor: *mut C_tensor) -> Result<Tensor, TensorError> {
    // SAFETY: a non-null result is a fresh tensor on the heap that nobody else owns.
    if tensor.is_null() { Err(last_error()) } else { Ok(unsafe { Tensor::from_ptr(tensor) }) }
}

fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

/// What must be set before the first tensor: the allocator and deterministic algorithms.
///
/// The environment variables that libraries read when they start (`CUBLAS_WORKSPACE_CONFIG`,
/// `MKL_CBWR`, `OMP_WAIT_POLICY`) cannot be set from here: whoever starts the process sets them.
pub fn initialize(threads: usize) -> Result<(), TensorError> {
    // SAFETY: plain calls without arguments.
    unsafe { lathe_tune_malloc() };
    check(unsafe { lathe_deterministic() })?;
    tch::set_num_threads(threads.max(1) as i32);
    Ok(())
}

/// The vector instructions that libtorch's CPU kernels use here, such as `AVX512`.
pub fn instruction_set() -> String {
    // SAFETY: the string is thread-local in the shim and copied at once.
    unsafe { CStr::from_ptr(lathe_instruction_set()) }.to_string_lossy().into_owned()
}

pub fn libtorch_version() -> String {
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(lathe_libtorch_version()) }.to_string_lossy().into_owned()
}

/// Loads a shared library so that its symbols serve all that follows. Used for libtorch's CUDA half.
pub fn load_library(path: &Path) -> Result<(), TensorError> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| TensorError("the path holds a NUL".into()))?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { lathe_dlopen(path.as_ptr()) })
}

/// While it lives, matrix products on this thread run in bf16.
pub struct Autocast {
    cuda: c_int,
    /// Autocast is a property of the thread.
    _not_send: PhantomData<*const ()>,
}

impl Autocast {
    pub fn bf16(device: Device) -> Result<Autocast, TensorError> {
        let cuda = c_int::from(device.is_cuda());
        // SAFETY: a plain call.
        check(unsafe { lathe_autocast(cuda, 1) })?;
        Ok(Autocast { cuda, _not_send: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: leaves what `bf16` entered on this thread.
        unsafe { lathe_autocast(self.cuda, 0) };
    }
}

/// Row `from[i]` of `input` (first dimension) for every i. `back[r]` says which result took input row
/// r; the backward pass gathers with it, and zeroes the rows marked in `unused_r1` (may be empty).
/// Results beside `back` must have a zero gradient.
pub fn move_rows(input: &Tensor, from: &Tensor, back: &Tensor, unused_r1: &Tensor) -> Result<Tensor, TensorError> {
    // SAFETY: borrowed tensors; the shim copies what it keeps.
    owned(unsafe { lathe_move_rows(input.as_ptr(), from.as_ptr(), back.as_ptr(), unused_r1.as_ptr()) })
}

/// Causal attention within the documents of a packed batch, on the CPU, in fp32 or bf16. Queries are
/// `(b, t, heads, d)`, keys and values `(b, t, kv heads, d)`; `documents_n2` holds each one's first token
/// (row × t + position) and length. Tokens of no document get zeros.
///
/// Documents must lie within the batch and within their row, which is the caller's to see to.
pub fn attend_documents(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, documents_n2: &Tensor) -> Result<Tensor, TensorError> {
    // SAFETY: borrowed tensors; the shim keeps what it needs for the backward pass.
    owned(unsafe { lathe_attend_documents(q_bthd.as_ptr(), k_btgd.as_ptr(), v_btgd.as_ptr(), documents_n2.as_ptr()) })
}

/// `length` tokens of a pass from `token` on: one sequence's, from position `start` on, in a slot of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CachedSpan {
    pub token: i64,
    pub length: i64,
    pub slot: i64,
    pub start: i64,
}

/// Puts the new tokens' keys and values into a cache on the CPU, and attends from each to all before it there.
/// Queries are `(t, heads, d)`, new keys and values `(t, kv heads, d)`, the cache's `(slots, kv heads,
/// capacity, d)`; the result is shaped like the queries, and zero for tokens of no span. At most one span is of
/// one slot.
///
/// # Errors
/// Where a span does not lie within the tokens and the cache, or shapes or types do not go together.
pub fn attend_cached(
    [q_thd, k_tgd, v_tgd]: [&Tensor; 3],
    [keys_sgcd, values_sgcd]: [&Tensor; 2],
    spans: &[CachedSpan],
) -> Result<Tensor, TensorError> {
    // SAFETY: borrowed tensors and `count` spans.
    owned(unsafe {
        lathe_attend_cached(
            q_thd.as_ptr(),
            k_tgd.as_ptr(),
            v_tgd.as_ptr(),
            keys_sgcd.as_ptr(),
            values_sgcd.as_ptr(),
            spans.as_ptr(),
            spans.len() as i64,
        )
    })
}

/// A weight `(outputs, inputs)` laid out for the CPU's kernels; for [`packed_linear`] alone. Fails where
/// this CPU's library has no kernels for the type.
pub fn pack_weight(weight: &Tensor) -> Result<Tensor, TensorError> {
    // SAFETY: a borrowed tensor.
    owned(unsafe { lathe_pack_weight(weight.as_ptr()) })
}

/// `x W^T + b` for a packed weight, and the GELU (tanh) of it if `gelu`. Has no gradient.
pub fn packed_linear(x: &Tensor, packed: &Tensor, bias: Option<&Tensor>, gelu: bool) -> Result<Tensor, TensorError> {
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    // SAFETY: borrowed tensors, the bias or null.
    owned(unsafe { lathe_packed_linear(x.as_ptr(), packed.as_ptr(), bias, c_int::from(gelu)) })
}

/// Whether [`row_product`] can take what [`pack_weight`] made of this weight.
pub fn is_for_rows(weight: &Tensor, packed: &Tensor) -> bool {
    // SAFETY: borrowed tensors.
    unsafe { lathe_is_for_rows(weight.as_ptr(), packed.as_ptr()) != 0 }
}

/// `x W^T + b` of a single row in bf16, shaped `(1, outputs)`. Has no gradient. Only for weights that [`is_for_rows`] has
/// said yes to.
pub fn row_product(x: &Tensor, packed: &Tensor, bias: Option<&Tensor>, outputs: i64) -> Result<Tensor, TensorError> {
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    // SAFETY: borrowed tensors, the bias or null.
    owned(unsafe { lathe_row_product(x.as_ptr(), packed.as_ptr(), bias, outputs) })
}

/// The 2-norm over all gradients as one scalar on the device; reading it is the caller's decision.
pub fn gradient_norm(parameters: &[Tensor]) -> Result<Tensor, TensorError> {
    let pointers = pointers(parameters);
    // SAFETY: `count` valid tensors.
    owned(unsafe { lathe_gradient_norm(pointers.as_ptr(), pointers.len() as i64) })
}

/// Frees every gradient.
pub fn zero_gradients(parameters: &[Tensor]) -> Result<(), TensorError> {
    let pointers = pointers(parameters);
    // SAFETY: `count` valid tensors.
    check(unsafe { lathe_zero_gradients(pointers.as_ptr(), pointers.len() as i64) })
}

/// `gradient` becomes the parameter's: a backward pass adds to it in place.
pub fn set_gradient(parameter: &Tensor, gradient: &Tensor) -> Result<(), TensorError> {
    // SAFETY: borrowed tensors; the parameter takes a reference of its own.
    check(unsafe { lathe_set_gradient(parameter.as_ptr(), gradient.as_ptr()) })
}

/// Gives the memory behind a tensor back where `bytes` is 0, and new memory to it otherwise, for all views that share it. Without
/// memory nobody may look at its numbers.
pub fn resize_storage(tensor: &Tensor, bytes: usize) -> Result<(), TensorError> {
    // SAFETY: a borrowed tensor, of whose memory nobody holds a pointer between calls.
    check(unsafe { lathe_resize_storage(tensor.as_ptr(), bytes as i64) })
}

type GradientHook = Box<dyn FnMut(&Tensor) -> bool + Send>;

/// Calls `body` with the parameter whenever a backward pass has added its part to its gradient, on the thread that computes it;
/// `false`, or a panic, fails the pass. A parameter has one such function, the newest.
pub fn on_gradient(parameter: &Tensor, body: impl FnMut(&Tensor) -> bool + Send + 'static) -> Result<(), TensorError> {
    extern "C" fn call(data: *mut c_void, parameter: *const C_tensor) -> c_int {
        // SAFETY: made below and alive until `free`; a parameter's gradient is computed by one thread at a time.
        let body = unsafe { &mut *data.cast::<GradientHook>() };
        // SAFETY: a borrowed tensor, of which this is a reference of its own.
        let parameter = unsafe { Tensor::clone_from_ptr(parameter.cast_mut()) };
        c_int::from(catch_unwind(AssertUnwindSafe(|| body(&parameter))).unwrap_or(false))
    }

    extern "C" fn free(data: *mut c_void) {
        // SAFETY: made below; called once.
        drop(unsafe { Box::from_raw(data.cast::<GradientHook>()) });
    }

    let body: GradientHook = Box::new(body);
    // SAFETY: a borrowed tensor; the shim owns the function from here on, and frees it.
    check(unsafe { lathe_on_gradient(parameter.as_ptr(), call, free, Box::into_raw(Box::new(body)).cast()) })
}

type BackwardStep = Box<dyn FnMut(Tensor) -> Option<Tensor> + Send>;

/// `output`, which was computed from `input` without gradients, as a step of the backward pass: `body` makes the input's
/// gradient of the output's, on the thread that computes it. `None`, or a panic, fails the pass.
pub fn with_backward(
    input: &Tensor,
    output: Tensor,
    body: impl FnMut(Tensor) -> Option<Tensor> + Send + 'static,
) -> Result<Tensor, TensorError> {
    extern "C" fn call(data: *mut c_void, gradient: *const C_tensor) -> *mut C_tensor {
        // SAFETY: made below and alive until `free`; a step is computed by one thread at a time.
        let body = unsafe { &mut *data.cast::<BackwardStep>() };
        // SAFETY: a borrowed tensor, of which this is a reference of its own.
        let gradient = unsafe { Tensor::clone_from_ptr(gradient.cast_mut()) };
        let made = catch_unwind(AssertUnwindSafe(|| body(gradient))).ok().flatten();
        // The shim takes over the reference.
        made.map_or(ptr::null_mut(), |tensor| std::mem::ManuallyDrop::new(tensor).as_mut_ptr())
    }

    extern "C" fn free(data: *mut c_void) {
        // SAFETY: made below; called once.
        drop(unsafe { Box::from_raw(data.cast::<BackwardStep>()) });
    }

    let body: BackwardStep = Box::new(body);
    // SAFETY: borrowed tensors; the shim owns the function from here on, and frees it.
    owned(unsafe { lathe_with_backward(input.as_ptr(), output.as_ptr(), call, free, Box::into_raw(Box::new(body)).cast()) })
}

/// Equally long lists: entry i of each belongs to parameter i.
pub struct AdamwTensors<'a> {
    pub parameters: &'a [Tensor],
    pub averages: &'a [Tensor],
    pub squares: &'a [Tensor],
    /// fp32 scalars: steps taken.
    pub steps: &'a [Tensor],
    /// fp32 scalar by which gradients are divided.
    pub grad_scale: &'a Tensor,
    /// fp32 scalar: 1 skips the step.
    pub found_inf: &'a Tensor,
}

#[derive(Clone, Copy, Debug)]
pub struct AdamwStep {
    pub learning_rate: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
}

pub fn adamw(tensors: &AdamwTensors, step: AdamwStep) -> Result<(), TensorError> {
    let lists = [tensors.parameters, tensors.averages, tensors.squares, tensors.steps].map(pointers);
    assert!(lists.iter().all(|list| list.len() == lists[0].len()), "AdamW's lists differ in length");
    let options = AdamwOptions {
        learning_rate: step.learning_rate,
        beta1: step.betas[0],
        beta2: step.betas[1],
        weight_decay: step.weight_decay,
        eps: step.eps,
    };
    // SAFETY: four lists of `count` valid tensors and two scalars, all borrowed for the call.
    check(unsafe {
        lathe_adamw(
            lists[0].as_ptr(),
            lists[1].as_ptr(),
            lists[2].as_ptr(),
            lists[3].as_ptr(),
            lists[0].len() as i64,
            ptr::from_ref(&options),
            tensors.grad_scale.as_ptr(),
            tensors.found_inf.as_ptr(),
        )
    })
}

/// Entry i of each list belongs to parameter i; without momentum there are no momenta.
pub struct SgdTensors<'a> {
    pub parameters: &'a [Tensor],
    pub momenta: &'a [Tensor],
    /// fp32 scalar by which gradients are divided.
    pub grad_scale: &'a Tensor,
    /// fp32 scalar: 1 skips the step.
    pub found_inf: &'a Tensor,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SgdStep {
    pub learning_rate: f64,
    pub momentum: f64,
    pub weight_decay: f64,
}

pub fn sgd(tensors: &SgdTensors, step: SgdStep) -> Result<(), TensorError> {
    let (parameters, momenta) = (pointers(tensors.parameters), pointers(tensors.momenta));
    let expected = if step.momentum > 0.0 { parameters.len() } else { 0 };
    assert_eq!(momenta.len(), expected, "momenta of other parameters");
    let (scale, found_inf) = (tensors.grad_scale.as_ptr(), tensors.found_inf.as_ptr());
    // SAFETY: lists of `count` valid tensors, of which the second is not read without momentum, and two scalars, all borrowed for
    // the call.
    check(unsafe {
        lathe_sgd(parameters.as_ptr(), momenta.as_ptr(), parameters.len() as i64, ptr::from_ref(&step), scale, found_inf)
    })
}

/// Where a dropout mask stands in a run; with the sequence index and the element it decides every bit.
#[derive(Clone, Copy, Debug)]
pub struct DropoutPlace {
    pub seed: u64,
    pub step: u64,
    pub layer: u32,
    pub site: u32,
    pub probability: f64,
}

/// A mask `(sequences, positions, width)`, fp32 on the CPU, of zeros and 1/(1−p), for these positions.
pub fn dropout_mask(
    sequences: &[u64],
    positions: std::ops::Range<i64>,
    width: i64,
    place: DropoutPlace,
) -> Result<Tensor, TensorError> {
    let options = DropoutOptions {
        seed: place.seed,
        step: place.step,
        layer: place.layer,
        site: place.site,
        probability: place.probability,
    };
    let (rows, first, count) = (sequences.len() as i64, positions.start, positions.end - positions.start);
    // SAFETY: `rows` indices are read during the call.
    owned(unsafe { lathe_dropout_mask(sequences.as_ptr(), rows, first, count, width, ptr::from_ref(&options)) })
}
