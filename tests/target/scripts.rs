//! The first command of the README.

use crate::common::{folder, free_port, image, run};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn run_script(args: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/run.sh");
    let port = free_port().to_string();
    let mut command = Command::new(script);
    command.args(["--check", "--port", &port]).args(args);
    let (status, output) = run(&mut command, Duration::from_secs(600));
    assert!(status.success(), "run.sh --check: {status}\n{output}");
    assert!(output.contains("proven") && output.contains("lloop0"), "{output}");
    output
}

#[test]
fn run_sh_proves_itself() {
    run_script(&[]);
    // And with a file of the user's, which keeps what is in it.
    let folder = folder();
    let file = image(folder.path(), "mine.img", 24 << 20);
    let content: Vec<u8> = (0..24u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&file, &content).unwrap();
    assert!(run_script(&["--image", file.to_str().unwrap()]).contains("24 MiB went through"));
    assert!(std::fs::read(&file).unwrap() == content);
}
