//! Ranks as processes that `mpirun` has started.
//!
//! One thread owns MPI: it posts what the others hand it and polls until it is done, since Open MPI makes progress only
//! inside its calls. A rank that is silent past the deadline is an error on the ranks that wait for it; a rank that is killed,
//! or ends without [`Session::finish`], makes `mpirun` end all others and name it.

use super::{
    Group, Turn,
    group::{Lost, Messages, Wire},
};
use crate::Error;
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

/// A message travels in parts of at most this many bytes: MPI counts in 32 bits. The part that is shorter is the last.
const PART: usize = 1 << 30;
/// Polls without anything to do before the thread sleeps between them.
const BUSY: u32 = 200;
/// How long it sleeps.
const PAUSE: Duration = Duration::from_micros(20);

/// Whether this process was started by Open MPI's `mpirun`.
pub fn launched() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

/// This process's part in an MPI job.
pub struct Session {
    posts: Sender<Post>,
    thread: JoinHandle<()>,
}

/// Where the messages of an exchange go.
type Reply = Sender<Result<Vec<Vec<u8>>, Lost>>;

/// What the thread that owns MPI is asked.
enum Post {
    Exchange { tag: u32, messages: Messages, deadline: Duration, reply: Reply },
    Finish,
}

impl Session {
    /// Joins the job; the group of all its ranks. Once per process.
    ///
    /// # Errors
    /// [`Error::Mpi`] if MPI cannot be initialised.
    pub fn start() -> Result<(Self, Group), Error> {
        let failed = |problem: &str| Error::Mpi { problem: problem.to_owned() };
        let ((posts, asked), (tell, told)) = (channel(), channel());
        let work = move || {
            let universe = initialize_with_threading(Threading::Serialized);
            let _ = tell.send(universe.as_ref().map(|(universe, _)| {
                let world = universe.world();
                (world.rank() as usize, world.size() as usize)
            }));
            if let Some((universe, _)) = universe {
                serve(universe, &asked);
            }
        };
        let thread = std::thread::Builder::new().name("mpi".to_owned()).spawn(work);
        let thread = thread.map_err(|error| failed(&error.to_string()))?;
        let place = told.recv().ok().flatten();
        let (rank, world) = place.ok_or_else(|| failed("it cannot be initialised, or was before"))?;
        let group = Group::world_of(Arc::new(Processes { posts: posts.clone() }), rank, world);
        Ok((Self { posts, thread }, group))
    }

    /// Leaves the job in peace, when every rank does: whoever ends without it has failed, and `mpirun` ends the others.
    pub fn finish(self) {
        let _ = self.posts.send(Post::Finish);
        let _ = self.thread.join();
    }
}

struct Processes {
    posts: Sender<Post>,
}

impl Wire for Processes {
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, Lost> {
        let (reply, result) = channel();
        let ended = Lost { rank: messages.incoming.first().copied().unwrap_or(0), waited: None };
        let _ = self.posts.send(Post::Exchange { tag, messages, deadline, reply });
        result.recv().unwrap_or(Err(ended))
    }

    fn turn(&self) -> Turn {
        Turn::default()
    }
}

/// Works until everyone has let go or asks to finish. MPI is finalised only in peace: it waits for all ranks.
fn serve(universe: Universe, asked: &Receiver<Post>) {
    let (mut running, mut idle, mut peace): (Vec<Running>, u32, bool) = (Vec::new(), 0, true);
    loop {
        let post =
            if running.is_empty() { asked.recv().map_err(|_| TryRecvError::Disconnected) } else { asked.try_recv() };
        match post {
            Ok(Post::Exchange { tag, messages, deadline, reply }) => {
                running.push(Running::post(tag as c_int, messages, (deadline, reply)));
                idle = 0;
            }
            Ok(Post::Finish) if peace => return drop(universe),
            Ok(Post::Finish) | Err(TryRecvError::Disconnected) => return std::mem::forget(universe),
            Err(TryRecvError::Empty) => {}
        }
        let mut progress = false;
        running =
            std::mem::take(&mut running).into_iter().filter_map(|job| job.poll(&mut progress, &mut peace)).collect();
        idle = if progress { 0 } else { idle.saturating_add(1) };
        if idle > BUSY {
            std::thread::sleep(PAUSE);
        } else if idle > 0 {
            std::thread::yield_now();
        }
    }
}

/// An exchange under way.
struct Running {
    tag: c_int,
    sends: Vec<Sending>,
    receives: Vec<Receiving>,
    start: Instant,
    deadline: Duration,
    reply: Reply,
}

