//! The MPI requests of one message.

use super::super::Message;
use ::mpi::ffi;
use std::{
    mem::MaybeUninit,
    os::raw::{c_int, c_void},
};

/// A message that is being sent.
pub(super) struct ActiveSend {
    pub to: usize,
    /// The incomplete requests of its parts.
    pub requests: Vec<ffi::MPI_Request>,
    /// The send buffer, which MPI reads until the requests are complete.
    buffer: Vec<u8>,
}

/// A message that is being received.
pub(super) struct ActiveReceive {
    pub from: usize,
    /// The receive buffer, with the parts that have arrived.
    pub buffer: Vec<u8>,
    /// The part that MPI is writing at the end of `buffer`.
    part: Option<PartReceive>,
    pub complete: bool,
}

/// The receive request of a part of a message.
struct PartReceive {
    request: ffi::MPI_Request,
    /// The length of the part in bytes.
    length: usize,
}

/// Returns true if the request is complete.
fn is_done(request: &mut ffi::MPI_Request) -> bool {
    let mut flag: c_int = 0;
    // SAFETY: the request comes from `MPI_Isend` or `MPI_Imrecv` and its owner drops it after the test that completes
    // it; its buffer lives in the same struct, which is kept or leaked if the request never completes.
    unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
    flag != 0
}

impl ActiveSend {
    pub(super) fn post(message: Message, tag: c_int, part_bytes: usize) -> Self {
        let Message { to, bytes: buffer } = message;
        // If the length is a multiple of the part size, an empty last part follows: only a shorter part ends a message.
        let parts = buffer.len() / part_bytes + 1;
        let send = |part: usize| {
            let bytes = &buffer[part * part_bytes..buffer.len().min((part + 1) * part_bytes)];
            let mut request = MaybeUninit::uninit();
            // SAFETY: the bytes lie in the heap allocation of `buffer`, which moves into the returned struct without
            // moving its allocation and is freed only when all requests are complete; `MPI_Isend` initialises `request`.
            unsafe {
                ffi::MPI_Isend(
                    bytes.as_ptr().cast::<c_void>(),
                    bytes.len() as c_int,
                    ffi::RSMPI_UINT8_T,
                    to as c_int,
                    tag,
                    ffi::RSMPI_COMM_WORLD,
                    request.as_mut_ptr(),
                );
                request.assume_init()
            }
        };
        let requests = (0..parts).map(send).collect();
        Self { to, requests, buffer }
    }

    /// Tests the requests without blocking; returns true when the message has been sent.
    pub(super) fn poll(&mut self, progress: &mut bool) -> bool {
        let before = self.requests.len();
        self.requests.retain_mut(|request| !is_done(request));
        *progress |= self.requests.len() < before;
        if self.requests.is_empty() {
            self.buffer = Vec::new();
        }
        self.requests.is_empty()
    }
}

impl ActiveReceive {
    pub(super) fn new(from: usize) -> Self {
        Self { from, buffer: Vec::new(), part: None, complete: false }
    }

    /// Receives what has arrived without blocking; returns true when the message is complete. Of several messages with
    /// one source and tag, only the oldest may be polled.
    pub(super) fn poll(&mut self, tag: c_int, part_bytes: usize, progress: &mut bool) -> bool {
        while !self.complete {
            match &mut self.part {
                None => match self.receive_part(tag) {
                    Some(part) => self.part = Some(part),
                    None => return false,
                },
                Some(part) => {
                    if !is_done(&mut part.request) {
                        return false;
                    }
                    self.complete = part.length < part_bytes;
                    self.part = None;
                }
            }
            *progress = true;
        }
        true
    }

    /// Starts to receive the next part if MPI has matched one.
    fn receive_part(&mut self, tag: c_int) -> Option<PartReceive> {
        let (mut flag, mut count): (c_int, c_int) = (0, 0);
        let (mut message, mut status, mut request) =
            (MaybeUninit::uninit(), MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: `MPI_Improbe` initialises `message` and `status` if it sets the flag. The part is received behind the
        // bytes that are there, into `count` bytes that were just allocated; `self.buffer` is not touched until the
        // request is complete.
        unsafe {
            let (from, world) = (self.from as c_int, ffi::RSMPI_COMM_WORLD);
            ffi::MPI_Improbe(from, tag, world, &mut flag, message.as_mut_ptr(), status.as_mut_ptr());
            if flag == 0 {
                return None;
            }
            ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count);
            let start = self.buffer.len();
            self.buffer.resize(start + count as usize, 0);
            let address = self.buffer[start..].as_mut_ptr().cast::<c_void>();
            ffi::MPI_Imrecv(address, count, ffi::RSMPI_UINT8_T, message.as_mut_ptr(), request.as_mut_ptr());
            Some(PartReceive { request: request.assume_init(), length: count as usize })
        }
    }
}
