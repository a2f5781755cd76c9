//! Random numbers: small, fast, the same on every machine.

/// xorshift64*.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        (0..4).for_each(|_| _ = rng.next());
        rng
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Less than `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// An index into a list of that length.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True `n` times of `of`.
    pub fn chance(&mut self, n: u64, of: u64) -> bool {
        self.below(of) < n
    }

    pub fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())].clone()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// A number at which code goes wrong: borders of types, powers of two and their neighbours.
    pub fn edge(&mut self) -> u64 {
        let near = self.below(3).wrapping_sub(1);
        match self.below(6) {
            0 => self.below(4),
            1 => u64::MAX - self.below(1024),
            2 => (1u64 << self.below(64)).wrapping_add(near),
            3 => self.one_of(&[0xff, 0xffff, 0xffff_ffff, i64::MAX as u64, 1 << 60]).wrapping_add(near),
            4 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
}
