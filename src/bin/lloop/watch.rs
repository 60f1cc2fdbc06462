//! `lloop stat --watch`

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output;
use crate::stat::{self, Rates, Stats};
use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);

/// Which device, and how often. In `stat --watch lloop0` the device stands where the seconds might be.
///
/// # Errors
/// [`Error::Usage`]
pub fn what<'a>(name: Option<&'a str>, watch: Option<Option<&'a str>>) -> Result<(Option<&'a str>, Option<Duration>)> {
    let Some(watch) = watch else { return Ok((name, None)) };
    let Some(word) = watch else { return Ok((name, Some(DEFAULT_INTERVAL))) };
    match (word.parse::<f64>(), name) {
        (Ok(seconds), _) => match Duration::try_from_secs_f64(seconds) {
            Ok(interval) if (0.1..=86400.0).contains(&seconds) => Ok((name, Some(interval))),
            _ => Err(Error::Usage(format!("--watch {word}: say 0.1 to 86400 seconds"))),
        },
        (Err(_), None) => Ok((Some(word), Some(DEFAULT_INTERVAL))),
        (Err(_), Some(_)) => Err(Error::Usage(format!("--watch {word}: that is no number of seconds"))),
    }
}

/// Shows the counters and rates again and again: in place on a terminal, below each other elsewhere, as a line of JSON each with
/// `as_json`. Until Ctrl-C, or until nobody reads.
///
/// # Errors
/// As [`Client::call`], and [`Error::Output`].
pub fn watch(client: &mut Client, name: Option<&str>, interval: Duration, as_json: bool) -> Result<()> {
    let in_place = io::stdout().is_terminal();
    let mut before: Option<(Stats, Instant)> = None;
    loop {
        let reply = stat::ask(client, name)?;
        let at = Instant::now();
        if as_json {
            output::write(format!("{reply}\n").as_bytes())?;
        } else {
            let stats = stat::read(&reply)?;
            let rates = match &before {
                None => Rates::Unknown,
                Some((stats, then)) => Rates::Since(stats, at.duration_since(*then).as_secs_f64()),
            };
            let text = stat::shown(&stats, rates);
            output::write(if in_place { repainted(&text) } else { format!("{text}\n") }.as_bytes())?;
            before = Some((stats, at));
        }
        thread::sleep(interval.saturating_sub(at.elapsed()));
    }
}

/// Over what is on the screen. Each line is cleared behind its end, and the rest of the screen at last: that does not flicker.
fn repainted(text: &str) -> String {
    format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_or_seconds() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(what(Some("a"), None).unwrap(), (Some("a"), None));
        assert_eq!(what(None, Some(None)).unwrap(), (None, second));
        assert_eq!(what(Some("a"), Some(None)).unwrap(), (Some("a"), second));
        assert_eq!(what(None, Some(Some("lloop0"))).unwrap(), (Some("lloop0"), second));
        assert_eq!(what(Some("a"), Some(Some("0.5"))).unwrap(), (Some("a"), Some(Duration::from_millis(500))));
        for (name, word) in [(Some("a"), "b"), (None, "0"), (None, "-1"), (None, "nan"), (None, "1e9")] {
            assert!(matches!(what(name, Some(Some(word))), Err(Error::Usage(_))), "{word}");
        }
    }

    #[test]
    fn lines_are_painted_over() {
        assert_eq!(repainted("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
