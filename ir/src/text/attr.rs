//! Attribute values as text: `{causal, heads=32, scaling=bands(factor=8.0, low=1.0)}`.

use serde_json::{Map, Value as Json};

use super::expr::{Function, RESERVED};
use super::lex::{is_word, quote};

/// A value as the parser reads it back.
///
/// Floats are the shortest that read back the same; a string that looks like a word stands without quotes; an object
/// of one entry that is an object itself is an enum variant with fields.
pub(super) fn value(json: &Json) -> String {
    match json {
        Json::Null => "none".into(),
        Json::Bool(b) => b.to_string(),
        Json::Number(n) => match (n.is_f64(), n.as_f64()) {
            (true, Some(x)) => format!("{x:?}"),
            (_, _) => n.to_string(),
        },
        Json::String(s) if is_word(s) && !RESERVED.contains(&s.as_str()) => s.clone(),
        Json::String(s) => quote(s),
        Json::Array(items) => format!("[{}]", items.iter().map(value).collect::<Vec<_>>().join(",")),
        Json::Object(map) => match map.iter().next() {
            Some((word, Json::Object(inner))) if map.len() == 1 && is_variant(word) => {
                format!("{word}({})", fields(inner))
            }
            Some(_) | None => format!("{{{}}}", fields(map)),
        },
    }
}

/// Whether `word(…)` reads back as a variant.
fn is_variant(word: &str) -> bool {
    is_word(word) && !RESERVED.contains(&word) && Function::of(word).is_none()
}

/// `key=value, flag`.
pub(super) fn fields(map: &Map<String, Json>) -> String {
    let one = |(key, v): (&String, &Json)| {
        let key = if is_word(key) { key.clone() } else { quote(key) };
        if *v == Json::Bool(true) { key } else { format!("{key}={}", value(v)) }
    };
    map.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::{parse_attributes, print_attributes};

    #[test]
    fn values_print_as_documented() {
        let map = json!({
            "causal": true, "eps": 1e-5, "theta": 10000.0, "form": "tanh", "sizes": [1, 2],
            "scaling": {"bands": {"factor": 8.0, "low": 1.0}}, "text": "a b", "word": "if", "big": 1e300,
        });
        let Json::Object(map) = map else { panic!("an object was written") };
        let want = "{causal, eps=1e-5, theta=10000.0, form=tanh, sizes=[1,2], scaling=bands(factor=8.0, low=1.0), \
                    text=\"a b\", word=\"if\", big=1e300}";
        assert_eq!(print_attributes(&map), want);
        assert_eq!(parse_attributes(want).unwrap(), map);
    }

    #[test]
    fn unusual_objects_read_back() {
        for json in [
            json!({"x": {}}),
            json!({"x": {"min": {"a": 1}}}),
            json!({"x": {"a": {}, "b": [false, -1, "i", "{i}"]}}),
            json!({"a key": {"another one": u64::MAX, "c": i64::MIN}}),
        ] {
            let Json::Object(map) = json else { panic!("an object was written") };
            assert_eq!(parse_attributes(&print_attributes(&map)).unwrap(), map);
        }
    }
}
