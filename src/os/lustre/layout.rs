//! Where a file's bytes lie: the attribute `lustre.lov`, read without liblustreapi.
//!
//! A file is plain (one component that covers all of it) or composite: components that follow each other, several times over
//! if it has mirrors. A component is striped over objects, each on an OST, in chunks of the stripe size counted from the file's
//! start. One that nobody has written to yet has no objects.
//!
//! The attribute comes from a server and may have been made by anybody: nothing of it is believed that was not checked.

use super::{Fid, errno};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

mod json;

pub(super) const MAGIC_V1: u32 = 0x0BD1_0BD0;
pub(super) const MAGIC_V3: u32 = 0x0BD3_0BD0;
const MAGIC_COMPOSITE: u32 = 0x0BD6_0BD0;
const MAGIC_FOREIGN: u32 = 0x0BD7_0BD0;
/// Composite, with components that grow.
const MAGIC_SEL: u32 = 0x0BD8_0BD0;

const FLAG_STALE: u32 = 0x1;
const FLAG_INIT: u32 = 0x10;
const FLAG_EXTENSION: u32 = 0x40;

const V1_BYTES: usize = 32;
const V3_BYTES: usize = 48;
pub(super) const POOL_BYTES: usize = 16;
const OBJECT_BYTES: usize = 24;
const COMPOSITE_BYTES: usize = 32;
const ENTRY_BYTES: usize = 48;
/// What stripe sizes are multiples of.
pub const STRIPE_UNIT_BYTES: u64 = 65536;
/// The largest attribute that Linux passes on.
const MAX_BYTES: usize = 65536;

/// A layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// In the order of the attribute; each covers some bytes.
    pub components: Vec<Component>,
    /// How many copies of the data there are, 1 if none was asked for.
    pub mirrors: u32,
    /// Another number when the layout has changed. Plain layouts have none: the client hides it.
    pub generation: u32,
    /// Whether it is made of components.
    pub composite: bool,
}

/// A part of a file, and how it is striped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Its id in the file.
    pub id: u32,
    /// The mirror that it belongs to.
    pub mirror: u16,
    /// Its flags as the attribute has them.
    pub flags: u32,
    /// Where it starts in the file.
    pub start_bytes: u64,
    /// The first byte behind it; `u64::MAX` when it has no end.
    pub end_bytes: u64,
    /// What it is made of.
    pub pattern: Pattern,
    /// How much of the file lies on an object before the next one's turn.
    pub stripe_size_bytes: u64,
    /// Over how many objects it is striped; `ALL_OSTS` where that is not settled yet.
    pub stripe_count: u32,
    /// The OST pool that it was made in.
    pub pool: Option<String>,
    /// As many as there are stripes, or none.
    pub objects: Vec<Object>,
}

/// The stripe count that means all OSTs there are.
pub const ALL_OSTS: u32 = 0xFFFF;

/// A stripe's object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// The OST that it is on.
    pub ost_idx: u32,
    /// Its id there.
    pub fid: Fid,
}

/// What a component is made of (`lmm_pattern`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern(pub u32);

impl Pattern {
    const RAID0: u32 = 0x1;
    const MDT: u32 = 0x100;
    const OVERSTRIPED: u32 = 0x200;
    const FOREIGN: u32 = 0x400;
    const RELEASED: u32 = 0x8000_0000;

    /// Striped over objects, on each OST once or, overstriped, several times.
    pub fn is_striped(self) -> bool {
        self.0 & !Self::OVERSTRIPED == Self::RAID0
    }

    /// The data is with the metadata (DoM).
    pub fn is_mdt(self) -> bool {
        self.0 == Self::MDT
    }

    /// The data is in an archive and comes back when it is asked for (HSM).
    pub fn is_released(self) -> bool {
        self.0 & Self::RELEASED != 0
    }
}

impl fmt::Display for Pattern {
    /// In the words of `lfs getstripe`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            released if Pattern(released).is_released() => "released",
            Self::RAID0 => "raid0",
            Self::MDT => "mdt",
            Self::FOREIGN => "foreign",
            overstriped if overstriped == Self::RAID0 | Self::OVERSTRIPED => "raid0,overstriped",
            _ => "unknown",
        })
    }
}

