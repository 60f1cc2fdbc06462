//! The parser of `lustre.lov`: on attributes of real files, with what `lfs getstripe -y` says of them, and on hostile ones.
//!
//! `LLOOP_FUZZ_SECONDS=60` gives each property that long instead of its few hundred cases.

mod common;

use common::fuzz::{fuzz, mutated};
use lloop::os::lustre::layout::Layout;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Attributes of real files.
fn fixtures() -> Vec<(PathBuf, Vec<u8>)> {
    layouts_in("tests/fixtures/lustre")
}

fn layouts_in(folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let layouts = files.filter(|path| path.extension().is_some_and(|e| e == "lov"));
    let mut all: Vec<_> = layouts.map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect();
    all.sort();
    assert!(all.len() >= 5, "they are there");
    all
}

fn fixture(name: &str) -> Vec<u8> {
    fixtures().into_iter().find(|(path, _)| path.file_stem().unwrap() == name).unwrap().1
}

/// As much of YAML as lfs writes: blocks of `key: value` and `- key: value` by indentation.
fn yaml(lines: &mut Vec<(usize, String)>) -> Value {
    let Some((indent, is_list)) = lines.first().map(|(indent, text)| (*indent, text.starts_with("- "))) else {
        return Value::Null;
    };
    if is_list {
        let mut list = Vec::new();
        while let Some((at, text)) = lines.first_mut().filter(|(at, text)| *at == indent && text.starts_with("- ")) {
            // The item's first key stands where its others do.
            let item = text[2..].trim_start().to_owned();
            *at += text.len() - item.len();
            *text = item;
            list.push(yaml(lines));
        }
        return Value::Array(list);
    }
    let mut map = Map::new();
    while lines.first().is_some_and(|(at, text)| *at == indent && !text.starts_with("- ")) {
        let (_, line) = lines.remove(0);
        let (key, value) = line.split_once(':').unwrap();
        let value = match value.trim() {
            "" => yaml(lines),
            word => word.parse::<i64>().map_or_else(|_| json!(word), Value::from),
        };
        assert_eq!(map.insert(key.to_owned(), value), None, "{key} once");
    }
    Value::Object(map)
}

#[test]
fn layouts_of_real_files_are_read_as_lfs_reads_them() {
    for (path, lov) in fixtures() {
        let text = std::fs::read_to_string(path.with_extension("yaml")).unwrap();
        let line = |line: &str| (line.len() - line.trim_start().len(), line.trim_start().to_owned());
        let mut lines: Vec<_> = text.lines().filter(|text| !text.trim().is_empty()).map(line).collect();
        let expected = yaml(&mut lines);
        assert!(lines.is_empty(), "{}: all of it was read, but {lines:?}", path.display());
        assert!(expected.as_object().unwrap().len() >= 4, "{expected}");
        let layout = Layout::parse(&lov).unwrap();
        check(&layout);
        assert_eq!(layout.to_json(), expected, "{}", path.display());
    }
}

#[test]
fn bytes_are_found_on_their_osts() {
    let two = Layout::parse(&fixture("v1-two-stripes")).unwrap();
    for (offset, ost) in [(0, 0), (MIB - 1, 0), (MIB, 1), (2 * MIB - 1, 1), (2 * MIB, 0), ((1 << 40) + MIB, 1)] {
        assert_eq!(two.ost_of(offset), Some(ost), "{offset}");
    }
    assert_eq!((two.stripe_end(0), two.stripe_end(MIB), two.stripe_end(3 * MIB - 1)), (MIB, 2 * MIB, 3 * MIB));
    assert_eq!(two.stripe_size_bytes(10 * MIB), Some(MIB));
    assert_eq!(two.objects().count(), 2);

    // 4 MiB on one, up to 64 MiB on two from OST 1 on, nothing behind that yet.
    let pfl = Layout::parse(&fixture("pfl-three-components")).unwrap();
    let osts = [0, 3, 4, 5, 63].map(|mib| pfl.ost_of(mib * MIB));
    assert_eq!(osts, [0, 0, 1, 0, 0].map(Some));
    assert_eq!((pfl.ost_of(64 * MIB), pfl.ost_of(u64::MAX)), (None, None));
    assert_eq!(pfl.stripe_end(64 * MIB), 68 * MIB, "it will be striped so");
    assert_eq!(
        pfl.objects().map(|(component, stripe, _)| (component, stripe)).collect::<Vec<_>>(),
        [(0, 0), (1, 0), (1, 1)]
    );
    let sizes = [1, 64, 120, 200, 1 << 20].map(|mib| pfl.stripe_size_bytes(mib * MIB).unwrap() / MIB);
    assert_eq!(sizes, [1, 1, 1, 4, 4], "that of most of the file");

    // Of two mirrors the first, until it is stale.
    let mut lov = fixture("flr-two-mirrors");
    let flr = |lov: &[u8]| Layout::parse(lov).unwrap();
    assert_eq!((flr(&lov).mirrors, flr(&lov).ost_of(0), flr(&lov).objects().count()), (2, Some(0), 1));
    lov[32 + 4] |= 1;
    assert_eq!(flr(&lov).ost_of(0), Some(1));
    assert_eq!(flr(&lov).to_json()["components"][0]["lcme_flags"], "init,stale");
    lov[32 + 48 + 4] |= 1;
    assert_eq!((flr(&lov).ost_of(0), flr(&lov).stripe_size_bytes(MIB)), (None, None));
}

