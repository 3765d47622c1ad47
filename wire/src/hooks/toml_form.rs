//! The TOML form of hooks: `[[hook]]` tables that say what clauses say.
//!
//! ```toml
//! [[hook]]
//! select = "layers.*.mlp"
//! kinds = ["forward", "backward"]
//! every = 10
//! steps = [100, 200]
//! ```
//!
//! Each table becomes the text of values and then goes through the parsers of clauses, so both forms accept the same.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::edit::edit;
use super::error::{Fault, HookError, Position};
use super::parse::{kinds, selector};
use super::value::{OPTIONS, example, option_name, set_option};
use super::{Hook, Kind, Options};
use crate::env;

const SELECT: &str = "write select = \"layers.*.mlp\"";
const KINDS: &str = "write kinds = [\"forward\"]";
const TABLES: &str = "write a [[hook]] table with select = \"layers.*.mlp\"";

/// Reads the `[[hook]]` tables of `text`; `file` is its name in errors.
pub fn parse_toml(text: &str, file: &str) -> Result<Vec<Hook>, HookError> {
    let source = Source { text, file };
    let document = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        source.error(at, Fault::new("", format!("this is not TOML: {}", error.message()), "correct the file's syntax"))
    })?;
    let mut hooks = Vec::new();
    for (key, value) in by_place(document.get_ref()) {
        if key.get_ref() != "hook" {
            return Err(
                source.error(key.span().start, Fault::unknown(key.get_ref(), "a table of hooks", "tables", &["hook"]))
            );
        }
        let DeValue::Array(tables) = value.get_ref() else {
            return Err(source.error(
                key.span().start,
                Fault::new("", "'hook' is not a list of tables", "write [[hook]], in two pairs of brackets"),
            ));
        };
        for table in tables.iter() {
            let start = table.span().start;
            match table.get_ref() {
                DeValue::Table(table) => hooks.push(source.hook(start, table)?),
                _ => return Err(source.error(start, Fault::new("", "a hook is not a table", TABLES))),
            }
        }
    }
    if hooks.is_empty() {
        let position = Position::File { file: file.to_string(), line: None };
        return Err(HookError {
            position,
            reason: "the file has no hooks".into(),
            help: TABLES.into(),
            given_as: env::HOOKS,
        });
    }
    Ok(hooks)
}

type Entry<'t, 'i> = (&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>);

/// Entries in the order of the file, so that its first fault is the one reported.
fn by_place<'t, 'i>(table: &'t DeTable<'i>) -> Vec<Entry<'t, 'i>> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

struct Source<'i> {
    text: &'i str,
    file: &'i str,
}

impl Source<'_> {
    /// `fault` on the line of byte `at`.
    fn error(&self, at: usize, fault: Fault<'_>) -> HookError {
        let line = 1 + self.text.bytes().take(at).filter(|b| *b == b'\n').count();
        fault.in_file(self.file, line)
    }

    /// One table, which starts at byte `start`.
    fn hook(&self, start: usize, table: &DeTable<'_>) -> Result<Hook, HookError> {
        let mut select = None;
        let mut named = Vec::new();
        let mut tapped = vec![Kind::Forward];
        let mut edited = None;
        let mut options = Options::default();
        let mut written = Vec::new();
        for (key, value) in by_place(table) {
            let at = value.span().start;
            let place = |fault: Fault<'_>| self.error(at, fault);
            match key.get_ref().as_ref() {
                "select" => {
                    let text = string(value.get_ref(), "select", SELECT).map_err(place)?;
                    select = Some((text, selector(text).map_err(place)?));
                }
                "kinds" => {
                    named = strings(value.get_ref()).map_err(place)?;
                    tapped = kinds(named.iter().copied()).map_err(place)?;
                }
                "edit" => {
                    edited = Some((at, string(value.get_ref(), "edit", "write edit = \"scale(0.5)\"").map_err(place)?))
                }
                key_text => {
                    let name = known_key(key_text).map_err(|fault| self.error(key.span().start, fault))?;
                    let text = option_text(name, value.get_ref()).map_err(place)?;
                    set_option(&mut options, name, &text).map_err(place)?;
                    written.push(format!("{name}={text}"));
                }
            }
        }
        let Some((select, selector)) = select else {
            return Err(self.error(start, Fault::new("", "this hook selects nothing", SELECT)));
        };
        // An edit is judged by the kinds, wherever in the table they stand.
        let edit = match edited {
            Some((at, text)) => Some(edit(text, &tapped).map_err(|fault| self.error(at, fault))?),
            None => None,
        };
        // The clause that says the same, for messages.
        let mut text = select.to_string();
        for (mark, part) in
            [(':', named.join(",")), ('@', written.join(",")), ('|', edited.map_or("", |e| e.1).to_string())]
        {
            if !part.is_empty() {
                text.push(mark);
                text.push_str(&part);
            }
        }
        Ok(Hook { text, span: 0..0, selector, kinds: tapped, options, edit })
    }
}