/// Why bytes are no layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed layout: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

impl Component {
    /// A newer mirror has what is in it; it is not read.
    pub fn is_stale(&self) -> bool {
        self.flags & FLAG_STALE != 0
    }

    /// It has its objects.
    pub fn is_init(&self) -> bool {
        self.flags & FLAG_INIT != 0
    }

    fn covers(&self, offset_bytes: u64) -> bool {
        (self.start_bytes..self.end_bytes).contains(&offset_bytes)
    }
}

impl Layout {
    /// Reads the layout of an open file. Asks the metadata server if need be: blocks.
    ///
    /// # Errors
    /// ENODATA for a file without one (nothing was written yet); EBADMSG for one that makes no sense; the system's errnos.
    pub fn read(fd: BorrowedFd<'_>) -> Result<Layout, i32> {
        let mut value = vec![0u8; 4096];
        loop {
            // SAFETY: a C string, and live memory of the length given.
            let n = unsafe {
                libc::fgetxattr(fd.as_raw_fd(), c"lustre.lov".as_ptr(), value.as_mut_ptr().cast(), value.len())
            };
            match usize::try_from(n) {
                Ok(n) => return Layout::parse(&value[..n.min(value.len())]).map_err(|_| libc::EBADMSG),
                Err(_) if errno() == libc::ERANGE && value.len() < MAX_BYTES => value.resize(value.len() * 4, 0),
                Err(_) => return Err(errno()),
            }
        }
    }

    /// Reads a layout from the attribute's bytes.
    ///
    /// # Errors
    /// What makes no sense in it.
    pub fn parse(bytes: &[u8]) -> Result<Layout, Malformed> {
        match u32_at(bytes, 0)? {
            MAGIC_COMPOSITE | MAGIC_SEL => parse_composite(bytes),
            _ => {
                let (mut component, generation) = parse_component(bytes, None)?;
                // The flag that composite ones have in their entry.
                component.flags = if component.objects.is_empty() { 0 } else { FLAG_INIT };
                Ok(Layout { components: vec![component], mirrors: 1, generation, composite: false })
            }
        }
    }

    /// The components of the mirror that reads go to: the first without stale parts. Without mirrors these are all.
    fn current(&self) -> impl Iterator<Item = (usize, &Component)> {
        let is_stale = |mirror| self.components.iter().any(|c| c.mirror == mirror && c.is_stale());
        let mirror = self.components.iter().map(|c| c.mirror).find(|&mirror| !is_stale(mirror));
        self.components.iter().enumerate().filter(move |(_, c)| Some(c.mirror) == mirror)
    }

    /// The object that holds a byte: the index of its component and of its stripe in there. None where nothing was written yet,
    /// and where the data is elsewhere (in the MDT, in an archive). The rule for mirrors: the first without stale parts.
    pub fn object_of(&self, offset_bytes: u64) -> Option<(usize, usize)> {
        let (index, component) = self.current().find(|(_, c)| c.covers(offset_bytes))?;
        let count = component.objects.len() as u64;
        (count > 0).then(|| (index, (offset_bytes / component.stripe_size_bytes % count) as usize))
    }

    /// The OST that holds a byte; none where [`Layout::object_of`] has no object.
    pub fn ost_of(&self, offset_bytes: u64) -> Option<u32> {
        let (component, stripe) = self.object_of(offset_bytes)?;
        Some(self.components[component].objects[stripe].ost_idx)
    }

    /// The first byte behind the chunk that holds a byte: up to there, all lies on the same object. `u64::MAX` if that is
    /// everything.
    pub fn stripe_end(&self, offset_bytes: u64) -> u64 {
        match self.current().find(|(_, c)| c.covers(offset_bytes)) {
            Some((_, c)) if c.pattern.is_striped() && c.stripe_size_bytes > 0 => {
                let rest_bytes = c.stripe_size_bytes - offset_bytes % c.stripe_size_bytes;
                offset_bytes.saturating_add(rest_bytes).min(c.end_bytes)
            }
            Some((_, c)) => c.end_bytes,
            None => self
                .current()
                .map(|(_, c)| c.start_bytes)
                .filter(|&start| start > offset_bytes)
                .min()
                .unwrap_or(u64::MAX),
        }
    }

