//! The scripts that set everything up, with an archive that is not as it should be, a full disk, and company. The archive is a
//! pretended one: an `apt-get` of our own, and a tree that builds in no time.

use crate::common::folder;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What the SPDK of today lies in, in Debian's package.
const TODAY: &str = "src/nvmeof/gateway/spdk";
/// And v20.07.
const LAST_RESORT: &str = "src/spdk";

/// Builds an SPDK, as far as the scripts look.
const BUILDS: &str = "mkdir -p build/lib && touch build/lib/libspdk_bdev.a build/lib/libspdk_nvmf.a";

const APT_GET: &str = r#"#!/bin/bash
# An archive that has the suites that are files in $FAKE/suites, each the tarball of its ceph package.
list=''
for word; do
	case $word in
	indextargets) echo 'http://archive.invalid/debian|Debian|Debian' && exit 0 ;;
	Dir::Etc::SourceList=*) list=${word#*=} ;;
	esac
done
echo "$*" >>"$FAKE/asked"
if [ -e "$FAKE/no-network" ]; then
	echo "E: Failed to fetch http://archive.invalid/debian  Could not resolve 'archive.invalid'"
	exit 100
fi
[ -n "$list" ] || exit 0
suite=$(awk '{ print $(NF - 1) }' "$list")
if [ ! -e "$FAKE/suites/$suite" ]; then
	echo "E: The repository 'http://archive.invalid/debian $suite Release' does not have a Release file."
	exit 100
fi
case " $* " in *" source "*) cp "$FAKE/suites/$suite" ceph_1.orig.tar.gz ;; esac
"#;

/// An archive and a cache.
struct Machine {
    here: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Machine { here: folder() };
        std::fs::create_dir_all(machine.path("fake/suites")).unwrap();
        std::fs::create_dir_all(machine.path("fake/bin")).unwrap();
        machine.program("apt-get", APT_GET);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.here.path().join(name)
    }

    /// A program that goes before the machine's own.
    fn program(&self, name: &str, text: &str) {
        let path = self.path("fake/bin").join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// Puts an SPDK, which builds by the commands `make`, into a suite's package.
    fn carry(&self, suite: &str, at: &str, version: &str, make: &str) {
        let work = self.path("package");
        let tree = work.join("ceph-1").join(at);
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::write(tree.join("VERSION"), format!("{version}.0\n")).unwrap();
        std::fs::write(tree.join("Makefile"), format!("all:\n\t{make}\n")).unwrap();
        let configure = tree.join("configure");
        std::fs::write(&configure, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&configure, PermissionsExt::from_mode(0o755)).unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&work).arg("-czf").arg(self.path("fake/suites").join(suite)).arg("ceph-1");
        assert!(tar.status().unwrap().success());
        std::fs::remove_dir_all(work).unwrap();
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script));
        let path = format!("{}:{}", self.path("fake/bin").display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("FAKE", self.path("fake")).env("LLOOP_CACHE", self.path("cache"));
        command.env("CARGO_TARGET_DIR", self.path("target")).env_remove("SPDK_DIR");
        command
    }

    /// Runs scripts/spdk.sh, which has to end well; the tree's name, and all that it said.
    fn spdk(&self, args: &[&str]) -> (String, String) {
        ended_well(&self.command("spdk.sh").args(args).output().unwrap())
    }

    /// Runs a script that has to end with a sentence that contains all of `words`.
    fn refused(&self, command: &mut Command, words: &[&str]) {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{output:?}");
        let sentence = said.split("error:").nth(1).unwrap_or_else(|| panic!("no sentence in {said}"));
        for word in words {
            assert!(sentence.contains(word), "no {word:?} in {said}");
        }
    }

    /// What spdk.sh has built so far.
    fn trees(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path("cache")).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("spdk-v")).collect()
    }
}

fn ended_well(output: &Output) -> (String, String) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{said}", output.status);
    let answer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(Path::new(&answer).join("build/lib/libspdk_bdev.a").exists(), "{answer:?}\n{said}");
    (Path::new(&answer).file_name().unwrap().to_str().unwrap().to_owned(), said)
}

