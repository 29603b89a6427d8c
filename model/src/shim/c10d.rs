//! PyTorch's collectives as it has them: stores, process groups, work. [`crate::parallel::group`] is what to use.

use std::{
    ffi::{CString, c_char, c_int},
    net::{SocketAddr, TcpListener},
    os::fd::IntoRawFd,
    ptr::NonNull,
    time::Duration,
};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{TensorError, check, last_error};

#[repr(C)]
struct StoreHandle([u8; 0]);
#[repr(C)]
struct GroupHandle([u8; 0]);
#[repr(C)]
struct WorkHandle([u8; 0]);

unsafe extern "C" {
    fn lathe_store_new(host: *const c_char, port: c_int, listener: c_int, timeout_ms: i64) -> *mut StoreHandle;
    fn lathe_store_free(store: *mut StoreHandle);
    fn lathe_group_gloo(
        store: *const StoreHandle,
        name: *const c_char,
        rank: c_int,
        size: c_int,
        address: *const c_char,
        timeout_ms: i64,
    ) -> *mut GroupHandle;
    fn lathe_group_free(group: *mut GroupHandle);
    fn lathe_all_reduce(group: *mut GroupHandle, tensor: *const C_tensor, operation: c_int) -> *mut WorkHandle;
    fn lathe_reduce_scatter(
        group: *mut GroupHandle,
        output: *const C_tensor,
        input: *const C_tensor,
        operation: c_int,
    ) -> *mut WorkHandle;
    fn lathe_all_gather(group: *mut GroupHandle, output: *const C_tensor, input: *const C_tensor) -> *mut WorkHandle;
    fn lathe_broadcast(group: *mut GroupHandle, tensor: *const C_tensor, root: c_int) -> *mut WorkHandle;
    fn lathe_send(group: *mut GroupHandle, tensor: *const C_tensor, to: c_int, tag: c_int) -> *mut WorkHandle;
    fn lathe_receive(group: *mut GroupHandle, tensor: *const C_tensor, from: c_int, tag: c_int) -> *mut WorkHandle;
    fn lathe_barrier(group: *mut GroupHandle) -> *mut WorkHandle;
    fn lathe_work_wait(work: *mut WorkHandle, timeout_ms: i64) -> c_int;
    fn lathe_work_free(work: *mut WorkHandle);
}

/// How values of several ranks become one; the numbers are c10d's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Reduction {
    Sum = 0,
    /// Not on integers.
    Mean = 1,
    Min = 3,
    Max = 4,
}

fn text(text: &str) -> Result<CString, TensorError> {
    CString::new(text).map_err(|_| TensorError(format!("{text:?} holds a NUL")))
}

