//! `lloop export vhost-blk` and `vhost-scsi`: a device for virtual machines, through a socket.

use crate::client::Client;
use crate::device::{self, Device};
use crate::error::{Error, Result};
use crate::export::carry_out;
use crate::exports::Exports;
use crate::output::Report;
use crate::plan::Step;
use crate::vhost::{self, Controller, name_for};
use serde_json::{Value, json};
use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// SPDK's limit of SCSI targets a controller.
const MAX_TARGETS: u32 = 8;

/// Exports a device as a virtio disk.
///
/// # Errors
/// As [`Client::call`]. What the call had created is removed then.
pub fn block(client: &mut Client, name: &str, socket: &Path, read_only: bool) -> Result<Report> {
    let device = device::find(client, name)?;
    // A virtual machine should know at once what its writes would meet.
    let read_only = read_only || device.is_read_only();
    export(client, &device, socket, &Disk::Block { read_only })
}

/// Exports a device as a SCSI disk.
///
/// # Errors
/// As [`Client::call`]. What the call had created is removed then.
pub fn scsi(client: &mut Client, name: &str, socket: &Path) -> Result<Report> {
    let device = device::find(client, name)?;
    export(client, &device, socket, &Disk::Scsi)
}

enum Disk {
    Block { read_only: bool },
    Scsi,
}

impl Disk {
    fn kind(&self) -> &'static str {
        match self {
            Disk::Block { .. } => "vhost-blk",
            Disk::Scsi => "vhost-scsi",
        }
    }

    /// QEMU's arguments. Before 8.2 it can connect its SCSI disks only at the start, and refuses them with `reconnect`.
    fn qemu_arguments(&self, socket: &Path) -> String {
        let (device, reconnect) = match self {
            Disk::Block { .. } => ("vhost-user-blk-pci", ",reconnect=1"),
            Disk::Scsi => ("vhost-user-scsi-pci", ""),
        };
        format!(
            "-chardev socket,id=lloop,path={}{reconnect} -device {device},chardev=lloop \
             -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem",
            socket.display()
        )
    }
}

fn export(client: &mut Client, device: &Device, socket: &Path, disk: &Disk) -> Result<Report> {
    let shown = socket.display();
    let controllers = vhost::controllers(client)?;
    let steps = missing(&controllers, device, socket, disk)?;
    if !steps.is_empty() {
        let read_only = device.is_read_only() || matches!(disk, Disk::Block { read_only: true });
        Exports::gather(client)?.check_shared(device, read_only)?;
        let is_new = !controllers.iter().any(|controller| controller.is_at(socket));
        let made_folder = if is_new && client.is_local() { prepare(socket)? } else { None };
        let done = carry_out(client, &steps, &device.name).and_then(|()| landed(client, socket));
        if done.is_err()
            && let Some(folder) = made_folder
        {
            // Only what is empty goes.
            let _ = fs::remove_dir(folder);
        }
        done?;
    }
    if client.is_local() {
        restrict(socket)?;
    }
    let controllers = vhost::controllers(client)?;
    let Some(controller) =
        controllers.iter().find(|controller| controller.is_at(socket) && controller.serves(&device.name))
    else {
        return Err(Error::Failed(format!("{shown} has gone again: does someone else change it?")));
    };
    let read_only = controller.block().is_some_and(|block| block.read_only) || device.is_read_only();
    let target = controller.targets_of(&device.name).next().map(|target| target.number);
    let qemu = disk.qemu_arguments(socket);
    let done = if steps.is_empty() { "is exported already" } else { "is exported" };
    let how = match (target, read_only) {
        (Some(number), _) => format!("SCSI target {number} of {shown}"),
        (None, true) => format!("{shown}, read-only"),
        (None, false) => shown.to_string(),
    };
    Ok(Report {
        text: format!(
            "{} {done} by {} on {how}\nUse it in QEMU (its memory shared) with\n  {qemu}\n",
            device.name,
            disk.kind()
        ),
        json: json!({
            "name": device.name,
            "type": disk.kind(),
            "socket": socket,
            "controller": controller.name,
            "target": target,
            "read_only": read_only,
            "qemu": qemu,
            "changed": !steps.is_empty(),
        }),
    })
}

