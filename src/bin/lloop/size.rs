//! Sizes, as they are typed and as they are shown.

const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// What can be typed, for errors.
const EXAMPLES: &str = "say it like 4096, 64K, 512MiB, 10G, 2T or 0x100000 (K, M, G, T are powers of 1024)";

/// Bytes from text: plain, hexadecimal with `0x`, or with a binary unit (K, KiB, M, MiB, ...).
///
/// # Errors
/// A sentence with examples.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let bytes = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) && !hex.is_empty() => u64::from_str_radix(hex, 16).ok(),
        Some(_) => return Err(format!("not a hexadecimal number; {EXAMPLES}")),
        None => {
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            if digits == 0 {
                return Err(format!("not a size; {EXAMPLES}"));
            }
            let (number, unit) = text.split_at(digits);
            let shift_bits = shift(unit.trim_start())
                .ok_or_else(|| format!("\"{}\" is no unit of size; {EXAMPLES}", unit.trim()))?;
            number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift_bits))
        }
    };
    // Offsets in files are signed.
    bytes.filter(|&bytes| i64::try_from(bytes).is_ok()).ok_or_else(|| "too large: files end at 8 EiB".to_owned())
}

/// Bytes as a power of two. KB is left out: to some it is 1000.
fn shift(unit: &str) -> Option<u32> {
    let mut letters = unit.chars();
    let first = match letters.next() {
        None => return Some(0),
        Some(first) => first.to_ascii_uppercase(),
    };
    match (first, letters.as_str().to_ascii_lowercase().as_str()) {
        ('B', "") => Some(0),
        (first, "" | "i" | "ib") => UNITS.iter().position(|&unit| unit == first).map(|at| 10 * (at as u32 + 1)),
        _ => None,
    }
}

/// The size of an image: some, and a multiple of 4096.
///
/// # Errors
/// A sentence.
pub fn parse_image(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("an image cannot be empty; say its size like 10G".to_owned()),
        bytes if bytes % 4096 != 0 => {
            let (below, above) = (bytes - bytes % 4096, bytes.next_multiple_of(4096));
            let near = if below == 0 { above.to_string() } else { format!("{below} or {above}") };
            Err(format!("must be a multiple of 4096, the block size; {near} would be near"))
        }
        bytes => Ok(bytes),
    }
}

/// Bytes for people: "512 B", "64 MiB", "1.5 GiB".
pub fn human(bytes: u64) -> String {
    let exponent = if bytes == 0 { 0 } else { (bytes.ilog2() / 10) as usize };
    if exponent == 0 {
        return format!("{bytes} B");
    }
    // Cut off rather than rounded: a device never seems to have more than it has, and 1023.999 KiB is not "1024 KiB".
    let hundredths = (u128::from(bytes) * 100) >> (10 * exponent);
    let (whole, fraction) = (hundredths / 100, hundredths % 100);
    let unit = UNITS[exponent - 1];
    match (fraction, fraction % 10) {
        (0, _) => format!("{whole} {unit}iB"),
        (_, 0) => format!("{whole}.{} {unit}iB", fraction / 10),
        _ => format!("{whole}.{fraction:02} {unit}iB"),
    }
}

/// Bytes for people, exactly: "67108864 bytes (64 MiB)".
pub fn exact(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{bytes} bytes ({})", human(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("1MiB", 1 << 20),
            ("1mib", 1 << 20),
            ("10G", 10 << 30),
            ("2 TiB", 2 << 40),
            ("7E", 7 << 60),
            ("0x100000", 1 << 20),
            ("0xFf", 255),
            (" 1Gi ", 1 << 30),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1KB",
            "1Kib/s",
            "0x",
            "0x+1",
            "0x1K",
            "1 0",
            "8E",
            "99999999999999999999",
            "ten",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("5Q").unwrap_err().contains("10G"));
        assert!(parse("16E").unwrap_err().contains("too large"));
    }

    #[test]
    fn images_have_whole_blocks() {
        assert_eq!(parse_image("1M"), Ok(1 << 20));
        assert!(parse_image("0").unwrap_err().contains("empty"));
        assert!(parse_image("5000").unwrap_err().contains("4096 or 8192"));
        assert!(parse_image("1").unwrap_err().ends_with("4096 would be near"));
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) + (1 << 24), "1.01 GiB"),
            ((1 << 20) - 1, "1023.99 KiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(exact(8 << 20), "8388608 bytes (8 MiB)");
        assert_eq!(exact(512), "512 bytes");
    }
}
