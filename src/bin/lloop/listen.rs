//! Addresses to listen on.

use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};

/// NVMe/TCP's port where none is said.
const DEFAULT_PORT: u16 = 4420;

/// An address with a port, or without.
///
/// # Errors
/// A sentence with examples.
pub fn parse(text: &str) -> Result<SocketAddr, String> {
    parse_with(text, DEFAULT_PORT, "say an IP address and a port, like 10.0.0.5:4420 or [fd00::5]:4420")
}

/// An address with a port, or without, in which case it has `default_port`.
///
/// # Errors
/// `examples`, or a sentence.
pub fn parse_with(text: &str, default_port: u16, examples: &str) -> Result<SocketAddr, String> {
    let unbracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = match unbracketed.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, default_port),
        Err(_) => text.parse().map_err(|_| examples.to_owned())?,
    };
    if address.port() == 0 { Err("port 0 is none".to_owned()) } else { Ok(address) }
}

/// As SPDK's RPCs want it.
pub fn listen_address(address: &SocketAddr) -> Value {
    json!({
        "trtype": "TCP",
        "adrfam": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "traddr": address.ip().to_string(),
        "trsvcid": address.port().to_string(),
    })
}

/// How to connect from a host.
pub fn connect_command(address: &SocketAddr, nqn: &str) -> String {
    let ip = address.ip();
    let ip = if ip.is_unspecified() { "ADDRESS-OF-THIS-NODE".to_owned() } else { ip.to_string() };
    format!("nvme connect -t tcp -a {ip} -s {} -n {}", address.port(), shell_word(nqn))
}

/// Quoted where a shell would take it for something else.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.:/,+@".contains(c);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        for (text, address) in [
            ("10.0.0.5:44321", "10.0.0.5:44321"),
            ("10.0.0.5", "10.0.0.5:4420"),
            ("[::1]:4420", "[::1]:4420"),
            ("::1", "[::1]:4420"),
            ("[fd00::5]", "[fd00::5]:4420"),
            ("0.0.0.0:1", "0.0.0.0:1"),
        ] {
            assert_eq!(parse(text).unwrap(), address.parse().unwrap(), "{text}");
        }
        for text in
            ["", "localhost:4420", "10.0.0.5:", "10.0.0.5:0", "10.0.0.5:70000", "10.0.0:1", ":4420", "1.2.3.4:x"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_on_the_wire() {
        let wire = listen_address(&parse("[::1]:44321").unwrap());
        assert_eq!(wire, json!({"trtype": "TCP", "adrfam": "IPv6", "traddr": "::1", "trsvcid": "44321"}));
        assert_eq!(listen_address(&parse("127.0.0.1").unwrap())["adrfam"], "IPv4");
    }

    #[test]
    fn how_to_connect() {
        let to = |text: &str| parse(text).unwrap();
        assert_eq!(
            connect_command(&to("10.0.0.5:1"), "nqn.2026-11.io.lloop:x"),
            "nvme connect -t tcp -a 10.0.0.5 -s 1 -n nqn.2026-11.io.lloop:x"
        );
        assert!(connect_command(&to("[::]:1"), "n").contains("-a ADDRESS-OF-THIS-NODE "));
        assert!(
            connect_command(&to("[::1]:1"), "nqn.2026-11.io.lloop:a b'c").ends_with(r"'nqn.2026-11.io.lloop:a b'\''c'")
        );
    }
}
