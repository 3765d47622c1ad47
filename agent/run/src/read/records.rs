//! The records of a run that was read, in blocks. Snapshots share those that are the same in both, so that taking one
//! costs what has changed since the last, and a pointer a block.

use std::{iter::FlatMap, ops::Index, slice::Iter, sync::Arc};

use super::Record;

/// Records in a block.
const BLOCK: usize = 1024;

type Block = Arc<Vec<Arc<Record>>>;

/// Records, in the order of their first part.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// All are full but the last.
    blocks: Vec<Block>,
    len: usize,
}

impl Records {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// In order.
    pub fn iter(&self) -> Each<'_> {
        self.blocks.iter().flat_map(|block| block.iter())
    }

    /// Puts a record in the place of another, or behind the last.
    pub(super) fn set(&mut self, at: usize, record: Arc<Record>) {
        if at / BLOCK == self.blocks.len() {
            self.blocks.push(Arc::default());
        }
        let block = Arc::make_mut(&mut self.blocks[at / BLOCK]);
        match block.get_mut(at % BLOCK) {
            Some(there) => *there = record,
            None => {
                block.push(record);
                self.len += 1;
            }
        }
    }
}

/// See [`Records::iter`].
pub type Each<'a> = FlatMap<Iter<'a, Block>, Iter<'a, Arc<Record>>, fn(&'a Block) -> Iter<'a, Arc<Record>>>;

impl<'a> IntoIterator for &'a Records {
    type Item = &'a Arc<Record>;
    type IntoIter = Each<'a>;

    fn into_iter(self) -> Each<'a> {
        self.iter()
    }
}

impl FromIterator<Arc<Record>> for Records {
    fn from_iter<I: IntoIterator<Item = Arc<Record>>>(records: I) -> Self {
        let mut all = Self::default();
        for (at, record) in records.into_iter().enumerate() {
            all.set(at, record);
        }
        all
    }
}

impl Index<usize> for Records {
    type Output = Arc<Record>;

    fn index(&self, at: usize) -> &Arc<Record> {
        &self.blocks[at / BLOCK][at % BLOCK]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fixture::id;

    fn record(step: u64) -> Arc<Record> {
        Arc::new(Record { id: id("a", step), parts: Vec::new() })
    }

    fn steps(records: &Records) -> Vec<u64> {
        records.iter().map(|record| record.id.step).collect()
    }

    #[test]
    fn a_snapshot_stays_as_it_was_and_shares_what_did_not_change() {
        let all: Vec<u64> = (0..2 * BLOCK as u64 + 5).collect();
        let mut now: Records = all.iter().copied().map(record).collect();
        let before = now.clone();
        now.set(BLOCK + 1, record(7));
        now.set(now.len(), record(9));
        assert_eq!((steps(&before), before.len()), (all.clone(), all.len()));
        let mut expected = all.clone();
        expected[BLOCK + 1] = 7;
        expected.push(9);
        assert_eq!((steps(&now), now.len()), (expected.clone(), expected.len()));
        assert!((0..now.len()).all(|at| now[at].id.step == expected[at]));
        let shared = |at: usize| Arc::ptr_eq(&before.blocks[at], &now.blocks[at]);
        assert_eq!([0, 1, 2].map(shared), [true, false, false]);
    }
}
