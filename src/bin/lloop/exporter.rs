//! `lloop exporter`: the counters for Prometheus to scrape, over HTTP. Each scrape asks the target anew, so that it may come and
//! go.

use crate::client::Client;
use crate::error::{Error, Result};
use crate::{output, prometheus};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long a scraper may take to ask, and to listen.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest question.
const MAX_REQUEST_BYTES: usize = 8192;
/// How many scrapers are answered at a time.
const MAX_SCRAPERS: usize = 16;

/// Connects to the target.
type Connect = dyn Fn() -> Result<Client> + Send + Sync;

/// Serves until it is ended.
///
/// # Errors
/// When the address cannot be listened on, and [`Error::Output`].
pub fn serve(connect: Arc<Connect>, listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).map_err(|e| {
        Error::Failed(format!(
            "cannot listen on {listen}: {e}; say with --listen where else (127.0.0.1:0 takes a free port)"
        ))
    })?;
    let address = listener.local_addr().map_err(|e| Error::Failed(format!("{listen}: {e}")))?;
    output::write(format!("http://{address}/metrics\n").as_bytes())?;
    let scrapers = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            // Out of descriptors, or hung up already: neither is better at once.
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let (connect, place) = (connect.clone(), Place::take(&scrapers));
        // Who comes when all places are taken is hung up on, and comes again.
        if let Some(place) = place {
            let answered = thread::Builder::new().name("scrape".into()).spawn(move || {
                let _place = place;
                // Whoever asks and does not listen misses it.
                let _ = answer(stream, &*connect);
            });
            drop(answered);
        }
    }
    Ok(())
}

/// One of [`MAX_SCRAPERS`].
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Place> {
        let place = Place(taken.clone());
        (taken.fetch_add(1, Ordering::Relaxed) < MAX_SCRAPERS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(mut stream: TcpStream, connect: &Connect) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = question(&mut stream)?;
    let (status, kind, body) = match route(&request) {
        Route::Metrics { .. } => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", metrics(connect)),
        Route::Start { .. } => ("200 OK", "text/html; charset=utf-8", START.to_owned()),
        Route::Other(status, words) => (status, "text/plain; charset=utf-8", words.to_owned()),
    };
    let shown = !matches!(route(&request), Route::Metrics { head: true } | Route::Start { head: true });
    let header = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(header.as_bytes())?;
    if shown {
        stream.write_all(body.as_bytes())?;
    }
    stream.flush()
}

const START: &str = "<!doctype html><title>lloop</title><p><a href=\"/metrics\">Metrics</a></p>\n";

/// A target that does not answer is a fact as well.
fn metrics(connect: &Connect) -> String {
    match connect().and_then(|mut client| prometheus::collect(&mut client, None)) {
        Ok(text) => text,
        Err(error) => {
            // (Without anybody to read this, the metrics still say it.)
            let _ = writeln!(io::stderr(), "lloop: {}", crate::table::printable(&error.to_string()));
            prometheus::down()
        }
    }
}

/// Reads up to the end of the header.
fn question(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") && request.len() < MAX_REQUEST_BYTES {
        match end.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => stream.set_read_timeout(Some(left))?,
            _ => return Err(io::ErrorKind::TimedOut.into()),
        }
        match stream.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => request.extend(&part[..n]),
        }
    }
    Ok(request)
}

#[derive(Debug, PartialEq, Eq)]
enum Route {
    Metrics { head: bool },
    Start { head: bool },
    Other(&'static str, &'static str),
}

fn route(request: &[u8]) -> Route {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, path, version) = (words.next(), words.next(), words.next());
    if !version.is_some_and(|version| version.starts_with("HTTP/1.")) {
        return Route::Other("400 Bad Request", "HTTP/1.1 is spoken here\n");
    }
    let head = match method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Route::Other("405 Method Not Allowed", "there is only GET\n"),
    };
    match path.map(|path| path.split('?').next().unwrap_or_default()) {
        Some("/metrics") => Route::Metrics { head },
        Some("/") => Route::Start { head },
        _ => Route::Other("404 Not Found", "there is only /metrics\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions() {
        let to = |line: &str| route(format!("{line}\r\nHost: x\r\n\r\n").as_bytes());
        assert_eq!(to("GET /metrics HTTP/1.1"), Route::Metrics { head: false });
        assert_eq!(to("GET /metrics?collect[]=x HTTP/1.0"), Route::Metrics { head: false });
        assert_eq!(to("HEAD / HTTP/1.1"), Route::Start { head: true });
        for (line, status) in [
            ("GET /etc/passwd HTTP/1.1", "404 Not Found"),
            ("POST /metrics HTTP/1.1", "405 Method Not Allowed"),
            ("GET /metrics", "400 Bad Request"),
            ("", "400 Bad Request"),
        ] {
            assert!(matches!(to(line), Route::Other(s, _) if s == status), "{line}");
        }
    }

    #[test]
    fn places_are_given_back() {
        let taken = Arc::new(AtomicUsize::new(0));
        let all: Vec<_> = (0..MAX_SCRAPERS).map(|_| Place::take(&taken).unwrap()).collect();
        assert!(Place::take(&taken).is_none());
        drop(all);
        assert!(Place::take(&taken).is_some() && taken.load(Ordering::Relaxed) == 0);
    }
}
