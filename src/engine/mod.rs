//! Moving data between requests and files. Knows files and threads, but no SPDK.
//!
//! A [`Request`] travels: a [`port::Port`] (one per reactor thread) gathers what is submitted during a poll and hands it over
//! with one atomic operation; workers of the [`threads::Pool`] sort requests into lanes, execute them and push each answer to
//! the port it came from; the port's next poll takes all answers at once.

pub mod port;
pub mod request;
pub mod sched;
pub mod stats;
pub mod target;
pub mod threads;
pub mod transfer;
pub mod uring;

pub use port::Port;
pub use request::{Answer, Op, Request};
pub use target::Target;
pub use threads::{Lane, Pool, PoolOptions};
pub use uring::Uring;