    /// The objects that there are to read and write: index of the component, index of the stripe, and the object.
    pub fn objects(&self) -> impl Iterator<Item = (usize, usize, &Object)> {
        self.current().flat_map(|(index, c)| c.objects.iter().enumerate().map(move |(stripe, o)| (index, stripe, o)))
    }

    /// The offset of a byte in each object that a file of `size_bytes` has some of its data in, the MDT's part included. What lies
    /// behind the file's end is in none.
    pub fn object_offsets(&self, size_bytes: u64) -> Vec<u64> {
        let mut offsets = Vec::new();
        for component in self.current().map(|(_, component)| component) {
            let end_bytes = component.end_bytes.min(size_bytes);
            let count = if component.pattern.is_mdt() { 1 } else { component.objects.len() as u64 };
            let stripe_bytes = component.stripe_size_bytes.max(1);
            let first = component.start_bytes / stripe_bytes;
            let starts = (first..first.saturating_add(count)).map(|stripe| stripe.saturating_mul(stripe_bytes));
            offsets.extend(starts.map(|start| start.max(component.start_bytes)).filter(|&start| start < end_bytes));
        }
        offsets
    }

    /// The stripe size of most of a file of `size_bytes`: where I/O had better not cross a boundary. Components that have no
    /// objects yet count, they will get them as they are filled; what lies in the MDT does not. None where nothing is striped.
    pub fn stripe_size_bytes(&self, size_bytes: u64) -> Option<u64> {
        let striped = self.current().filter(|(_, c)| c.pattern.is_striped() && c.stripe_size_bytes > 0);
        let covered = |c: &Component| c.end_bytes.min(size_bytes).saturating_sub(c.start_bytes);
        // The first of equals: a file of no size yet starts there.
        let most = striped.reduce(|most, next| if covered(next.1) > covered(most.1) { next } else { most });
        most.map(|(_, c)| c.stripe_size_bytes)
    }
}

fn parse_composite(bytes: &[u8]) -> Result<Layout, Malformed> {
    let size = u32_at(bytes, 4)? as usize;
    let bytes = bytes.get(..size).ok_or(Malformed("it is shorter than it says"))?;
    let count = usize::from(u16_at(bytes, 14)?);
    let entries = bytes.get(COMPOSITE_BYTES..COMPOSITE_BYTES + count * ENTRY_BYTES);
    let entries = entries.ok_or(Malformed("it has no room for its components"))?;
    let mut components = Vec::with_capacity(count);
    let mut objects = 0;
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let (id, flags) = (u32_at(entry, 0)?, u32_at(entry, 4)?);
        let (start_bytes, end_bytes) = (u64_at(entry, 8)?, u64_at(entry, 16)?);
        let (at, len) = (u32_at(entry, 24)? as usize, u32_at(entry, 28)? as usize);
        if start_bytes == end_bytes && flags & FLAG_EXTENSION != 0 {
            // What it stood for has been given to its neighbour.
            continue;
        }
        if start_bytes >= end_bytes {
            return Err(Malformed("a component covers nothing"));
        }
        let blob = at.checked_add(len).and_then(|end| bytes.get(at..end));
        let blob = blob.ok_or(Malformed("a component lies outside of it"))?;
        let (component, _) = parse_component(blob, Some(flags & FLAG_INIT != 0))?;
        objects += component.objects.len();
        // Several entries may point to the same bytes: no reason to take memory for each.
        if objects > size / OBJECT_BYTES {
            return Err(Malformed("it has more objects than it has room for"));
        }
        components.push(Component {
            id,
            mirror: (id >> 16) as u16 & 0x7FFF,
            flags,
            start_bytes,
            end_bytes,
            ..component
        });
    }
    check_overlaps(&components)?;
    let mirrors = u32::from(u16_at(bytes, 16)?) + 1;
    Ok(Layout { components, mirrors, generation: u32_at(bytes, 8)?, composite: true })
}

