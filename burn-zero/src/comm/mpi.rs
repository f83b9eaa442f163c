//! Ranks as processes that `mpirun` has started.
//!
//! One thread makes all MPI calls: it posts the exchanges that other threads request and polls until they are complete,
//! since Open MPI makes progress only inside its calls. Any number of exchanges may be running. A receive first asks
//! whether a message is there (`MPI_Improbe`), because its length is unknown; of the receives with one source and tag,
//! only the oldest asks, so that none takes a part of the message of another. If a rank does not answer before the
//! deadline, the ranks that wait for it get an error, which says whom that rank waits for itself; if a rank is killed or
//! ends without [`Session::finalize`], `mpirun` ends all other ranks and names it.

use super::{
    ComputeLock, ProcessGroup,
    exchange::{LostPeer, Received, RunningExchange},
    process_group::{Messages, Transport},
};
use crate::{CommError, Error};
use ::mpi::{
    Threading,
    environment::{Universe, initialize_with_threading},
    topology::Communicator as _,
};
use std::{
    collections::HashSet,
    os::raw::c_int,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

mod request;
mod wait_notices;

use request::{ActiveReceive, ActiveSend};
use wait_notices::WaitNotices;

/// The part size of [`Session::init`]: MPI counts are 32-bit integers.
const PART_BYTES: usize = 1 << 30;
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

/// The state of an exchange that its owner shares with the thread that makes all MPI calls.
#[derive(Debug, Default)]
struct ExchangeStatus {
    /// The time since which the owner has been waiting.
    waiting_since: OnceLock<Instant>,
    done: AtomicBool,
}

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
    status: Arc<ExchangeStatus>,
    reply: Sender<Received>,
}

impl Session {
    /// Joins the job and returns the group of all its ranks. Can be called once per process. A message above 1 GiB is
    /// sent in parts.
    ///
    /// # Errors
    /// [`CommError::MpiInit`] if MPI cannot be initialised, [`CommError::MpiThread`] if the thread cannot be started.
    pub fn init() -> Result<(Self, ProcessGroup), Error> {
        Self::init_with_part_bytes(PART_BYTES)
    }

    /// Like [`Session::init`], with messages in parts of `part_bytes` bytes, at least 1 and at most 1 GiB; a part that
    /// is shorter is the last. All ranks must pass the same value.
    ///
    /// # Errors
    /// As [`Session::init`].
    pub fn init_with_part_bytes(part_bytes: usize) -> Result<(Self, ProcessGroup), Error> {
        let part_bytes = part_bytes.clamp(1, PART_BYTES);
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
                run_progress_loop(universe, &command_receiver, part_bytes);
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

/// An exchange that the thread which makes all MPI calls runs.
struct MpiExchange {
    status: Arc<ExchangeStatus>,
    result: Receiver<Received>,
    /// The rank that is named if that thread has ended.
    peer: usize,
}

impl RunningExchange for MpiExchange {
    fn wait_timeout(&mut self, timeout: Option<Duration>) -> Option<Received> {
        let _ = self.status.waiting_since.set(Instant::now());
        let result = match timeout {
            None => self.result.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(timeout) => self.result.recv_timeout(timeout),
        };
        match result {
            Ok(received) => Some(received),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(LostPeer { rank: self.peer, waited: None, waits_for: Vec::new() }))
            }
        }
    }

    fn is_done(&self) -> bool {
        self.status.done.load(Ordering::SeqCst)
    }
}

impl Transport for MpiTransport {
    fn start(&self, tag: u32, messages: Messages, deadline: Duration) -> Box<dyn RunningExchange> {
        let (reply, result) = channel();
        let status = Arc::<ExchangeStatus>::default();
        let peers = messages.incoming.iter().copied().chain(messages.outgoing.iter().map(|message| message.to));
        let peer = peers.min().unwrap_or(0);
        let request = ExchangeRequest { tag, messages, deadline, status: status.clone(), reply };
        let _ = self.commands.send(MpiCommand::Exchange(request));
        Box::new(MpiExchange { status, result, peer })
    }

    fn compute_lock(&self) -> ComputeLock {
        ComputeLock::default()
    }
}

