//! Moving data between requests and files. Knows files and threads, but no SPDK.
//!
//! A [`Request`] travels: a [`port::Port`] (one per reactor thread) gathers what is submitted during a poll and hands it over
//! with one atomic operation; workers of the [`threads::Pool`] sort requests into lanes (one for each server of a file), execute them and push each answer to
//! the port it came from; the port's next poll takes all answers at once.

#[doc(hidden)]
pub mod errand;
pub mod guard;
mod keeper;
pub mod lane;
pub mod lockable;
#[doc(hidden)]
pub mod order;
pub mod port;
pub mod request;
pub mod retry;
#[doc(hidden)]
pub mod rules;
#[doc(hidden)]
pub mod sched;
pub mod state;
pub mod stats;
mod supervisor;
pub mod target;
pub mod threads;
pub mod transfer;
pub mod uring;
mod worker;

pub use guard::Guard;
pub use keeper::Care;
pub use lane::LaneMap;
pub use port::Port;
pub use request::{Answer, Op, Request};
pub use target::Target;
pub use threads::{Pool, PoolOptions, Volume};
pub use uring::{Uring, UringOptions};