#[test]
fn setup_takes_the_first_suite_that_has_it() {
    let machine = Machine::new();
    machine.carry("sid", TODAY, "26.05", BUILDS);
    // The package may have moved it elsewhere, and may carry one that is too old.
    machine.carry("forky", "src/elsewhere", "26.01", BUILDS);
    let (tree, said) = machine.spdk(&[]);
    assert!(tree.starts_with("spdk-v26.05-") && !said.contains("last resort"), "{tree} {said}");
    machine.carry("forky", TODAY, "24.05", BUILDS);
    std::fs::remove_dir_all(machine.path("cache")).unwrap();
    assert!(machine.spdk(&[]).0.starts_with("spdk-v26.05-"));
    // What is built is used from then on: nobody is asked.
    std::fs::remove_file(machine.path("fake/asked")).unwrap();
    assert_eq!(machine.spdk(&[]).0, machine.trees()[0]);
    assert!(!machine.path("fake/asked").exists());
}

#[test]
fn setup_falls_to_the_last_resort_and_says_so_in_a_line() {
    let machine = Machine::new();
    machine.carry("trixie", LAST_RESORT, "20.07", BUILDS);
    for (args, reason) in [(&[][..], "neither forky nor sid"), (&["--fallback"], "asked for")] {
        let (tree, said) = machine.spdk(args);
        assert!(tree.starts_with("spdk-v20.07-"), "{tree}");
        let lines: Vec<_> = said.lines().filter(|line| line.contains("last resort")).collect();
        assert!(lines.len() == 1 && lines[0].contains(reason) && lines[0].contains("no vhost"), "{said}");
    }
    // It takes the place of nothing: when the archive has the SPDK of today, that is built.
    machine.carry("forky", TODAY, "26.01", BUILDS);
    assert!(machine.spdk(&[]).0.starts_with("spdk-v26.01-"));
    assert_eq!(machine.trees().len(), 2);

    let nothing = Machine::new();
    nothing.refused(&mut nothing.command("spdk.sh"), &["no usable SPDK", "24.09", "20.07", "SPDK_DIR"]);
}

#[test]
fn setup_without_network() {
    let machine = Machine::new();
    machine.carry("forky", TODAY, "26.01", BUILDS);
    machine.carry("trixie", LAST_RESORT, "20.07", BUILDS);
    std::fs::write(machine.path("fake/no-network"), "").unwrap();
    let words = ["could not be reached", "Could not resolve", "run this again", "SPDK_DIR"];
    machine.refused(&mut machine.command("spdk.sh"), &words);
    machine.refused(machine.command("setup.sh").arg("--no-build"), &words);
    // It does not settle for the last resort because of that.
    assert_eq!(machine.trees(), Vec::<String>::new());
    // Packages that are missing need the network, too.
    machine.program("dpkg-query", "#!/bin/sh\n");
    machine.refused(machine.command("setup.sh").arg("--no-build"), &["could not install", "gcc", "network"]);
    std::fs::remove_file(machine.path("fake/no-network")).unwrap();
    assert!(machine.spdk(&[]).0.starts_with("spdk-v26.01-"));
}

#[test]
fn setup_with_a_tree_of_ones_own() {
    let machine = Machine::new();
    let tree = machine.path("own");
    let with = |tree: &Path| {
        let mut command = machine.command("spdk.sh");
        command.env("SPDK_DIR", tree);
        command
    };
    machine.refused(&mut with(&tree), &["is not a folder", "unset"]);
    std::fs::create_dir_all(tree.join("include/spdk")).unwrap();
    machine.refused(&mut with(&tree), &["not an SPDK tree"]);
    let header = |major: u32, minor: u32| {
        let text = format!("#define SPDK_VERSION_MAJOR {major}\n#define SPDK_VERSION_MINOR {minor}\n");
        std::fs::write(tree.join("include/spdk/version.h"), text).unwrap();
    };
    header(24, 5);
    machine.refused(&mut with(&tree), &["v24.05", "v24.09 or later", "unset SPDK_DIR"]);
    machine.refused(machine.command("setup.sh").arg("--no-build").env("SPDK_DIR", &tree), &["v24.09 or later"]);
    header(24, 9);
    machine.refused(&mut with(&tree), &["not built", "./configure && make"]);
    std::fs::create_dir_all(tree.join("build/lib")).unwrap();
    for library in ["bdev", "nvmf"] {
        std::fs::write(tree.join(format!("build/lib/libspdk_{library}.a")), "").unwrap();
    }
    assert_eq!(ended_well(&with(&tree).output().unwrap()).0, "own");
}

