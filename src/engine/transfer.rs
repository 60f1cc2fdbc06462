//! Executing requests with blocking calls: what a worker does between taking a request and answering it.
//!
//! Three ways, from fast to slow: memory and range aligned, straight into the request's memory; only the range aligned,
//! through a bounce buffer; neither, by reading the pages at the edges, patching and writing them. The scheduler keeps
//! overlapping requests away from the third.

use super::request::{Op, Request};
use super::target::{Damage, Target};
use crate::os::bounce::BounceBuffer;
use crate::os::iov::{IoVecs, IovList};
use crate::os::queue::List;

/// How much a worker bounces at a time.
pub(super) const BOUNCE_BYTES: usize = 1 << 20;

type Outcome = Result<(), i32>;

/// A worker's reusable memory: reserved when the worker starts, so that no I/O allocates.
pub struct Transfer {
    iovs: IovList,
    bounce: BounceBuffer,
}

impl Transfer {
    /// Reserves the memory.
    ///
    /// # Errors
    /// The system's, when it has none.
    pub fn new() -> std::io::Result<Self> {
        Ok(Transfer { iovs: IovList::default(), bounce: BounceBuffer::new(BOUNCE_BYTES)? })
    }

    /// Executes the requests of one `sched::Work`: several only when they are flushes of one file, or neighbours. Whether
    /// all of them succeeded.
    pub fn execute<T>(&mut self, requests: &mut List<Request<T>>) -> bool {
        let Some(first) = requests.front() else { return true };
        if first.op == Op::Flush {
            let result = first.target.file().sync_data();
            if result.is_err() {
                first.target.set_damage(Damage::FlushFailed);
            }
            requests.iter_mut().for_each(|request| request.conclude(result));
            return result.is_ok();
        }
        if requests.len() > 1 && self.merged(requests) {
            requests.iter_mut().for_each(|request| request.conclude(Ok(())));
            return true;
        }
        let mut all_well = true;
        for request in requests.iter_mut() {
            let result = self.single(request);
            all_well &= result.is_ok();
            request.conclude(result);
        }
        all_well
    }

    /// Neighbours in one call. False when that did not do all of it: then each gets its own call and its own result.
    fn merged<T>(&mut self, requests: &List<Request<T>>) -> bool {
        let Some(first) = requests.front() else { return true };
        let wanted = requests.iter().map(|request| request.len_bytes).sum::<u64>();
        if first.target.ends_before(first.offset_bytes + wanted) {
            return false;
        }
        self.iovs.clear();
        if requests.iter().all(Request::suits_direct_io) {
            for request in requests.iter() {
                self.iovs.push(&request.iovs, 0);
            }
            return call(&first.target, Access::of(first), &self.iovs, first.offset_bytes) == Ok(wanted as usize);
        }
        // One copy, and one call, for all of them.
        let Some(copy) = self.bounce.as_mut_slice().get_mut(..wanted as usize) else { return false };
        let mut rest = &mut *copy;
        for request in requests.iter().filter(|request| request.op == Op::Write) {
            let part = rest.split_off_mut(..request.len_bytes as usize).unwrap_or_default();
            request.iovs.gather(0, part);
        }
        self.iovs.push_slice(copy);
        if call(&first.target, Access::of(first), &self.iovs, first.offset_bytes) != Ok(wanted as usize) {
            return false;
        }
        let mut rest = &self.bounce.as_mut_slice()[..wanted as usize];
        for request in requests.iter().filter(|request| request.op == Op::Read) {
            let part = rest.split_off(..request.len_bytes as usize).unwrap_or_default();
            request.iovs.scatter(0, part);
        }
        true
    }

