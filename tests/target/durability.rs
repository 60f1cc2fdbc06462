//! Nothing acknowledged is ever lost: the target is killed under load, and what was written before a completed flush is there.

use crate::common::Target;
use crate::common::nvme::Nvme;
use serde_json::json;
use std::time::{Duration, Instant};

const BLOCKS: usize = 2048;

/// The newest write to each block, by its serial number, in three stages.
#[derive(Clone)]
struct Model {
    submitted: Vec<u64>,
    completed: Vec<u64>,
    flushed: Vec<u64>,
}

fn block(lba: usize, serial: u64) -> Vec<u8> {
    let mut data = vec![serial as u8; 4096];
    data[..8].copy_from_slice(&serial.to_le_bytes());
    data[8..16].copy_from_slice(&(lba as u64).to_le_bytes());
    data[4088..].copy_from_slice(&serial.to_le_bytes());
    data
}

/// Writes at random places, 32 at a time, with a flush now and then, until the connection breaks.
fn load(nvme: &mut Nvme, model: &mut Model, serial: &mut u64) {
    let mut random = *serial | 1;
    loop {
        let mut flights = Vec::new();
        for _ in 0..32 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let lba = (random % BLOCKS as u64) as usize;
            // One write to a block at a time: of two, either could be the later one.
            if model.submitted[lba] != model.completed[lba] {
                continue;
            }
            *serial += 1;
            model.submitted[lba] = *serial;
            match nvme.start_write(lba as u64, &block(lba, *serial)) {
                Ok(flight) => flights.push((lba, *serial, flight)),
                Err(_) => return,
            }
        }
        for (lba, serial, flight) in flights {
            match nvme.finish(flight) {
                Ok(Ok(())) => model.completed[lba] = serial,
                Ok(Err(failed)) => panic!("a write failed: {failed:?}"),
                Err(_) => return,
            }
        }
        if random.is_multiple_of(4) {
            let promised = model.completed.clone();
            match nvme.start_flush().and_then(|flight| nvme.finish(flight)) {
                Ok(Ok(())) => model.flushed = promised,
                Ok(Err(failed)) => panic!("a flush failed: {failed:?}"),
                Err(_) => return,
            }
        }
    }
}

#[test]
fn what_was_flushed_survives_kill_9() {
    let folder = crate::common::folder();
    let file = crate::common::image(folder.path(), "a.img", (BLOCKS * 4096) as u64);
    let mut model = Model { submitted: vec![0; BLOCKS], completed: vec![0; BLOCKS], flushed: vec![0; BLOCKS] };
    let mut serial = 0;
    for round in 0..4 {
        let mut target = Target::start();
        let name = target.attach(&file, json!({"engine": if round == 1 { "threads" } else { "uring" }}));
        let mut nvme = target.connect(&name);
        // What the rounds before promised is there, seen through the device.
        for lba in 0..BLOCKS {
            let data = nvme.read(lba as u64, 1).unwrap();
            let found = u64::from_le_bytes(data[..8].try_into().unwrap());
            assert!(
                found >= model.flushed[lba] && found <= model.submitted[lba],
                "round {round}, block {lba}: found write {found}, flushed was {}, submitted {}",
                model.flushed[lba],
                model.submitted[lba]
            );
            assert!(found == 0 || data == block(lba, found), "round {round}, block {lba} is torn");
            // A write whose answer was lost may be there or not; from here on it is what it is.
            (model.submitted[lba], model.completed[lba], model.flushed[lba]) = (found, found, found);
        }
        if round == 3 {
            target.stop();
            break;
        }
        let pid = target.pid();
        let killer = std::thread::spawn(move || {
            let start = Instant::now();
            std::thread::sleep(Duration::from_millis(700 + 130 * round));
            // SAFETY: a signal to a child of ours.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            start.elapsed()
        });
        load(&mut nvme, &mut model, &mut serial);
        killer.join().unwrap();
        assert!(!target.wait(Duration::from_secs(10)).success());
        assert!(model.flushed.iter().any(|&f| f > 0), "the load reached a flush in round {round}");
    }
}
