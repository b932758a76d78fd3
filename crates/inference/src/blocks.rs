//! The paged cache's bookkeeping: who owns which block, and which full blocks can be found again by their tokens.
//!
//! Only full blocks are shared, so a block is never written while two sequences own it and copy-on-write is not
//! needed. A full block is published under the hash of everything before and in it ([`BlockHash`]); once its last
//! owner leaves it stays findable ("idle") until its memory is needed, least recently used first. Kwon et al.,
//! "Efficient memory management for large language model serving with PagedAttention", SOSP 2023.
//!
//! Pure: numbers in, numbers out. Costs: allocate and release O(log idle), everything else O(1).

use std::collections::{BTreeMap, HashMap};

use consort_tensor::kv::{BLOCK_TOKENS, BlockId};

/// Names a full block by its tokens and all tokens before it: the first half of BLAKE3 over the parent's hash and
/// the block's token ids. At 128 bits a collision (one user reading another's cache) takes about 2^64 blocks, by
/// accident or on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// The parent of a sequence's first block.
    pub const ROOT: BlockHash = BlockHash([0; 16]);

    /// The name of the block that holds `tokens` (one full block) after the block named `self`.
    pub fn child(self, tokens: &[u32]) -> BlockHash {
        assert_eq!(tokens.len(), BLOCK_TOKENS, "only full blocks have a name");
        let mut bytes = [0u8; 16 + 4 * BLOCK_TOKENS];
        bytes[..16].copy_from_slice(&self.0);
        for (slot, token) in bytes[16..].chunks_exact_mut(4).zip(tokens) {
            slot.copy_from_slice(&token.to_le_bytes());
        }
        let mut name = [0; 16];
        name.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
        BlockHash(name)
    }
}

/// Every block of a cache and its owners.
#[derive(Debug)]
pub struct BlockPool {
    /// Owners of each block.
    owners: Vec<u32>,
    /// The name each block is published under.
    names: Vec<Option<BlockHash>>,
    /// Blocks without owner or name; the lowest ids are handed out first, so that memory is touched late.
    blank: Vec<BlockId>,
    by_name: HashMap<BlockHash, BlockId>,
    /// Published blocks without owner, keyed by when they lost it.
    idle: BTreeMap<u64, BlockId>,
    idle_since: Vec<u64>,
    releases: u64,
    /// One more than the highest block ever handed out.
    touched: usize,
}

impl BlockPool {
    /// `blocks` blank blocks.
    pub fn new(blocks: usize) -> BlockPool {
        let last = BlockId::try_from(blocks).unwrap_or(BlockId::MAX);
        BlockPool {
            owners: vec![0; blocks],
            names: vec![None; blocks],
            blank: (0..last).rev().collect(),
            by_name: HashMap::new(),
            idle: BTreeMap::new(),
            idle_since: vec![0; blocks],
            releases: 0,
            touched: 0,
        }
    }

