//! The hook grammar in both of its forms; what a hook says of itself, it reads again.
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::hooks::{Hook, parse_clauses, parse_toml};

/// All but its place in the text.
fn meaning(h: &Hook) -> String {
    format!("{:?} {:?} {:?} {:?}", h.selector, h.kinds, h.options, h.edit)
}

fuzz_target!(|text: &str| {
    for hook in parse_clauses(text).unwrap_or_default() {
        let again = parse_clauses(&hook.text).expect("a hook's own text is a hook");
        assert_eq!(again.iter().map(meaning).collect::<Vec<_>>(), [meaning(&hook)]);
        let _ = (hook.selector.matches("layers.0.mlp", "Mlp", "models.Mlp"), hook.unsupported());
        let _ = (hook.wants_step(7, 7), hook.wants_pass(1, true));
    }
    let _ = parse_toml(text, "hooks.toml").map_err(|e| e.to_string());
});
