//! The ranks of a run: one process, or those that `mpirun` has started together.

use anyhow::Result;
use burn_zero::comm::{Communicator, Solo};

/// This process's place among the ranks.
pub struct World {
    communicator: Box<dyn Communicator>,
    #[cfg(feature = "mpi")]
    session: Option<burn_zero::comm::mpi::Session>,
}

impl World {
    /// A world of one.
    pub fn alone() -> Self {
        Self {
            communicator: Box::new(Solo),
            #[cfg(feature = "mpi")]
            session: None,
        }
    }

    /// The world that this process was started in.
    ///
    /// # Errors
    /// If it was started by `mpirun` and cannot join.
    #[cfg(feature = "mpi")]
    pub fn join() -> Result<Self> {
        if !burn_zero::comm::mpi::launched() {
            return Ok(Self::alone());
        }
        let (session, group) = burn_zero::comm::mpi::Session::start()?;
        Ok(Self { communicator: Box::new(group), session: Some(session) })
    }

    /// The world that this process was started in.
    ///
    /// # Errors
    /// If it was started by `mpirun`, which this binary cannot join.
    #[cfg(not(feature = "mpi"))]
    pub fn join() -> Result<Self> {
        match std::env::var("OMPI_COMM_WORLD_SIZE") {
            Ok(size) if size != "1" => anyhow::bail!(
                "started by mpirun as one of {size} ranks, which needs a medqa that was built with the feature `mpi`: cargo \
                 build --release -p medqa --features mpi"
            ),
            _ => Ok(Self::alone()),
        }
    }

    /// Whether this is the rank that speaks and writes for all.
    pub fn is_first(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// Gives the communicator to whoever trains; what is left says goodbye at the end.
    pub fn divide(self) -> (Box<dyn Communicator>, Farewell) {
        #[cfg(feature = "mpi")]
        return (self.communicator, Farewell(self.session));
        #[cfg(not(feature = "mpi"))]
        (self.communicator, Farewell())
    }
}

/// Ends the job in peace. A rank that never does has failed, and ends all others.
#[cfg(feature = "mpi")]
pub struct Farewell(Option<burn_zero::comm::mpi::Session>);
/// Ends the job in peace.
#[cfg(not(feature = "mpi"))]
pub struct Farewell();

impl Farewell {
    /// Once everything is written.
    pub fn say(self) {
        #[cfg(feature = "mpi")]
        if let Some(session) = self.0 {
            session.finish();
        }
    }
}

/// Whether `mpirun` has started this process.
pub fn launched() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

/// How many ranks `mpirun` has started, and which one this is, before it joins them: 1 and 0 without `mpirun`.
pub fn started() -> (u64, u64) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    (number("OMPI_COMM_WORLD_SIZE").unwrap_or(1).max(1), number("OMPI_COMM_WORLD_RANK").unwrap_or(0))
}
