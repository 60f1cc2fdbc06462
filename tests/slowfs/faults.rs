//! What is wrong, as a file of words says it.
//!
//! Each line is a rule; what is on one line belongs together, several lines apply one beside the other:
//! - `latency_us=N`: every read and write takes that much longer; `hang`: they wait until the file says something else;
//!   `short=N`: they move N bytes at most; `error=ERRNO`: they fail; `full`: writes fail with ENOSPC;
//!   `sync_error=ERRNO`: fsync fails
//! - `range=START-END`: only what touches these bytes; `ost=N`: only what touches bytes on that OST; `reads`, `writes`: only
//!   those; `times=N`: N times, then no more
//!
//! What happens once, each time the number is another one:
//! - `evict_ost=N`: reads and writes in flight fail with EIO (with `ost=` on the line: those to that OST), group locks are lost,
//!   and the next fsync fails with EIO
//! - `evict_mds=N`: record locks are lost, and the next question for one fails with EIO
//!
//! Of calls that are no I/O:
//! - `stat_error=ERRNO`: fstat fails; `lock_error=ERRNO`: nobody gets a record lock; `truncate_us=N`: a truncate takes that much longer
//!
//! How the filesystem is:
//! - `stripes=COUNT:SIZE`: which OST has which bytes, where BACKING.lov does not tell; `osts=N`: how many there are (4)
//! - `no_fallocate`: as on ZFS servers; `fid=N`: another file stands there now; `ignore_setstripe` (the defaults
//!   instead), `skip_setstripe` (nothing yet), `ignore_pool`, `default_dom` (a default layout with its
//!   first part on the metadata server): what some sites do with new files

use crate::layout::Map;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What is asked of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Sync,
}

/// What is asked, and where it lies.
pub struct Io {
    pub kind: Kind,
    pub offset: u64,
    pub len: usize,
    pub osts: Vec<u32>,
}

/// One line.
#[derive(Default)]
pub struct Rule {
    pub latency: Duration,
    pub hang: bool,
    pub short: Option<usize>,
    pub error: Option<i32>,
    full: bool,
    sync_error: Option<i32>,
    range: Option<(u64, u64)>,
    ost: Option<u32>,
    only: Option<Kind>,
    left: Option<AtomicU64>,
}

impl Rule {
    /// Whether it is about this I/O; if so, that is one time less.
    fn applies(&self, io: &Io) -> bool {
        let everywhere = self.range.is_none() && self.ost.is_none();
        let general = !self.latency.is_zero() || self.hang || self.short.is_some() || self.error.is_some();
        let about = match io.kind {
            Kind::Sync => self.sync_error.is_some() || (general && everywhere && self.only.is_none()),
            kind => (general || (self.full && kind == Kind::Write)) && self.only.is_none_or(|only| only == kind),
        };
        let (start, end) = self.range.unwrap_or((0, u64::MAX));
        let there = io.kind == Kind::Sync
            || (io.offset < end
                && io.offset + io.len as u64 > start
                && self.ost.is_none_or(|ost| io.osts.contains(&ost)));
        about && there && self.left.as_ref().is_none_or(one_less)
    }

    /// What it fails with.
    pub fn errno(&self, kind: Kind) -> Option<i32> {
        match kind {
            Kind::Sync => self.sync_error.or(self.error),
            Kind::Write if self.full => Some(libc::ENOSPC),
            _ => self.error,
        }
    }
}

fn one_less(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
}

/// All of it.
#[derive(Default)]
pub struct Faults {
    rules: Vec<Rule>,
    pub stripes: Option<Map>,
    pub osts: Option<u32>,
    pub no_fallocate: bool,
    pub fid: Option<u32>,
    pub ignore_setstripe: bool,
    pub skip_setstripe: bool,
    pub ignore_pool: bool,
    pub default_dom: bool,
    pub stat_error: Option<i32>,
    pub lock_error: Option<i32>,
    pub truncate_latency: Duration,
    /// The number, and which OST.
    pub evict_ost: Option<(u64, Option<u32>)>,
    pub evict_mds: Option<u64>,
}

