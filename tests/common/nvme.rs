//! A small NVMe/TCP initiator: enough to do I/O as a host does and to see the status codes that a host sees.
//!
//! Written from the NVM Express base and TCP transport specifications. One thread, blocking; requests can be pipelined.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const ICREQ: u8 = 0x00;
const CAPSULE_CMD: u8 = 0x04;
const CAPSULE_RESP: u8 = 0x05;
const H2C_DATA: u8 = 0x06;
const C2H_DATA: u8 = 0x07;
const R2T: u8 = 0x09;

/// What the controller answered: status code type and status code, `(0, 0)` for success.
pub type Status = (u8, u8);

/// A refused or failed command.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Failed(pub Status);

struct Queue {
    stream: TcpStream,
    next_cid: u16,
    pending: HashMap<u16, Pending>,
    finished: HashMap<u16, (Status, u32, Vec<u8>)>,
}

struct Pending {
    out: Vec<u8>,
    back: Vec<u8>,
}

fn sqe(opcode: u8) -> [u8; 64] {
    let mut sqe = [0; 64];
    sqe[0] = opcode;
    sqe[1] = 0x40; // SGLs
    sqe
}

fn put(sqe: &mut [u8], at: usize, bytes: &[u8]) {
    sqe[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Queue {
    fn connect(address: &str) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut icreq = [0; 128];
        put(&mut icreq, 0, &[ICREQ, 0, 128, 0]);
        put(&mut icreq, 4, &128u32.to_le_bytes());
        stream.write_all(&icreq)?;
        let mut icresp = [0; 128];
        stream.read_exact(&mut icresp)?;
        assert_eq!(icresp[0], 0x01, "the controller accepts the connection");
        Ok(Queue { stream, next_cid: 0, pending: HashMap::new(), finished: HashMap::new() })
    }

    /// Sends a command. `out` goes along in the capsule when it is `inline`, else when the controller asks for it.
    fn send(&mut self, mut sqe: [u8; 64], out: Vec<u8>, inline: bool, back_len: usize) -> std::io::Result<u16> {
        let cid = self.next_cid;
        self.next_cid = (self.next_cid + 1) % 0x7fff;
        put(&mut sqe, 2, &cid.to_le_bytes());
        let data_len = out.len().max(back_len) as u32;
        put(&mut sqe, 32, &data_len.to_le_bytes());
        sqe[39] = if inline { 0x01 } else { 0x5a };
        let in_capsule = if inline { &out[..] } else { &[] };
        let mut pdu = vec![CAPSULE_CMD, 0, 72, if in_capsule.is_empty() { 0 } else { 72 }];
        pdu.extend((72 + in_capsule.len() as u32).to_le_bytes());
        pdu.extend(sqe);
        pdu.extend(in_capsule);
        self.stream.write_all(&pdu)?;
        self.pending.insert(cid, Pending { out, back: vec![0; back_len] });
        Ok(cid)
    }

    /// Takes one PDU in.
    fn receive(&mut self) -> std::io::Result<()> {
        let mut head = [0; 8];
        self.stream.read_exact(&mut head)?;
        let len = u32::from_le_bytes(head[4..8].try_into().unwrap()) as usize;
        let mut body = vec![0; len - 8];
        self.stream.read_exact(&mut body)?;
        let u16_at = |at: usize| u16::from_le_bytes(body[at - 8..at - 6].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(body[at - 8..at - 4].try_into().unwrap());
        match head[0] {
            CAPSULE_RESP => {
                let (cid, status) = (u16_at(20), u16_at(22) >> 1);
                let pending = self.pending.remove(&cid).expect("an answer to a command");
                let status = (((status >> 8) & 7) as u8, status as u8);
                self.finished.insert(cid, (status, u32_at(8), pending.back));
            }
            C2H_DATA => {
                let (cid, offset, n) = (u16_at(8), u32_at(12) as usize, u32_at(16) as usize);
                let data = &body[head[3] as usize - 8..];
                let pending = self.pending.get_mut(&cid).expect("data of a command");
                pending.back[offset..offset + n].copy_from_slice(&data[..n]);
                // "Success" in the last one saves the response.
                if head[1] & 0x08 != 0 {
                    let pending = self.pending.remove(&cid).unwrap();
                    self.finished.insert(cid, ((0, 0), 0, pending.back));
                }
            }
            R2T => {
                let (cid, ttag, offset, n) = (u16_at(8), u16_at(10), u32_at(12) as usize, u32_at(16) as usize);
                let data = &self.pending[&cid].out[offset..offset + n];
                let mut pdu = vec![H2C_DATA, 0x04, 24, 24];
                pdu.extend((24 + n as u32).to_le_bytes());
                pdu.extend(cid.to_le_bytes());
                pdu.extend(ttag.to_le_bytes());
                pdu.extend((offset as u32).to_le_bytes());
                pdu.extend((n as u32).to_le_bytes());
                pdu.extend([0; 4]);
                pdu.extend(data);
                self.stream.write_all(&pdu)?;
            }
            other => return Err(std::io::Error::other(format!("the controller sent a PDU of type {other:#x}"))),
        }
        Ok(())
    }

    fn wait(&mut self, cid: u16) -> std::io::Result<(Status, u32, Vec<u8>)> {
        loop {
            if let Some(done) = self.finished.remove(&cid) {
                return Ok(done);
            }
            self.receive()?;
        }
    }

    fn fabrics(&mut self, fctype: u8, fill: impl FnOnce(&mut [u8; 64]), data: Vec<u8>) -> std::io::Result<u32> {
        let mut sqe = sqe(0x7f);
        sqe[4] = fctype;
        fill(&mut sqe);
        let cid = self.send(sqe, data, true, 0)?;
        let (status, result, _) = self.wait(cid)?;
        if status == (0, 0) {
            Ok(result)
        } else {
            Err(std::io::Error::other(format!("fabrics command {fctype}: {status:x?}")))
        }
    }

    fn join(&mut self, nqn: &str, qid: u16, cntlid: u16) -> std::io::Result<u16> {
        let mut data = vec![0; 1024];
        data[..16].copy_from_slice(b"lloop-test-host!");
        put(&mut data, 16, &cntlid.to_le_bytes());
        put(&mut data, 256, nqn.as_bytes());
        put(&mut data, 512, b"nqn.2026-11.io.lloop:test-host");
        let fill = |sqe: &mut [u8; 64]| {
            put(sqe, 42, &qid.to_le_bytes());
            put(sqe, 44, &127u16.to_le_bytes());
        };
        self.fabrics(0x01, fill, data).map(|result| result as u16)
    }
}

/// A connected controller with one I/O queue, for namespace 1.
pub struct Nvme {
    admin: Queue,
    io: Queue,
    block_bytes: usize,
}

/// A command on its way.
#[derive(Debug)]
pub struct InFlight(u16);

impl Nvme {
    /// Connects to a subsystem whose namespace 1 has blocks of `block_bytes`.
    pub fn connect(address: &str, nqn: &str, block_bytes: usize) -> std::io::Result<Self> {
        let mut admin = Queue::connect(address)?;
        let cntlid = admin.join(nqn, 0, 0xffff)?;
        // CC: entry sizes 2^6 and 2^4, enable.
        let enable = |sqe: &mut [u8; 64]| {
            put(sqe, 44, &0x14u32.to_le_bytes());
            put(sqe, 48, &0x0046_0001u64.to_le_bytes());
        };
        admin.fabrics(0x00, enable, Vec::new())?;
        let mut io = Queue::connect(address)?;
        io.join(nqn, 1, cntlid)?;
        Ok(Nvme { admin, io, block_bytes })
    }

    fn command(&self, opcode: u8, lba: u64, blocks: usize) -> [u8; 64] {
        let mut sqe = sqe(opcode);
        put(&mut sqe, 4, &1u32.to_le_bytes());
        put(&mut sqe, 40, &lba.to_le_bytes());
        put(&mut sqe, 48, &(blocks.max(1) as u32 - 1).to_le_bytes());
        sqe
    }

    fn done(&mut self, cid: u16) -> Result<Vec<u8>, Failed> {
        let (status, _, back) = self.io.wait(cid).expect("the connection holds");
        if status == (0, 0) { Ok(back) } else { Err(Failed(status)) }
    }

    /// Starts a write. A page goes along with the command (SPDK's default for I/O queues); more is sent when the controller asks
    /// for it, which is noticed in waiting for an answer.
    pub fn start_write(&mut self, lba: u64, data: &[u8]) -> std::io::Result<InFlight> {
        let sqe = self.command(0x01, lba, data.len() / self.block_bytes);
        self.io.send(sqe, data.to_vec(), data.len() <= 4096, 0).map(InFlight)
    }

    /// Starts a write that is to be on stable storage when it is answered (FUA: bit 30 of dword 12).
    pub fn start_write_fua(&mut self, lba: u64, data: &[u8]) -> std::io::Result<InFlight> {
        let mut sqe = self.command(0x01, lba, data.len() / self.block_bytes);
        sqe[51] |= 0x40;
        self.io.send(sqe, data.to_vec(), data.len() <= 4096, 0).map(InFlight)
    }

    /// Has a command aborted; whether it was.
    pub fn abort(&mut self, command: &InFlight) -> bool {
        let mut sqe = sqe(0x08);
        put(&mut sqe, 40, &1u16.to_le_bytes());
        put(&mut sqe, 42, &command.0.to_le_bytes());
        let cid = self.admin.send(sqe, Vec::new(), false, 0).expect("the connection holds");
        let (status, result, _) = self.admin.wait(cid).expect("the connection holds");
        assert_eq!(status, (0, 0));
        result & 1 == 0
    }

    /// Starts a flush.
    pub fn start_flush(&mut self) -> std::io::Result<InFlight> {
        let mut sqe = sqe(0x00);
        put(&mut sqe, 4, &1u32.to_le_bytes());
        self.io.send(sqe, Vec::new(), false, 0).map(InFlight)
    }

    /// Starts a read; [`Nvme::finish_read`] has what it read.
    pub fn start_read(&mut self, lba: u64, blocks: usize) -> std::io::Result<InFlight> {
        let sqe = self.command(0x02, lba, blocks);
        self.io.send(sqe, Vec::new(), false, blocks * self.block_bytes).map(InFlight)
    }

    /// Starts to deallocate blocks.
    pub fn start_unmap(&mut self, lba: u64, blocks: usize) -> std::io::Result<InFlight> {
        let mut sqe = sqe(0x09);
        put(&mut sqe, 4, &1u32.to_le_bytes());
        put(&mut sqe, 44, &4u32.to_le_bytes());
        let mut range = vec![0; 16];
        put(&mut range, 4, &(blocks as u32).to_le_bytes());
        put(&mut range, 8, &lba.to_le_bytes());
        self.io.send(sqe, range, true, 0).map(InFlight)
    }

    /// Waits for a read; an I/O error when the connection is gone.
    pub fn finish_read(&mut self, command: InFlight) -> std::io::Result<Result<Vec<u8>, Failed>> {
        let (status, _, data) = self.io.wait(command.0)?;
        Ok(if status == (0, 0) { Ok(data) } else { Err(Failed(status)) })
    }

    /// Waits for a command; an I/O error when the connection is gone.
    pub fn finish(&mut self, command: InFlight) -> std::io::Result<Result<(), Failed>> {
        let (status, _, _) = self.io.wait(command.0)?;
        Ok(if status == (0, 0) { Ok(()) } else { Err(Failed(status)) })
    }

    /// Writes whole blocks.
    pub fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), Failed> {
        let command = self.start_write(lba, data).expect("the connection holds");
        self.done(command.0).map(drop)
    }

    /// Reads whole blocks.
    pub fn read(&mut self, lba: u64, blocks: usize) -> Result<Vec<u8>, Failed> {
        let command = self.start_read(lba, blocks).expect("the connection holds");
        self.done(command.0)
    }

    /// Makes what was written durable.
    pub fn flush(&mut self) -> Result<(), Failed> {
        let command = self.start_flush().expect("the connection holds");
        self.done(command.0).map(drop)
    }

    /// Zeroes blocks.
    pub fn write_zeroes(&mut self, lba: u64, blocks: usize) -> Result<(), Failed> {
        let sqe = self.command(0x08, lba, blocks);
        let cid = self.io.send(sqe, Vec::new(), false, 0).expect("the connection holds");
        self.done(cid).map(drop)
    }

    /// Deallocates blocks.
    pub fn unmap(&mut self, lba: u64, blocks: usize) -> Result<(), Failed> {
        let command = self.start_unmap(lba, blocks).expect("the connection holds");
        self.done(command.0).map(drop)
    }
}
