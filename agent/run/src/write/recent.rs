//! A map that forgets its oldest entries.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::Arc,
};

/// At most `limit` entries, of at most `room` bytes between them; the one inserted longest ago goes first.
#[derive(Debug)]
pub struct Recent<K, V> {
    limit: usize,
    room: usize,
    bytes: usize,
    entries: HashMap<Arc<K>, Entry<V>>,
    order: VecDeque<(u64, Arc<K>)>,
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    clock: u64,
    bytes: usize,
    value: V,
}

impl<K: Eq + Hash, V> Recent<K, V> {
    /// Empty.
    pub fn new(limit: usize, room: usize) -> Self {
        Self { limit, room, bytes: 0, entries: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// The value of `key`.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// The value of `key`, to change it.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|entry| &mut entry.value)
    }

    /// Takes an entry out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let gone = self.entries.remove(key)?;
        self.bytes -= gone.bytes;
        Some(gone.value)
    }

    /// Puts an entry in as the newest, which takes so many bytes with what it points to, and gives back the values that had
    /// to go for it.
    pub fn insert(&mut self, key: K, value: V, bytes: usize) -> Vec<V> {
        self.clock += 1;
        let mut gone: Vec<V> = self.remove(&key).into_iter().collect();
        let key = Arc::new(key);
        self.entries.insert(key.clone(), Entry { clock: self.clock, bytes, value });
        self.bytes += bytes;
        self.order.push_back((self.clock, key));
        while self.entries.len() > self.limit || (self.bytes > self.room && self.entries.len() > 1) {
            let Some((clock, key)) = self.order.pop_front() else { break };
            if self.is_in(clock, &key) {
                gone.extend(self.remove(&key));
            }
        }
        if self.order.len() > 2 * self.limit + 16 {
            let order = std::mem::take(&mut self.order);
            self.order = order.into_iter().filter(|(clock, key)| self.is_in(*clock, key)).collect();
        }
        gone
    }

    fn is_in(&self, clock: u64, key: &K) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.clock == clock)
    }

    /// Takes every entry out for which `gone` holds.
    pub fn remove_if(&mut self, gone: impl Fn(&V) -> bool) {
        let bytes = &mut self.bytes;
        self.entries.retain(|_, entry| {
            let stays = !gone(&entry.value);
            *bytes -= if stays { 0 } else { entry.bytes };
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_removed_ones_leave_nothing_behind() {
        let mut map = Recent::new(3, 0);
        for n in 0..1000 {
            let gone = map.insert(n, n, 0);
            assert_eq!(gone, if n >= 3 { vec![n - 3] } else { vec![] });
        }
        assert!(map.order.len() < 30, "{}", map.order.len());
        for n in 0..1000 {
            map.insert(n, n, 0);
            map.remove(&n);
        }
        assert!(map.order.len() < 30 && map.entries.len() <= 3);
    }

    #[test]
    fn an_entry_put_in_again_is_young_again() {
        let mut map = Recent::new(2, 0);
        map.insert('a', 1, 0);
        map.insert('b', 2, 0);
        assert_eq!(map.insert('a', 3, 0), [1]);
        assert_eq!(map.insert('c', 4, 0), [2]);
        assert_eq!(map.get(&'a'), Some(&3));
    }

    #[test]
    fn entries_that_take_more_than_there_is_room_for_go_too() {
        let mut map = Recent::new(9, 100);
        assert!(map.insert('a', 1, 40).is_empty() && map.insert('b', 2, 60).is_empty());
        assert_eq!(map.insert('c', 3, 10), [1]);
        assert_eq!(map.insert('b', 4, 20), [2]);
        assert_eq!(map.remove(&'c'), Some(3));
        assert!(map.insert('d', 5, 80).is_empty());
        map.remove_if(|&v| v == 5);
        assert!(map.insert('e', 6, 80).is_empty());
        assert_eq!(map.insert('f', 7, 1000), [4, 6], "the newest stays");
    }
}