    /// Blocks in all.
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// Blocks that [`BlockPool::allocate`] can hand out.
    pub fn available(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Blocks that some sequence owns.
    pub fn owned(&self) -> usize {
        self.len() - self.available()
    }

    /// Blocks that are only kept to be found again.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// A block with one owner and no name; forgets the idle block that was used longest ago if it must.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.blank.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                if let Some(name) = self.names[block as usize].take() {
                    self.by_name.remove(&name);
                }
                block
            }
        };
        self.owners[block as usize] = 1;
        self.touched = self.touched.max(block as usize + 1);
        Some(block)
    }

    /// Blocks `0..touched` have been handed out at some time; the others never.
    pub fn touched(&self) -> usize {
        self.touched
    }

    /// The block published under `name`, if any, and whether it is idle (adopting it makes one less available).
    pub fn find(&self, name: BlockHash) -> Option<(BlockId, bool)> {
        let block = *self.by_name.get(&name)?;
        Some((block, self.owners[block as usize] == 0))
    }

    /// Adds an owner to the block published under `name`, if any.
    pub fn adopt(&mut self, name: BlockHash) -> Option<BlockId> {
        let block = *self.by_name.get(&name)?;
        if self.owners[block as usize] == 0 {
            self.idle.remove(&self.idle_since[block as usize]);
        }
        self.owners[block as usize] += 1;
        Some(block)
    }

    /// Publishes a full block that the caller owns, and returns the block to own from now on: a twin with the same
    /// tokens if one was published first (its bits are the same), so that memory is not held twice.
    pub fn publish(&mut self, block: BlockId, name: BlockHash) -> BlockId {
        match self.by_name.get(&name) {
            Some(&twin) if twin == block => block,
            Some(_) => {
                let twin = self.adopt(name).unwrap_or(block);
                self.release(block);
                twin
            }
            None => {
                debug_assert!(self.names[block as usize].is_none(), "block {block} is published already");
                self.names[block as usize] = Some(name);
                self.by_name.insert(name, block);
                block
            }
        }
    }

    /// Takes one owner away. The last one leaves a published block idle and any other blank.
    ///
    /// # Panics
    /// If nobody owns the block.
    pub fn release(&mut self, block: BlockId) {
        let index = block as usize;
        assert!(self.owners[index] > 0, "block {block} is released more often than it was taken");
        self.owners[index] -= 1;
        if self.owners[index] > 0 {
            return;
        }
        if self.names[index].is_some() {
            self.releases += 1;
            self.idle_since[index] = self.releases;
            self.idle.insert(self.releases, block);
        } else {
            self.blank.push(block);
        }
    }

    /// Checks every invariant, given all owners' block lists.
    ///
    /// # Panics
    /// With the first one that doesn't hold.
    #[doc(hidden)]
    pub fn check<'a>(&self, owned: impl Iterator<Item = &'a [BlockId]>) {
        let mut owners = vec![0u32; self.len()];
        for list in owned {
            for &block in list {
                owners[block as usize] += 1;
            }
        }
        assert_eq!(owners, self.owners, "owners are miscounted");
        let mut places = vec![0u32; self.len()];
        for &block in self.blank.iter().chain(self.idle.values()) {
            places[block as usize] += 1;
        }
        for (block, (&owners, &places)) in self.owners.iter().zip(&places).enumerate() {
            assert_eq!(
                places,
                u32::from(owners == 0),
                "block {block} with {owners} owners is free {places} times"
            );
        }
        for &block in &self.blank {
            assert!(self.names[block as usize].is_none(), "blank block {block} has a name");
        }
        for (&since, &block) in &self.idle {
            assert!(self.names[block as usize].is_some(), "idle block {block} has no name");
            assert_eq!(self.idle_since[block as usize], since);
        }
        let named = self.names.iter().flatten().count();
        assert_eq!(named, self.by_name.len(), "names and their index disagree");
        for (name, &block) in &self.by_name {
            assert_eq!(self.names[block as usize], Some(*name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(parent: BlockHash, first: u32) -> BlockHash {
        parent.child(&std::array::from_fn::<u32, BLOCK_TOKENS, _>(|i| first + i as u32))
    }

    #[test]
    fn names_depend_on_every_token_and_on_the_parent() {
        let a = name(BlockHash::ROOT, 0);
        assert_eq!(a, name(BlockHash::ROOT, 0));
        assert_ne!(a, name(BlockHash::ROOT, 1));
        assert_ne!(a, name(a, 0));
        for changed in 0..BLOCK_TOKENS {
            let mut tokens: [u32; BLOCK_TOKENS] = std::array::from_fn(|i| i as u32);
            tokens[changed] += 1 << 24;
            assert_ne!(a, BlockHash::ROOT.child(&tokens), "token {changed} doesn't matter");
        }
    }

    #[test]
    fn idle_blocks_are_found_again_until_the_oldest_is_needed() {
        let mut pool = BlockPool::new(3);
        let names = [0, 100, 200].map(|first| name(BlockHash::ROOT, first));
        let blocks = names.map(|_| pool.allocate().expect("blank"));
        assert_eq!((blocks, pool.touched()), ([0, 1, 2], 3), "low ids first");
        assert_eq!(pool.allocate(), None);
        for (&block, &name) in blocks.iter().zip(&names) {
            assert_eq!(pool.publish(block, name), block);
        }
        pool.release(1);
        pool.release(0);
        assert_eq!((pool.available(), pool.idle(), pool.owned()), (2, 2, 1));
        assert_eq!(pool.adopt(names[0]), Some(0));
        assert_eq!(pool.adopt(names[2]), Some(2), "shared with its owner");
        assert_eq!(pool.allocate(), Some(1), "the only idle one is forgotten");
        assert_eq!(pool.find(names[1]), None);
        pool.check([&[0][..], &[2], &[2], &[1]].into_iter());
    }

    #[test]
    fn a_twin_gives_its_memory_back() {
        let mut pool = BlockPool::new(2);
        let shared = name(BlockHash::ROOT, 0);
        let (first, second) = (pool.allocate().expect("blank"), pool.allocate().expect("blank"));
        assert_eq!(pool.publish(first, shared), first);
        assert_eq!(pool.publish(second, shared), first);
        assert_eq!(pool.available(), 1);
        pool.check([&[first][..], &[first]].into_iter());
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn releasing_twice_is_our_bug() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().expect("blank");
        pool.release(block);
        pool.release(block);
    }
}
