//! The command line as a user meets it: every verb on a small random model, and every mistake as one line.

mod adapters;
mod before;
mod chat;
mod data;
mod devices;
mod doctor;
mod foreign;
mod methods;
mod mistakes;
mod model;
#[cfg(feature = "mpi")]
mod mpi;
mod quickstart;
mod resume;
mod run;
mod spoiled;
mod train;
mod work;