/// Runs exchanges until a command to finish arrives or all senders are dropped. MPI is finalised only if all exchanges
/// are complete, because `MPI_Finalize` waits for all ranks; otherwise the buffers of the others are leaked, because
/// peers may still read them.
fn run_progress_loop(universe: Universe, commands: &Receiver<MpiCommand>, part_bytes: usize) {
    let (mut active, mut idle_polls): (Vec<ActiveExchange>, u32) = (Vec::new(), 0);
    let world = universe.world();
    let mut notices = WaitNotices::new(world.rank() as usize, world.size() as usize, part_bytes);
    loop {
        let command = if active.is_empty() {
            commands.recv().map_err(|_| TryRecvError::Disconnected)
        } else {
            commands.try_recv()
        };
        match command {
            Ok(MpiCommand::Exchange(request)) => {
                active.push(ActiveExchange::post(request, part_bytes));
                idle_polls = 0;
            }
            Ok(MpiCommand::Finalize) if active.is_empty() => {
                notices.leave();
                return drop(universe);
            }
            Ok(MpiCommand::Finalize) | Err(TryRecvError::Disconnected) => {
                return std::mem::forget((universe, active, notices));
            }
            Err(TryRecvError::Empty) => {}
        }
        let mut pass = PollPass { part_bytes, notices: &notices, probed: HashSet::new(), progress: false };
        active.retain_mut(|exchange| !exchange.poll(&mut pass));
        let progress = pass.progress;
        // After the pass, so that the last exchange takes its notice back before the thread blocks.
        notices.update(active.iter().find_map(|exchange| exchange.awaited_for(exchange.deadline / 2)));
        idle_polls = if progress { 0 } else { idle_polls.saturating_add(1) };
        pause(idle_polls);
    }
}

fn pause(idle_polls: u32) {
    if idle_polls > IDLE_POLLS {
        std::thread::sleep(POLL_PAUSE);
    } else if idle_polls > 0 {
        std::thread::yield_now();
    }
}

/// One pass over all exchanges, in the order of their start.
struct PollPass<'a> {
    part_bytes: usize,
    notices: &'a WaitNotices,
    /// The sources and tags that have an incomplete receive; later receives have to wait for it.
    probed: HashSet<(usize, c_int)>,
    progress: bool,
}

/// An exchange that is in progress. If it fails it stays in progress without an owner: MPI may still use its buffers,
/// and a message that comes too late must not reach the next receive.
struct ActiveExchange {
    tag: c_int,
    sends: Vec<ActiveSend>,
    receives: Vec<ActiveReceive>,
    start: Instant,
    deadline: Duration,
    status: Arc<ExchangeStatus>,
    /// The channel to the owner; none after a failure.
    reply: Option<Sender<Received>>,
}

impl ActiveExchange {
    fn post(request: ExchangeRequest, part_bytes: usize) -> Self {
        let ExchangeRequest { tag, messages, deadline, status, reply } = request;
        // Tag 0 is that of notices.
        let tag = tag as c_int + 1;
        let send = |message| ActiveSend::post(message, tag, part_bytes);
        let sends = messages.outgoing.into_iter().map(send).collect();
        let receives = messages.incoming.into_iter().map(ActiveReceive::new).collect();
        Self { tag, sends, receives, start: Instant::now(), deadline, status, reply: Some(reply) }
    }

    /// Makes as much progress as possible without blocking; returns true when the exchange is complete.
    fn poll(&mut self, pass: &mut PollPass<'_>) -> bool {
        // Every request is polled, whatever the state of the others.
        let mut incomplete = 0;
        for send in &mut self.sends {
            incomplete += usize::from(!send.poll(&mut pass.progress));
        }
        for receive in self.receives.iter_mut().filter(|receive| !receive.complete) {
            let key = (receive.from, self.tag);
            if pass.probed.contains(&key) || !receive.poll(self.tag, pass.part_bytes, &mut pass.progress) {
                pass.probed.insert(key);
                incomplete += 1;
            }
        }
        if incomplete == 0 {
            let receives = self.receives.iter_mut();
            let received = receives.map(|receive| std::mem::take(&mut receive.buffer)).collect();
            self.finish(Ok(received));
        } else if let Some(rank) = self.awaited_for(self.deadline) {
            self.finish(Err(LostPeer { rank, waited: Some(self.deadline), waits_for: pass.notices.chain(rank) }));
        }
        incomplete == 0
    }

    /// Returns the rank that has not sent or not received for at least `time`.
    fn awaited_for(&self, time: Duration) -> Option<usize> {
        let is_over = |start: &Instant| start.elapsed() >= time;
        let waited_too_long = self.status.waiting_since.get().is_some_and(is_over);
        let receive = self.receives.iter().find(|receive| !receive.complete).filter(|_| waited_too_long);
        let send = self.sends.iter().find(|send| !send.requests.is_empty()).filter(|_| is_over(&self.start));
        receive.map(|receive| receive.from).or(send.map(|send| send.to))
    }

    fn finish(&mut self, received: Received) {
        if let Some(reply) = self.reply.take() {
            // The owner may have dropped the exchange.
            let _ = reply.send(received);
            self.status.done.store(true, Ordering::SeqCst);
        }
    }
}