/// No byte lies in two components of one mirror.
fn check_overlaps(components: &[Component]) -> Result<(), Malformed> {
    let mut extents: Vec<_> = components.iter().map(|c| (c.mirror, c.start_bytes, c.end_bytes)).collect();
    extents.sort_unstable();
    match extents.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1) {
        true => Err(Malformed("components overlap")),
        false => Ok(()),
    }
}

/// A component, as if it covered the whole file, and its generation. `init` says whether it has objects, where that is known.
fn parse_component(bytes: &[u8], init: Option<bool>) -> Result<(Component, u32), Malformed> {
    let mut component = Component {
        id: 0,
        mirror: 0,
        flags: 0,
        start_bytes: 0,
        end_bytes: u64::MAX,
        pattern: Pattern(Pattern::FOREIGN),
        stripe_size_bytes: 0,
        stripe_count: 0,
        pool: None,
        objects: Vec::new(),
    };
    let header_bytes = match u32_at(bytes, 0)? {
        MAGIC_V1 => V1_BYTES,
        MAGIC_V3 => V3_BYTES,
        MAGIC_FOREIGN => return Ok((component, 0)),
        _ => return Err(Malformed("an unknown kind of layout")),
    };
    let body = bytes.get(header_bytes..).ok_or(Malformed("it ends inside a header"))?;
    component.pattern = Pattern(u32_at(bytes, 4)?);
    component.stripe_size_bytes = u64::from(u32_at(bytes, 24)?);
    component.stripe_count = u32::from(u16_at(bytes, 28)?);
    if header_bytes == V3_BYTES {
        component.pool = pool(&bytes[V1_BYTES..V1_BYTES + POOL_BYTES])?;
    }
    if !component.stripe_size_bytes.is_multiple_of(STRIPE_UNIT_BYTES) {
        return Err(Malformed("a stripe size is no multiple of 64 KiB"));
    }
    // Plain layouts do not say whether they have objects: they have them, or end here.
    if component.pattern.is_striped() && init.unwrap_or(!body.is_empty()) {
        let count = component.stripe_count as usize;
        if count == 0 || component.stripe_size_bytes == 0 {
            return Err(Malformed("a component has objects, but no stripes"));
        }
        let objects = body.get(..count * OBJECT_BYTES).ok_or(Malformed("it has no room for its objects"))?;
        component.objects = objects.chunks_exact(OBJECT_BYTES).map(object).collect::<Result<_, _>>()?;
    }
    // The client sets all bits, so that what copies attributes does not copy the generation.
    let generation = Some(u32::from(u16_at(bytes, 30)?)).filter(|&generation| generation != 0xFFFF);
    Ok((component, generation.unwrap_or(0)))
}

fn object(bytes: &[u8]) -> Result<Object, Malformed> {
    let fid = Fid { seq: u64_at(bytes, 0)?, oid: u32_at(bytes, 8)?, ver: u32_at(bytes, 12)? };
    Ok(Object { ost_idx: u32_at(bytes, 20)?, fid })
}

fn pool(bytes: &[u8]) -> Result<Option<String>, Malformed> {
    let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    match std::str::from_utf8(name) {
        Ok(name) if name.chars().all(|c| c.is_ascii_graphic()) => Ok(Some(name.to_owned()).filter(|n| !n.is_empty())),
        _ => Err(Malformed("a pool's name cannot be read")),
    }
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], Malformed> {
    let end = offset.checked_add(N);
    let part = end.and_then(|end| bytes.get(offset..end)).and_then(|part| part.try_into().ok());
    part.ok_or(Malformed("it ends inside a header"))
}

fn u16_at(bytes: &[u8], offset: usize) -> Result<u16, Malformed> {
    at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, Malformed> {
    at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, Malformed> {
    at(bytes, offset).map(u64::from_le_bytes)
}
