//! Secrets on a command line: a run that is given away must not give them away too.
//!
//! The rule: the value of what is named by words of which the last is one of [`SECRET`] is shown as [`HIDDEN`]. Words of
//! a name are told apart by `-`, `_`, `.`, `:`, `/` and by case (`apiKey`, `APIKey`). A value stands behind `=`
//! (`--api-key=V`, `HF_TOKEN=V`), or is the argument behind a flag, unless that is a flag itself. Arguments that are
//! command lines of their own (`bash -c '...'`) are gone through word by word.

/// Last words of the names of secrets.
const SECRET: [&str; 5] = ["key", "token", "secret", "password", "apikey"];
/// What stands for a value.
const HIDDEN: &str = "***";

/// The command line with the values of secrets hidden. The job is started with the real one.
pub fn hidden(command: &[String]) -> Vec<String> {
    hide(command.iter().map(String::as_str))
}

fn hide<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut behind_a_flag = false;
    words
        .map(|word| {
            let out = if behind_a_flag && !word.starts_with('-') { HIDDEN.to_owned() } else { in_word(word) };
            behind_a_flag = word.starts_with('-') && !word.contains(char::is_whitespace) && names_a_secret(word);
            out
        })
        .collect()
}

/// Hides what stands in one word: `NAME=VALUE`, or a command line of its own.
fn in_word(word: &str) -> String {
    let named = |&(at, _): &(usize, &str)| {
        word.get(..at).is_some_and(|before| {
            let name = before.rsplit(|c: char| !(c.is_alphanumeric() || "-_.:/".contains(c))).next();
            name.is_some_and(names_a_secret)
        })
    };
    let space = word.find(char::is_whitespace);
    match word.match_indices('=').find(named) {
        // What follows a space may be of the value as well.
        Some((at, _)) if at + 1 < word.len() && space.is_none_or(|space| at < space) => {
            format!("{}={HIDDEN}", &word[..at])
        }
        _ if space.is_some() => in_line(word),
        _ => word.to_owned(),
    }
}

/// Goes through a shell's line, whose words may be quoted.
fn in_line(line: &str) -> String {
    let (mut gaps, mut words) = split(line, true);
    if words == [line] {
        // A quote that is none: without them every word is shorter, so this ends.
        (gaps, words) = split(line, false);
    }
    let quotes: Vec<&str> = words.iter().map(|word| quote_of(word)).collect();
    let bare = words.iter().zip(&quotes).map(|(word, quote)| &word[quote.len()..word.len() - quote.len()]);
    let mut out = String::new();
    for ((word, quote), gap) in hide(bare).iter().zip(quotes).zip(&gaps) {
        out += &format!("{gap}{quote}{word}{quote}");
    }
    out + gaps.last().copied().unwrap_or_default()
}

/// The words of a line, and the gaps before each of them and behind the last.
fn split(line: &str, quotes: bool) -> (Vec<&str>, Vec<&str>) {
    let (mut gaps, mut words) = (Vec::new(), Vec::new());
    let mut rest = line;
    loop {
        let (gap, after) = rest.split_at(rest.find(|c| !is_gap(c)).unwrap_or(rest.len()));
        gaps.push(gap);
        if after.is_empty() {
            return (gaps, words);
        }
        let mut quote = None;
        let end = after.find(|c: char| {
            match quote {
                Some(open) if c == open => quote = None,
                None if quotes && (c == '"' || c == '\'') => quote = Some(c),
                _ => {}
            }
            quote.is_none() && is_gap(c)
        });
        let (word, behind) = after.split_at(end.unwrap_or(after.len()));
        words.push(word);
        rest = behind;
    }
}

fn is_gap(c: char) -> bool {
    c.is_whitespace() || ";|&()".contains(c)
}

/// The quote that a word is in as a whole; empty for none.
fn quote_of(word: &str) -> &str {
    match word.chars().next() {
        Some(quote @ ('"' | '\'')) if word.len() > 1 && word.ends_with(quote) => &word[..1],
        _ => "",
    }
}

