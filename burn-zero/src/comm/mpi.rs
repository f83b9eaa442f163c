//! Ranks as processes that `mpirun` has started.
//!
//! One thread makes all MPI calls: it posts the exchanges that other threads request and polls until they are complete,
//! since Open MPI makes progress only inside its calls. If a rank does not answer before the deadline, the ranks that
//! wait for it get an error; if a rank is killed or ends without [`Session::finalize`], `mpirun` ends all other ranks
//! and names it.

use super::{
    ComputeLock, Message, ProcessGroup,
    process_group::{LostPeer, Messages, Transport},
};
use crate::{CommError, Error};
use ::mpi::{
    Threading,
    environment::{Universe, initialize_with_threading},
    ffi,
    topology::Communicator as _,
};
use std::{
    mem::MaybeUninit,
    os::raw::{c_int, c_void},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The largest part of a message in bytes, because MPI counts are 32-bit integers. A part that is shorter is the last.
const MAX_PART_BYTES: usize = 1 << 30;
/// The number of polls without progress after which the thread sleeps between polls.
const IDLE_POLLS: u32 = 200;
/// How long the thread sleeps between polls.
const POLL_PAUSE: Duration = Duration::from_micros(20);

/// Returns true if this process was started by Open MPI's `mpirun`.
pub fn launched_by_mpirun() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

/// This process's membership in an MPI job.
pub struct Session {
    commands: Sender<MpiCommand>,
    thread: JoinHandle<()>,
}

/// The channel on which an exchange returns its messages.
type ExchangeReply = Sender<Result<Vec<Vec<u8>>, LostPeer>>;

/// A command to the thread that makes all MPI calls.
enum MpiCommand {
    Exchange(ExchangeRequest),
    Finalize,
}

/// An exchange that is to be started.
struct ExchangeRequest {
    tag: u32,
    messages: Messages,
    deadline: Duration,
    reply: ExchangeReply,
}

impl Session {
    /// Joins the job and returns the group of all its ranks. Can be called once per process.
    ///
    /// # Errors
    /// [`CommError::MpiInit`] if MPI cannot be initialised, [`CommError::MpiThread`] if the thread cannot be started.
    pub fn init() -> Result<(Self, ProcessGroup), Error> {
        let (commands, command_receiver) = channel();
        let (group_sender, group_receiver) = channel();
        let transport = MpiTransport { commands: commands.clone() };
        let work = move || {
            let universe = initialize_with_threading(Threading::Serialized);
            let _ = group_sender.send(universe.as_ref().map(|(universe, _)| {
                let world = universe.world();
                ProcessGroup::world_group(Arc::new(transport), world.rank() as usize, world.size() as usize)
            }));
            if let Some((universe, _)) = universe {
                run_progress_loop(universe, &command_receiver);
            }
        };
        let thread = std::thread::Builder::new().name("mpi".to_owned()).spawn(work);
        let thread = thread.map_err(|source| CommError::MpiThread { source })?;
        let group = group_receiver.recv().ok().flatten().ok_or(CommError::MpiInit)?;
        Ok((Self { commands, thread }, group))
    }

    /// Leaves the job; every rank must call it. A process that ends without it has failed, and `mpirun` ends the
    /// others.
    pub fn finalize(self) {
        let _ = self.commands.send(MpiCommand::Finalize);
        let _ = self.thread.join();
    }
}

struct MpiTransport {
    commands: Sender<MpiCommand>,
}

impl Transport for MpiTransport {
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, LostPeer> {
        let (reply, result) = channel();
        let ended = LostPeer { rank: messages.incoming.first().copied().unwrap_or(0), waited: None };
        let _ = self.commands.send(MpiCommand::Exchange(ExchangeRequest { tag, messages, deadline, reply }));
        result.recv().unwrap_or(Err(ended))
    }

    fn compute_lock(&self) -> ComputeLock {
        ComputeLock::default()
    }
}

/// Runs exchanges until a command to finish arrives or all senders are dropped. MPI is finalised only if no exchange
/// has failed, because `MPI_Finalize` waits for all ranks.
fn run_progress_loop(universe: Universe, commands: &Receiver<MpiCommand>) {
    let (mut pending, mut idle_polls, mut failed): (Vec<ActiveExchange>, u32, bool) = (Vec::new(), 0, false);
    loop {
        let command = if pending.is_empty() {
            commands.recv().map_err(|_| TryRecvError::Disconnected)
        } else {
            commands.try_recv()
        };
        match command {
            Ok(MpiCommand::Exchange(request)) => {
                pending.push(ActiveExchange::post(request));
                idle_polls = 0;
            }
            Ok(MpiCommand::Finalize) if !failed => return drop(universe),
            Ok(MpiCommand::Finalize) | Err(TryRecvError::Disconnected) => return std::mem::forget(universe),
            Err(TryRecvError::Empty) => {}
        }
        let mut progress = false;
        let polled = std::mem::take(&mut pending).into_iter();
        pending = polled.filter_map(|exchange| exchange.poll(&mut progress, &mut failed)).collect();
        idle_polls = if progress { 0 } else { idle_polls.saturating_add(1) };
        if idle_polls > IDLE_POLLS {
            std::thread::sleep(POLL_PAUSE);
        } else if idle_polls > 0 {
            std::thread::yield_now();
        }
    }
}

/// An exchange that is in progress.
struct ActiveExchange {
    tag: c_int,
    sends: Vec<ActiveSend>,
    receives: Vec<ActiveReceive>,
    start: Instant,
    deadline: Duration,
    reply: ExchangeReply,
}

struct ActiveSend {
    to: usize,
    requests: Vec<ffi::MPI_Request>,
    /// The send buffer, which MPI reads until the requests are complete.
    buffer: Vec<u8>,
}

struct ActiveReceive {
    from: usize,
    /// The receive buffer, with the parts that have arrived.
    buffer: Vec<u8>,
    /// The part that MPI is writing at the end of `buffer`.
    part: Option<PartReceive>,
    complete: bool,
}

/// The receive request of a part of a message.
struct PartReceive {
    request: ffi::MPI_Request,
    /// The length of the part in bytes.
    length: usize,
}

impl ActiveExchange {
    fn post(request: ExchangeRequest) -> Self {
        let ExchangeRequest { tag, messages, deadline, reply } = request;
        let tag = tag as c_int;
        let sends = messages.outgoing.into_iter().map(|message| ActiveSend::post(message, tag)).collect();
        let receive = |from| ActiveReceive { from, buffer: Vec::new(), part: None, complete: false };
        let receives = messages.incoming.into_iter().map(receive).collect();
        Self { tag, sends, receives, start: Instant::now(), deadline, reply }
    }

    /// Makes as much progress as possible without blocking; returns `None` when the exchange is complete or has failed.
    fn poll(mut self, progress: &mut bool, failed: &mut bool) -> Option<Self> {
        // Every request is polled, whatever the state of the others.
        let mut incomplete = 0;
        for send in &mut self.sends {
            incomplete += usize::from(!send.poll(progress));
        }
        for receive in &mut self.receives {
            incomplete += usize::from(!receive.poll(self.tag, progress));
        }
        if incomplete == 0 {
            let _ = self.reply.send(Ok(self.receives.into_iter().map(|receive| receive.buffer).collect()));
            return None;
        }
        if self.start.elapsed() < self.deadline {
            return Some(self);
        }
        let source = self.receives.iter().find(|receive| !receive.complete).map(|receive| receive.from);
        let destination = self.sends.iter().find(|send| !send.requests.is_empty()).map(|send| send.to);
        let lost = LostPeer { rank: source.or(destination).unwrap_or(0), waited: Some(self.deadline) };
        let _ = self.reply.send(Err(lost));
        // The requests are still pending, so MPI may still use the buffers: they are leaked.
        std::mem::forget((self.sends, self.receives));
        *failed = true;
        None
    }
}

/// Returns true if the request is complete.
fn is_done(request: &mut ffi::MPI_Request) -> bool {
    let mut flag: c_int = 0;
    // SAFETY: the request comes from `MPI_Isend` or `MPI_Imrecv` and its owner drops it after the test that completes
    // it; its buffer lives in the same struct, which is leaked if the request never completes.
    unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
    flag != 0
}

impl ActiveSend {
    fn post(message: Message, tag: c_int) -> Self {
        let Message { to, bytes: buffer } = message;
        // If the length is a multiple of the part size, an empty last part follows: only a shorter part ends a message.
        let parts = buffer.len() / MAX_PART_BYTES + 1;
        let send = |part: usize| {
            let bytes = &buffer[part * MAX_PART_BYTES..buffer.len().min((part + 1) * MAX_PART_BYTES)];
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

    fn poll(&mut self, progress: &mut bool) -> bool {
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
    fn poll(&mut self, tag: c_int, progress: &mut bool) -> bool {
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
                    self.complete = part.length < MAX_PART_BYTES;
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
