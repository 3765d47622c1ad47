//! A list of modules as it comes from a rank: in one text, and no more of it than a run keeps.
//!
//! A message may name millions. They are taken in one by one, so that a list costs what is kept of it and not what a
//! string each would.

use std::{fmt, marker::PhantomData};

use flexmodel_run::names::{MAX_NAME_BYTES, MAX_NAMES};
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};
use wire::control::{FromRank, ModuleInfo};

/// What a rank says, as the agent takes it in.
pub type Heard = FromRank<Listed<ModuleInfo>, Listed<String>>;

/// The list. `T` is what it is a sequence of on the wire.
#[derive(Debug)]
pub struct Listed<T> {
    text: String,
    /// Ends of name and class in `text`, and kinds.
    modules: Vec<(u32, u32, u32)>,
    /// How many came.
    sent: usize,
    of: PhantomData<T>,
}

/// Name, class and kinds of what is listed.
pub trait Module {
    /// Those that it has not are empty.
    fn parts(&self) -> (&str, &str, u32);
}

impl Module for ModuleInfo {
    fn parts(&self) -> (&str, &str, u32) {
        (&self.name, &self.class, self.kinds)
    }
}

impl Module for String {
    fn parts(&self) -> (&str, &str, u32) {
        (self, "", 0)
    }
}

impl<T> Listed<T> {
    /// Names, classes and kinds in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, u32)> {
        let mut start = 0;
        self.modules.iter().map(move |&(name, class, kinds)| {
            let (from, name, class) = (start, name as usize, class as usize);
            start = class;
            (&self.text[from..name], &self.text[name..class], kinds)
        })
    }

    /// How many came, whether they were kept or not.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// Whether some were not kept.
    pub fn is_cut(&self) -> bool {
        self.modules.len() < self.sent
    }
}

impl<T: Module> FromIterator<T> for Listed<T> {
    fn from_iter<I: IntoIterator<Item = T>>(modules: I) -> Self {
        let mut all = Self::new();
        modules.into_iter().for_each(|module| all.push(&module));
        all
    }
}

impl<T: Module> Listed<T> {
    fn new() -> Self {
        Self { text: String::new(), modules: Vec::new(), sent: 0, of: PhantomData }
    }

    fn push(&mut self, module: &T) {
        let (name, class, kinds) = module.parts();
        self.sent += 1;
        let fits = self.text.len() + name.len() + class.len() <= MAX_NAME_BYTES;
        if self.modules.len() >= MAX_NAMES || !fits {
            return;
        }
        self.text += name;
        let name = self.text.len() as u32;
        self.text += class;
        self.modules.push((name, self.text.len() as u32, kinds));
    }
}

impl<'de, T: Module + Deserialize<'de>> Deserialize<'de> for Listed<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Each<T>(PhantomData<T>);
        impl<'de, T: Module + Deserialize<'de>> Visitor<'de> for Each<T> {
            type Value = Listed<T>;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("a list of modules")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Listed<T>, A::Error> {
                let mut all = Listed::new();
                while let Some(module) = list.next_element::<T>()? {
                    all.push(&module);
                }
                Ok(all)
            }
        }
        from.deserialize_seq(Each(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use wire::control;

    use super::*;

    fn module(name: &str, kinds: u32) -> ModuleInfo {
        ModuleInfo { name: name.into(), class: format!("Class{kinds}"), kinds }
    }

    #[test]
    fn a_list_is_the_one_that_was_sent() {
        let modules = vec![module("", 0), module("é.a", 3), module("b", 1)];
        let names = vec!["x".to_owned(), String::new(), "ß".into()];
        let mut bytes = control::encode(&control::ToAgent::Model { model: 7, modules: modules.clone() }).unwrap();
        bytes.extend(control::encode(&control::ToAgent::Others { modules: names }).unwrap());
        let Ok(Some(Heard::Model { model: 7, modules: listed })) = control::decode_next(&mut bytes) else { panic!() };
        let again: Vec<_> = listed
            .iter()
            .map(|(name, class, kinds)| ModuleInfo { name: name.into(), class: class.into(), kinds })
            .collect();
        assert_eq!((again, listed.is_cut()), (modules, false));
        let Ok(Some(Heard::Others { modules: listed })) = control::decode_next(&mut bytes) else { panic!() };
        assert_eq!(listed.iter().collect::<Vec<_>>(), [("x", "", 0), ("", "", 0), ("ß", "", 0)]);
    }

    #[test]
    fn no_more_is_taken_in_than_a_run_keeps() {
        let many: Listed<String> = (0..MAX_NAMES + 5).map(|n| n.to_string()).collect();
        assert_eq!((many.iter().count(), many.sent(), many.is_cut()), (MAX_NAMES, MAX_NAMES + 5, true));
        let long: Listed<String> = (0..5).map(|_| "x".repeat(MAX_NAME_BYTES / 4)).collect();
        assert_eq!((long.iter().count(), long.is_cut()), (4, true));
    }
}
