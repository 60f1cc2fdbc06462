//! The first command of the README.

use crate::common::{folder, free_port, hugepages, image, run};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// One at a time: newer SPDKs refuse two initiators on one core.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

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
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Its target and its initiator.
    let _memory = hugepages::claim(hugepages::DEFAULT_MIB + 384);
    // Memory that a dead process of SPDK's kind has left is given back on the way, and so is the lock of a test's socket.
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let hugepages = format!("/dev/hugepages/spdk_pid{}map_0", dead.id());
    let lock = std::env::temp_dir().join(format!("lloop-{}-0.sock.lock", dead.id()));
    std::fs::write(&lock, "").unwrap();
    std::fs::File::create(&hugepages).unwrap();
    run_script(&[]);
    assert!(!Path::new(&hugepages).exists() && !lock.exists());
    // And with a file of the user's, which keeps what is in it.
    let folder = folder();
    let file = image(folder.path(), "mine.img", 24 << 20);
    let content: Vec<u8> = (0..24u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&file, &content).unwrap();
    assert!(run_script(&["--image", file.to_str().unwrap()]).contains("24 MiB went through"));
    assert!(std::fs::read(&file).unwrap() == content);
}

#[test]
fn run_sh_serves_until_it_is_interrupted() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Its target and its initiator.
    let _memory = hugepages::claim(hugepages::DEFAULT_MIB + 384);
    let folder = folder();
    let own = image(folder.path(), "own.img", 8 << 20);
    let output = folder.path().join("output");
    let file = std::fs::File::create(&output).unwrap();
    // (Who runs the tests in the background may have SIGINT ignored, and a shell cannot change that.)
    let mut child = Command::new("env")
        .arg("--default-signal=INT")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/run.sh"))
        .args(["--port", &free_port().to_string(), "--image", own.to_str().unwrap()])
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(&output).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(300);
    while !said().contains("Ctrl-C ends it") {
        assert!(std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", said());
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it serves on:\n{}", said());
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}\n{}", said());
    assert!(said().contains("stopping the target") && !said().contains("ended with status"), "{}", said());
}
