//! Names and places of threads.

/// Lets the calling thread run on every processor but those in `excluded`, or on all when nothing else is left.
///
/// A thread inherits the affinity of the one that starts it, and reactors are pinned to one core each: a worker that kept
/// that would compete with the reactor that never sleeps.
pub fn run_anywhere_but(excluded: &[u32]) {
    // The kernel intersects with the cgroup's cpuset and refuses an empty result: then the wider set is tried.
    if !set_affinity(&CpuSet::but(excluded)) {
        set_affinity(&CpuSet::but(&[]));
    }
}

/// A set of processors as the kernel takes it.
pub(super) struct CpuSet(libc::cpu_set_t);

impl CpuSet {
    /// Every processor that is online but those in `excluded`, or all when nothing else is left.
    pub(super) fn but(excluded: &[u32]) -> Self {
        let online = online_cpus();
        let rest: Vec<u32> = online.iter().copied().filter(|cpu| !excluded.contains(cpu)).collect();
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for &cpu in if rest.is_empty() { &online } else { &rest } {
            if cpu < libc::CPU_SETSIZE as u32 {
                // SAFETY: the index was checked against the set's size.
                unsafe { libc::CPU_SET(cpu as usize, &mut set) };
            }
        }
        CpuSet(set)
    }

    /// The kernel's form.
    pub(super) fn raw(&self) -> &libc::cpu_set_t {
        &self.0
    }
}

/// How many processors there are beside those in `excluded`.
pub fn processors_but(excluded: &[u32]) -> usize {
    cpus_but(excluded).len()
}

/// The processors that this process may use, without those in `excluded`, and no more of them than a quota (`cpu.max`) leaves time for.
fn cpus_but(excluded: &[u32]) -> Vec<u32> {
    let (allowed, at_once) = allowed_cpus();
    within_quota(&allowed, at_once, excluded)
}

fn within_quota(allowed: &[u32], at_once: usize, excluded: &[u32]) -> Vec<u32> {
    let (taken, mut free): (Vec<u32>, Vec<u32>) = allowed.iter().partition(|cpu| excluded.contains(cpu));
    free.truncate(at_once.saturating_sub(taken.len()));
    free
}

/// The processors that the cgroup lets us use, however the calling thread is pinned (a thread that asks for all of them gets those), and
/// how many of them at once.
fn allowed_cpus() -> (Vec<u32>, usize) {
    let ask = || {
        set_affinity(&CpuSet::but(&[]));
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: 0 is the calling thread; the set is live and its size is given.
        if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } != 0 {
            return None;
        }
        // SAFETY: the indices are less than the set's size.
        let allowed = (0..libc::CPU_SETSIZE as u32).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu as usize, &set) });
        Some((allowed.collect(), std::thread::available_parallelism().ok()?.get()))
    };
    let asked = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, ask);
        thread.ok().and_then(|thread| thread.join().ok()).flatten()
    });
    asked.unwrap_or_else(|| {
        let online = online_cpus();
        let count = online.len();
        (online, count)
    })
}

fn online_cpus() -> Vec<u32> {
    parse_cpu_list(&std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// Whether the machine has this processor, and it is in use.
pub fn is_online(cpu: u32) -> bool {
    online_cpus().contains(&cpu)
}

fn set_affinity(set: &CpuSet) -> bool {
    // SAFETY: 0 is the calling thread; the set is live and its size is given.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set.raw()) == 0 }
}

/// Parses the kernel's list format: `0-3,8,10-11`.
fn parse_cpu_list(text: &str) -> Vec<u32> {
    text.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

/// Ends the process now: no destructor runs, nobody is waited for.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: the call has no preconditions, and does not return.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_leaves_less() {
        assert_eq!(within_quota(&[0, 1, 2, 3], 4, &[0]), [1, 2, 3]);
        assert_eq!(within_quota(&[0, 1, 2, 3], 2, &[0]), [1]);
        assert_eq!(within_quota(&[0, 1, 2, 3], 1, &[0]), [0u32; 0]);
        assert_eq!(within_quota(&[4, 5], 2, &[0]), [4, 5], "a reactor elsewhere takes none of ours");
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_cpu_list("0"), [0]);
        assert_eq!(parse_cpu_list(""), [0u32; 0]);
    }

    #[test]
    fn a_thread_can_be_moved_and_none_is_left_without_a_processor() {
        std::thread::spawn(|| {
            run_anywhere_but(&[0]);
            run_anywhere_but(&online_cpus());
            assert_eq!(processors_but(&online_cpus()), 0);
            assert!(set_affinity(&CpuSet::but(&[0])) && online_cpus().len() > 1);
            assert!(allowed_cpus().0.contains(&0), "whatever this thread is pinned to");
            assert!(std::thread::available_parallelism().unwrap().get() >= 1);
        })
        .join()
        .unwrap();
    }
}
