//! Which OST has which bytes. Written apart from the product's parser on purpose: one can be tested by the other. It believes
//! what it reads.

const V1: u32 = 0x0BD1_0BD0;
const V3: u32 = 0x0BD3_0BD0;
const COMPOSITE: u32 = 0x0BD6_0BD0;

struct Part {
    start: u64,
    end: u64,
    stripe_size: u64,
    osts: Vec<u32>,
}

/// Where bytes lie. An empty one has everything on OST 0.
#[derive(Default)]
pub struct Map(Vec<Part>);

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(word)
}

impl Map {
    /// `count` OSTs from 0 on, `size` bytes each in turn.
    pub fn striped(count: u32, size: u64) -> Map {
        assert!(count > 0 && size > 0, "some stripes of some size");
        Map(vec![Part { start: 0, end: u64::MAX, stripe_size: size, osts: (0..count).collect() }])
    }

    /// From an attribute; the first mirror of several.
    pub fn parse(lov: &[u8]) -> Map {
        let mut map = Map::default();
        if lov.is_empty() {
            return map;
        }
        if number::<4>(lov, 0) as u32 != COMPOSITE {
            map.add(lov, 0, u64::MAX);
            return map;
        }
        let mut mirror = None;
        for i in 0..number::<2>(lov, 14) as usize {
            let entry = &lov[32 + 48 * i..];
            let of = number::<4>(entry, 0) >> 16;
            if *mirror.get_or_insert(of) == of {
                let (at, len) = (number::<4>(entry, 24) as usize, number::<4>(entry, 28) as usize);
                map.add(&lov[at..at + len], number::<8>(entry, 8), number::<8>(entry, 16));
            }
        }
        map
    }

    fn add(&mut self, lov: &[u8], start: u64, end: u64) {
        let objects = match number::<4>(lov, 0) as u32 {
            V1 => 32,
            V3 => 48,
            _ => return,
        };
        let osts: Vec<u32> = lov[objects..].chunks_exact(24).map(|object| number::<4>(object, 20) as u32).collect();
        if !osts.is_empty() {
            self.0.push(Part { start, end, stripe_size: number::<4>(lov, 24), osts });
        }
    }

    /// The OSTs that have some of these bytes.
    pub fn osts(&self, offset: u64, len: usize) -> Vec<u32> {
        let mut osts = Vec::new();
        let (mut at, end) = (offset, offset + len.max(1) as u64);
        while at < end {
            let (ost, next) = match self.0.iter().find(|part| part.start <= at && at < part.end) {
                Some(part) => {
                    let stripe = at / part.stripe_size;
                    (part.osts[(stripe % part.osts.len() as u64) as usize], (stripe + 1) * part.stripe_size)
                }
                None => (0, at + 65536),
            };
            if !osts.contains(&ost) {
                osts.push(ost);
            }
            at = next;
        }
        osts
    }
}

/// The attribute of a new file: what was asked for, as far as there are OSTs. `asked` is the v1 or v3 blob of the ioctl.
pub fn instantiate(asked: &[u8], osts: u32, with_pool: bool, serial: u32) -> Result<Vec<u8>, i32> {
    let magic = number::<4>(asked, 0) as u32;
    let (pattern, stripe_size) = (number::<4>(asked, 4), number::<4>(asked, 24));
    if !matches!(magic, V1 | V3) || pattern != 1 || !stripe_size.is_multiple_of(65536) {
        return Err(libc::EINVAL);
    }
    let stripe_size = if stripe_size == 0 { 4 << 20 } else { stripe_size };
    let count = match number::<2>(asked, 28) as u32 {
        0 => 1,
        0xFFFF => osts,
        // More than there are: as many as there are, without a word.
        count => count.min(osts),
    };
    let pooled = magic == V3 && with_pool && asked[32] != 0;
    let mut lov = Vec::new();
    lov.extend((if pooled { V3 } else { V1 }).to_le_bytes());
    lov.extend(1u32.to_le_bytes());
    lov.extend(u64::from(serial).to_le_bytes());
    lov.extend(0x2_0000_0401u64.to_le_bytes());
    lov.extend((stripe_size as u32).to_le_bytes());
    lov.extend((count as u16).to_le_bytes());
    lov.extend(0xFFFFu16.to_le_bytes());
    if pooled {
        lov.extend(&asked[32..48]);
    }
    for i in 0..count {
        let ost = (serial + i) % osts;
        lov.extend((0x2_4000_0400u64 + (u64::from(ost) << 30)).to_le_bytes());
        lov.extend(u64::from(serial).to_le_bytes());
        lov.extend(0u32.to_le_bytes());
        lov.extend(ost.to_le_bytes());
    }
    Ok(lov)
}

/// What a site gives to files that nothing was asked for.
pub fn default_request() -> Vec<u8> {
    let mut asked = vec![0; 48];
    asked[..4].copy_from_slice(&V1.to_le_bytes());
    asked[4] = 1;
    asked[28] = 1;
    asked
}

/// What a site gives whose default is DoM: the first MiB on the metadata server, the rest plain.
pub fn with_dom(osts: u32, serial: u32) -> Vec<u8> {
    const HEADER: usize = 32;
    const ENTRY: usize = 48;
    const DOM_BYTES: u64 = 1 << 20;
    let mut dom = vec![0; 32];
    dom[..4].copy_from_slice(&V1.to_le_bytes());
    dom[4..8].copy_from_slice(&0x100u32.to_le_bytes());
    dom[24..28].copy_from_slice(&(DOM_BYTES as u32).to_le_bytes());
    let rest = instantiate(&default_request(), osts, false, serial).expect("the default can be had");
    let size = HEADER + 2 * ENTRY + dom.len() + rest.len();
    let mut lov = Vec::new();
    lov.extend(COMPOSITE.to_le_bytes());
    lov.extend((size as u32).to_le_bytes());
    lov.extend(1u32.to_le_bytes());
    lov.extend(0u16.to_le_bytes());
    lov.extend(2u16.to_le_bytes());
    lov.resize(HEADER, 0);
    let mut at = HEADER + 2 * ENTRY;
    for (id, start, end, len) in [(1u32, 0, DOM_BYTES, dom.len()), (2, DOM_BYTES, u64::MAX, rest.len())] {
        lov.extend(id.to_le_bytes());
        // It has its objects.
        lov.extend(0x10u32.to_le_bytes());
        lov.extend(start.to_le_bytes());
        lov.extend(end.to_le_bytes());
        lov.extend((at as u32).to_le_bytes());
        lov.extend((len as u32).to_le_bytes());
        lov.resize(lov.len() + 16, 0);
        at += len;
    }
    [lov, dom, rest].concat()
}