#[test]
fn other_patterns_are_known() {
    let with_pattern = |pattern: u32| {
        let mut lov = fixture("v1-two-stripes");
        lov[4..8].copy_from_slice(&pattern.to_le_bytes());
        Layout::parse(&lov).unwrap()
    };
    for (pattern, name, ost) in [
        (0x201, "raid0,overstriped", Some(1)),
        (0x8000_0001, "released", None),
        (0x100, "mdt", None),
        (0x400, "foreign", None),
        (0x77, "unknown", None),
    ] {
        let layout = with_pattern(pattern);
        check(&layout);
        assert_eq!((layout.to_json()["lmm_pattern"].as_str().unwrap(), layout.ost_of(MIB)), (name, ost));
    }
    // A symbolic link to something else altogether.
    let foreign = Layout::parse(&[0xD0, 0x0B, 0xD7, 0x0B, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9]).unwrap();
    assert_eq!((foreign.ost_of(0), foreign.stripe_end(0), foreign.objects().count()), (None, u64::MAX, 0));
    // Data in the MDT first, then stripes; and a file that nobody wrote to yet.
    let mut dom = fixture("pfl-three-components");
    dom[0xB4..0xB8].copy_from_slice(&0x100u32.to_le_bytes());
    let dom = Layout::parse(&dom).unwrap();
    assert_eq!((dom.ost_of(0), dom.stripe_end(5), dom.ost_of(4 * MIB)), (None, 4 * MIB, Some(1)));
    let empty = Layout::parse(&fixture("v1-two-stripes")[..32]).unwrap();
    assert_eq!((empty.ost_of(0), empty.stripe_size_bytes(0)), (None, Some(MIB)));
    assert_eq!(empty.to_json()["lmm_stripe_offset"], -1);
    // On all OSTs there are, when it is written to.
    let mut all = fixture("v1-two-stripes")[..32].to_vec();
    all[28..30].copy_from_slice(&[0xFF; 2]);
    assert_eq!(Layout::parse(&all).unwrap().to_json()["lmm_stripe_count"], -1);
    // Components that can grow: the same with another magic; one that was used up covers nothing.
    let mut sel = fixture("pfl-three-components");
    sel[2] = 0xD8;
    sel[0x80 + 4] = 0x40;
    sel.copy_within(0x80 + 8..0x80 + 16, 0x80 + 16);
    assert_eq!(Layout::parse(&sel).unwrap().components.len(), 2);
}

#[test]
fn layouts_that_make_no_sense_are_refused() {
    let refused = |what: &str, from: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut lov = fixture(from);
        change(&mut lov);
        let error = Layout::parse(&lov).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    refused("ends inside a header", "v1-two-stripes", &|lov| lov.truncate(20));
    refused("no room for its objects", "v1-two-stripes", &|lov| lov.truncate(79));
    refused("unknown kind", "v1-two-stripes", &|lov| lov[0] = 0);
    refused("64 KiB", "v1-two-stripes", &|lov| lov[24] = 1);
    refused("no stripes", "v1-two-stripes", &|lov| lov[24..28].fill(0));
    refused("no stripes", "v1-two-stripes", &|lov| lov[28..30].fill(0));
    refused("pool's name", "v3-pool", &|lov| lov[33] = 7);
    let pfl = "pfl-three-components";
    refused("shorter than it says", pfl, &|lov| lov.truncate(300));
    refused("no room for its components", pfl, &|lov| lov[14..16].fill(0xFF));
    refused("covers nothing", pfl, &|lov| lov[32 + 16..32 + 24].fill(0));
    refused("outside of it", pfl, &|lov| lov[32 + 24..32 + 28].fill(0xFF));
    refused("overlap", pfl, &|lov| lov[32 + 16..32 + 24].fill(0xFF));
    refused("no room for its objects", pfl, &|lov| lov[0x80 + 4] = 0x10);
    // Every entry the same large component.
    let one = fixture("v1-two-stripes").repeat(2);
    let mut many = fixture(pfl)[..32].to_vec();
    for i in 0..100u64 {
        let mut entry = fixture(pfl)[32..80].to_vec();
        entry[8..16].copy_from_slice(&i.to_le_bytes());
        entry[16..24].copy_from_slice(&(i + 1).to_le_bytes());
        entry[24..28].copy_from_slice(&(32 + 4800u32).to_le_bytes());
        entry[28..32].copy_from_slice(&(one.len() as u32).to_le_bytes());
        many.extend(entry);
    }
    many.extend(&one);
    let len = many.len() as u32;
    many[4..8].copy_from_slice(&len.to_le_bytes());
    many[14..16].copy_from_slice(&100u16.to_le_bytes());
    let stripes = 32 + 4800 + 28;
    many[stripes..stripes + 2].copy_from_slice(&5u16.to_le_bytes());
    assert!(Layout::parse(&many).unwrap_err().to_string().contains("more objects than"));
}