impl Faults {
    pub fn parse(text: &[u8]) -> Faults {
        let mut faults = Faults::default();
        for line in std::str::from_utf8(text).expect("text").lines() {
            let mut rule = Rule::default();
            let mut evict_ost = None;
            for word in line.split_whitespace() {
                let (key, value) = word.split_once('=').unwrap_or((word, ""));
                let number = || value.parse::<u64>().unwrap_or_else(|_| panic!("{word}: not a number"));
                let errno = || Some(number() as i32);
                match key {
                    "latency_us" => rule.latency = Duration::from_micros(number()),
                    "hang" => rule.hang = true,
                    "short" => rule.short = Some(number() as usize),
                    "error" => rule.error = errno(),
                    "full" => rule.full = true,
                    "sync_error" => rule.sync_error = errno(),
                    "range" => {
                        let (start, end) = value.split_once('-').expect("START-END");
                        rule.range = Some((start.parse().expect("a number"), end.parse().expect("a number")));
                    }
                    "ost" => rule.ost = Some(number() as u32),
                    "reads" => rule.only = Some(Kind::Read),
                    "writes" => rule.only = Some(Kind::Write),
                    "times" => rule.left = Some(AtomicU64::new(number())),
                    "evict_ost" => evict_ost = Some(number()),
                    "evict_mds" => faults.evict_mds = Some(number()),
                    "stripes" => {
                        let (count, size) = value.split_once(':').expect("COUNT:SIZE");
                        let size = size.parse().expect("a number");
                        faults.stripes = Some(Map::striped(count.parse().expect("a number"), size));
                    }
                    "stat_error" => faults.stat_error = errno(),
                    "lock_error" => faults.lock_error = errno(),
                    "truncate_us" => faults.truncate_latency = Duration::from_micros(number()),
                    "osts" => faults.osts = Some(number() as u32),
                    "no_fallocate" => faults.no_fallocate = true,
                    "fid" => faults.fid = Some(number() as u32),
                    "ignore_setstripe" => faults.ignore_setstripe = true,
                    "skip_setstripe" => faults.skip_setstripe = true,
                    "default_dom" => faults.default_dom = true,
                    "ignore_pool" => faults.ignore_pool = true,
                    other => panic!("unknown fault {other}"),
                }
            }
            if let Some(number) = evict_ost {
                faults.evict_ost = Some((number, rule.ost));
            }
            faults.rules.push(rule);
        }
        faults
    }

    /// Whether some I/O hangs: an OST is gone.
    pub fn hangs(&self) -> bool {
        let is_over = |rule: &Rule| rule.left.as_ref().is_some_and(|left| left.load(Ordering::Relaxed) == 0);
        self.rules.iter().any(|rule| rule.hang && !is_over(rule))
    }

    /// The rules about an I/O. Asking counts as one time.
    pub fn matching<'a>(&'a self, io: &Io) -> Vec<&'a Rule> {
        self.rules.iter().filter(|rule| rule.applies(io)).collect()
    }
}

/// A file's content, parsed anew whenever the file is another one or was changed.
pub struct Watched<T> {
    path: PathBuf,
    parse: fn(&[u8]) -> T,
    /// Inode, size and time of change of what was parsed.
    stamp: Option<(u64, u64, i64, i64)>,
    value: Arc<T>,
}

impl<T> Watched<T> {
    pub fn new(path: &Path, parse: fn(&[u8]) -> T) -> Self {
        Watched { path: path.to_owned(), parse, stamp: None, value: Arc::new(parse(b"")) }
    }

    /// What it says now. A file that is not there is an empty one.
    pub fn get(&mut self) -> Arc<T> {
        let stamp = std::fs::metadata(&self.path).ok().map(|m| (m.ino(), m.size(), m.ctime(), m.ctime_nsec()));
        if stamp != self.stamp {
            let text = if stamp.is_some() { std::fs::read(&self.path).unwrap_or_default() } else { Vec::new() };
            self.value = Arc::new((self.parse)(&text));
            self.stamp = stamp;
        }
        self.value.clone()
    }
}
