//! Lustre's ioctls, by the numbers that tests/lustre.c translates them to.

use crate::layout;
use crate::locks::Asked;
use crate::node::Node;
use crate::{SlowFs, raw};
use fuser::Errno;
use std::os::unix::fs::MetadataExt;

const FID: u32 = 0x8010_6c61;
const GROUP_LOCK: u32 = 0x4010_6c62;
const GROUP_UNLOCK: u32 = 0x4010_6c63;
const SET_STRIPE: u32 = 0x4030_6c64;
const SYNC: u32 = 0x6c65;
/// Lustre's own number: it is one that FUSE can carry.
const DATA_VERSION: u32 = 0x8010_66da;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Errno> {
    bytes.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).ok_or(Errno::EINVAL)
}

/// Answers one; what is to be copied to the caller.
pub fn call(fs: &SlowFs, node: &Node, pid: u32, handle: u64, request: u32, arg: &[u8]) -> Result<Vec<u8>, Errno> {
    match request {
        FID => {
            let fid = fs.faults().fid.unwrap_or(node.file.metadata()?.ino() as u32);
            Ok([&0x2_0000_0401u64.to_le_bytes()[..], &fid.to_le_bytes(), &0u32.to_le_bytes()].concat())
        }
        DATA_VERSION => {
            let version = node.state.lock().unwrap().version;
            Ok([version.to_le_bytes(), [0; 8]].concat())
        }
        GROUP_LOCK => {
            let gid = u64::from_le_bytes(number(arg, 0)?);
            let nonblock = u32::from_le_bytes(number(arg, 8)?) != 0;
            // It needs every OST.
            fs.while_hanging(pid)?;
            fs.wait(node, pid, |state| match state.group_lock(handle, gid, nonblock) {
                Asked::Yes => Some(Ok(())),
                Asked::No(errno) => Some(Err(raw(errno))),
                Asked::Wait => None,
            })?;
            Ok(Vec::new())
        }
        GROUP_UNLOCK => {
            let gid = u64::from_le_bytes(number(arg, 0)?);
            node.change(|state| {
                state.groups.unlock(handle, gid)?;
                state.counters.group_unlocks += 1;
                Ok(())
            })
            .map_err(raw)?;
            Ok(Vec::new())
        }
        SYNC => fs.sync(node).map(|()| Vec::new()),
        SET_STRIPE => {
            let faults = fs.faults();
            if node.lov.exists() {
                return Err(Errno::EEXIST);
            }
            if faults.skip_setstripe {
                return Ok(Vec::new());
            }
            let asked =
                if faults.ignore_setstripe { layout::default_request() } else { number::<48>(arg, 0)?.to_vec() };
            let serial = node.file.metadata()?.ino() as u32;
            let lov = layout::instantiate(&asked, faults.osts.unwrap_or(4), !faults.ignore_pool, serial);
            std::fs::write(&node.lov, lov.map_err(raw)?)?;
            Ok(Vec::new())
        }
        _ => Err(Errno::ENOTTY),
    }
}
