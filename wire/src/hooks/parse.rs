//! Clauses: their selectors, their kinds, and how their parts are separated.

use super::edit::edit;
use super::error::{Fault, HookError, Position, offset_in, quote};
use super::select::{glob_character, regex_end};
use super::toml_form::parse_toml;
use super::value::{OPTIONS, example, option_name, set_option};
use super::{Hook, Kind, Options, ROOT, Selector};
use crate::env;

/// Reads `FLEXMODEL_HOOKS`: the path of a TOML file (it ends in `.toml`) or clauses.
pub fn parse(text: &str) -> Result<Vec<Hook>, HookError> {
    let file = text.trim();
    if !names_a_file(file) {
        return parse_clauses(text);
    }
    let content = std::fs::read_to_string(file).map_err(|error| HookError {
        position: Position::File { file: file.to_string(), line: None },
        reason: format!("the hooks file cannot be read: {error}"),
        help: "name a readable TOML file, or write clauses such as layers.*.mlp:forward".into(),
        given_as: env::HOOKS,
    })?;
    parse_toml(&content, file)
}

/// Whether hooks are the path of a TOML file, and no clauses.
pub fn names_a_file(text: &str) -> bool {
    text.trim().ends_with(".toml")
}

/// Reads clauses separated by `;`. Empty clauses are skipped, but there must be one that is not. None is ever a file's path.
pub fn parse_clauses(text: &str) -> Result<Vec<Hook>, HookError> {
    let mut hooks = Vec::new();
    let mut rest = Some(text);
    while let Some(tail) = rest {
        let (written, after) = split_clause(tail);
        rest = after;
        let written = written.trim();
        if written.is_empty() {
            continue;
        }
        let mut hook = clause(written).map_err(|fault| fault.in_clause(text, hooks.len() + 1, written))?;
        let start = offset_in(text, written);
        hook.span = start..start + written.len();
        hooks.push(hook);
    }
    if hooks.is_empty() {
        return Err(HookError {
            position: Position::Whole,
            reason: "the text is empty".into(),
            help: "write a clause such as layers.*.mlp:forward, or name a TOML file".into(),
            given_as: env::HOOKS,
        });
    }
    Ok(hooks)
}

/// Reads one clause, and no file: what is told to a running job, or was read before.
pub fn parse_one(text: &str) -> Result<Hook, HookError> {
    let mut hooks = parse_clauses(text)?;
    match hooks.pop() {
        Some(hook) if hooks.is_empty() => Ok(hook),
        _ => Err(HookError {
            position: Position::Whole,
            reason: format!("'{text}' is more than one clause"),
            help: "give each clause by itself".into(),
            given_as: env::HOOKS,
        }),
    }
}

/// The first clause, and what follows its `;`. A `;` within a regular expression does not count.
fn split_clause(text: &str) -> (&str, Option<&str>) {
    let start = text.trim_start();
    let skipped = if start.starts_with('/') { regex_end(start).unwrap_or(start.len()) } else { 0 };
    let (selector, rest) = text.split_at(offset_in(text, start) + skipped);
    match rest.find(';') {
        Some(end) => (&text[..selector.len() + end], Some(&rest[end + 1..])),
        None => (text, None),
    }
}

/// `selector[:kind,kind...][@option=value,...][|edit]`; the caller knows the span.
fn clause(text: &str) -> Result<Hook, Fault<'_>> {
    let end = match regex_end(text) {
        Some(end) if text.starts_with('/') => end,
        _ if text.starts_with('/') => text.len(),
        _ => text.find([':', '@', '|']).unwrap_or(text.len()),
    };
    let (selector_text, rest) = text.split_at(end);
    let (rest, edit_text) = cut(rest, '|');
    let (kinds_text, options_text) = cut(rest, '@');

    if end == text.len() && names_a_file(text) {
        let help = "give the file alone where hooks are given at the start of a job, or write clauses";
        return Err(Fault::new(text, format!("{} names a file, and is no clause", quote(text)), help));
    }
    let selector = selector(selector_text.trim())?;
    let kinds = match kinds_text.trim_start().strip_prefix(':') {
        Some(list) => kinds(list.split(','))?,
        None if kinds_text.trim().is_empty() => vec![Kind::Forward],
        None => {
            let help = "write : before kinds, @ before options, | before an edit; a file of hooks ends in .toml";
            let reason = format!("{} follows the regular expression", quote(kinds_text.trim()));
            return Err(Fault::new(kinds_text.trim(), reason, help));
        }
    };
    let mut options = Options::default();
    let mut seen = Vec::new();
    for part in options_text.iter().flat_map(|list| listed(list)) {
        let (name, value) = cut(part, '=');
        let name = option_name(name.trim())?;
        let Some(value) = value else {
            return Err(Fault::new(part.trim(), format!("option '{name}' has no value"), example(name)));
        };
        if seen.contains(&name) {
            return Err(Fault::new(part.trim(), format!("option '{name}' is given twice"), "keep one of them"));
        }
        seen.push(name);
        set_option(&mut options, name, value.trim())?;
    }
    let edit = edit_text.map(|written| edit(written.trim(), &kinds)).transpose()?;
    Ok(Hook { text: text.to_string(), span: 0..0, selector, kinds, options, edit })
}