/// The option that `key` names; `select`, `kinds` and `edit` are read by the caller.
fn known_key(key: &str) -> Result<&'static str, Fault<'_>> {
    option_name(key).map_err(|_| {
        let known: Vec<&str> = ["select", "kinds", "edit"].into_iter().chain(OPTIONS.map(|(name, _)| name)).collect();
        Fault::unknown(key, "a key of a hook", "keys", &known)
    })
}

fn string<'v>(value: &'v DeValue<'_>, key: &str, help: &str) -> Result<&'v str, Fault<'v>> {
    value.as_str().map(str::trim).ok_or_else(|| Fault::new("", format!("{key} is not a string"), help))
}

/// One string, or a list of at least one.
fn strings<'v>(value: &'v DeValue<'_>) -> Result<Vec<&'v str>, Fault<'v>> {
    match value {
        DeValue::Array(list) if list.is_empty() => Err(Fault::new("", "kinds is empty", KINDS)),
        DeValue::Array(list) => list.iter().map(|item| string(item.get_ref(), "a kind", KINDS)).collect(),
        one => string(one, "kinds", KINDS).map(|names| names.split(',').collect()),
    }
}

/// The value of an option as a clause has it: numbers in digits, lists with the mark that joins them.
fn option_text(name: &'static str, value: &DeValue<'_>) -> Result<String, Fault<'static>> {
    let text = match (name, value) {
        (_, DeValue::String(text)) => Some(text.trim().to_string()),
        ("every" | "steps" | "ranks", DeValue::Integer(_)) => integer(value),
        ("steps", DeValue::Array(ends)) if ends.len() == 2 => joined(ends.iter(), ".."),
        ("ranks", DeValue::Array(ranks)) => joined(ranks.iter(), "+"),
        _ => None,
    };
    text.ok_or_else(|| {
        let help = match name {
            "every" => "write every = 10".into(),
            "steps" => "write steps = [100, 200] or steps = \"100..200\"".into(),
            "ranks" => "write ranks = [0, 2] or ranks = \"0+2\"".into(),
            _ => example(name).replacen('=', " = \"", 1) + "\"",
        };
        Fault::new("", format!("{name} cannot be {} here", value.type_str()), help)
    })
}

fn joined<'v, 'i: 'v>(items: impl Iterator<Item = &'v Spanned<DeValue<'i>>>, mark: &str) -> Option<String> {
    let items: Option<Vec<_>> = items.map(|item| integer(item.get_ref())).collect();
    items.map(|items| items.join(mark))
}