#[test]
fn setup_with_a_half_built_cache() {
    let machine = Machine::new();
    machine.carry("forky", TODAY, "26.01", "false");
    machine.refused(&mut machine.command("spdk.sh"), &["building SPDK v26.01", "spdk-build.log"]);
    assert_eq!(machine.trees().len(), 1, "what it was like can be looked at");
    // Interrupted elsewhere: while it was unpacked, and after the stamp, by somebody who removed files.
    let cache = machine.path("cache");
    std::fs::create_dir_all(cache.join("fetch/unpacked")).unwrap();
    std::fs::create_dir_all(cache.join("spdk-v26.01-0123456789")).unwrap();
    std::fs::write(cache.join("spdk-v26.01-0123456789/.lloop-complete"), "").unwrap();
    machine.carry("forky", TODAY, "26.01", BUILDS);
    let (tree, said) = machine.spdk(&[]);
    assert!(said.contains("half-built"), "{said}");
    assert_eq!(machine.trees(), [tree]);
}

/// A small disk; unmounted with the value.
struct Disk(PathBuf);

impl Disk {
    fn new(at: PathBuf, size: &str) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&at).status();
        assert!(status.unwrap().success());
        Disk(at)
    }

    fn grow(&self, size: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn setup_on_a_full_disk() {
    let machine = Machine::new();
    machine.carry("forky", TODAY, "26.01", &format!("dd if=/dev/zero of=large bs=1M count=24 && rm large && {BUILDS}"));
    let disk = Disk::new(machine.path("cache"), "16m");
    machine.refused(&mut machine.command("spdk.sh"), &["free disk space", "make room", "LLOOP_CACHE"]);
    // It becomes full while SPDK is built: there seems to be enough at first.
    let df = "#!/bin/sh\n[ -e \"$FAKE/looked\" ] && exec /bin/df \"$@\"\ntouch \"$FAKE/looked\"\n\
              printf 'Filesystem 1048576-blocks Used Available Capacity Mounted\\ntmpfs 9999 0 9999 0%% /\\n'\n";
    machine.program("df", df);
    machine.refused(&mut machine.command("spdk.sh"), &["the disk is full", "make room"]);
    // And while it is fetched.
    std::fs::remove_file(machine.path("fake/looked")).unwrap();
    std::fs::write(disk.0.join("filler"), vec![1; 16 << 20]).unwrap_err();
    machine.refused(&mut machine.command("spdk.sh"), &["make room"]);
    std::fs::remove_file(disk.0.join("filler")).unwrap();
    // With room it goes on.
    disk.grow("64m");
    std::fs::remove_file(machine.path("fake/looked")).unwrap();
    let (tree, _) = machine.spdk(&[]);
    assert_eq!(machine.trees(), [tree]);
}

#[test]
fn setup_twice_at_once() {
    let machine = Machine::new();
    let built = machine.path("built");
    machine.carry("forky", TODAY, "26.01", &format!("sleep 1; echo once >>{}; {BUILDS}", built.display()));
    let mut others: Vec<_> = (0..2)
        .map(|_| {
            let mut command = machine.command("spdk.sh");
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let results: Vec<_> = others.drain(..).map(|child| ended_well(&child.wait_with_output().unwrap())).collect();
    assert_eq!(results[0].0, results[1].0);
    assert_eq!(results.iter().filter(|(_, said)| said.contains("waiting for it")).count(), 1, "{results:?}");
    assert_eq!(std::fs::read_to_string(&built).unwrap(), "once\n");
    // And all of it.
    let setup = || {
        let mut command = machine.command("setup.sh");
        command.args(["--no-build", "--hugepages", "0"]).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let runs = [setup(), setup()];
    for run in runs {
        let output = run.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