/// Whether the last word of a name is one of a secret's.
fn names_a_secret(name: &str) -> bool {
    let last = name.rsplit(['-', '_', '.', ':', '/']).next().unwrap_or_default();
    let mut word = last;
    let letters: Vec<(usize, char)> = last.char_indices().collect();
    for (n, &(at, c)) in letters.iter().enumerate().skip(1) {
        let follows_lower = !letters[n - 1].1.is_uppercase();
        let lower_follows = letters.get(n + 1).is_some_and(|(_, next)| next.is_lowercase());
        if c.is_uppercase() && (follows_lower || lower_follows) {
            word = &last[at..];
        }
    }
    SECRET.iter().any(|secret| word.eq_ignore_ascii_case(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_secrets_are_hidden_and_nothing_else() {
        for (given, shown) in [
            ("--api-key S", "--api-key ***"),
            ("--api-key=S", "--api-key=***"),
            ("--api_key S t", "--api_key *** t"),
            ("--hf_token S", "--hf_token ***"),
            ("-token S", "-token ***"),
            ("--TOKEN S", "--TOKEN ***"),
            ("--apiKey S", "--apiKey ***"),
            ("--apikey S", "--apikey ***"),
            ("--APIKey=S", "--APIKey=***"),
            ("--myHFToken S", "--myHFToken ***"),
            ("--client-secret S", "--client-secret ***"),
            ("--db.password S", "--db.password ***"),
            ("--wandb.api_key S", "--wandb.api_key ***"),
            ("++wandb.api_key=S", "++wandb.api_key=***"),
            ("trainer/logger.token=S", "trainer/logger.token=***"),
            ("-p:secret=S", "-p:secret=***"),
            ("HF_TOKEN=S python train.py", "HF_TOKEN=*** python train.py"),
            ("--env=HF_TOKEN=S", "--env=HF_TOKEN=***"),
            ("-e HF_TOKEN=S", "-e HF_TOKEN=***"),
            ("https://h/?a=1&token=S", "https://h/?a=1&token=***"),
            ("--api-key=S=x==", "--api-key=***"),
            ("--lr 1 --key S --out x", "--lr 1 --key *** --out x"),
            // A flag without a value hides nothing else.
            ("--use-token --batch 3", "--use-token --batch 3"),
            ("--token", "--token"),
            ("--token= --x y", "--token= --x y"),
            ("--token - S", "--token - S"),
            // The word at the end is another.
            ("--tokenizer gpt2", "--tokenizer gpt2"),
            ("--num-key-value-heads 8", "--num-key-value-heads 8"),
            ("--keyboard x", "--keyboard x"),
            ("--monkey x", "--monkey x"),
            ("--max-tokens 5", "--max-tokens 5"),
            ("--key-frames 5", "--key-frames 5"),
            ("--token-dim=5", "--token-dim=5"),
            ("--tokenType x", "--tokenType x"),
            ("--passwords x", "--passwords x"),
            // No flag: a file.
            ("cat token next", "cat token next"),
            ("python key S", "python key S"),
        ] {
            let given: Vec<String> = given.split(' ').map(str::to_owned).collect();
            assert_eq!(hidden(&given).join(" "), shown);
            assert_eq!(hidden(&hidden(&given)), hidden(&given));
        }
    }

    #[test]
    fn a_flag_and_its_value_may_hold_anything() {
        let given = ["--password", "a b --x", "--note", "the secret is out", "é=ß", "=", "--", ""].map(str::to_owned);
        let shown = ["--password", "***", "--note", "the secret is out", "é=ß", "=", "--", ""];
        assert_eq!(hidden(&given), shown);
    }

    #[test]
    fn a_line_for_a_shell_is_a_command_line() {
        for (given, shown) in [
            ("python t.py --api-key S --lr 1", "python t.py --api-key *** --lr 1"),
            ("cd x;  HF_TOKEN=S exec python t.py;echo", "cd x;  HF_TOKEN=*** exec python t.py;echo"),
            // It may be one value.
            ("HF_TOKEN=S exec python t.py", "HF_TOKEN=***"),
            ("x --password 'a b' \"y z\"", "x --password '***' \"y z\""),
            ("sh -c \"t --token 'S S' u\" & wait", "sh -c \"t --token '***' u\" & wait"),
            ("export A='x y' KEY='S S'", "export A='x y' KEY=***"),
            ("it's --token S", "it's --token ***"),
            ("' --token S", "' --token ***"),
        ] {
            assert_eq!(hidden(&["bash".into(), "-c".into(), given.into()])[2], shown);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_command_line_has_as_many_words(words in proptest::collection::vec("[-a=' \"&;ékeyTOKEN_]{0,12}", 0..6)) {
            proptest::prop_assert_eq!(hidden(&words).len(), words.len());
        }
    }
}
