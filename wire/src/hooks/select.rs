//! Which names a selector means, and which ones its writer may have meant.
//!
//! Matching runs inside the job: it neither allocates nor recurses for globs, and its cost is bounded by the product
//! of the lengths.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::error::word_cost;
use super::{ROOT, Selector};

/// Distinct patterns that [`nearest`] ranks by likeness; more than any model has once numbers are collapsed.
const RANKED: usize = 10_000;
/// Names and selectors with more segments than this are not compared by likeness.
const DEEPEST: usize = 32;
/// What a segment costs that the selector lacks: before its first one, or after it.
const LACKS_PREFIX: usize = 1;
const LACKS: usize = 3;
/// What a segment of the selector costs that the name lacks.
const SURPLUS: usize = 6;

impl Selector {
    /// Whether this selector means the module `name` of class `class`, whose full dotted name is `qualified_class`.
    ///
    /// The root module's name is empty: `(root)`, `**`, its class and regular expressions can mean it.
    pub fn matches(&self, name: &str, class: &str, qualified_class: &str) -> bool {
        match self {
            Selector::Glob(pattern) => glob(pattern, segments(name)),
            Selector::Regex(regex) => regex.is_match(name),
            Selector::Class(wanted) => wanted == class || wanted == qualified_class,
        }
    }
}

/// The form in a clause.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Glob(pattern) if pattern.is_empty() => f.write_str(ROOT),
            Selector::Glob(pattern) => f.write_str(&pattern.join(".")),
            Selector::Regex(regex) => write!(f, "/{regex}/"),
            Selector::Class(name) => write!(f, "class={name}"),
        }
    }
}

/// Whether a glob's segment may hold `c`.
pub(super) fn glob_character(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '*')
}

/// Where the regular expression ends that `text` begins with: after the first slash that no backslash escapes.
pub(super) fn regex_end(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '/' if !escaped => return Some(at + 1),
            _ => escaped = c == '\\' && !escaped,
        }
    }
    None
}

/// The segments of a dotted name; the empty name has none.
fn segments(name: &str) -> std::str::Split<'_, char> {
    let mut segments = name.split('.');
    if name.is_empty() {
        segments.next();
    }
    segments
}

fn glob<'a>(pattern: &[impl AsRef<str>], name: impl Iterator<Item = &'a str> + Clone) -> bool {
    wildcard(pattern, name, |part| part.as_ref() == "**", |part, segment| glob_segment(part.as_ref(), segment))
}

fn glob_segment(pattern: &str, segment: &str) -> bool {
    wildcard(pattern.as_bytes(), segment.bytes(), |byte| *byte == b'*', |byte, other| byte == other)
}

/// Matches all of `name` against `pattern`, where a part that is `many` stands for any number of items.
///
/// On a mismatch only the last such part takes one item more: what an earlier one could take, a later one can too.
/// Hence no recursion, and at most length times length steps.
fn wildcard<P, I: Iterator + Clone>(
    pattern: &[P],
    mut name: I,
    many: impl Fn(&P) -> bool,
    same: impl Fn(&P, &I::Item) -> bool,
) -> bool {
    let mut rest = pattern.iter();
    let mut retry = None;
    loop {
        match (rest.next(), name.clone().next()) {
            (Some(part), _) if many(part) => retry = Some((rest.clone(), name.clone())),
            (Some(part), Some(item)) if same(part, &item) => _ = name.next(),
            (None, None) => return true,
            (_, None) => return false,
            (_, Some(_)) => match &mut retry {
                Some((after, taken)) => {
                    taken.next();
                    (rest, name) = (after.clone(), taken.clone());
                }
                None => return false,
            },
        }
    }
}

/// What to offer when `selector` matched none of `names` (pairs of name and class), best first, at most `count`.
///
/// For `class=` these are class names, otherwise patterns that match: numbers are collapsed to `*`, so that
/// sixty layers are one suggestion. A name that lacks only a prefix (`model.`, often) comes first.
pub fn nearest<'a>(selector: &Selector, names: impl Iterator<Item = (&'a str, &'a str)>, count: usize) -> Vec<String> {
    let mut ranked = match selector {
        Selector::Class(wanted) => rank_classes(wanted, names),
        Selector::Glob(pattern) => rank_names(pattern, names),
        Selector::Regex(regex) => rank_names(&rough_glob(regex.as_str()), names),
    };
    ranked.sort();
    ranked.into_iter().map(|(_, suggestion)| suggestion).take(count).collect()
}

