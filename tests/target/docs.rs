//! The commands in docs/: those that can run here are run, in the order of the page, by a shell that meets a target; of the
//! others, what `lloop` and `lloop_tgt` are given has to be what they take.

use crate::common::{Target, free_port, run};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What is to be done with a block of commands, as the line at its top says: "sh run", "sh not-run REASON", or, for commands
/// that this version does not have, "sh later REASON".
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Fate {
    Run,
    NotRun,
    Later,
}

struct Block {
    fate: Fate,
    line: usize,
    text: String,
}

fn pages() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let pages = entries.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

fn blocks(page: &str, text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let Some(info) = line.trim_start().strip_prefix("```") else { continue };
        let indent = line.len() - line.trim_start().len();
        let mut body = String::new();
        for (_, line) in lines.by_ref().take_while(|(_, line)| line.trim() != "```") {
            body += line.get(indent..).unwrap_or_default();
            body.push('\n');
        }
        if !matches!(info.split(' ').next(), Some("sh" | "bash" | "shell" | "console" | "")) {
            continue;
        }
        let words: Vec<&str> = info.splitn(3, ' ').collect();
        let fate = match words[..] {
            ["sh", "run"] => Fate::Run,
            ["sh", "not-run", reason] if !reason.is_empty() => Fate::NotRun,
            ["sh", "later", reason] if !reason.is_empty() => Fate::Later,
            _ => panic!("docs/{page}:{}: say after ``` sh run, or sh not-run and the reason", at + 1),
        };
        blocks.push(Block { fate, line: at + 1, text: body });
    }
    blocks
}

/// Where cargo has put the programs.
fn programs() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_lloop")).parent().unwrap().to_owned()
}

fn path_with_programs() -> String {
    format!("{}:{}", programs().display(), std::env::var("PATH").unwrap())
}

/// Runs a page's commands, and checks that they leave nothing behind in the target.
fn run_page(page: &str) {
    let text = &pages()[page];
    let mut script = String::from("set -euo pipefail\n");
    let mut count = 0;
    for block in blocks(page, text).iter().filter(|block| block.fate == Fate::Run) {
        script += &format!("echo '--- docs/{page}:{}'\n{}", block.line, block.text);
        count += 1;
    }
    assert!(count > 0, "docs/{page} has no commands that run");
    let target = Target::start();
    let here = target.folder.path();
    let files = here.join("files");
    std::fs::create_dir_all(files.join("sub")).unwrap();
    for number in 0..200 {
        std::fs::write(files.join(format!("sub/{number}")), format!("{number}\n").repeat(50)).unwrap();
    }
    let mut command = Command::new("bash");
    command
        .args(["-c", &script])
        .current_dir(here)
        .env("PATH", path_with_programs())
        .env("LLOOP_SOCKET", &target.socket)
        .env("DIR", here)
        .env("FILES", &files)
        .env("IMAGE", here.join("disk.img"))
        .env("EXT4_IMAGE", here.join("disk.ext4"))
        .env("CONFIG", here.join("config.json"))
        .env("ADDRESS", format!("127.0.0.1:{}", free_port()));
    let (status, output) = run(&mut command, Duration::from_secs(120));
    assert!(status.success(), "docs/{page}: {status}\n{output}");
    assert!(target.names().is_empty(), "docs/{page} leaves {:?} behind\n{output}", target.names());
    let subsystems = target.ok("nvmf_get_subsystems", serde_json::json!({})).to_string();
    assert!(!subsystems.contains("io.lloop"), "docs/{page} leaves exports behind: {subsystems}");
}

#[test]
fn quick_start() {
    run_page("quick-start.md");
}

#[test]
fn vm_on_lustre() {
    run_page("vm-on-lustre.md");
}

#[test]
fn serving_hosts_without_lustre() {
    run_page("serving-hosts-without-lustre.md");
}

#[test]
fn many_small_files() {
    run_page("many-small-files.md");
}

#[test]
fn tuning() {
    run_page("tuning.md");
}

#[test]
fn troubleshooting() {
    run_page("troubleshooting.md");
}

#[test]
fn security() {
    run_page("security.md");
}

/// The pages above. Another page with commands that run needs a test as well.
const RUN: [&str; 7] = [
    "many-small-files.md",
    "quick-start.md",
    "security.md",
    "serving-hosts-without-lustre.md",
    "troubleshooting.md",
    "tuning.md",
    "vm-on-lustre.md",
];

#[test]
fn no_page_is_forgotten() {
    let pages = pages();
    let with_commands =
        pages.iter().filter(|(page, text)| blocks(page, text).iter().any(|block| block.fate == Fate::Run));
    assert_eq!(with_commands.map(|(page, _)| page.as_str()).collect::<Vec<_>>(), RUN);
}

/// The words of each call of one of our programs in a block: lines are put together at backslashes, comments left out.
fn calls(text: &str) -> Vec<Vec<String>> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.split(" #").next().unwrap_or_default().trim());
    let calls = lines.map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    calls.filter(|words| words.first().is_some_and(|word| word == "lloop" || word == "lloop_tgt")).collect()
}

/// What is not run is still what the programs take: a usage error is status 2, no target to talk to is 1.
#[test]
fn commands_that_do_not_run_are_spelled_right() {
    let mut tried = 0;
    for (page, text) in pages() {
        for block in blocks(&page, &text).iter().filter(|block| block.fate == Fate::NotRun) {
            for call in calls(&block.text) {
                let program = programs().join(&call[0]);
                let mut command = Command::new(program);
                command.args(&call[1..]).env("LLOOP_SOCKET", "/nowhere/there-is-no-target.sock");
                let expected = if call[0] == "lloop" {
                    1
                } else {
                    // (It prints its version when it has understood all the rest.)
                    command.arg("--version");
                    0
                };
                let (status, output) = run(&mut command, Duration::from_secs(30));
                assert_eq!(status.code(), Some(expected), "docs/{page}:{}: {call:?}: {output}", block.line);
                tried += 1;
            }
        }
    }
    assert!(tried > 5, "there are commands to try, {tried} were");
}

#[test]
fn links_lead_somewhere() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    for (page, text) in pages() {
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let file = link.split('#').next().unwrap();
            let is_elsewhere = file.is_empty() || file.contains("://");
            assert!(is_elsewhere || folder.join(file).exists(), "docs/{page} links to {link}");
        }
    }
}