    fn single<T>(&mut self, request: &Request<T>) -> Outcome {
        let (target, op) = (&*request.target, request.op);
        if target.ends_before(request.end_bytes()) {
            return Err(libc::EIO);
        }
        let align = target.file().offset_align_bytes() as u64;
        let whole_pages = (request.offset_bytes | request.len_bytes) & (align - 1) == 0;
        match op {
            Op::Read | Op::Write if whole_pages => {
                if request.suits_direct_io() {
                    self.direct(target, Access::of(request), request)
                } else {
                    self.bounced(target, Access::of(request), request)
                }
            }
            Op::Read => self.read_parts(target, request),
            Op::Write => {
                let data = Some((&request.iovs, 0));
                self.write_parts(target, Access::of(request), request.offset_bytes, request.len_bytes, data)
            }
            Op::Unmap | Op::WriteZeroes => self.zero(target, request),
            Op::Flush => target.file().sync_data(),
            // The scheduler answers them.
            Op::Abort | Op::Reset => Err(libc::EINVAL),
        }
    }

    fn direct<T>(&mut self, target: &Target, access: Access, request: &Request<T>) -> Outcome {
        let mut done = 0;
        while done < request.len_bytes {
            self.iovs.clear();
            self.iovs.push(&request.iovs, done as usize);
            let n = call(target, access, &self.iovs, request.offset_bytes + done)?;
            done += progress(target, access, n)?;
        }
        Ok(())
    }

    fn bounced<T>(&mut self, target: &Target, access: Access, request: &Request<T>) -> Outcome {
        let mut done = 0;
        while done < request.len_bytes {
            let chunk = (request.len_bytes - done).min(BOUNCE_BYTES as u64) as usize;
            if access != Access::Read {
                request.iovs.gather(done as usize, &mut self.bounce.as_mut_slice()[..chunk]);
            }
            self.chunk(target, access, request.offset_bytes + done, chunk)?;
            if access == Access::Read {
                request.iovs.scatter(done as usize, &self.bounce.as_mut_slice()[..chunk]);
            }
            done += chunk as u64;
        }
        Ok(())
    }

    /// Moves the first `len` bytes of the bounce buffer, all of them.
    fn chunk(&mut self, target: &Target, access: Access, offset_bytes: u64, len: usize) -> Outcome {
        let mut done = 0;
        while done < len {
            self.iovs.clear();
            self.iovs.push_slice(&mut self.bounce.as_mut_slice()[done..len]);
            let n = call(target, access, &self.iovs, offset_bytes + done as u64)?;
            done += progress(target, access, n)? as usize;
        }
        Ok(())
    }

    fn read_parts<T>(&mut self, target: &Target, request: &Request<T>) -> Outcome {
        for part in pages(request.offset_bytes, request.len_bytes, target.file().offset_align_bytes() as u64) {
            self.chunk(target, Access::Read, part.page_start, part.pages_len)?;
            let bytes = &self.bounce.as_mut_slice()[part.lead..part.lead + part.len];
            request.iovs.scatter(part.done, bytes);
        }
        Ok(())
    }

    /// Writes `data` (from a position in it on), or zeroes, over a range that covers parts of pages.
    fn write_parts(
        &mut self,
        target: &Target,
        access: Access,
        offset_bytes: u64,
        len_bytes: u64,
        data: Option<(&IoVecs, usize)>,
    ) -> Outcome {
        let align = target.file().offset_align_bytes();
        for part in pages(offset_bytes, len_bytes, align as u64) {
            let tail_page = part.pages_len - align;
            let tail_is_partial = part.lead + part.len != part.pages_len;
            // `chunk` works on the front of the buffer: read the tail page there, move it into place, then read the head page.
            if tail_page != 0 && tail_is_partial {
                self.chunk(target, Access::Read, part.page_start + tail_page as u64, align)?;
                self.bounce.as_mut_slice().copy_within(..align, tail_page);
            }
            if part.lead != 0 || (tail_page == 0 && tail_is_partial) {
                self.chunk(target, Access::Read, part.page_start, align)?;
            }
            let patch = &mut self.bounce.as_mut_slice()[part.lead..part.lead + part.len];
            match data {
                Some((iovs, skip)) => {
                    iovs.gather(skip + part.done, patch);
                }
                None => patch.fill(0),
            }
            self.chunk(target, access, part.page_start, part.pages_len)?;
        }
        Ok(())
    }