struct Sending {
    to: usize,
    requests: Vec<ffi::MPI_Request>,
    /// What MPI reads from until the requests are done.
    message: Vec<u8>,
}

struct Receiving {
    from: usize,
    message: Vec<u8>,
    /// The part that MPI writes at the end of `message`, and its length.
    part: Option<(ffi::MPI_Request, usize)>,
    complete: bool,
}

impl Running {
    fn post(tag: c_int, messages: Messages, (deadline, reply): (Duration, Reply)) -> Self {
        let sends = messages.outgoing.into_iter().map(|(to, message)| Sending::post(to, message, tag)).collect();
        let receive = |from| Receiving { from, message: Vec::new(), part: None, complete: false };
        let receives = messages.incoming.into_iter().map(receive).collect();
        Self { tag, sends, receives, start: Instant::now(), deadline, reply }
    }

    /// Goes on as far as it can; none when the exchange is over.
    fn poll(mut self, progress: &mut bool, peace: &mut bool) -> Option<Self> {
        // Every one is polled, whatever the others say.
        let mut open = 0;
        for sending in &mut self.sends {
            open += usize::from(!sending.poll(progress));
        }
        for receiving in &mut self.receives {
            open += usize::from(!receiving.poll(self.tag, progress));
        }
        if open == 0 {
            let _ = self.reply.send(Ok(self.receives.into_iter().map(|receiving| receiving.message).collect()));
            return None;
        }
        if self.start.elapsed() < self.deadline {
            return Some(self);
        }
        let silent = self.receives.iter().find(|receiving| !receiving.complete).map(|receiving| receiving.from);
        let deaf = self.sends.iter().find(|sending| !sending.requests.is_empty()).map(|sending| sending.to);
        let lost = Lost { rank: silent.or(deaf).unwrap_or(0), waited: Some(self.deadline) };
        let _ = self.reply.send(Err(lost));
        // MPI may still use the buffers.
        std::mem::forget((self.sends, self.receives));
        *peace = false;
        None
    }
}

/// Whether a request is done.
fn is_done(request: &mut ffi::MPI_Request) -> bool {
    let mut flag: c_int = 0;
    // SAFETY: the request was made by MPI and is tested until it is done, once; its buffer lives as long.
    unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
    flag != 0
}

impl Sending {
    fn post(to: usize, message: Vec<u8>, tag: c_int) -> Self {
        // A message that fills its last part is followed by an empty one.
        let parts = message.len() / PART + 1;
        let send = |part: usize| {
            let bytes = &message[part * PART..message.len().min((part + 1) * PART)];
            let mut request = MaybeUninit::uninit();
            // SAFETY: the bytes live in `message`, whose heap buffer stays where it is until the request is done.
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
        Self { to, requests, message }
    }

    fn poll(&mut self, progress: &mut bool) -> bool {
        let before = self.requests.len();
        self.requests.retain_mut(|request| !is_done(request));
        *progress |= self.requests.len() < before;
        if self.requests.is_empty() {
            self.message = Vec::new();
        }
        self.requests.is_empty()
    }
}

impl Receiving {
    fn poll(&mut self, tag: c_int, progress: &mut bool) -> bool {
        while !self.complete {
            match &mut self.part {
                None => match self.receive_part(tag) {
                    Some(part) => self.part = Some(part),
                    None => return false,
                },
                Some((request, length)) => {
                    if !is_done(request) {
                        return false;
                    }
                    self.complete = *length < PART;
                    self.part = None;
                }
            }
            *progress = true;
        }
        true
    }

    /// Takes the next part if it has been announced.
    fn receive_part(&mut self, tag: c_int) -> Option<(ffi::MPI_Request, usize)> {
        let (mut flag, mut count): (c_int, c_int) = (0, 0);
        let (mut message, mut status, mut request) =
            (MaybeUninit::uninit(), MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: `message` and `status` are written if the flag is set. The part is received behind what is there, into a
        // buffer that is as long as MPI says and is not touched until the request is done.
        unsafe {
            let (from, world) = (self.from as c_int, ffi::RSMPI_COMM_WORLD);
            ffi::MPI_Improbe(from, tag, world, &mut flag, message.as_mut_ptr(), status.as_mut_ptr());
            if flag == 0 {
                return None;
            }
            ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count);
            let start = self.message.len();
            self.message.resize(start + count as usize, 0);
            let buffer = self.message[start..].as_mut_ptr().cast::<c_void>();
            ffi::MPI_Imrecv(buffer, count, ffi::RSMPI_UINT8_T, message.as_mut_ptr(), request.as_mut_ptr());
            Some((request.assume_init(), count as usize))
        }
    }
}
