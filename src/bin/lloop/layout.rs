//! A file's layout in words, from what the target shows of it (the words of `lfs getstripe -y`).

use crate::size;
use crate::table;
use serde_json::{Map, Value};

/// A line for each component: where it lies, how it is striped and over which OSTs.
pub fn in_words(layout: &Map<String, Value>) -> String {
    let Some(components) = layout.get("components").and_then(Value::as_array) else { return stripes(layout) };
    let mirrors = layout.get("lcm_mirror_count").and_then(Value::as_u64).unwrap_or(1);
    let lines = components.iter().filter_map(Value::as_object).map(|component| {
        let offset = |key: &str| match component.get(key) {
            Some(Value::Number(bytes)) => bytes.as_u64().map_or_else(|| "?".to_owned(), size::human),
            _ => "the end".to_owned(),
        };
        let mirror = match component.get("lcme_mirror_id").and_then(Value::as_u64) {
            Some(id) if mirrors > 1 => format!("mirror {id}, "),
            _ => String::new(),
        };
        let flags = match component.get("lcme_flags").and_then(Value::as_str) {
            Some("init") => String::new(),
            Some(flags) => format!(" ({})", flags.replace("init,", "").replace(",init", "")),
            None => " (not written to yet)".to_owned(),
        };
        let inner = component.get("sub_layout").and_then(Value::as_object);
        let (start, end) = (offset("lcme_extent.e_start"), offset("lcme_extent.e_end"));
        format!("{mirror}{start} to {end}: {}{flags}", inner.map_or_else(|| "unknown".to_owned(), stripes))
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn stripes(layout: &Map<String, Value>) -> String {
    let number = |key: &str| layout.get(key).and_then(Value::as_u64);
    let osts: Vec<String> = layout
        .get("lmm_objects")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|object| object.get("l_ost_idx").map(ToString::to_string))
        .collect();
    let mut text = match (number("lmm_stripe_count"), number("lmm_stripe_size")) {
        (Some(count), Some(bytes)) => {
            format!("{count} stripe{} of {}", if count == 1 { "" } else { "s" }, size::human(bytes))
        }
        _ => "no stripes".to_owned(),
    };
    if let Some(pattern) = layout.get("lmm_pattern").and_then(Value::as_str).filter(|&p| p != "raid0") {
        text += &format!(", {pattern}");
    }
    if !osts.is_empty() {
        text += &format!(" on OST {}", osts.join(", "));
    }
    if let Some(pool) = layout.get("lmm_pool").and_then(Value::as_str) {
        // (A name is what a server says it is.)
        text += &format!(", pool {}", table::printable(pool));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lustre::layout::Layout;

    fn shown(fixture: &str) -> String {
        let path = format!("{}/tests/fixtures/lustre/{fixture}.lov", env!("CARGO_MANIFEST_DIR"));
        let layout = Layout::parse(&std::fs::read(path).unwrap()).unwrap().to_json();
        in_words(layout.as_object().unwrap())
    }

    #[test]
    fn real_layouts() {
        assert_eq!(shown("v1-two-stripes"), "2 stripes of 1 MiB on OST 0, 1");
        let pool = shown("v3-pool");
        assert!(pool.contains(" on OST ") && pool.contains(", pool "), "{pool}");
        assert_eq!(
            shown("pfl-three-components"),
            "0 B to 4 MiB: 1 stripe of 1 MiB on OST 0\n4 MiB to 64 MiB: 2 stripes of 1 MiB on OST 1, 0\n\
             64 MiB to the end: 2 stripes of 4 MiB (not written to yet)"
        );
        let mirrors = shown("flr-two-mirrors");
        assert!(mirrors.lines().count() == 2 && mirrors.starts_with("mirror 1, 0 B to the end: "), "{mirrors}");
    }
}