fn milliseconds(time: Duration) -> i64 {
    // c10d takes 0 for "for ever".
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// Where the ranks of a job meet: a few names and values, held by one of the processes.
#[derive(Debug)]
pub struct Store(NonNull<StoreHandle>);

// SAFETY: c10d's store takes a lock of its own for every call.
unsafe impl Send for Store {}

impl Store {
    /// Holds the store, for those who connect to the listener's address, as long as the value lives.
    pub fn host(listener: TcpListener, timeout: Duration) -> Result<Store, TensorError> {
        let address = listener.local_addr().map_err(|error| TensorError(error.to_string()))?;
        Store::new(address, Some(listener), timeout)
    }

    /// Connects to a store, waiting for it at most `timeout`.
    pub fn join(address: SocketAddr, timeout: Duration) -> Result<Store, TensorError> {
        Store::new(address, None, timeout)
    }

    fn new(address: SocketAddr, listener: Option<TcpListener>, timeout: Duration) -> Result<Store, TensorError> {
        let host = text(&address.ip().to_string())?;
        // c10d closes the socket, whether it succeeds or not.
        let listener = listener.map_or(-1, IntoRawFd::into_raw_fd);
        // SAFETY: the host is NUL-terminated and copied; the socket is the store's from here on.
        let store = unsafe { lathe_store_new(host.as_ptr(), address.port().into(), listener, milliseconds(timeout)) };
        NonNull::new(store).map(Store).ok_or_else(last_error)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by `lathe_store_new`, freed once; groups hold references of their own.
        unsafe { lathe_store_free(self.0.as_ptr()) };
    }
}

/// Ranks that compute collectives together. Every member starts the same ones in the same order.
#[derive(Debug)]
pub struct ProcessGroup(NonNull<GroupHandle>);

// SAFETY: a group may be used by one thread after another; its work runs on threads of its own.
unsafe impl Send for ProcessGroup {}

impl ProcessGroup {
    /// A group over Gloo, of `size` members that meet under `name`, of which this is `rank` and listens on `address`. Returns
    /// when all have met; an operation fails that takes longer than `timeout`.
    pub fn gloo(
        store: &Store,
        name: &str,
        (rank, size): (usize, usize),
        address: &str,
        timeout: Duration,
    ) -> Result<ProcessGroup, TensorError> {
        let (name, address) = (text(name)?, text(address)?);
        let (rank, size) = (rank as c_int, size as c_int);
        // SAFETY: a live store and NUL-terminated strings, which are copied.
        let group =
            unsafe { lathe_group_gloo(store.0.as_ptr(), name.as_ptr(), rank, size, address.as_ptr(), milliseconds(timeout)) };
        NonNull::new(group).map(ProcessGroup).ok_or_else(last_error)
    }

    /// `tensor` becomes the reduction of all members' tensors.
    pub fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<Work, TensorError> {
        // SAFETY: here and below a live group and borrowed tensors, to which c10d takes references of its own.
        Work::of(unsafe { lathe_all_reduce(self.0.as_ptr(), tensor.as_ptr(), reduction as c_int) })
    }

    /// `output` becomes this member's part, of `size` equal ones, of the reduction of all inputs.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor, reduction: Reduction) -> Result<Work, TensorError> {
        // SAFETY: see `all_reduce`.
        Work::of(unsafe { lathe_reduce_scatter(self.0.as_ptr(), output.as_ptr(), input.as_ptr(), reduction as c_int) })
    }

    /// `output` becomes all members' inputs one after the other.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, TensorError> {
        // SAFETY: see `all_reduce`.
        Work::of(unsafe { lathe_all_gather(self.0.as_ptr(), output.as_ptr(), input.as_ptr()) })
    }

    /// `tensor` becomes that of the member `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, TensorError> {
        // SAFETY: see `all_reduce`.
        Work::of(unsafe { lathe_broadcast(self.0.as_ptr(), tensor.as_ptr(), root as c_int) })
    }

    /// Sends to the member `to`, which receives under the same tag.
    pub fn send(&self, tensor: &Tensor, to: usize, tag: u32) -> Result<Work, TensorError> {
        // SAFETY: see `all_reduce`.
        Work::of(unsafe { lathe_send(self.0.as_ptr(), tensor.as_ptr(), to as c_int, tag as c_int) })
    }

    /// `tensor` becomes what the member `from` sends under the same tag.
    pub fn receive(&self, tensor: &Tensor, from: usize, tag: u32) -> Result<Work, TensorError> {
        // SAFETY: see `all_reduce`.
        Work::of(unsafe { lathe_receive(self.0.as_ptr(), tensor.as_ptr(), from as c_int, tag as c_int) })
    }

    /// Ends when every member has come here.
    pub fn barrier(&self) -> Result<Work, TensorError> {
        // SAFETY: a live group.
        Work::of(unsafe { lathe_barrier(self.0.as_ptr()) })
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: made by `lathe_group_gloo`, freed once; work that is under way holds what it needs.
        unsafe { lathe_group_free(self.0.as_ptr()) };
    }
}

/// A collective under way. Its tensors are to be left alone until it has been waited for.
#[derive(Debug)]
#[must_use = "what a collective gives is there once it has been waited for"]
pub struct Work(NonNull<WorkHandle>);

// SAFETY: c10d guards a work's state with a lock.
unsafe impl Send for Work {}

impl Work {
    fn of(work: *mut WorkHandle) -> Result<Work, TensorError> {
        NonNull::new(work).map(Work).ok_or_else(last_error)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Where another member is gone, or `timeout` has passed.
    pub fn wait(self, timeout: Duration) -> Result<(), TensorError> {
        // SAFETY: a live work; it is freed by `drop`.
        check(unsafe { lathe_work_wait(self.0.as_ptr(), milliseconds(timeout)) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: made by the calls above, freed once; what is under way goes on.
        unsafe { lathe_work_free(self.0.as_ptr()) };
    }
}
