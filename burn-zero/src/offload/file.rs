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
/// The largest number of requests in flight while a block is updated: one to read ahead, two to write behind.
const MAX_IN_FLIGHT: usize = 3;

/// A rank's file of moments. A thread reads ahead and writes behind; the data passes through a few buffers instead of a
/// memory map.
pub(super) struct MomentFile {
    path: PathBuf,
    file: Arc<File>,
    /// The number of values allocated so far.
    allocated: u64,
    requests: Option<Sender<IoRequest>>,
    completions: Receiver<IoCompletion>,
    /// The number of requests without completion.
    in_flight: usize,
    /// Buffers for further requests.
    free: Vec<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

enum IoRequest {
    Read { start: u64, length: usize, buffer: Vec<f32> },
    Write { start: u64, buffer: Vec<f32> },
}

/// A completed request; its buffer comes back whether it succeeded or not.
struct IoCompletion {
    is_read: bool,
    buffer: Vec<f32>,
    result: io::Result<()>,
}

/// A part of a shard: the offset of its first value in the shard and the number of its values.
#[derive(Clone, Copy)]
struct FileBlock {
    offset: usize,
    length: usize,
}

impl FileBlock {
    /// Returns the offset in the file, in values, for a shard whose moments start at `start`.
    fn position(self, start: u64) -> u64 {
        start + 2 * self.offset as u64
    }
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

fn io_loop(file: &File, requests: Receiver<IoRequest>, completions: &Sender<IoCompletion>) {
    for request in requests {
        let completion = match request {
            IoRequest::Read { start, length, mut buffer } => {
                buffer.resize(length, 0.0);
                let result = file.read_exact_at(bytes_mut(&mut buffer), 4 * start);
                IoCompletion { is_read: true, buffer, result }
            }
            IoRequest::Write { start, buffer } => {
                let result = file.write_all_at(bytes(&buffer), 4 * start);
                IoCompletion { is_read: false, buffer, result }
            }
        };
        if completions.send(completion).is_err() {
            return;
        }
    }
}

/// Returns the blocks of a shard of `n` values.
fn blocks(n: usize) -> impl Iterator<Item = FileBlock> {
    let offsets = (0..n).step_by(FILE_BLOCK);
    offsets.map(move |offset| FileBlock { offset, length: FILE_BLOCK.min(n - offset) })
}

/// Creates a file for one rank.
fn create_file(folder: &Path, rank: usize, extension: &str) -> Result<(PathBuf, Arc<File>), Error> {
    // The number keeps the files of two engines in one process apart.
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("rank-{rank}-{}-{number}.{extension}", std::process::id()));
    let wrong = |source| Error::Io { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(wrong)?;
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
    Ok((path.clone(), Arc::new(options.map_err(wrong)?)))
}

impl MomentFile {
    /// Creates the file and starts the thread that reads and writes it.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be created.
    pub(super) fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create_file(folder, rank, "states")?;
        let wrong = |source| Error::Io { path: path.clone(), source };
        let (requests, submitted) = channel();
        let (completed, completions) = channel();
        let shared = file.clone();
        let work = move || io_loop(&shared, submitted, &completed);
        let thread = std::thread::Builder::new().name("optimizer states".to_owned()).spawn(work).map_err(wrong)?;
        let (requests, thread) = (Some(requests), Some(thread));
        Ok(Self { path, file, allocated: 0, requests, completions, in_flight: 0, free: Vec::new(), thread })
    }

