//! A map that forgets its oldest entries.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// At most `limit` entries; the one inserted longest ago goes first.
#[derive(Debug)]
pub struct Recent<K, V> {
    limit: usize,
    entries: HashMap<K, (u64, V)>,
    order: VecDeque<(u64, K)>,
    clock: u64,
}

impl<K: Clone + Eq + Hash, V> Recent<K, V> {
    /// Empty.
    pub fn new(limit: usize) -> Self {
        Self { limit, entries: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// The value of `key`.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(_, v)| v)
    }

    /// The value of `key`, to change it.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|(_, v)| v)
    }

    /// Takes an entry out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.entries.remove(key).map(|(_, v)| v)
    }

    /// Puts an entry in as the newest, and gives back the values that had to go for it.
    pub fn insert(&mut self, key: K, value: V) -> Vec<V> {
        self.clock += 1;
        let mut gone: Vec<V> =
            self.entries.insert(key.clone(), (self.clock, value)).map(|(_, v)| v).into_iter().collect();
        self.order.push_back((self.clock, key));
        while self.entries.len() > self.limit {
            let Some((clock, key)) = self.order.pop_front() else { break };
            if self.entries.get(&key).is_some_and(|(now, _)| *now == clock) {
                gone.extend(self.remove(&key));
            }
        }
        if self.order.len() > 2 * self.limit + 16 {
            self.order.retain(|(clock, key)| self.entries.get(key).is_some_and(|(now, _)| now == clock));
        }
        gone
    }

    /// Takes every entry out.
    pub fn drain(&mut self) -> Vec<V> {
        self.order.clear();
        self.entries.drain().map(|(_, (_, v))| v).collect()
    }

    /// Takes every entry out for which `gone` holds.
    pub fn remove_if(&mut self, gone: impl Fn(&V) -> bool) {
        self.entries.retain(|_, (_, v)| !gone(v));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_removed_ones_leave_nothing_behind() {
        let mut map = Recent::new(3);
        for n in 0..1000 {
            let gone = map.insert(n, n);
            assert_eq!(gone, if n >= 3 { vec![n - 3] } else { vec![] });
        }
        assert!(map.order.len() < 30, "{}", map.order.len());
        for n in 0..1000 {
            map.insert(n, n);
            map.remove(&n);
        }
        assert!(map.order.len() < 30 && map.entries.len() <= 3);
    }

    #[test]
    fn an_entry_put_in_again_is_young_again() {
        let mut map = Recent::new(2);
        map.insert('a', 1);
        map.insert('b', 2);
        assert_eq!(map.insert('a', 3), [1]);
        assert_eq!(map.insert('c', 4), [2]);
        assert_eq!(map.get(&'a'), Some(&3));
    }
}
