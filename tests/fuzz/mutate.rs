//! Changes of a JSON text that leave it one: values are replaced, doubled, dropped, and moved within it or from another.

use libfuzzer_sys::fuzzer_mutate;
use serde_json::{Value, json};

/// What numbers become; a little more and a little less of what they are as well.
#[rustfmt::skip]
const NUMBERS: [i128; 22] = [
    -1, 0, 1, 2, 3, 8, 9, 63, 64, 65, 255, 4096, 65536, 1 << 20, (1 << 20) + 64, (1 << 31) - 1, (1 << 32) - 1, 1 << 32,
    1 << 53, (1 << 63) - 1, 1 << 63, u64::MAX as i128,
];

/// What texts become: the words of the format, and what is in no honest run.
#[rustfmt::skip]
const TEXTS: [&str; 40] = [
    "", "a", "a.b", "part", "refused", "divergence", "dropped", "sealed", "forward", "forward_pre", "backward", "param",
    "grad", "out", "out[0]", "float32", "bfloat16", "float8_e8m0fnu", "bool", "complex64", "replicate", "partial",
    "unknown", "dp", "tp", "micro", "shard-00000", "shard-00001", "shard-4294967295", "../x", "/etc/hostname",
    "node-a/shard-00000", ".", "..", "/dev/zero", "/dev/stdin", "\u{1b}[2J\u{1b}]0;x\u{7}", "\0", "\u{202e}é\n", "NaN",
];

/// Mutates the text in `data[..size]`; the new size. For [`libfuzzer_sys::fuzz_mutator`].
pub fn mutate(data: &mut [u8], size: usize, max: usize, seed: u32) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed.into());
    let tree = serde_json::from_slice::<Value>(&data[..size]);
    let Ok(mut tree) = tree else { return fuzzer_mutate(data, size, max) };
    if rng.u8(..) < 8 {
        // A text that is none, now and then.
        return fuzzer_mutate(data, size, max);
    }
    for _ in 0..rng.u32(1..5) {
        let from = tree.clone();
        change(&mut tree, &from, &mut rng);
    }
    put(&tree, data, max).unwrap_or(size)
}

/// Puts something of the text `b` into the text `a`; the size of the result in `out`, 0 if there is none. For
/// [`libfuzzer_sys::fuzz_crossover`].
pub fn cross(a: &[u8], b: &[u8], out: &mut [u8], seed: u32) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed.into());
    let (Ok(mut a), Ok(b)) = (serde_json::from_slice::<Value>(a), serde_json::from_slice::<Value>(b)) else { return 0 };
    if let (Some(a), Some(b), true) = (a.as_object_mut(), b.as_object(), rng.bool()) {
        // A file.
        if let Some((name, entry)) = rng.choice(b.iter()) {
            a.insert(name.clone(), entry.clone());
        }
    } else {
        let nth = rng.usize(..size_of_tree(&a));
        if let Some(at) = node(&mut a, &mut nth.clone()) {
            *at = pick(&b, &mut rng);
        }
    }
    let max = out.len();
    put(&a, out, max).unwrap_or(0)
}

fn put(tree: &Value, data: &mut [u8], max: usize) -> Option<usize> {
    let text = tree.to_string();
    let fits = text.len() <= max;
    fits.then(|| data[..text.len()].copy_from_slice(text.as_bytes()))?;
    Some(text.len())
}

fn size_of_tree(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(size_of_tree).sum(),
        Value::Object(map) => map.values().map(size_of_tree).sum(),
        _ => 0,
    }
}

/// The `nth` value in the tree, itself the first.
fn node<'a>(value: &'a mut Value, nth: &mut usize) -> Option<&'a mut Value> {
    if *nth == 0 {
        return Some(value);
    }
    *nth -= 1;
    match value {
        Value::Array(values) => values.iter_mut().find_map(|v| node(v, nth)),
        Value::Object(map) => map.values_mut().find_map(|v| node(v, nth)),
        _ => None,
    }
}

/// Some value of a tree.
fn pick(tree: &Value, rng: &mut fastrand::Rng) -> Value {
    let mut nth = rng.usize(..size_of_tree(tree));
    node(&mut tree.clone(), &mut nth).cloned().unwrap_or_default()
}

/// Changes one value somewhere in the tree.
fn change(tree: &mut Value, from: &Value, rng: &mut fastrand::Rng) {
    let mut nth = rng.usize(..size_of_tree(tree));
    let Some(at) = node(tree, &mut nth) else { return };
    if rng.u8(..) < 24 {
        *at = match rng.u8(..8) {
            0 => Value::Null,
            1 => json!([]),
            2 => json!({}),
            3 => json!({"$long": 1 << rng.u32(..21)}),
            4 => json!({"$deep": 1 << rng.u32(..21)}),
            _ => pick(from, rng),
        };
        return;
    }
    match at {
        Value::Null | Value::Bool(_) => *at = if rng.bool() { rng.bool().into() } else { pick(from, rng) },
        Value::Number(n) => {
            let near = n.as_i64().unwrap_or_default().wrapping_add(rng.i64(-2..=2));
            *at = match rng.u8(..8) {
                0 => json!(1e308),
                1 => json!(0.5),
                2..4 => near.into(),
                _ => match *rng.choice(&NUMBERS).unwrap_or(&0) {
                    n if n < 0 => json!(n as i64),
                    n => json!(n as u64),
                },
            };
        }
        Value::String(text) if rng.u8(..4) == 0 => *text = text.chars().take(rng.usize(..8)).collect(),
        Value::String(text) => *text = (*rng.choice(&TEXTS).unwrap_or(&"")).to_owned(),
        Value::Array(values) if values.is_empty() => values.push(pick(from, rng)),
        Value::Array(values) => {
            let (i, j) = (rng.usize(..values.len()), rng.usize(..values.len()));
            match rng.u8(..6) {
                0 => _ = values.remove(i),
                1 => values.swap(i, j),
                2 => values.insert(j, pick(from, rng)),
                3 => values[i] = json!({"$times": 1 << rng.u32(..13), "of": values[i]}),
                _ => values.insert(j, values[i].clone()),
            }
        }
        Value::Object(map) => {
            let Some(name) = rng.choice(map.keys()).cloned() else { return };
            match rng.u8(..4) {
                0 => _ = map.remove(&name),
                1 => _ = map.insert(name, pick(from, rng)),
                2 => {
                    let entry = map.remove(&name).unwrap_or_default();
                    map.insert((*rng.choice(&TEXTS).unwrap_or(&"")).to_owned(), entry);
                }
                _ => _ = map.insert("link".into(), (*rng.choice(&TEXTS).unwrap_or(&"")).into()),
            }
        }
    }
}
