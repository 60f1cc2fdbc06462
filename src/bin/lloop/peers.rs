//! Who is connected to the target's sockets, where the target itself does not tell (SPDK v20.07 does not): the kernel does, as long
//! as the target runs on this node and in this network namespace.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

const ESTABLISHED: &str = "01";
const LISTENING: &str = "0A";
/// SS_CONNECTED
const CONNECTED: &str = "03";

/// How many connections a UNIX socket has; `None` where nobody listens on it here.
pub fn of_unix(path: &Path) -> Option<usize> {
    in_unix_table(&fs::read_to_string("/proc/net/unix").ok()?, path)
}

fn in_unix_table(table: &str, path: &Path) -> Option<usize> {
    // Num RefCount Protocol Flags Type St Inode Path
    let states: Vec<&str> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let state = words.nth(5)?;
            // (The path is the rest of the line, whatever is in it.)
            let rest = line.split_once('/').map(|(_, rest)| format!("/{rest}"))?;
            Path::new(&rest).components().eq(path.components()).then_some(state)
        })
        .collect();
    let connected = states.iter().filter(|state| **state == CONNECTED).count();
    (connected < states.len()).then_some(connected)
}

/// The addresses that are connected to a TCP socket, and how often each; `None` where nobody listens on it here.
pub fn of_tcp(listener: &SocketAddr) -> Option<BTreeMap<IpAddr, usize>> {
    let tables: String =
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    in_tcp_tables(&tables, listener)
}

fn in_tcp_tables(tables: &str, listener: &SocketAddr) -> Option<BTreeMap<IpAddr, usize>> {
    // sl local_address rem_address st ...
    let sockets: Vec<(SocketAddr, SocketAddr, &str)> = tables
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().take(4).collect();
            match words.as_slice() {
                [_, local, remote, state] => Some((address(local)?, address(remote)?, *state)),
                _ => None,
            }
        })
        .collect();
    if !sockets.iter().any(|(local, _, state)| *state == LISTENING && local == listener) {
        return None;
    }
    let mut peers = BTreeMap::new();
    let to_listener = |local: &SocketAddr| {
        local.port() == listener.port() && (listener.ip().is_unspecified() || local.ip() == listener.ip())
    };
    for (_, remote, _) in sockets.iter().filter(|(local, _, state)| *state == ESTABLISHED && to_listener(local)) {
        *peers.entry(remote.ip()).or_default() += 1;
    }
    Some(peers)
}

/// "0100007F:1144": words of 32 bits in the machine's byte order, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at * 8)?);
            }
            // An IPv6 socket shows its IPv4 peers as mapped addresses.
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn on_a_unix_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a socket");
        assert_eq!(of_unix(&path), None);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(of_unix(&path), Some(0));
        let client = UnixStream::connect(&path).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!(of_unix(&path), Some(1));
        drop((client, server));
        assert_eq!(of_unix(&path), Some(0));
    }

    #[test]
    fn on_a_tcp_socket() {
        for text in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(text) else {
                assert!(text.starts_with('['), "there is always IPv4");
                continue;
            };
            let local = listener.local_addr().unwrap();
            assert_eq!(of_tcp(&local), Some(BTreeMap::new()));
            let _clients = [TcpStream::connect(local).unwrap(), TcpStream::connect(local).unwrap()];
            let _servers = [listener.accept().unwrap(), listener.accept().unwrap()];
            assert_eq!(of_tcp(&local), Some(BTreeMap::from([(local.ip(), 2)])));
        }
        assert_eq!(of_tcp(&"127.0.0.1:1".parse().unwrap()), None);
    }
}
