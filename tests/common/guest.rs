//! A guest's memory, and QEMU's migration stream of it.

pub const PAGE: usize = 4096;

/// Noise that a seed makes.
pub fn noise(seed: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in page.as_chunks_mut::<8>().0 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = (x ^ x >> 29).to_le_bytes();
    }
    page
}

/// Memory of so many pages: a tenth zero, the others noise of their own.
pub fn guest(seed: u64, pages: u64) -> Vec<[u8; PAGE]> {
    (0..pages).map(|n| if n % 10 == 0 { [0; PAGE] } else { noise(seed * 1_000_000 + n) }).collect()
}

/// QEMU's stream of that memory in one round, with a return path.
pub fn stream(memory: &[[u8; PAGE]]) -> Vec<u8> {
    let blocks = vec![("ram0", memory.to_vec())];
    Vm { machine: "test", return_path: true, blocks, section_pages: usize::MAX, again: Vec::new() }.stream()
}

/// A guest, and how QEMU writes it.
#[derive(Clone)]
pub struct Vm {
    pub machine: &'static str,
    pub return_path: bool,
    /// Name and pages of each block of memory.
    pub blocks: Vec<(&'static str, Vec<[u8; PAGE]>)>,
    /// Pages of a section before the next one begins.
    pub section_pages: usize,
    /// Block and page of what is written once more at the end.
    pub again: Vec<(usize, usize)>,
}

impl Vm {
    /// The stream in which whatever comes twice is the same both times.
    pub fn stream(&self) -> Vec<u8> {
        self.stream_with(|block, page| &self.blocks[block].1[page])
    }

    /// The stream in which what comes twice was noise at first.
    pub fn stream_that_changes(&self, seed: u64) -> Vec<u8> {
        let old = noise(seed);
        self.stream_with(
            |block, page| {
                if self.again.contains(&(block, page)) { &old } else { &self.blocks[block].1[page] }
            },
        )
    }

    fn stream_with<'a>(&'a self, first: impl Fn(usize, usize) -> &'a [u8; PAGE]) -> Vec<u8> {
        let mut out = b"QEVM\0\0\0\x03\x07".to_vec();
        out.extend((self.machine.len() as u32).to_be_bytes());
        out.extend(self.machine.as_bytes());
        if self.return_path {
            out.extend([8, 0, 1, 0, 0]);
        }
        out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        let len = |pages: &[[u8; PAGE]]| (pages.len() * PAGE) as u64;
        let all: u64 = self.blocks.iter().map(|(_, pages)| len(pages)).sum();
        out.extend((all | 4).to_be_bytes());
        for (name, pages) in &self.blocks {
            out.push(name.len() as u8);
            out.extend(name.as_bytes());
            out.extend(len(pages).to_be_bytes());
        }
        out.extend(0x10u64.to_be_bytes());
        out.extend(b"\x7e\0\0\0\x02");
        let places = (0..self.blocks.len()).flat_map(|b| (0..self.blocks[b].1.len()).map(move |p| (b, p)));
        let mut records: Vec<_> = places.map(|(b, p)| (b, p, first(b, p))).collect();
        records.extend(self.again.iter().map(|(b, p)| (*b, *p, &self.blocks[*b].1[*p])));
        let sections = records.len().div_ceil(self.section_pages);
        let mut block = None;
        for (n, records) in records.chunks(self.section_pages.min(records.len())).enumerate() {
            out.extend([if n + 1 == sections { 3 } else { 2 }, 0, 0, 0, 2]);
            for (b, p, content) in records {
                self.record(*b, *p, content, block != Some(*b), &mut out);
                block = Some(*b);
            }
            out.extend(0x10u64.to_be_bytes());
            out.extend(b"\x7e\0\0\0\x02");
        }
        out.extend(b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01");
        out.extend((0..5000u32).flat_map(u32::to_be_bytes));
        out.extend(b"\x7e\0\0\0\x09\0");
        out
    }

    fn record(&self, block: usize, page: usize, content: &[u8; PAGE], named: bool, out: &mut Vec<u8>) {
        let zero = content.iter().all(|b| *b == 0);
        let flags = if zero { 2 } else { 8 } | if named { 0 } else { 0x20 };
        out.extend(((page * PAGE) as u64 | flags).to_be_bytes());
        if named {
            let name = self.blocks[block].0;
            out.push(name.len() as u8);
            out.extend(name.as_bytes());
        }
        if zero { out.push(0) } else { out.extend(content) }
    }
}
