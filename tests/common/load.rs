//! Mixed load through an initiator, with a model of what has to be there.

use super::nvme::{Failed, Nvme};

/// Random numbers that are the same in every run (xorshift).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed | 1)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A device and what it has to hold, block by block of 4096 bytes.
pub struct Load {
    pub nvme: Nvme,
    random: Random,
    /// The seed of each block's content; 0: zeroes.
    model: Vec<u64>,
    /// Reads, writes and flushes so far.
    pub done: u64,
    /// Flushes that have failed.
    pub failed_flushes: u64,
}

pub const BLOCK: usize = 4096;

/// A block's content by its seed.
pub fn content(seed: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    if seed != 0 {
        for (i, word) in block.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ i as u64).to_le_bytes());
        }
    }
    block
}

impl Load {
    /// On a device of zeroes with `blocks` blocks.
    pub fn new(nvme: Nvme, blocks: u64, seed: u64) -> Self {
        Load { nvme, random: Random::new(seed), model: vec![0; blocks as usize], done: 0, failed_flushes: 0 }
    }

    /// 16 writes at once to different blocks, and reads of others meanwhile; all have to succeed and to be right.
    pub fn round(&mut self) {
        let blocks = self.model.len() as u64;
        let mut flights = Vec::new();
        let mut busy = Vec::new();
        while flights.len() < 16 {
            let (block, seed) = (self.random.below(blocks), self.random.below(u64::MAX - 1) + 1);
            if !busy.contains(&block) {
                flights.push((block, seed, self.nvme.start_write(block, &content(seed)).unwrap()));
                busy.push(block);
            }
        }
        for _ in 0..4 {
            let block = self.random.below(blocks);
            if !busy.contains(&block) {
                self.check(block);
            }
        }
        for (block, seed, flight) in flights {
            self.nvme.finish(flight).unwrap().unwrap_or_else(|e| panic!("the write of block {block}: {e:?}"));
            self.model[block as usize] = seed;
            self.done += 1;
        }
        if self.random.below(8) == 0 {
            // After an eviction an OST's earlier error is told to who flushes first (rule 4); nothing else may fail.
            if let Err(failed) = self.nvme.flush() {
                assert_eq!(failed, Failed((2, 0x80)));
                self.failed_flushes += 1;
            }
            self.done += 1;
        }
    }

    /// Reads a block and compares.
    pub fn check(&mut self, block: u64) {
        let data = self.nvme.read(block, 1).unwrap_or_else(|e| panic!("the read of block {block}: {e:?}"));
        assert!(data == content(self.model[block as usize]), "block {block} is not what was written");
        self.done += 1;
    }

    /// Everything has to be there: through the device, and in the file below it.
    pub fn verify(&mut self, backing: &std::path::Path) {
        (0..self.model.len() as u64).for_each(|block| self.check(block));
        if self.nvme.flush().is_err() {
            self.failed_flushes += 1;
            self.nvme.flush().unwrap();
        }
        let file = std::fs::read(backing).unwrap();
        for (block, seed) in self.model.iter().enumerate() {
            assert!(
                file[block * BLOCK..][..BLOCK] == content(*seed),
                "block {block} of the file is not what was written"
            );
        }
    }
}