/// What must be done for it, in order.
fn missing(controllers: &[Controller], device: &Device, socket: &Path, disk: &Disk) -> Result<Vec<Step>> {
    let (name, shown) = (&device.name, socket.display());
    let found = controllers.iter().find(|controller| controller.is_at(socket));
    if let Some(found) = found {
        match (disk, found.block(), found.targets()) {
            (Disk::Block { read_only }, Some(block), _) if block.bdev.as_ref() == Some(name) => {
                let words = |read_only| if read_only { "read-only" } else { "for writing, too" };
                return if block.read_only == *read_only {
                    Ok(Vec::new())
                } else {
                    Err(Error::Failed(format!(
                        "{name} is exported on {shown} already, {}, not {}; lloop unexport vhost-blk {name} --socket {shown} first",
                        words(block.read_only),
                        words(*read_only)
                    )))
                };
            }
            (Disk::Scsi, _, Some(_)) if found.serves(name) => return Ok(Vec::new()),
            (Disk::Scsi, _, Some(_)) => {}
            _ => {
                return Err(Error::Failed(format!(
                    "{shown} is there already, and {}; say another socket, or take that back first",
                    found.in_words()
                )));
            }
        }
    }
    let creation = |method, params| Step {
        call: (method, params),
        undo: Some(("vhost_delete_controller", json!({"ctrlr": name_for(socket)}))),
        failure: format!("cannot make the socket {shown}"),
        remedy: "is its folder there, may the target write to it, and is the target lloop_tgt without -S DIR? Its log says more",
    };
    let mut steps = Vec::new();
    match disk {
        Disk::Block { read_only } => {
            let params = json!({"ctrlr": name_for(socket), "dev_name": name, "readonly": read_only});
            steps.push(creation("vhost_create_blk_controller", params));
        }
        Disk::Scsi => {
            if found.is_none() {
                steps.push(creation("vhost_create_scsi_controller", json!({"ctrlr": name_for(socket)})));
            }
            let targets = found.and_then(Controller::targets).unwrap_or_default();
            let number = (0..MAX_TARGETS).find(|number| targets.iter().all(|target| target.number != *number));
            let Some(number) = number else {
                return Err(Error::Failed(format!("{shown} has {MAX_TARGETS} devices already, which is all it can")));
            };
            let controller = found.map_or_else(|| name_for(socket), |found| found.name.clone());
            let params = json!({"ctrlr": controller, "scsi_target_num": number, "bdev_name": name});
            steps.push(Step {
                call: ("vhost_scsi_controller_add_target", params),
                undo: None,
                failure: format!("cannot add {name} to {shown}"),
                remedy: "is something else using it? The target's log says more",
            });
        }
    }
    Ok(steps)
}

/// SPDK would take the place of any socket that is there, also of one in use. The folder, if it had to be made.
fn prepare(socket: &Path) -> Result<Option<&Path>> {
    let shown = socket.display();
    match fs::symlink_metadata(socket) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::Failed(format!("{shown} is there already and is no socket; say another path")));
        }
        Ok(_) if UnixStream::connect(socket).is_ok() => {
            return Err(Error::Failed(format!(
                "another process listens on {shown} already; say another path, or end it"
            )));
        }
        _ => {}
    }
    let Some(folder) = socket.parent().filter(|folder| !folder.exists()) else { return Ok(None) };
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => Ok(Some(folder)),
        Err(e) => Err(Error::Failed(format!(
            "cannot make the folder {}: {e}; make it, or say another path",
            folder.display()
        ))),
    }
}

