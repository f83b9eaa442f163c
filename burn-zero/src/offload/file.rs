//! Optimizer moments in a file, with only a bounded part of them in memory.

use crate::{
    Error,
    optimizer::cpu_adam::{AdamSlices, AdamUpdate, HalfCopy},
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

/// The number of values of each moment in a buffer. In the file a shard is a sequence of such blocks, each with its
/// `exp_avg` followed by its `exp_avg_sq`.
const FILE_BLOCK: usize = 256 << 10;
/// The number of buffers: one to read ahead, one to compute with, two to write behind.
const BUFFERS: usize = 4;

/// A rank's file of moments. A thread reads ahead and writes behind; the data passes through a few buffers instead of a
/// memory map.
pub(super) struct MomentFile {
    path: PathBuf,
    file: Arc<File>,
    /// The number of values allocated so far.
    allocated: u64,
    requests: Option<Sender<IoRequest>>,
    completions: Receiver<io::Result<IoCompletion>>,
    free: Vec<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

enum IoRequest {
    Read { start: u64, length: usize, buffer: Vec<f32> },
    Write { start: u64, buffer: Vec<f32> },
}

enum IoCompletion {
    Read(Vec<f32>),
    Written(Vec<f32>),
}

fn bytes(values: &[f32]) -> &[u8] {
    // SAFETY: the slice covers exactly the memory of `values`, whose borrow it keeps. f32 has no padding bytes, every
    // byte is a valid u8, and u8 needs no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: the slice covers exactly the memory of `values`, whose exclusive borrow it keeps. f32 has no padding
    // bytes, and every pattern of four bytes is a valid f32, so any write through the slice is allowed.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

fn io_loop(file: &File, requests: Receiver<IoRequest>, answers: &Sender<io::Result<IoCompletion>>) {
    for request in requests {
        let answer = match request {
            IoRequest::Read { start, length, mut buffer } => {
                buffer.resize(length, 0.0);
                file.read_exact_at(bytes_mut(&mut buffer), 4 * start).map(|()| IoCompletion::Read(buffer))
            }
            IoRequest::Write { start, buffer } => {
                file.write_all_at(bytes(&buffer), 4 * start).map(|()| IoCompletion::Written(buffer))
            }
        };
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// Returns the blocks of a shard of `n` values: offset in the shard and length of each.
fn blocks(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n.div_ceil(FILE_BLOCK)).map(move |i| (i * FILE_BLOCK, FILE_BLOCK.min(n - i * FILE_BLOCK)))
}

/// Creates a file for one rank; `what` is its extension.
fn create_file(folder: &Path, rank: usize, what: &str) -> Result<(PathBuf, Arc<File>), Error> {
    // The number keeps the files of two engines in one process apart.
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("rank-{rank}-{}-{number}.{what}", std::process::id()));
    let wrong = |source| Error::Path { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(wrong)?;
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
    Ok((path.clone(), Arc::new(options.map_err(wrong)?)))
}

impl MomentFile {
    /// Creates the file and starts the thread that reads and writes it.
    ///
    /// # Errors
    /// Returns [`Error::Path`] if the file cannot be created.
    pub fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create_file(folder, rank, "states")?;
        let wrong = |source| Error::Path { path: path.clone(), source };
        let ((requests, asked), (answer, answers)) = (channel(), channel());
        let shared = file.clone();
        let work = move || io_loop(&shared, asked, &answer);
        let thread = std::thread::Builder::new().name("optimizer states".to_owned()).spawn(work).map_err(wrong)?;
        let (requests, thread) = (Some(requests), Some(thread));
        Ok(Self { path, file, allocated: 0, requests, completions: answers, free: vec![Vec::new(); BUFFERS], thread })
    }

    fn wrong(&self, source: io::Error) -> Error {
        Error::Path { path: self.path.clone(), source }
    }

    /// Allocates space for the moments of `n` values, initializes it and returns its offset.
    pub fn allocate(&mut self, n: usize) -> Result<u64, Error> {
        let start = self.allocated;
        self.allocated += 2 * n as u64;
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

    /// Frees all allocated space.
    pub fn clear(&mut self) {
        self.allocated = 0;
    }

    fn submit(&self, request: IoRequest) {
        if let Some(requests) = &self.requests {
            // If the thread has ended, waiting for its completion reports that.
            let _ = requests.send(request);
        }
    }

    /// Waits for the next block that has been read; buffers of completed writes become free.
    fn next_read(&mut self) -> Result<Vec<f32>, Error> {
        loop {
            match self.next_completion()? {
                IoCompletion::Read(buffer) => return Ok(buffer),
                IoCompletion::Written(buffer) => self.free.push(buffer),
            }
        }
    }

    fn next_completion(&self) -> Result<IoCompletion, Error> {
        let ended = || io::Error::other("the thread that reads and writes has ended");
        self.completions.recv().unwrap_or_else(|_| Err(ended())).map_err(|source| self.wrong(source))
    }

    /// Returns a free buffer; waits for a write to complete if there is none.
    fn free_buffer(&mut self) -> Result<Vec<f32>, Error> {
        loop {
            if let Some(buffer) = self.free.pop() {
                return Ok(buffer);
            }
            match self.next_completion()? {
                IoCompletion::Written(buffer) => self.free.push(buffer),
                IoCompletion::Read(_) => unreachable!("only one block is read ahead at a time"),
            }
        }
    }

    /// Updates a shard block by block: while one block is updated, the next one is read and the previous one is
    /// written.
    pub fn update(
        &mut self,
        start: u64,
        update: &AdamUpdate,
        parameter: &mut [f32],
        gradient: &[f32],
    ) -> Result<(), Error> {
        let all: Vec<_> = blocks(parameter.len()).collect();
        let place = |(at, _): (usize, usize)| start + 2 * at as u64;
        let read = |states: &mut Self, block: (usize, usize)| -> Result<(), Error> {
            let buffer = states.free_buffer()?;
            states.submit(IoRequest::Read { start: place(block), length: 2 * block.1, buffer });
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
            update.apply(AdamSlices { parameter, gradient, exp_avg, exp_avg_sq }, HalfCopy::None);
            self.submit(IoRequest::Write { start: place((at, length)), buffer });
        }
        Ok(())
    }

    /// Reads a moment of a shard; all writes must have been completed by [`MomentFile::flush`].
    pub fn read(&self, start: u64, n: usize, slot: usize) -> Result<Vec<f32>, Error> {
        let mut moment = vec![0.0; n];
        for (at, length) in blocks(n) {
            let begin = 4 * (start + (2 * at + slot * length) as u64);
            let found = self.file.read_exact_at(bytes_mut(&mut moment[at..at + length]), begin);
            found.map_err(|source| self.wrong(source))?;
        }
        Ok(moment)
    }

    /// Waits until all writes are complete.
    pub fn flush(&mut self) -> Result<(), Error> {
        while self.free.len() < BUFFERS {
            match self.next_completion()? {
                IoCompletion::Written(buffer) | IoCompletion::Read(buffer) => self.free.push(buffer),
            }
        }
        Ok(())
    }

    /// Overwrites both moments of a shard.
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

/// A rank's file of offloaded weights: byte strings of fixed length, each at an offset of its own.
pub(crate) struct OffloadFile {
    path: PathBuf,
    file: Arc<File>,
    allocated: u64,
}

impl OffloadFile {
    /// Creates the file.
    ///
    /// # Errors
    /// Returns [`Error::Path`] if the file cannot be created.
    pub fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create_file(folder, rank, "weights")?;
        Ok(Self { path, file, allocated: 0 })
    }

    /// Allocates space for `length` bytes and returns its offset.
    pub fn allocate(&mut self, length: usize) -> u64 {
        self.allocated += length as u64;
        self.allocated - length as u64
    }

    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all_at(bytes, start).map_err(|source| Error::Path { path: self.path.clone(), source })
    }

    /// Returns a closure that reads `length` bytes; any thread can call it.
    pub fn reader(&self, start: u64, length: usize) -> impl FnOnce() -> Result<Vec<u8>, Error> + Send + 'static {
        let (path, file) = (self.path.clone(), self.file.clone());
        move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, start).map_err(|source| Error::Path { path, source })?;
            Ok(bytes)
        }
    }
}

impl Drop for OffloadFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for MomentFile {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // The file belongs to this process only; a checkpoint is what preserves the states.
        let _ = std::fs::remove_file(&self.path);
    }
}