    fn wrong(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    /// Allocates space for the moments of `n` values, initializes it and returns its offset.
    pub(super) fn allocate(&mut self, n: usize) -> Result<u64, Error> {
        let start = self.allocated;
        self.allocated += 2 * n as u64;
        let mut buffer = self.free.pop().unwrap_or_default();
        let mut result = Ok(());
        for block in blocks(n) {
            buffer.clear();
            buffer.resize(block.length, -0.0);
            buffer.resize(2 * block.length, 0.0);
            result = result.and_then(|()| self.file.write_all_at(bytes(&buffer), 4 * block.position(start)));
        }
        self.free.push(buffer);
        result.map(|()| start).map_err(|source| self.wrong(source))
    }

    /// Frees all allocated space.
    pub(super) fn clear(&mut self) {
        self.allocated = 0;
    }

    fn submit(&mut self, request: IoRequest) {
        self.in_flight += 1;
        if let Some(requests) = &self.requests {
            // If the thread has ended, waiting for its completion reports that.
            let _ = requests.send(request);
        }
    }

    fn submit_read(&mut self, start: u64, block: FileBlock) -> Result<(), Error> {
        let buffer = self.free_buffer()?;
        self.submit(IoRequest::Read { start: block.position(start), length: 2 * block.length, buffer });
        Ok(())
    }

    /// Waits for the next completed request; keeps the buffer if it is not a block that has been read.
    fn next_completion(&mut self) -> Result<Option<Vec<f32>>, Error> {
        let Ok(IoCompletion { is_read, buffer, result }) = self.completions.recv() else {
            self.in_flight = 0;
            return Err(self.wrong(io::Error::other("the thread that reads and writes has ended")));
        };
        self.in_flight -= 1;
        match result {
            Ok(()) if is_read => Ok(Some(buffer)),
            result => {
                self.free.push(buffer);
                result.map(|()| None).map_err(|source| self.wrong(source))
            }
        }
    }

    /// Waits for the next block that has been read.
    fn next_read(&mut self) -> Result<Vec<f32>, Error> {
        loop {
            if let Some(buffer) = self.next_completion()? {
                return Ok(buffer);
            }
        }
    }

    /// Returns a buffer for a request; waits for a write to complete if too many requests are in flight.
    fn free_buffer(&mut self) -> Result<Vec<f32>, Error> {
        while self.in_flight >= MAX_IN_FLIGHT {
            // A block is read ahead only after the one before it has been received.
            self.next_completion()?;
        }
        Ok(self.free.pop().unwrap_or_default())
    }

    /// Updates a shard block by block: while one block is updated, the next one is read and the previous one is
    /// written. After an error no request is in flight, and some of the moments are those before the update.
    pub(super) fn update(
        &mut self,
        start: u64,
        update: &AdamUpdate,
        parameter: &mut [f32],
        gradient: &[f32],
    ) -> Result<(), Error> {
        let result = self.update_blocks(start, update, parameter, gradient);
        if result.is_err() {
            // The first error is the one to report.
            let _ = self.flush();
        }
        result
    }

    fn update_blocks(
        &mut self,
        start: u64,
        update: &AdamUpdate,
        parameter: &mut [f32],
        gradient: &[f32],
    ) -> Result<(), Error> {
        let mut ahead = blocks(parameter.len());
        if let Some(first) = ahead.next() {
            self.submit_read(start, first)?;
        }
        for block in blocks(parameter.len()) {
            let mut buffer = self.next_read()?;
            if let Some(next) = ahead.next() {
                self.submit_read(start, next)?;
            }
            let (exp_avg, exp_avg_sq) = buffer.split_at_mut(block.length);
            let range = block.offset..block.offset + block.length;
            let (parameter, gradient) = (&mut parameter[range.clone()], &gradient[range]);
            update.apply(AdamSlices { parameter, gradient, exp_avg, exp_avg_sq }, HalfCopy::None);
            self.submit(IoRequest::Write { start: block.position(start), buffer });
        }
        Ok(())
    }

    /// Reads a moment of a shard; all writes must have been completed by [`MomentFile::flush`].
    pub(super) fn read(&self, start: u64, n: usize, slot: usize) -> Result<Vec<f32>, Error> {
        let mut moment = vec![0.0; n];
        for block @ FileBlock { offset, length } in blocks(n) {
            let begin = 4 * (block.position(start) + (slot * length) as u64);
            let read = self.file.read_exact_at(bytes_mut(&mut moment[offset..offset + length]), begin);
            read.map_err(|source| self.wrong(source))?;
        }
        Ok(moment)
    }

    /// Waits until no request is in flight.
    ///
    /// # Errors
    /// Returns the first error since the last update or flush.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        while self.in_flight > 0 {
            let completion = self.next_completion();
            result = result.and(completion.map(|read| self.free.extend(read)));
        }
        result
    }

    /// Overwrites both moments of a shard.
    pub(super) fn write(&mut self, start: u64, moments: [&[f32]; 2]) -> Result<(), Error> {
        for block @ FileBlock { offset, length } in blocks(moments[0].len()) {
            let begin = 4 * block.position(start);
            for (slot, moment) in moments.iter().enumerate() {
                let values = bytes(&moment[offset..offset + length]);
                let written = self.file.write_all_at(values, begin + (4 * slot * length) as u64);
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
    /// Returns [`Error::Io`] if the file cannot be created.
    pub(crate) fn create(folder: &Path, rank: usize) -> Result<Self, Error> {
        let (path, file) = create_file(folder, rank, "weights")?;
        Ok(Self { path, file, allocated: 0 })
    }

    /// Allocates space for `length` bytes and returns its offset.
    pub(crate) fn allocate(&mut self, length: usize) -> u64 {
        self.allocated += length as u64;
        self.allocated - length as u64
    }

    pub(crate) fn write(&self, start: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all_at(bytes, start).map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// Returns a closure that reads `length` bytes; any thread can call it.
    pub(crate) fn reader(&self, start: u64, length: usize) -> impl FnOnce() -> Result<Vec<u8>, Error> + Send + 'static {
        let (path, file) = (self.path.clone(), self.file.clone());
        move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, start).map_err(|source| Error::Io { path, source })?;
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
