//! JSON-RPC 2.0 to the target, over its UNIX socket or TCP.

use crate::error::{Error, METHOD_NOT_FOUND, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where a target listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// host:port
    Tcp(String),
}

impl Address {
    /// host:port is what has no slash and ends with a colon and a number; all else is a path.
    pub fn parse(text: OsString) -> Self {
        let is_tcp = |text: &str| {
            let port = text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
            !text.contains('/') && matches!(port, Some((host, Ok(_))) if !host.is_empty())
        };
        match text.into_string() {
            Ok(text) if is_tcp(&text) => Address::Tcp(text),
            Ok(text) => Address::Unix(text.into()),
            Err(text) => Address::Unix(text.into()),
        }
    }

    /// A sentence that says what could not be reached, and what to do about it.
    fn unreachable(&self, error: &io::Error) -> Error {
        let start = "start lloop_tgt, or say with --socket where it listens";
        Error::Failed(match (self, error.kind()) {
            (Address::Unix(_), ErrorKind::NotFound) => format!("there is no socket {self}: {start}"),
            (_, ErrorKind::ConnectionRefused) => format!("nobody listens on {self}: {start}"),
            (Address::Unix(_), ErrorKind::PermissionDenied) => {
                format!("no permission for the socket {self}: run lloop as the user lloop_tgt runs as (root?)")
            }
            _ => format!("cannot reach {self}: {error}; {start}"),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp(address) => address.fmt(f),
        }
    }
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn connect(address: &Address, timeout: Duration) -> io::Result<Socket> {
        match address {
            Address::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
            Address::Tcp(text) => {
                let mut result = Err(io::Error::new(ErrorKind::NotFound, "the name has no address"));
                for address in text.to_socket_addrs()? {
                    result = TcpStream::connect_timeout(&address, timeout).map(Socket::Tcp);
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
        }
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_read_timeout(Some(timeout)).and_then(|()| s.set_write_timeout(Some(timeout))),
            Socket::Tcp(s) => s.set_read_timeout(Some(timeout)).and_then(|()| s.set_write_timeout(Some(timeout))),
        }
    }
}

/// A socket that is given up at a point in time, however slowly its bytes come.
struct Deadline {
    socket: Socket,
    at: Instant,
}

impl Deadline {
    fn arm(&self) -> io::Result<()> {
        match self.at.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => self.socket.set_timeout(left),
            _ => Err(ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Deadline {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        match &mut self.socket {
            Socket::Unix(s) => s.read(buffer),
            Socket::Tcp(s) => s.read(buffer),
        }
    }
}

impl Write for Deadline {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        match &mut self.socket {
            Socket::Unix(s) => s.write(bytes),
            Socket::Tcp(s) => s.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    result: Value,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    code: i64,
    message: String,
}

/// A connection to a target. One request at a time.
pub struct Client {
    stream: BufReader<Deadline>,
    address: Address,
    timeout: Duration,
    last_id: u64,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`Error::Failed`], saying what could not be reached.
    pub fn connect(address: &Address, timeout: Duration) -> Result<Client> {
        let socket = Socket::connect(address, timeout).map_err(|e| address.unreachable(&e))?;
        let stream = BufReader::new(Deadline { socket, at: Instant::now() + timeout });
        Ok(Client { stream, address: address.clone(), timeout, last_id: 0 })
    }

    /// Where the target is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The target is on this node: its files are ours, too.
    pub fn is_local(&self) -> bool {
        matches!(self.address, Address::Unix(_))
    }

    /// Calls a method. `params` is an object, or null for none.
    ///
    /// # Errors
    /// [`Error::Refused`] with the target's words, or [`Error::Failed`] when no answer came.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last_id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.last_id, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        let stream = self.stream.get_mut();
        stream.at = Instant::now() + self.timeout;
        stream.write_all(request.to_string().as_bytes()).map_err(|e| self.broken(method, &e))?;
        // An object ends with its brace: nothing behind it is waited for.
        let reply = Reply::deserialize(&mut serde_json::Deserializer::from_reader(&mut self.stream));
        let reply = reply.map_err(|e| match e.io_error_kind() {
            Some(kind) => self.broken(method, &kind.into()),
            None if e.is_eof() => self.broken(method, &ErrorKind::UnexpectedEof.into()),
            None => Error::Failed(format!("{} answers {method} with what is no JSON-RPC: {e}", self.address)),
        })?;
        match reply.error {
            // Errors about the request as a whole may come without its id.
            Some(refusal) => Err(self.refused(method, refusal)),
            None if reply.id != json!(self.last_id) => {
                Err(Error::Failed(format!("{} answers {method} with the answer to another request", self.address)))
            }
            None => Ok(reply.result),
        }
    }

    fn refused(&self, method: &str, refusal: Refusal) -> Error {
        let message = match refusal.code {
            METHOD_NOT_FOUND if method.starts_with("bdev_lloop") => {
                format!(
                    "the target on {} has no method {method}: it is not lloop_tgt, or another version of it",
                    self.address
                )
            }
            METHOD_NOT_FOUND => format!("the target on {} has no method {method}", self.address),
            _ => refusal.message,
        };
        Error::Refused { code: refusal.code, message }
    }

    fn broken(&self, method: &str, error: &io::Error) -> Error {
        let address = &self.address;
        Error::Failed(match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => format!(
                "{address} has not answered {method} for {} s, and may still carry it out; --timeout SECONDS waits longer",
                self.timeout.as_secs()
            ),
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                format!("{address} hung up before it answered {method}: has the target ended?")
            }
            _ => format!("{address}: {method}: {error}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn addresses() {
        for (text, is_tcp) in [
            ("/var/tmp/spdk.sock", false),
            ("spdk.sock", false),
            ("./a:1", false),
            ("a:b", false),
            (":1", false),
            ("localhost:5260", true),
            ("[::1]:5260", true),
            ("10.0.0.1:70000", false),
        ] {
            assert_eq!(matches!(Address::parse(text.into()), Address::Tcp(_)), is_tcp, "{text}");
        }
    }

    #[test]
    fn where_nobody_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let connect = || {
            Client::connect(&Address::Unix(path.clone()), Duration::from_secs(1)).map(|_| ()).unwrap_err().to_string()
        };
        assert!(
            connect().contains("there is no socket")
                && connect().contains("lloop_tgt")
                && connect().contains("--socket")
        );
        drop(UnixListener::bind(&path).unwrap());
        assert!(connect().contains("nobody listens on") && connect().contains(path.to_str().unwrap()));
    }

    /// A target that answers every request with the next of `replies`, in two pieces, and then hangs or hangs up.
    fn served(replies: &'static [&'static str], hang: bool) -> (Client, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            for reply in replies {
                let _ = stream.read(&mut buffer).unwrap();
                let (a, b) = reply.as_bytes().split_at(reply.len() / 2);
                stream.write_all(a).unwrap();
                thread::sleep(Duration::from_millis(20));
                stream.write_all(b).unwrap();
            }
            let _ = stream.read(&mut buffer);
            if hang {
                thread::sleep(Duration::from_secs(5));
            }
        });
        let client = Client::connect(&Address::Unix(path), Duration::from_millis(300)).unwrap();
        (client, dir)
    }