/// The items of a list that commas separate. Those within brackets, as of a slice, do not.
fn listed(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    text.split(move |c| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

/// `text` before and after the first `mark`.
fn cut(text: &str, mark: char) -> (&str, Option<&str>) {
    text.split_once(mark).map_or((text, None), |(before, after)| (before, Some(after)))
}

/// A whole selector: a glob, `/regular expression/`, `class=NAME`, or `(root)` for the model itself.
pub(super) fn selector(text: &str) -> Result<Selector, Fault<'_>> {
    if let Some(name) = text.strip_prefix("class=") {
        return match name.chars().find(|c| c.is_whitespace() || "*/:;@|,=".contains(*c)) {
            Some(c) => Err(Fault::new(name, format!("'{c}' cannot be in a class name"), "write class=NAME in full")),
            None if name.is_empty() => {
                Err(Fault::new(name, "the class has no name", "write one, such as class=LlamaMLP"))
            }
            None => Ok(Selector::Class(name.to_string())),
        };
    }
    if text.starts_with('/') {
        return regex(text);
    }
    if text.is_empty() {
        return Err(Fault::new(text, "there is no selector", "name modules, such as layers.*.mlp, or ** for all"));
    }
    if text == ROOT {
        return Ok(Selector::Glob(Vec::new()));
    }
    text.split('.').map(|part| segment(part).map(str::to_string)).collect::<Result<_, _>>().map(Selector::Glob)
}

fn regex(text: &str) -> Result<Selector, Fault<'_>> {
    let slash = "put it between slashes, /.../, with \\/ for a slash within";
    let Some(end) = regex_end(text) else {
        return Err(Fault::new(text, "the regular expression has no closing slash", slash));
    };
    if end < text.len() {
        return Err(Fault::new(&text[end..], format!("{} follows the regular expression", quote(&text[end..])), slash));
    }
    let pattern = &text[1..end - 1];
    if pattern.is_empty() {
        return Err(Fault::new(text, "the regular expression is empty", "write ** for all modules"));
    }
    regex::Regex::new(pattern).map(Selector::Regex).map_err(|error| {
        // A syntax error draws the pattern over several lines; its last words are the reason.
        let all = error.to_string();
        let reason = all.rsplit("error: ").next().unwrap_or(&all).trim();
        let reason = format!("the regular expression {} is not valid: {reason}", quote(text));
        Fault::new(pattern, reason, "correct it, or write a glob such as layers.*.mlp")
    })
}

/// One segment of a glob.
fn segment(part: &str) -> Result<&str, Fault<'_>> {
    if part.is_empty() {
        return Err(Fault::new(
            part,
            "a segment of the name is empty",
            "put one dot between segments, none at the ends",
        ));
    }
    if let Some((at, c)) = part.char_indices().find(|(_, c)| !glob_character(*c)) {
        let help = match c {
            '=' => "a class is written class=NAME; options follow '@'",
            ',' | ' ' | '\t' | '\n' => "separate clauses with ';'",
            ':' | '@' | '|' | ';' => "kinds, options and the edit have keys of their own",
            '[' | ']' => {
                "an index is a segment of its own, as in layers.0; a regular expression stands in slashes, /.../"
            }
            _ => "names have letters, digits, '_', '-' and '*'; a regular expression stands in slashes, /.../",
        };
        return Err(Fault::new(
            &part[at..],
            format!("{} cannot be in a glob", quote(c.encode_utf8(&mut [0; 4]))),
            help,
        ));
    }
    if part.contains("**") && part != "**" {
        return Err(Fault::new(
            part,
            format!("'**' is only a part of {}", quote(part)),
            "let ** stand alone between dots, or write *",
        ));
    }
    Ok(part)
}