/// Suggestions under their ranks: the smaller, the better.
type Ranked = Vec<((bool, usize, usize), String)>;

fn rank_classes<'a>(wanted: &str, names: impl Iterator<Item = (&'a str, &'a str)>) -> Ranked {
    let wanted = wanted.rsplit('.').next().unwrap_or(wanted);
    let classes: HashSet<&str> = names.map(|(_, class)| class).filter(|class| !class.is_empty()).collect();
    let rank = |class: &str| (true, word_cost(wanted, class), class.len());
    classes.into_iter().take(RANKED).map(|class| (rank(class), class.to_string())).collect()
}

fn rank_names<'a>(pattern: &[String], names: impl Iterator<Item = (&'a str, &'a str)>) -> Ranked {
    let mut ranked = Ranked::new();
    let mut seen = HashSet::new();
    let mut likeness = Likeness { pattern, costs: HashMap::new() };
    for (name, class) in names {
        let parts: Vec<&str> = segments(name).take(DEEPEST + 1).collect();
        if parts.is_empty() || parts.len() > DEEPEST || pattern.len() > DEEPEST {
            continue;
        }
        // A lone word may be a class. Written in other case too: people copy it from memory.
        if let [word] = pattern
            && word.eq_ignore_ascii_case(class)
            && seen.insert(format!("class={class}"))
        {
            ranked.push(((false, 0, 0), format!("class={class}")));
        }
        let suffix = (1..parts.len()).find(|&at| glob(pattern, parts[at..].iter().copied()));
        if let Some(at) = suffix {
            let suggestion = format!("{}.{}", collapsed(&parts[..at]), pattern.join("."));
            if seen.insert(suggestion.clone()) {
                ranked.push(((false, at, suggestion.len()), suggestion));
            }
        } else if seen.len() < RANKED {
            let suggestion = collapsed(&parts);
            if seen.insert(suggestion.clone()) {
                ranked.push(((true, likeness.cost(&parts), suggestion.len()), suggestion));
            }
        }
    }
    ranked
}