    #[test]
    fn answers_and_refusals() {
        let (mut client, _dir) = served(
            &[
                r#"{"jsonrpc":"2.0","id":1,"result":[1,"x"]}"#,
                r#"{"jsonrpc":"2.0","id":2,"error":{"code":-16,"message":"busy"}}"#,
                r#"{"jsonrpc":"2.0","id":3,"error":{"code":-32601,"message":"Method not found"}}"#,
                r#"{"jsonrpc":"2.0","id":9,"result":true}"#,
                "HTTP/1.1 400 Bad Request",
            ],
            false,
        );
        let mut call = || client.call("bdev_lloop_x", json!({"name": "y"}));
        assert_eq!(call().unwrap(), json!([1, "x"]));
        assert!(matches!(call(), Err(Error::Refused { code: -16, message }) if message == "busy"));
        let unknown = call().unwrap_err();
        assert!(unknown.is_unknown_method() && unknown.to_string().contains("not lloop_tgt"));
        assert!(call().unwrap_err().to_string().contains("another request"));
        assert!(call().unwrap_err().to_string().contains("no JSON-RPC"));
    }

    #[test]
    fn a_target_that_dies_or_hangs() {
        let (mut client, _dir) = served(&[], false);
        assert!(client.call("m", Value::Null).unwrap_err().to_string().contains("hung up"));
        let (mut client, _dir) = served(&[], true);
        let before = Instant::now();
        assert!(client.call("m", Value::Null).unwrap_err().to_string().contains("--timeout"));
        assert!(before.elapsed() < Duration::from_secs(3));
    }
}
