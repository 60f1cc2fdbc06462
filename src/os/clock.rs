//! A clock for the I/O path: one unprivileged instruction where the processor has it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Clock ticks since some fixed moment; differences count.
pub type Ticks = u64;

/// Now, in ticks. Monotonic on one core and, on the processors of the last decade, between cores.
#[inline]
pub fn now() -> Ticks {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC exists on every x86-64 processor and has no side effect.
    return unsafe { core::arch::x86_64::_rdtsc() };
    #[cfg(target_arch = "aarch64")]
    {
        let ticks: u64;
        // SAFETY: reading the virtual counter is allowed to user space by Linux and has no side effect.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
        return ticks;
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return fallback_now();
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fallback_now() -> Ticks {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

static HZ: OnceLock<u64> = OnceLock::new();

/// Says how many ticks a second has, for tests with a clock of their own. To be called before anything else of this module.
#[doc(hidden)]
pub fn pretend_hz(hz: u64) {
    let _ = HZ.set(hz);
}

/// Ticks a second, measured once against the system's clock (takes 20 ms the first time: not on the I/O path).
pub fn ticks_hz() -> u64 {
    *HZ.get_or_init(|| {
        let (t0, c0) = (Instant::now(), now());
        std::thread::sleep(Duration::from_millis(20));
        let (elapsed, ticks) = (t0.elapsed(), now().saturating_sub(c0));
        ((ticks as u128 * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64).max(1)
    })
}

/// How many ticks `duration` lasts.
pub fn to_ticks(duration: Duration) -> Ticks {
    (duration.as_nanos() * u128::from(ticks_hz()) / 1_000_000_000) as u64
}

/// How long `ticks` last.
pub fn to_duration(ticks: Ticks) -> Duration {
    Duration::from_nanos(to_nanos(ticks))
}

/// How many nanoseconds `ticks` last.
pub fn to_nanos(ticks: Ticks) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(ticks_hz())) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_measure_time() {
        let start = now();
        std::thread::sleep(Duration::from_millis(30));
        let nanos = to_nanos(now() - start);
        assert!(nanos >= 25_000_000, "30 ms were {nanos} ns");
        let there_and_back = to_nanos(to_ticks(Duration::from_secs(5)));
        assert!(there_and_back.abs_diff(5_000_000_000) < 1000);
    }
}
