//! `lloop stat --watch`

use crate::client::{Address, Client};
use crate::error::{Error, Result};
use crate::stat::{self, Stats};
use crate::{live, output, table};
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

/// Shows rates, latencies and queues again and again: in place on a terminal, below each other elsewhere, as a line of JSON each
/// with `as_json`. Until Ctrl-C, or until nobody reads. On a terminal a target that ends may come back.
///
/// # Errors
/// As [`Client::call`], and [`Error::Output`].
pub fn watch(
    connect: &dyn Fn() -> Result<Client>,
    address: &Address,
    name: Option<&str>,
    interval: Duration,
    as_json: bool,
) -> Result<()> {
    let in_place = io::stdout().is_terminal() && !as_json;
    let mut client = Some(connect()?);
    let mut before: Option<(Stats, Instant)> = None;
    loop {
        let start = Instant::now();
        let asked = match &mut client {
            Some(client) => stat::ask(client, name, !as_json),
            None => connect().and_then(|new| stat::ask(client.insert(new), name, !as_json)),
        };
        // (Counters come with the answer, not with the question: a busy target may take its time.)
        let at = Instant::now();
        match asked {
            Ok(reply) if as_json => output::write(format!("{reply}\n").as_bytes())?,
            Ok(reply) => {
                let stats = stat::read(&reply)?;
                let since = before.as_ref().map(|(stats, then)| (stats, at.duration_since(*then).as_secs_f64()));
                let text = live::shown(&stats, since);
                match in_place {
                    true => paint(&format!("{address}, every {} s, Ctrl-C ends\n\n{text}", interval.as_secs_f64()))?,
                    false => output::write(format!("{text}\n").as_bytes())?,
                }
                before = Some((stats, at));
            }
            // A device that is not there (yet), or a target that is gone.
            Err(error) if in_place && before.is_some() => {
                if !matches!(error, Error::Refused { .. }) {
                    client = None;
                }
                paint(&format!(
                    "{}\ntrying again every {} s, Ctrl-C ends\n",
                    table::printable(&error.to_string()),
                    interval.as_secs_f64()
                ))?;
            }
            Err(error) => return Err(error),
        }
        thread::sleep(interval.saturating_sub(start.elapsed()));
    }
}

fn paint(text: &str) -> Result<()> {
    let rows = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_row));
    output::write(repainted(text, rows).as_bytes())
}

/// Over what is on the screen. Each line is cleared behind its end, and the rest of the screen at last: that does not flicker.
/// Nothing goes past the end of a line or of the screen, which would move what is above.
fn repainted(text: &str, rows: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let room = if rows == 0 { lines.len() } else { rows - 1 };
    let mut shown = lines[..lines.len().min(room)].to_vec();
    let more = format!("... {} more lines: a larger window, or lloop stat --watch NAME", lines.len() - shown.len() + 1);
    if let (true, Some(last)) = (shown.len() < lines.len(), shown.last_mut()) {
        *last = &more;
    }
    let body: String = shown.iter().map(|line| format!("{line}\x1b[K\n")).collect();
    format!("\x1b[?7l\x1b[H{body}\x1b[J\x1b[?7h")
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
        assert_eq!(repainted("a\nb\n", 0), "\x1b[?7l\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J\x1b[?7h");
        assert_eq!(repainted("a\nb\n", 3), repainted("a\nb\n", 0));
        let cut = repainted("a\nb\nc\n", 3);
        assert!(cut.contains("a\x1b[K\n... 2 more lines") && !cut.contains("b\x1b"), "{cut:?}");
        assert_eq!(repainted("a\nb\n", 1), "\x1b[?7l\x1b[H\x1b[J\x1b[?7h");
    }
}
