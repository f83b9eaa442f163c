//! Moments in a file, a bounded part of them in memory.

use crate::{
    Error,
    optimizer::cpu_adam::{Copy, Slices, Update},
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

/// Values of each moment in a buffer. In the file a piece is a row of such blocks, `exp_avg` then `exp_avg_sq` in each.
const BLOCK: usize = 256 << 10;
/// Buffers: one that is read ahead, one that is computed with, two that are written behind.
const BUFFERS: usize = 4;

/// A rank's file of moments. Reading ahead and writing behind is a thread's work; bytes go through a few buffers, not through
/// mapped pages.
pub(super) struct States {
    path: PathBuf,
    file: Arc<File>,
    /// Values that have been given away.
    end: u64,
    requests: Option<Sender<Request>>,
    answers: Receiver<io::Result<Answer>>,
    free: Vec<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    Read { start: u64, length: usize, buffer: Vec<f32> },
    Write { start: u64, buffer: Vec<f32> },
}

enum Answer {
    Read(Vec<f32>),
    Written(Vec<f32>),
}

fn bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four bytes without padding, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above, and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

fn serve(file: &File, requests: Receiver<Request>, answers: &Sender<io::Result<Answer>>) {
    for request in requests {
        let answer = match request {
            Request::Read { start, length, mut buffer } => {
                buffer.resize(length, 0.0);
                file.read_exact_at(bytes_mut(&mut buffer), 4 * start).map(|()| Answer::Read(buffer))
            }
            Request::Write { start, buffer } => {
                file.write_all_at(bytes(&buffer), 4 * start).map(|()| Answer::Written(buffer))
            }
        };
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// The blocks of a piece of `n` values: where each starts in the piece, and how long it is.
fn blocks(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n.div_ceil(BLOCK)).map(move |i| (i * BLOCK, BLOCK.min(n - i * BLOCK)))
}

/// A new file of a rank's own.
fn create(folder: &Path, rank: usize, what: &str) -> Result<(PathBuf, Arc<File>), Error> {
    // Two engines of one process must not share a file.
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("rank-{rank}-{}-{number}.{what}", std::process::id()));
    let wrong = |source| Error::Path { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(wrong)?;
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
    Ok((path.clone(), Arc::new(options.map_err(wrong)?)))
}

impl States {
    /// # Errors
    /// [`Error::Path`] if the file cannot be made.
    pub fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create(folder, rank, "states")?;
        let wrong = |source| Error::Path { path: path.clone(), source };
        let ((requests, asked), (answer, answers)) = (channel(), channel());
        let shared = file.clone();
        let work = move || serve(&shared, asked, &answer);
        let thread = std::thread::Builder::new().name("optimizer states".to_owned()).spawn(work).map_err(wrong)?;
        let (requests, thread) = (Some(requests), Some(thread));
        Ok(Self { path, file, end: 0, requests, answers, free: vec![Vec::new(); BUFFERS], thread })
    }

    fn wrong(&self, source: io::Error) -> Error {
        Error::Path { path: self.path.clone(), source }
    }

    /// A place for the moments of `n` values, filled with what they are before the first update.
    pub fn allocate(&mut self, n: usize) -> Result<u64, Error> {
        let start = self.end;
        self.end += 2 * n as u64;
        let mut buffer = self.free.pop().unwrap_or_default();
        let mut result = Ok(());
        for (at, length) in blocks(n) {
            buffer.clear();
            buffer.resize(length, -0.0);
            buffer.resize(2 * length, 0.0);
            result = result.and_then(|()| self.file.write_all_at(bytes(&buffer), 4 * (start + 2 * at as u64)));
        }
        self.free.push(buffer);
        result.map(|()| start).map_err(|source| self.wrong(source))
    }

    /// Gives all places back.
    pub fn clear(&mut self) {
        self.end = 0;
    }

    fn ask(&self, request: Request) {
        if let Some(requests) = &self.requests {
            // A thread that has ended shows when its answer is waited for.
            let _ = requests.send(request);
        }
    }

    /// Takes answers until one was read; buffers that were written are free again.
    fn next_read(&mut self) -> Result<Vec<f32>, Error> {
        loop {
            match self.answer()? {
                Answer::Read(buffer) => return Ok(buffer),
                Answer::Written(buffer) => self.free.push(buffer),
            }
        }
    }

    fn answer(&self) -> Result<Answer, Error> {
        let ended = || io::Error::other("the thread that reads and writes has ended");
        self.answers.recv().unwrap_or_else(|_| Err(ended())).map_err(|source| self.wrong(source))
    }

    /// A buffer that no one uses.
    fn buffer(&mut self) -> Result<Vec<f32>, Error> {
        loop {
            if let Some(buffer) = self.free.pop() {
                return Ok(buffer);
            }
            match self.answer()? {
                Answer::Written(buffer) => self.free.push(buffer),
                Answer::Read(_) => unreachable!("one block is read ahead at a time"),
            }
        }
    }

    /// Updates a piece block by block: the next block is read and the last one written while one is computed.
    pub fn update(
        &mut self,
        start: u64,
        update: &Update,
        (parameter, gradient): (&mut [f32], &[f32]),
    ) -> Result<(), Error> {
        let all: Vec<_> = blocks(parameter.len()).collect();
        let place = |(at, _): (usize, usize)| start + 2 * at as u64;
        let read = |states: &mut Self, block: (usize, usize)| -> Result<(), Error> {
            let buffer = states.buffer()?;
            states.ask(Request::Read { start: place(block), length: 2 * block.1, buffer });
            Ok(())
        };
        if let Some(&first) = all.first() {
            read(self, first)?;
        }
        for (i, &(at, length)) in all.iter().enumerate() {
            let mut buffer = self.next_read()?;
            if let Some(&next) = all.get(i + 1) {
                read(self, next)?;
            }
            let (exp_avg, exp_avg_sq) = buffer.split_at_mut(length);
            let range = at..at + length;
            let (parameter, gradient) = (&mut parameter[range.clone()], &gradient[range]);
            update.apply(Slices { parameter, gradient, exp_avg, exp_avg_sq }, Copy::None);
            self.ask(Request::Write { start: place((at, length)), buffer });
        }
        Ok(())
    }

    /// A moment of a piece, once [`States::settle`] has seen that everything is written.
    pub fn read(&self, start: u64, n: usize, slot: usize) -> Result<Vec<f32>, Error> {
        let mut moment = vec![0.0; n];
        for (at, length) in blocks(n) {
            let begin = 4 * (start + (2 * at + slot * length) as u64);
            let found = self.file.read_exact_at(bytes_mut(&mut moment[at..at + length]), begin);
            found.map_err(|source| self.wrong(source))?;
        }
        Ok(moment)
    }

    /// Waits until everything is written.
    pub fn settle(&mut self) -> Result<(), Error> {
        while self.free.len() < BUFFERS {
            match self.answer()? {
                Answer::Written(buffer) | Answer::Read(buffer) => self.free.push(buffer),
            }
        }
        Ok(())
    }

    /// Replaces both moments of a piece.
    pub fn write(&mut self, start: u64, moments: [&[f32]; 2]) -> Result<(), Error> {
        for (at, length) in blocks(moments[0].len()) {
            let begin = 4 * (start + 2 * at as u64);
            for (k, moment) in moments.iter().enumerate() {
                let written = self.file.write_all_at(bytes(&moment[at..at + length]), begin + (4 * k * length) as u64);
                written.map_err(|source| self.wrong(source))?;
            }
        }
        Ok(())
    }
}

/// A rank's file of weights: byte strings of fixed length, each at a place of its own.
pub(crate) struct Shelf {
    path: PathBuf,
    file: Arc<File>,
    end: u64,
}

impl Shelf {
    /// # Errors
    /// [`Error::Path`] if the file cannot be made.
    pub fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create(folder, rank, "weights")?;
        Ok(Self { path, file, end: 0 })
    }

    /// A new place for so many bytes.
    pub fn allocate(&mut self, length: usize) -> u64 {
        self.end += length as u64;
        self.end - length as u64
    }

    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all_at(bytes, start).map_err(|source| Error::Path { path: self.path.clone(), source })
    }

    /// What reads so many bytes, on whichever thread.
    pub fn reader(&self, start: u64, length: usize) -> impl FnOnce() -> Result<Vec<u8>, Error> + Send + 'static {
        let (path, file) = (self.path.clone(), self.file.clone());
        move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, start).map_err(|source| Error::Path { path, source })?;
            Ok(bytes)
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for States {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // The states are those of a process: a checkpoint keeps them.
        let _ = std::fs::remove_file(&self.path);
    }
}