/// Kinds by name, each once, in the order written.
pub(super) fn kinds<'a>(names: impl Iterator<Item = &'a str>) -> Result<Vec<Kind>, Fault<'a>> {
    let mut kinds = Vec::new();
    for name in names.map(str::trim) {
        let kind = Kind::from_name(name).ok_or_else(|| {
            let known = Kind::ALL.map(Kind::name);
            let is_option = OPTIONS.iter().any(|(option, _)| cut(name, '=').0.trim() == *option);
            match name {
                "" => Fault::new(name, "a kind is missing", format!("kinds: {}", known.join(", "))),
                _ if is_option => Fault::unknown(name, "a kind", "kinds", &known).with_help("options follow '@'"),
                _ => Fault::unknown(name, "a kind", "kinds", &known),
            }
        })?;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::DType;
    use crate::hooks::{Edit, ShardHint};
    use crate::tap_abi::LeafEdit;

    fn one(text: &str) -> Hook {
        let mut hooks = parse_clauses(text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(hooks.len(), 1, "{text}");
        hooks.remove(0)
    }

    fn refused(text: &str) -> String {
        parse_clauses(text).expect_err(text).to_string()
    }

    #[test]
    fn the_examples_of_the_contract_are_understood() {
        let hook = one("layers.*.mlp");
        assert_eq!(hook.selector.to_string(), "layers.*.mlp");
        assert_eq!(hook.kinds, [Kind::Forward]);

        let hook = one("layers.*.mlp:forward,backward@every=10");
        assert_eq!(hook.kinds, [Kind::Forward, Kind::Backward]);
        assert_eq!(hook.options.every, Some(10));

        let hook = one("lm_head:forward_pre@steps=100..200,dtype=float32");
        assert_eq!(hook.options.steps, Some((100, 200)));
        assert_eq!(hook.options.dtype, Some(DType::Float32));

        let hook = one(r"/^transformer\.h\.\d+\.attn$/");
        assert!(hook.selector.matches("transformer.h.11.attn", "", ""));
        assert!(!hook.selector.matches("transformer.h.11.attn.c_proj", "", ""));

        let hook = one("class=LlamaMLP:forward");
        assert!(hook.selector.matches("any", "LlamaMLP", "transformers.LlamaMLP"));

        let hook = one("layers.3.mlp.0.weight:param,grad@every=50");
        assert_eq!(hook.kinds, [Kind::Param, Kind::Grad]);

        assert_eq!(
            one("layers.7.mlp:forward|scale(0.5)").edit,
            Some(Edit::BuiltIn(LeafEdit { factor: 0.5, zero: false }))
        );
        let python = Edit::Python { file: "edits.py".into(), function: "double".into() };
        assert_eq!(one("layers.7.mlp|edits.py:double").edit, Some(python));
    }

    #[test]
    fn commas_in_brackets_do_not_separate_options() {
        let hook = one("model.layers.*@slice=[:, -1],mode=eval");
        assert_eq!(hook.options.slice.map(|slice| slice.to_string()).as_deref(), Some("[:,-1]"));
        assert_eq!(hook.options.mode, Some(crate::hooks::Mode::Eval));
        let hook = one("a:backward@path=in[0],slice=[...,::2]|zero");
        assert!(hook.edit.is_some() && hook.options.path.is_some() && hook.options.slice.is_some());
        for (text, reason) in [
            ("a@slice=:,-1", "column 9 ('a@slice=:,-1'): ':' is not in brackets; write it like slice=[:,-1]"),
            ("a@slice=[:,x],every=2", "column 12 ('a@slice=[:,x],every=2'): 'x' is no index"),
            ("a@slice=[0,every=2", "'[0,every=2' is not in brackets"),
            ("a@slice=", "option 'slice' has no value; write it like slice=[:,-1]"),
            ("a@slice=[0@1]", "is not a value of option 'slice'"),
            ("a@slice=[0],slice=[1]", "option 'slice' is given twice"),
        ] {
            let message = refused(text);
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn marks_within_values_do_not_separate_parts() {
        let hook = one("a.b:backward@shard=-1@tp,path=in[0]|scale(-2)");
        assert_eq!(hook.options.shard, Some(ShardHint { dim: -1, axis: "tp".into() }));
        assert_eq!(hook.options.path.as_deref(), Some("in[0]"));
        assert_eq!(hook.edit, Some(Edit::BuiltIn(LeafEdit { factor: -2.0, zero: false })));

        let hooks = parse_clauses(r"/a[;:@|,]\/b/:grad; c").unwrap();
        assert_eq!(hooks.len(), 2);
        assert_eq!(hooks[0].selector.to_string(), r"/a[;:@|,]\/b/");
        assert!(hooks[0].selector.matches("a|/b", "", ""));
        assert_eq!(hooks[0].kinds, [Kind::Grad]);
    }

    #[test]
    fn spans_and_texts_are_those_of_the_clauses() {
        let text = " ; a.b ;; /c;d/ : forward @ every = 2 ;";
        let hooks = parse_clauses(text).unwrap();
        let texts: Vec<_> = hooks.iter().map(|hook| &text[hook.span.clone()]).collect();
        assert_eq!(texts, ["a.b", "/c;d/ : forward @ every = 2"]);
        assert!(hooks.iter().zip(texts).all(|(hook, text)| hook.text == text));
        assert_eq!(hooks[1].options.every, Some(2));
    }

    #[test]
    fn repeated_kinds_count_once_and_repeated_options_are_refused() {
        assert_eq!(one("a:grad,param,grad").kinds, [Kind::Grad, Kind::Param]);
        assert!(
            refused("a@every=1,every=2").contains("column 11 ('a@every=1,every=2'): option 'every' is given twice")
        );
    }

    #[test]
    fn a_refusal_names_place_reason_and_nearest_word() {
        assert_eq!(
            refused("a; layers.*.mlp:foward"),
            "FLEXMODEL_HOOKS clause 2, column 17 ('layers.*.mlp:foward'): 'foward' is not a kind; did you mean \
             'forward'? (kinds: forward, forward_pre, backward, backward_pre, param, grad, grad_unclipped)"
        );
        for (text, reason) in [
            ("a@evry=2", "column 3 ('a@evry=2'): 'evry' is not an option; did you mean 'every'?"),
            ("a@forward", "'forward' is a kind; kinds follow ':'"),
            ("a:every=3", "options follow '@'"),
            ("a@every", "option 'every' has no value; write it like every=10"),
            ("a@every=", "option 'every' has no value"),
            ("a@", "an option is missing"),
            ("a:", "a kind is missing"),
            ("a:forward,", "a kind is missing"),
            ("a|", "an edit is missing"),
            (":forward", "there is no selector"),
            ("a@every=10:forward", "kinds stand before '@'"),
            ("a..b", "column 3 ('a..b'): a segment of the name is empty"),
            ("a.", "a segment of the name is empty"),
            ("a.**b", "'**' is only a part of '**b'"),
            ("a.(b|c)", "column 3 ('a.(b|c)'): '(' cannot be in a glob"),
            ("clas=X", "a class is written class=NAME"),
            ("a,b:grad", "separate clauses with ';'"),
            ("class=", "the class has no name"),
            ("class=Llama*", "'*' cannot be in a class name"),
            ("/a", "the regular expression has no closing slash"),
            ("//", "the regular expression is empty"),
            ("/etc/hooks.yaml", "'hooks.yaml' follows the regular expression"),
            ("/(a/", "the regular expression '/(a/' is not valid: unclosed group;"),
            ("/(?=a)/", "look-around, including look-ahead and look-behind, is not supported"),
            ("a:grad|zero", "kind 'grad' cannot be edited"),
            ("a|sclae(2)", "did you mean 'scale(x)'?"),
        ] {
            let message = refused(text);
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn a_text_without_clauses_is_refused() {
        for text in ["", "  ", " ; ;"] {
            assert!(refused(text).starts_with("FLEXMODEL_HOOKS: the text is empty; write a clause"));
        }
    }

    #[test]
    fn a_clause_is_never_the_path_of_a_file() {
        for text in [
            "hooks.toml",
            " a/hooks.toml ",
            "layers.0; hooks.toml",
            "./hooks.toml;",
            "/runs/hooks.toml",
            "class=x.toml",
        ] {
            let said = refused(text);
            assert!(said.contains("file"), "{said}");
        }
        for path in ["runs/x", "./hooks", "../hooks", "~/hooks", "/etc/passwd"] {
            refused(path);
        }
        // A leaf may be called so.
        assert_eq!(one("layers.0@path=out.toml").options.path.as_deref(), Some("out.toml"));
    }

    #[test]
    fn a_toml_file_that_is_not_there_is_named() {
        let message = parse(" missing/hooks.toml ").unwrap_err().to_string();
        assert!(message.starts_with("missing/hooks.toml: the hooks file cannot be read: "), "{message}");
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in any::<String>()) {
            let _ = parse_clauses(&text);
        }

        #[test]
        fn text_near_the_grammar_never_panics_and_errors_point_into_it(
            text in r"([a*./:@|;,=\\\[\]()+-ä ]|class|every|steps|shard|0\.\.|forward|scale|\.py){0,12}"
        ) {
            if let Err(HookError { position: Position::Clause { offset, column, .. }, .. }) = parse_clauses(&text) {
                prop_assert_eq!(text[..offset].chars().count() + 1, column);
            }
        }

        #[test]
        fn a_clause_is_understood_again_from_its_own_text(
            text in r"[ ]?(([a-z*]|\*\*)(\.[a-z0-9*]){0,3}|/a[.;|@:]/|class=[A-Z]{1,3})(:grad|:forward,backward)?(@every=[1-9]|@steps=3\.\.,shard=0@ep)?"
        ) {
            let hook = one(&text);
            let again = one(&hook.text);
            prop_assert_eq!(hook.selector.to_string(), again.selector.to_string());
            prop_assert_eq!(hook.kinds, again.kinds);
            prop_assert_eq!(hook.text, again.text);
            prop_assert_eq!(one(&hook.selector.to_string()).selector.to_string(), hook.selector.to_string());
        }
    }
}