/// A pattern for names like this one: `*` for numbers, and for what a glob cannot spell.
fn collapsed(parts: &[&str]) -> String {
    let wild = |part: &str| part.bytes().all(|b| b.is_ascii_digit()) || !part.chars().all(glob_character);
    parts.iter().map(|part| if wild(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

/// How unlike a pattern names are: an edit distance over segments.
struct Likeness<'p, 'n> {
    pattern: &'p [String],
    /// For each segment seen, its cost against every segment of the pattern. Models repeat segments.
    costs: HashMap<&'n str, Vec<usize>>,
}

impl<'n> Likeness<'_, 'n> {
    fn cost(&mut self, name: &[&'n str]) -> usize {
        // Before the pattern's first segment everything is prefix.
        let mut above: Vec<usize> = (0..=name.len()).map(|count| count * LACKS_PREFIX).collect();
        for (i, part) in self.pattern.iter().enumerate() {
            let many = part == "**";
            let (surplus, lacks) = if many { (0, 0) } else { (SURPLUS, LACKS) };
            let mut row = vec![above[0] + surplus];
            for (j, segment) in name.iter().enumerate() {
                let costs = self
                    .costs
                    .entry(segment)
                    .or_insert_with(|| self.pattern.iter().map(|part| segment_cost(part, segment)).collect());
                row.push((above[j] + costs[i]).min(above[j + 1] + surplus).min(row[j] + lacks));
            }
            above = row;
        }
        above.last().copied().unwrap_or_default()
    }
}

/// Never more than leaving both segments out.
fn segment_cost(pattern: &str, segment: &str) -> usize {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if glob_segment(pattern, segment) || number(pattern) && number(segment) {
        return 0;
    }
    word_cost(&pattern.replace('*', ""), segment).min(SURPLUS + LACKS)
}

/// The glob that a regular expression resembles, to compare names with.
///
/// Escaped dots part segments; letters stay; `.*` becomes `**` and everything else that is special becomes `*`.
fn rough_glob(regex: &str) -> Vec<String> {
    let mut glob = vec![String::new()];
    let mut chars = regex.chars().peekable();
    while let Some(c) = chars.next() {
        let literal = match c {
            '^' | '$' => continue,
            '\\' => match chars.next() {
                Some('.') | None => '.',
                Some('b' | 'B' | 'A' | 'z') => continue,
                Some(c) if c.is_alphanumeric() => '*',
                Some(c) => c,
            },
            '.' if matches!(chars.peek(), Some('*' | '+')) => {
                chars.next();
                glob.push("**".into());
                '.'
            }
            '[' | '{' => {
                let close = if c == '[' { ']' } else { '}' };
                chars.by_ref().find(|c| *c == close);
                '*'
            }
            c => c,
        };
        match glob.last_mut() {
            Some(last) if literal != '.' => {
                let kept = if glob_character(literal) { literal } else { '*' };
                if kept != '*' || !last.ends_with('*') {
                    last.push(kept);
                }
            }
            _ => glob.push(String::new()),
        }
    }
    glob.retain(|segment| !segment.is_empty());
    glob
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parse::selector as read;
    use super::*;

    fn selector(text: &str) -> Selector {
        read(text).unwrap_or_else(|fault| panic!("{fault:?}"))
    }

    fn matches(text: &str, name: &str) -> bool {
        selector(text).matches(name, "Class", "package.Class")
    }

    #[test]
    fn a_star_is_one_segment_or_a_part_of_one() {
        assert!(matches("layers.*.mlp", "layers.0.mlp"));
        assert!(!matches("layers.*.mlp", "layers.mlp"));
        assert!(!matches("layers.*.mlp", "layers.0.1.mlp"));
        assert!(!matches("layers.*.mlp", "model.layers.0.mlp"));
        assert!(matches("h*.a*n", "h12.attn"));
        assert!(matches("h*", "h"));
        assert!(!matches("h*", "h.1"));
        assert!(matches("größe.*", "größe.é"));
    }

    #[test]
    fn two_stars_are_any_number_of_segments() {
        for name in ["mlp", "a.mlp", "a.b.c.mlp"] {
            assert!(matches("**.mlp", name));
        }
        assert!(matches("layers.**", "layers"));
        assert!(matches("a.**.b.**.c", "a.b.b.x.c.c"));
        assert!(!matches("a.**.b.**.c", "a.c.x.c"));
        assert!(!matches("**.mlp", "a.mlp.b"));
    }

    #[test]
    fn the_root_has_no_segment() {
        assert!(matches("**", ""));
        assert!(!matches("*", ""));
        assert!(matches("(root)", ""));
        assert!(!matches("(root)", "a"));
        assert_eq!(selector("(root)").to_string(), "(root)");
        assert!(matches("/^$/", ""));
        assert!(matches("class=Class", ""));
    }

    #[test]
    fn classes_match_by_either_name() {
        assert!(matches("class=package.Class", "a"));
        assert!(!matches("class=other.Class", "a"));
        assert!(!matches("class=Clas", "a"));
    }

    #[test]
    fn hostile_patterns_end() {
        let pattern = format!("{}b", "*a".repeat(400));
        assert!(!matches(&pattern, &"a".repeat(5_000)));
        let pattern = format!("{}b", "**.a.".repeat(400));
        assert!(!matches(&pattern, &vec!["a"; 5_000].join(".")));
    }

    fn llama() -> Vec<(String, &'static str)> {
        let mut names = vec![
            (String::new(), "LlamaForCausalLM"),
            ("lm_head".into(), "Linear"),
            ("model".into(), "LlamaModel"),
            ("model.embed_tokens".into(), "Embedding"),
            ("model.layers".into(), "ModuleList"),
        ];
        for i in 0..32 {
            names.push((format!("model.layers.{i}"), "LlamaDecoderLayer"));
            for (name, class) in [("mlp", "LlamaMLP"), ("mlp.up_proj", "Linear"), ("self_attn", "LlamaAttention")] {
                names.push((format!("model.layers.{i}.{name}"), class));
            }
        }
        names
    }

    fn suggest(text: &str, count: usize) -> Vec<String> {
        let names = llama();
        nearest(&selector(text), names.iter().map(|(name, class)| (name.as_str(), *class)), count)
    }

    #[test]
    fn a_missing_prefix_is_suggested_first() {
        assert_eq!(suggest("layers.*.mlp", 1), ["model.layers.*.mlp"]);
        assert_eq!(suggest("layers.3.mlp", 1), ["model.layers.3.mlp"]);
        assert_eq!(suggest("mlp", 2), ["model.layers.*.mlp", "model"]);
        assert_eq!(suggest(r"/^layers\.\d+\.mlp$/", 1), ["model.layers.*.mlp"]);
    }

    #[test]
    fn a_misspelt_segment_is_corrected() {
        assert_eq!(suggest("layer.*.mlp", 1), ["model.layers.*.mlp"]);
        assert_eq!(suggest("model.layers.99.mlp", 1), ["model.layers.*.mlp"]);
        assert_eq!(suggest("model.layers.*.attn", 1), ["model.layers.*.self_attn"]);
        assert_eq!(suggest("**.upproj", 1), ["model.layers.*.mlp.up_proj"]);
        assert_eq!(suggest("lmhead", 1), ["lm_head"]);
        assert_eq!(suggest(r"/model\.layers\.[0-9]+\.attn$/", 1), ["model.layers.*.self_attn"]);
        assert_eq!(suggest("/embd.*tokens2/", 1).len(), 1);
    }

    #[test]
    fn classes_are_suggested_for_classes() {
        assert_eq!(suggest("class=LLamaMlp", 1), ["LlamaMLP"]);
        assert_eq!(suggest("class=transformers.models.LlamaAttn", 1), ["LlamaAttention"]);
        assert_eq!(suggest("llamamlp", 1), ["class=LlamaMLP"]);
    }

    #[test]
    fn suggestions_of_names_match_a_module() {
        for text in ["layers.3.mlp", "layer.*.mlp", "a.b.c", "**.x", "/a.b|c/"] {
            for suggestion in suggest(text, 5) {
                let wanted = selector(&suggestion);
                assert!(llama().iter().any(|(name, _)| wanted.matches(name, "", "")), "{suggestion}");
            }
        }
    }

    #[test]
    fn suggestions_stay_bounded_for_large_models() {
        let names: Vec<String> = (0..100_000).map(|i| format!("experts_{i}.block_{}.w{i}", i % 977)).collect();
        let pairs = || names.iter().map(|name| (name.as_str(), "Linear"));
        assert_eq!(nearest(&selector("expert_5.block_5.w5"), pairs(), 3).len(), 3);
        assert_eq!(nearest(&selector("w99999"), pairs(), 1), ["experts_99999.block_345.w99999"]);
    }

    /// The definition of the glob, without care for its cost.
    fn plain(pattern: &[&str], name: &[&str]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, _) => name.is_empty(),
            (Some((&"**", rest)), None) => plain(rest, name),
            (Some((&"**", rest)), Some((_, after))) => plain(rest, name) || plain(pattern, after),
            (Some((part, rest)), Some((segment, after))) => {
                let (part, segment): (Vec<_>, Vec<_>) = (part.split("").collect(), segment.split("").collect());
                let part: Vec<_> = part.into_iter().map(|c| if c == "*" { "**" } else { c }).collect();
                (part == segment || part.contains(&"**") && plain(&part, &segment)) && plain(rest, after)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_match_as_defined(pattern in r"(a|b|\*|\*\*|a\*|\*b|b\*a)(\.(a|b|\*|\*\*|\*a)){0,5}", name in "[ab]{1,3}(\\.[ab]{1,2}){0,5}") {
            let parts: Vec<_> = pattern.split('.').collect();
            let segments: Vec<_> = name.split('.').collect();
            prop_assert_eq!(matches(&pattern, &name), plain(&parts, &segments));
        }

        #[test]
        fn hostile_names_never_panic(text in any::<String>(), name in any::<String>(), class in any::<String>()) {
            let named = [(name.as_str(), class.as_str())];
            let regex = regex::Regex::new(&text).map_or(Selector::Class(text.clone()), Selector::Regex);
            let glob = Selector::Glob(text.split('.').map(str::to_string).collect());
            for selector in [regex, glob] {
                selector.matches(&name, &class, &class);
                nearest(&selector, named.into_iter(), 3);
            }
        }
    }
}