/// What holds for every layout that was accepted.
fn check(layout: &Layout) {
    let mut offsets = vec![0, 1, 4095, 4096, u64::MAX / 2, u64::MAX - 1];
    for component in &layout.components {
        assert!(component.start_bytes < component.end_bytes);
        assert!(component.objects.is_empty() || component.objects.len() == component.stripe_count as usize);
        assert!(component.objects.is_empty() || component.stripe_size_bytes > 0);
        let around = [component.start_bytes, component.end_bytes];
        offsets.extend(around.iter().flat_map(|&at| [at.wrapping_sub(1), at, at.wrapping_add(1)]));
    }
    for offset in offsets.into_iter().filter(|&offset| offset < u64::MAX) {
        let end = layout.stripe_end(offset);
        assert!(end > offset, "{offset}: {end} in {layout:?}");
        // One chunk is on one object, from its first to its last byte.
        assert_eq!(layout.object_of(offset), layout.object_of(end - 1), "{offset} to {end} in {layout:?}");
        assert_eq!(layout.object_of(offset).is_some(), layout.ost_of(offset).is_some());
        if let Some((component, stripe)) = layout.object_of(offset) {
            assert!(layout.objects().any(|(c, s, _)| (c, s) == (component, stripe)));
        }
    }
    for size in [0, 1, MIB, u64::MAX] {
        assert!(layout.stripe_size_bytes(size).is_none_or(|bytes| bytes > 0 && bytes.is_multiple_of(65536)));
    }
    assert!(layout.to_json().is_object());
}

fn accepted(bytes: &[u8]) -> bool {
    let layout = Layout::parse(bytes);
    if let Ok(layout) = &layout {
        check(layout);
    }
    layout.is_ok()
}

#[test]
fn truncated_layouts_are_refused_or_whole() {
    for (path, lov) in fixtures() {
        let parsed = (0..lov.len()).filter(|&len| accepted(&lov[..len]));
        // A plain header is a layout of its own; all else needs its last byte.
        assert!(parsed.count() <= 1, "{}", path.display());
    }
}

#[test]
fn arbitrary_bytes_do_no_harm() {
    fuzz(&proptest::collection::vec(any::<u8>(), 0..2000), |bytes| {
        accepted(&bytes);
    });
    // Most of those end at the magic.
    let magic = prop::sample::select(vec![0x0BD1_0BD0u32, 0x0BD3_0BD0, 0x0BD6_0BD0, 0x0BD7_0BD0, 0x0BD8_0BD0]);
    let behind = (magic, proptest::collection::vec(any::<u8>(), 0..600));
    fuzz(&behind, |(magic, bytes)| {
        accepted(&[&magic.to_le_bytes()[..], &bytes].concat());
    });
}

#[test]
fn mutated_layouts_do_no_harm() {
    // Real ones, and kinds that there was no real file of.
    let made_up = layouts_in("tests/corpus/layout");
    for (path, lov) in &made_up {
        assert!(accepted(lov), "{}", path.display());
    }
    let corpus = fixtures().into_iter().chain(made_up).map(|(_, lov)| lov).collect();
    let accepted_cases = std::sync::atomic::AtomicU64::new(0);
    fuzz(&mutated(corpus), |bytes| {
        accepted_cases.fetch_add(u64::from(accepted(&bytes)), std::sync::atomic::Ordering::Relaxed);
    });
    assert!(accepted_cases.into_inner() > 0, "some are still layouts");
}