    /// Whole pages by the filesystem, parts of pages by writing zeroes: all of the range reads as zeroes afterwards.
    fn zero<T>(&mut self, target: &Target, request: &Request<T>) -> Outcome {
        let align = target.file().offset_align_bytes() as u64;
        let (start, end) = (request.offset_bytes, request.end_bytes());
        let (first, last) = (start.next_multiple_of(align), end - end % align);
        if first >= last {
            return self.write_parts(target, Access::Write, start, end - start, None);
        }
        if start < first {
            self.write_parts(target, Access::Write, start, first - start, None)?;
        }
        if last < end {
            self.write_parts(target, Access::Write, last, end - last, None)?;
        }
        // Under a group lock fallocate would wait for that lock for ever.
        let permit = target.guard().unlocked().ok_or(libc::EOPNOTSUPP)?;
        match request.op {
            Op::Unmap => target.file().punch(permit, first, last - first),
            _ => target.zero_pages(permit, first, last - first),
        }
    }
}

/// What a call does with the file.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Into memory.
    Read,
    /// To the file; a later flush makes it durable.
    Write,
    /// What is written is on stable storage when the call returns.
    WriteDurably,
}

impl Access {
    /// By what the request wants.
    pub fn of<T>(request: &Request<T>) -> Self {
        match (request.op, request.fua) {
            (Op::Read, _) => Access::Read,
            (_, true) => Access::WriteDurably,
            (_, false) => Access::Write,
        }
    }
}

fn call(target: &Target, access: Access, iovs: &IovList, offset_bytes: u64) -> Result<usize, i32> {
    match access {
        Access::Read => target.file().read_at(iovs, offset_bytes),
        Access::Write | Access::WriteDurably => {
            target.file().write_at(iovs, offset_bytes, access == Access::WriteDurably)
        }
    }
}

/// How far a call that moved `n` bytes has brought us: whole pages, since direct I/O continues on those only.
///
/// # Errors
/// EIO when that is nothing. For a read this is the end of the file, inside the device: zeroes would be a lie.
fn progress(target: &Target, access: Access, n: usize) -> Result<u64, i32> {
    let whole = n - n % target.file().offset_align_bytes();
    if whole == 0 {
        if access == Access::Read {
            target.set_damage(Damage::Truncated);
        }
        return Err(libc::EIO);
    }
    Ok(whole as u64)
}

/// A piece of a range, with the pages around it.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Part {
    page_start: u64,
    pages_len: usize,
    /// Bytes of the first page before the piece.
    lead: usize,
    len: usize,
    /// Bytes of the range before this piece.
    done: usize,
}

/// Cuts a range into pieces whose pages fit the bounce buffer.
fn pages(offset_bytes: u64, len_bytes: u64, align: u64) -> impl Iterator<Item = Part> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len_bytes {
            return None;
        }
        let start = offset_bytes + done;
        let page_start = start - start % align;
        let end = (offset_bytes + len_bytes).min(page_start + BOUNCE_BYTES as u64);
        let part = Part {
            page_start,
            pages_len: (end.next_multiple_of(align) - page_start) as usize,
            lead: (start - page_start) as usize,
            len: (end - start) as usize,
            done: done as usize,
        };
        done += end - start;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_the_range_once_and_fit(offset in 0u64..1 << 40, len in 0u64..5 << 20, shift in 9u32..17) {
            let align = 1u64 << shift;
            let mut next = offset;
            for part in pages(offset, len, align) {
                prop_assert_eq!(part.page_start + part.lead as u64, next);
                prop_assert_eq!(part.done as u64, next - offset);
                prop_assert!(part.len > 0 && part.lead + part.len <= part.pages_len && part.pages_len <= BOUNCE_BYTES);
                prop_assert_eq!((part.page_start % align, part.pages_len as u64 % align), (0, 0));
                prop_assert!(part.pages_len - (part.lead + part.len) < align as usize && part.lead < align as usize);
                next += part.len as u64;
            }
            prop_assert_eq!(next, offset + len);
        }
    }
}
