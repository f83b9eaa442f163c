//! The ranks of a run: one process, or those that `mpirun` has started together.

use anyhow::Result;
use burn_zero::comm::{Communicator, Solo};

/// The process group that this process belongs to.
pub(crate) struct World {
    communicator: Box<dyn Communicator>,
    #[cfg(feature = "mpi")]
    session: Option<burn_zero::comm::mpi::Session>,
}

impl World {
    /// Returns a group of this process alone.
    pub(crate) fn single_process() -> Self {
        Self {
            communicator: Box::new(Solo),
            #[cfg(feature = "mpi")]
            session: None,
        }
    }

    /// Joins the process group that this process was started in.
    ///
    /// # Errors
    /// If it was started by `mpirun` and cannot join.
    #[cfg(feature = "mpi")]
    pub(crate) fn join() -> Result<Self> {
        if !burn_zero::comm::mpi::launched_by_mpirun() {
            return Ok(Self::single_process());
        }
        let (session, group) = burn_zero::comm::mpi::Session::init()?;
        Ok(Self { communicator: Box::new(group), session: Some(session) })
    }

    /// Joins the process group that this process was started in.
    ///
    /// # Errors
    /// If it was started by `mpirun`, which this binary cannot join.
    #[cfg(not(feature = "mpi"))]
    pub(crate) fn join() -> Result<Self> {
        match std::env::var("OMPI_COMM_WORLD_SIZE") {
            Ok(size) if size != "1" => anyhow::bail!(
                "started by mpirun as one of {size} ranks, which needs a medqa that was built with the feature `mpi`: cargo \
                 build --release -p medqa --features mpi"
            ),
            _ => Ok(Self::single_process()),
        }
    }

    /// Returns whether this is rank 0, which prints and writes for all.
    pub(crate) fn is_rank_zero(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// Splits into the communicator, for the engine, and the guard that leaves the MPI job at the end.
    pub(crate) fn into_parts(self) -> (Box<dyn Communicator>, MpiGuard) {
        #[cfg(feature = "mpi")]
        return (self.communicator, MpiGuard(self.session));
        #[cfg(not(feature = "mpi"))]
        (self.communicator, MpiGuard())
    }
}

/// A guard of the MPI job. A rank that ends without [`MpiGuard::finalize`] counts as failed, and `mpirun` ends all
/// others.
#[cfg(feature = "mpi")]
pub(crate) struct MpiGuard(Option<burn_zero::comm::mpi::Session>);
/// A guard that does nothing, without MPI.
#[cfg(not(feature = "mpi"))]
pub(crate) struct MpiGuard();

impl MpiGuard {
    /// Leaves the MPI job. Called once everything is written.
    pub(crate) fn finalize(self) {
        #[cfg(feature = "mpi")]
        if let Some(session) = self.0 {
            session.finalize();
        }
    }
}

/// Returns whether `mpirun` started this process.
pub(crate) fn launched_by_mpirun() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

/// The rank of this process and the number of ranks, known before the process joins the group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RankInfo {
    /// The rank; 0 without `mpirun`.
    pub rank: u64,
    /// The number of ranks; 1 without `mpirun`.
    pub world_size: u64,
}

impl RankInfo {
    /// Reads the environment variables that `mpirun` sets.
    pub(crate) fn from_env() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let world_size = number("OMPI_COMM_WORLD_SIZE").unwrap_or(1).max(1);
        Self { rank: number("OMPI_COMM_WORLD_RANK").unwrap_or(0), world_size }
    }
}