/// An integer in decimal digits, whatever its radix in the file.
fn integer(value: &DeValue<'_>) -> Option<String> {
    let integer = value.as_integer()?;
    i128::from_str_radix(integer.as_str(), integer.radix()).ok().map(|number| number.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::DType;
    use crate::hooks::{Edit, parse, parse_clauses};
    use crate::tap_abi::LeafEdit;

    fn refused(text: &str) -> String {
        parse_toml(text, "hooks.toml").expect_err(text).to_string()
    }

    #[test]
    fn tables_say_what_clauses_say() {
        let text = r#"
            [[hook]]
            select = "layers.*.mlp"
            kinds = ["forward", "backward"]
            every = 0x0A
            steps = [100, 200]
            ranks = [0, 2]
            dtype = "float32"
            reduce = "stats"
            group = "probe"
            assemble = "agent"
            shard = "-1@tp"
            path = "out[0]"
            slice = "[:, -1]"
            edit = "scale(0.5)"

            [[hook]]
            select = '/^h\.\d+$/'
            kinds = "grad"
            steps = "5.."
            ranks = "0..3"

            [[hook]]
            select = " class=LlamaMLP "
        "#;
        let hooks = parse_toml(text, "hooks.toml").unwrap();
        assert_eq!(hooks.len(), 3);
        assert_eq!(hooks[0].options.every, Some(10));
        assert_eq!(hooks[0].options.steps, Some((100, 200)));
        assert_eq!(hooks[0].options.ranks, Some(vec![0, 2]));
        assert_eq!(hooks[0].options.dtype, Some(DType::Float32));
        assert_eq!(hooks[0].edit, Some(Edit::BuiltIn(LeafEdit { factor: 0.5, zero: false })));
        assert_eq!(hooks[1].options.steps, Some((5, u64::MAX)));
        assert_eq!(hooks[2].kinds, [Kind::Forward]);
        for hook in hooks {
            let again = parse_clauses(&hook.text).unwrap().remove(0);
            assert_eq!(again.selector.to_string(), hook.selector.to_string());
            assert_eq!(
                format!("{:?}", (again.kinds, again.options, again.edit)),
                format!("{:?}", (hook.kinds, hook.options, hook.edit))
            );
        }
    }

    #[test]
    fn a_refusal_names_the_line_and_the_nearest_word() {
        let hook = "# hooks\n[[hook]]\nselect = \"a\"\n";
        assert_eq!(
            refused(&format!("{hook}kinds = [\"grad\", \"foward\"]")),
            "hooks.toml line 4: 'foward' is not a kind; did you mean 'forward'? \
             (kinds: forward, forward_pre, backward, backward_pre, param, grad, grad_unclipped)"
        );
        for (line, reason) in [
            ("evry = 1", "line 4: 'evry' is not a key of a hook; did you mean 'every'?"),
            ("selector = 'b'", "line 4: 'selector' is not a key of a hook; did you mean 'select'?"),
            ("every = true", "line 4: every cannot be boolean here; write every = 10"),
            ("every = -1", "line 4: '-1' is not a whole number"),
            ("steps = [1]", "line 4: steps cannot be array here; write steps = [100, 200]"),
            ("steps = [2, 1]", "line 4: '2..1' ends before it starts"),
            ("ranks = []", "line 4: option 'ranks' has no value"),
            ("dtype = 1", "line 4: dtype cannot be integer here; write it like dtype = \"float32\""),
            ("kinds = []", "line 4: kinds is empty"),
            ("kinds = [1]", "line 4: a kind is not a string"),
            ("edit = 'zero'\nkinds = 'param'", "line 4: kind 'param' cannot be edited"),
            ("slice = [0]", "line 4: slice cannot be array here; write it like slice = \"[:,-1]\""),
            ("path = 'x'", "line 4: 'x' starts with neither"),
            ("select = 'b'", "line 4: this is not TOML: duplicate key"),
            ("\n[hooks]", "line 5: 'hooks' is not a table of hooks; did you mean 'hook'?"),
            ("[[hook]]\nkinds = 'grad'", "line 4: this hook selects nothing"),
            ("[[hook]]\nselect = 'a:grad'", "line 5: ':' cannot be in a glob; kinds, options and the edit have keys"),
        ] {
            let message = refused(&format!("{hook}{line}\n"));
            assert!(message.contains(reason), "{message}");
        }
        assert!(refused("[hook]\nselect = 'a'").contains("line 1: 'hook' is not a list of tables; write [[hook]]"));
        assert!(refused("hook = [1]").contains("line 1: a hook is not a table"));
        assert!(refused("# nothing\n").starts_with("hooks.toml: the file has no hooks; write a [[hook]] table"));
    }

    #[test]
    fn a_file_is_read_by_its_path() {
        let file = std::env::temp_dir().join(format!("flexmodel-hooks-{}.toml", std::process::id()));
        std::fs::write(&file, "[[hook]]\nselect = 'lm_head'\n").unwrap();
        let hooks = parse(file.to_str().unwrap());
        std::fs::remove_file(&file).unwrap();
        assert_eq!(hooks.unwrap()[0].text, "lm_head");
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in any::<String>(), key in "[a-z]{1,8}", value in any::<String>()) {
            let _ = parse_toml(&text, "f");
            let _ = parse_toml(&format!("[[hook]]\nselect = 'a'\n{key} = {value}"), "f");
            for (name, _) in OPTIONS {
                let _ = parse_toml(&format!("[[hook]]\nselect = 'a'\n{name} = {value:?}"), "f");
            }
        }
    }
}