/// The target may put sockets elsewhere than lloop_tgt does.
fn landed(client: &mut Client, socket: &Path) -> Result<()> {
    let name = name_for(socket);
    let controllers = vhost::controllers(client)?;
    let Some(elsewhere) = controllers.iter().find(|controller| controller.name == name && !controller.is_at(socket))
    else {
        return Ok(());
    };
    for target in elsewhere.targets().unwrap_or_default() {
        client.call("vhost_scsi_controller_remove_target", json!({"ctrlr": name, "scsi_target_num": target.number}))?;
    }
    client.call("vhost_delete_controller", json!({"ctrlr": name}))?;
    Err(Error::Failed(format!(
        "the target put the socket at {} instead of {}, and it was removed again: start lloop_tgt without -S DIR",
        elsewhere.socket.display(),
        socket.display()
    )))
}

/// lloop_tgt makes sockets that only its user can connect to; others may not.
fn restrict(socket: &Path) -> Result<()> {
    let fail = |e: std::io::Error| Error::Failed(format!("cannot restrict {} to its owner: {e}", socket.display()));
    let mode = fs::symlink_metadata(socket).map_err(fail)?.permissions().mode();
    if mode & 0o177 != 0 { fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(fail) } else { Ok(()) }
}

/// What takes a device off a controller; the controller goes with its last device. `None` where it is not on it.
pub fn removal(controller: &Controller, name: &str) -> Option<Vec<Step>> {
    let shown = controller.socket.display();
    let step = |call, undo| Step {
        call,
        undo,
        failure: format!("cannot take {name} off {shown}"),
        remedy: "end the virtual machine that has it first; the target's log says more",
    };
    let deletion = || step(("vhost_delete_controller", json!({"ctrlr": controller.name})), None);
    if controller.block().is_some() {
        return controller.serves(name).then(|| vec![deletion()]);
    }
    let mut steps: Vec<Step> = controller
        .targets_of(name)
        .map(|target| {
            let place = json!({"ctrlr": controller.name, "scsi_target_num": target.number});
            let mut back: Value = place.clone();
            back["bdev_name"] = name.into();
            step(("vhost_scsi_controller_remove_target", place), Some(("vhost_scsi_controller_add_target", back)))
        })
        .collect();
    if steps.is_empty() {
        return None;
    }
    if controller.targets().is_some_and(|targets| targets.len() == steps.len()) {
        steps.push(deletion());
    }
    Some(steps)
}

