//! End-to-end tests of the command line: every verb on a small random model, and one-line errors for every mistake.

mod adalora;
mod adapters;
mod before;
mod chat;
mod compatible;
mod conversations;
mod data;
mod devices;
mod doctor;
mod files;
mod finite;
mod foreign;
mod generate;
mod generate_methods;
mod inputs;
mod methods;
mod mistakes;
mod mock_api;
mod model;
#[cfg(feature = "mpi")]
mod mpi;
mod pipeline;
mod prepare;
mod quickstart;
mod resume;
mod run;
mod spoiled;
mod tokens;
mod train;
mod work;
