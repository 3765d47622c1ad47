//! Names that a job gives to its modules and tensors: each is kept once, and no more of them than fit.
//!
//! A job may invent new ones for ever. What names that are not kept belong to is stored all the same: they are missing
//! where all names are held in memory, which is what the page lists and `run.json`.

use std::{collections::HashSet, sync::Arc};

/// Most names of modules and their classes in a run: `run.json` and the page's tree leave further ones out.
pub const MAX_NAMES: usize = 1 << 17;
/// Most bytes of these.
pub const MAX_NAME_BYTES: usize = 8 << 20;

/// A bounded set of names.
#[derive(Debug)]
pub struct Names {
    all: HashSet<Arc<str>>,
    /// Names, and bytes of them, that there is still room for.
    room: (usize, usize),
}

impl Names {
    /// None yet; at most `count` with `bytes` between them.
    pub fn new(count: usize, bytes: usize) -> Self {
        Self { all: HashSet::new(), room: (count, bytes) }
    }

    /// The one copy of a name; `None` if it is new and there is no room for it.
    pub fn keep(&mut self, name: &str) -> Option<Arc<str>> {
        if let Some(known) = self.all.get(name) {
            return Some(known.clone());
        }
        let room = (self.room.0.checked_sub(1)?, self.room.1.checked_sub(name.len())?);
        self.room = room;
        let name: Arc<str> = name.into();
        self.all.insert(name.clone());
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_once_and_new_ones_while_they_fit() {
        let mut names = Names::new(3, 10);
        let first = names.keep("layers").unwrap();
        assert!(Arc::ptr_eq(&first, &names.keep("layers").unwrap()));
        assert_eq!(names.keep("longer"), None);
        assert!(names.keep("abc").is_some() && names.keep("d").is_some());
        assert_eq!(names.keep(""), None);
        assert!(Arc::ptr_eq(&first, &names.keep("layers").unwrap()));
    }
}