/// A controller that has lost its device: what removes it.
pub fn removal_of_empty(controller: &Controller) -> Option<Vec<Step>> {
    let is_empty = match (controller.block(), controller.targets()) {
        (Some(block), _) => block.bdev.is_none(),
        (None, Some(targets)) => targets.is_empty(),
        (None, None) => false,
    };
    is_empty.then(|| {
        vec![Step {
            call: ("vhost_delete_controller", json!({"ctrlr": controller.name})),
            undo: None,
            failure: format!("cannot remove {}", controller.socket.display()),
            remedy: "end the virtual machine that is connected first; the target's log says more",
        }]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Call;
    use serde::Deserialize;

    fn device(name: &str) -> Device {
        Device::deserialize(device::tests::bdev(name)).unwrap()
    }

    fn planned(name: &str, socket: &str, disk: &Disk) -> Result<Vec<Call>> {
        let steps = missing(&vhost::tests::some(), &device(name), Path::new(socket), disk)?;
        Ok(steps.into_iter().map(|step| step.call).collect())
    }

    const BLOCK: Disk = Disk::Block { read_only: false };
    const READ_ONLY: Disk = Disk::Block { read_only: true };

    #[test]
    fn new_sockets() {
        assert_eq!(
            planned("lloop5", "/run/x", &BLOCK).unwrap(),
            [("vhost_create_blk_controller", json!({"ctrlr": "run/x", "dev_name": "lloop5", "readonly": false}))]
        );
        assert_eq!(
            planned("lloop5", "/run/x", &Disk::Scsi).unwrap(),
            [
                ("vhost_create_scsi_controller", json!({"ctrlr": "run/x"})),
                (
                    "vhost_scsi_controller_add_target",
                    json!({"ctrlr": "run/x", "scsi_target_num": 0, "bdev_name": "lloop5"})
                ),
            ]
        );
    }

    #[test]
    fn sockets_that_are_there() {
        let (blk, scsi) = ("/run/lloop/blk.sock", "/run/lloop/scsi.sock");
        assert_eq!(planned("lloop0", blk, &READ_ONLY).unwrap(), [], "the same again");
        assert_eq!(planned("lloop2", scsi, &Disk::Scsi).unwrap(), [], "the same again");
        assert_eq!(
            planned("lloop5", scsi, &Disk::Scsi).unwrap(),
            [(
                "vhost_scsi_controller_add_target",
                json!({"ctrlr": "run/lloop/scsi.sock", "scsi_target_num": 1, "bdev_name": "lloop5"})
            )]
        );
        let refusal = |name, socket, disk: &Disk| planned(name, socket, disk).unwrap_err().to_string();
        assert!(refusal("lloop0", blk, &BLOCK).contains("already, read-only, not for writing"));
        assert!(refusal("lloop1", blk, &BLOCK).contains("serves lloop0 (vhost-blk)"));
        assert!(refusal("lloop0", blk, &Disk::Scsi).contains("serves lloop0 (vhost-blk)"));
        assert!(refusal("lloop1", scsi, &BLOCK).contains("serves lloop1, lloop2 (vhost-scsi)"));
        assert!(refusal("lloop1", "/run/lloop/gone.sock", &BLOCK).contains("serves nothing"));
    }

    #[test]
    fn a_target_without_vhost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // It has a device, and knows no other method.
        let served = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            while let Ok(request) = Value::deserialize(&mut serde_json::Deserializer::from_reader(&stream)) {
                let mut reply = match request["method"].as_str() {
                    Some("bdev_get_bdevs") => json!({"result": [device::tests::bdev("lloop0")]}),
                    _ => json!({"error": {"code": -32601, "message": "Method not found"}}),
                };
                reply["id"] = request["id"].clone();
                std::io::Write::write_all(&mut &stream, reply.to_string().as_bytes()).unwrap();
            }
        });
        let address = crate::client::Address::Unix(path);
        let mut client = Client::connect(&address, std::time::Duration::from_secs(5)).unwrap();
        let socket = dir.path().join("folder/vm");
        for error in [block(&mut client, "lloop0", &socket, false), scsi(&mut client, "lloop0", &socket)] {
            let error = error.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("without vhost") && error.contains("export nvmf"), "{error}");
        }
        assert!(!socket.parent().unwrap().exists(), "nothing is made");
        drop(client);
        served.join().unwrap();
    }

    #[test]
    fn back_again() {
        let all = vhost::tests::some();
        let calls =
            |steps: Option<Vec<Step>>| steps.map(|steps| steps.into_iter().map(|step| step.call.0).collect::<Vec<_>>());
        assert_eq!(calls(removal(&all[0], "lloop0")), Some(vec!["vhost_delete_controller"]));
        assert_eq!(calls(removal(&all[0], "lloop1")), None);
        let steps = removal(&all[1], "lloop2").unwrap();
        assert_eq!(steps.len(), 1, "another device stays");
        let back = json!({"ctrlr": "run/lloop/scsi.sock", "scsi_target_num": 3, "bdev_name": "lloop2"});
        assert_eq!(steps[0].undo, Some(("vhost_scsi_controller_add_target", back)));
        assert_eq!(calls(removal_of_empty(&all[2])), Some(vec!["vhost_delete_controller"]));
        assert_eq!(calls(removal_of_empty(&all[1])), None);
    }

    #[test]
    fn nobodys_socket_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert_eq!(prepare(&path).unwrap(), None);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(prepare(&path).unwrap_err().to_string().contains("another process listens"));
        restrict(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert_eq!(prepare(&path).unwrap(), None, "one that was left behind is in nobody's way");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "x").unwrap();
        assert!(prepare(&path).unwrap_err().to_string().contains("no socket"));
        let (below, deep) = (dir.path().join("a/s"), dir.path().join("b/c/s"));
        assert_eq!(prepare(&below).unwrap(), below.parent());
        assert_eq!(fs::metadata(dir.path().join("a")).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(prepare(&deep).unwrap_err().to_string().contains("cannot make the folder"));
    }
}
