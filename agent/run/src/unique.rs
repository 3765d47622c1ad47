//! Names that differ, out of names that may not.

use std::collections::HashMap;

/// Gives every name once, and later ones a number: `name`, `name~2`, `name~3`.
#[derive(Debug, Default)]
pub struct Unique {
    /// Names that were given, and the number that the next one of it has.
    given: HashMap<String, u64>,
    /// Names that differ only in case are one name to some file systems.
    ignores_case: bool,
}

impl Unique {
    /// Names that differ only in case do not differ.
    pub fn ignoring_case() -> Self {
        Self { ignores_case: true, ..Self::default() }
    }

    /// `name`, or what is made of it if that was given before. However many there are of one name, each takes as long.
    pub fn name(&mut self, name: String) -> String {
        let key = self.key(&name);
        let Some(&next) = self.given.get(&key) else {
            self.given.insert(key, 2);
            return name;
        };
        for n in next.. {
            let candidate = format!("{name}~{n}");
            let own = self.key(&candidate);
            if !self.given.contains_key(&own) {
                self.given.insert(own, 2);
                self.given.insert(key, n + 1);
                return candidate;
            }
        }
        name
    }

    fn key(&self, name: &str) -> String {
        if self.ignores_case { name.to_ascii_lowercase() } else { name.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_get_numbers_that_are_free() {
        let mut names = Unique::default();
        let given = ["a", "a~2", "a", "A", "a", "a~2"].map(|name| names.name(name.into()));
        assert_eq!(given, ["a", "a~2", "a~3", "A", "a~4", "a~2~2"]);
        let mut names = Unique::ignoring_case();
        assert_eq!(["a", "A", "b~2", "B", "b"].map(|name| names.name(name.into())), ["a", "A~2", "b~2", "B", "b~3"]);
    }
}
